"""A training run from settings to folder: preparation, the loop, checkpoints, signals, tables."""

from catode.train.loop.evaluation import Score, evaluate
from catode.train.loop.optimization import AMP, autocast, make_optimizer, make_pruner
from catode.train.loop.setup import Setup, build_model, prepare
from catode.train.loop.tables import METRIC_FIELDS, TABLES, CsvTable
from catode.train.loop.trainer import NotFinite, Trainer, run, train
from catode.train.settings.training import learning_rates

__all__ = [
    "AMP",
    "METRIC_FIELDS",
    "TABLES",
    "CsvTable",
    "NotFinite",
    "Score",
    "Setup",
    "Trainer",
    "autocast",
    "build_model",
    "evaluate",
    "learning_rates",
    "make_optimizer",
    "make_pruner",
    "prepare",
    "run",
    "train",
]
