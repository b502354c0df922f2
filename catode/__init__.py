"""catode: prune residual networks by the ordinary differential equations of their gates.

The package root imports nothing heavy: what it offers is loaded when it is asked for. The mathematics lives in
`catode.theory` (numpy and scipy only), the pruner in `catode.prune` and the trainer in `catode.train` (PyTorch).
"""

from catode._lazy import lazy

__version__ = "0.1.0"

_HOMES = {
    "Pruner": "catode.prune.pruner",
    "describe": "catode.prune.describe.protocol",
    "load": "catode.train.loop.checkpoint",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
__all__ = ["Pruner", "describe", "load"]
