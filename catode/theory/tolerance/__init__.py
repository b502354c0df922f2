"""How small a keep probability must be for safe removal, and how often the iterates escape all the same."""

from catode.theory.tolerance.derivation import commit_alarm, derive, escape_probability
from catode.theory.tolerance.result import Tolerance, fixed

__all__ = ["Tolerance", "commit_alarm", "derive", "escape_probability", "fixed"]
