"""Data sets by name, their readers, and batches."""

from catode.train.data.augment import AUGMENTATIONS
from catode.train.data.batches import Batches
from catode.train.data.datasets import DATASETS, load
from catode.train.data.images import DataError, ImageData

__all__ = ["AUGMENTATIONS", "DATASETS", "Batches", "DataError", "ImageData", "load"]
