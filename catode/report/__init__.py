"""Finished runs read back: reports, pictures, comparisons.

`write` makes the report of a run's folder; `compare` holds runs against each other.
"""

from catode._lazy import lazy

__all__ = ["write"]
__getattr__, __dir__ = lazy(__name__, {"write": "catode.report.report"})
