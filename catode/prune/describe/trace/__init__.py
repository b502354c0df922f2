"""Description of any network by tracing one of its forward passes."""

from catode.prune.describe.trace.describing import describe
from catode.prune.describe.trace.description import Description, Refusal

__all__ = ["Description", "Refusal", "describe"]
