"""From measurements to decisions: pooled evidence, limits, rules, outcomes, targets. Pure functions of arrays; no PyTorch."""
