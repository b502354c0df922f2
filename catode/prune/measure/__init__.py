"""What is measured while the user's loop trains: captured steps, probes of the benefits, growth of the benefits."""
