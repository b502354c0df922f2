"""Processes, devices and what passes between them; times of what they do."""
