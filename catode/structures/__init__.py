"""What can go, numbered, and what it costs. Needs numpy alone."""
