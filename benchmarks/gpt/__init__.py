"""A small GPT on text in its own training loop, traced and pruned to half its MACs, against its dense twins."""
