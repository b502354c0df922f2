"""What runs on a GPU: correctness checks, ratios of step times, and short trainings, within a budget of minutes."""
