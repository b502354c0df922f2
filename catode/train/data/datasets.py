"""The data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from catode.train.data import cifar, folder
from catode.train.data.augment import AUGMENTATIONS
from catode.train.data.batches import Batches
from catode.train.data.images import DataError, ImageData, assemble, resized

__all__ = ["AUGMENTATIONS", "DATASETS", "Batches", "DataError", "ImageData", "load"]

DATASETS = ("digits", "cifar10", "cifar100", "folder")
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_SHARE = 0.2


def load(
    dataset: str,
    data_dir: str | os.PathLike | None = None,
    *,
    validation_share: float = 0.0,
    split_seed: int = 0,
    image_size: int | None = None,
    augment: str = "none",
    array_bytes: int | None = None,
    download: bool = False,
) -> ImageData:
    """Read a data set, into memory unless it is a large `folder`.

    Args:
        dataset: `digits`, `cifar10`, `cifar100` or `folder`.
        data_dir: Folder with the data; for CIFAR the official folder or its parent. Not used for `digits`.
        validation_share: Share of the training images of every class that is held out for validation, in [0, 1/2]. A `folder`
            with both val/ and test/ has its validation images in val/, whatever the share; 0 for no validation images.
        split_seed: Seed of that choice. It is not the run's, so that accuracies of different runs are comparable; the test
            images never depend on it.
        image_size: Side to which the images are resized; of a `folder` the shorter side is, and the centre cropped to a square.
            Without it all images of a `folder` must share one size.
        augment: Augmentation of `Batches`; `resized-crop` needs the images of a `folder` at their original size.
        array_bytes: For `folder`: images that take more bytes than this when decoded stay on the disk; None for a quarter
            of the memory.
        download: For CIFAR: download the official archive if the data are missing.

    Returns:
        The images and labels of all splits with the training statistics.

    Raises:
        DataError: if the data are missing, malformed or inconsistent, or cannot be downloaded.
    """
    if dataset not in DATASETS:
        raise DataError(
            f"`dataset` must be one of {', '.join(DATASETS)}; got dataset={dataset!r}. Use one of these names."
        )
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise DataError(
            f"`image_size` must be an integer >= 1; got image_size={image_size!r}. Use the side in pixels, such as 64."
        )
    if dataset == "digits":
        return resized(_digits(validation_share, split_seed), image_size)
    if data_dir is None:
        raise DataError(
            f"`data_dir` must be given for dataset={dataset!r}; got data_dir=None. Pass the folder that holds the data."
        )
    try:
        root = Path(data_dir).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"`data_dir` must be an existing folder; got data_dir={str(data_dir)!r}, whose home folder is not known. "
            "Pass the folder that holds the data."
        ) from error
    if download and dataset in cifar.CIFAR:
        cifar.download(root, cifar.CIFAR[dataset])
    if not root.is_dir():
        found = "a file" if root.exists() else "a path that does not exist"
        raise DataError(
            f"`data_dir` must be an existing folder; got data_dir={str(root)!r}, {found}. "
            "Pass the folder that holds the data."
        )
    if dataset == "folder":
        return folder.read(
            root,
            image_size,
            validation_share=validation_share,
            split_seed=split_seed,
            whole_pictures=augment == "resized-crop",
            array_bytes=array_bytes,
        )
    return resized(cifar.read(root, cifar.CIFAR[dataset], validation_share, split_seed), image_size)


def _digits(validation_share: float, split_seed: int) -> ImageData:
    """scikit-learn's 1,797 digits, 8x8, with a fixed stratified test split."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    # RandomState, not default_rng: its stream is frozen, so the split is the same under every version of numpy.
    random = np.random.RandomState(DIGITS_SPLIT_SEED)
    test = np.zeros(len(labels), dtype=bool)
    for k in range(10):
        members = random.permutation(np.flatnonzero(labels == k))
        test[members[: round(DIGITS_TEST_SHARE * len(members))]] = True
    train, held = ((images[own], labels[own]) for own in (~test, test))
    return assemble("digits", train, held, tuple(str(k) for k in range(10)), validation_share, split_seed)
