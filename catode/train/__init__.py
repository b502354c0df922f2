"""Train a network once and get a smaller one back: the pruner, the architectures, the trainer.

from catode.train import Pruner, load
"""

from catode.train.checkpoint import load
from catode.train.config import Config
from catode.train.loop import run
from catode.train.models import build
from catode.train.prune import Pruner
from catode.train.structure import Block, Counts, Site, count, describe

__all__ = ["Block", "Config", "Counts", "Pruner", "Site", "build", "count", "describe", "load", "run"]
