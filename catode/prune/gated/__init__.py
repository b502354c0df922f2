"""The network under the gates: gates, their draws, and physical removal."""
