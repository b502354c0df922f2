"""Finished runs read back: reports, pictures, comparisons."""
