"""Train a network and prune it while training: settings, data, architectures, training loop.

from catode.train import Config, run
"""

from catode._lazy import lazy

_HOMES = {
    "Block": "catode.structures.description",
    "Config": "catode.train.settings.config",
    "Counts": "catode.prune.describe.costs",
    "Pruner": "catode.prune.pruner",
    "Site": "catode.structures.description",
    "build": "catode.train.models.resnets",
    "count": "catode.prune.describe.costs",
    "describe": "catode.prune.describe.costs",
    "load": "catode.train.loop.checkpoint",
    "run": "catode.train.loop.trainer",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
__all__ = [*_HOMES]
