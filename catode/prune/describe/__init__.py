"""What may be removed from a model, and what it costs: protocol, counts, measured step times."""
