"""catode: train a neural network once and get back a smaller one, with a mathematical reason for every piece removed.

Importing the package loads neither PyTorch nor matplotlib; `Pruner`, `describe` and `load` are imported on first use.
"""

from catode import _moved
from catode._lazy import lazy

__version__ = "0.2.0"

_HOMES = {
    "Pruner": "catode.prune.pruner",
    "describe": "catode.prune.describe.trace",
    "load": "catode.train.loop.checkpoint",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
__all__ = ["__version__", *_HOMES]

_moved.install()
