"""Fault injection: every call of a run to the operating system fails once, and every file of a run is damaged many ways."""
