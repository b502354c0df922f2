"""Reports, pictures and comparisons of finished runs.

`write` writes the report of a run; `compare` compares runs.
"""

from catode._lazy import lazy

__all__ = ["write"]
__getattr__, __dir__ = lazy(__name__, {"write": "catode.report.report"})
