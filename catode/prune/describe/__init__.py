"""How a model says, or is found to say, what may be removed from it."""
