"""Removable structures: description, numbering, fates and complexity. Needs numpy alone."""
