"""A labelled set of images, its statistics, and `DataError`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from catode.train.data.folder import ImageFiles


class DataError(ValueError):
    """Data that are missing, malformed or unusable; one line: argument, constraint, value, hint."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification.

    Its images are tensors in memory, or `catode.train.data.folder.ImageFiles`, decoded at every use.

    Args:
        name: Name of the data set.
        train_images: Training images, uint8, shape (N, C, H, W).
        train_labels: Class index of each training image, int64, shape (N,).
        test_images: Test images, uint8, shape (M, C, H, W).
        test_labels: Class index of each test image, int64, shape (M,).
        classes: Class names in the order of the labels.
        mean: Mean of each channel over the training images, in [0, 1].
        std: Standard deviation of each channel over the training images, in [0, 1]; at least 1/255.
        contents: Digest of the files that the images were read from; None where every pixel is in memory and can be hashed.
        notes: What the user of these images should know, one line each.
    """

    name: str
    train_images: torch.Tensor | ImageFiles
    train_labels: torch.Tensor
    test_images: torch.Tensor | ImageFiles
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    contents: bytes | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the class names, the images and the labels in their order: what a run that goes on must find again.

        Of arrays it covers every pixel. Of class folders it covers every file's name, label, size and bytes, of very large
        ones the bytes of a sample (`catode.train.data.folder.WHOLE_BYTES`), and is the same wherever their pixels are kept.
        Unlike `pixel_fingerprint`, which tells copies of a data set apart in records, it depends on the order and on the files.
        """
        whole = hashlib.sha256(repr(self.classes).encode())
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            whole.update(labels.numpy().tobytes())
            if self.contents is None:
                whole.update(repr(tuple(images.shape)).encode())
                whole.update(images.contiguous().numpy().data)
        whole.update(self.contents or b"")
        return whole.hexdigest()


def assemble(name: str, train: tuple, test: tuple, classes: tuple[str, ...]) -> ImageData:
    """Make an `ImageData` from arrays; computes the training statistics.

    Args:
        name: Name of the data set.
        train: Images, uint8, shape (N, C, H, W), and class indices, shape (N,).
        test: The same for the test images.
        classes: Class names in the order of the labels.
    """
    (train_images, train_labels), (test_images, test_labels) = (
        (torch.from_numpy(x), torch.from_numpy(np.asarray(y, dtype=np.int64))) for x, y in (train, test)
    )
    mean, std = statistics(train_images)
    return ImageData(name, train_images, train_labels, test_images, test_labels, classes, mean, std)


def statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixel values scaled to [0, 1], of uint8 images (N, C, H, W)."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for part in images.split(1024):
        wide = part.to(torch.int32)
        total += wide.sum(dim=(0, 2, 3))
        squares += (wide * wide).sum(dim=(0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total.double() / count
    std = (squares.double() / count - mean**2).clamp_min(1.0).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def pixel_fingerprint(data: ImageData) -> str:
    """SHA-256 of all pixels and labels, independent of file names and of the order of the images.

    For each image, the SHA-256 of its class index (int64, little-endian) and its uint8 pixels in the order channel, row,
    column. For each split, training then test, the shape as text and the sorted digests of its images are hashed. A resumed
    run depends on the order of the images: use `ImageData.fingerprint` there.

    Args:
        data: A data set in memory or on the disk; images on the disk are decoded at the data set's image size.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: if an image cannot be decoded.
    """
    whole = hashlib.sha256()
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        digests = []
        for rows in torch.arange(len(labels)).split(4096):
            part = images[rows] if isinstance(images, torch.Tensor) else images.array(rows.numpy())
            for pixels, label in zip(part.numpy(), labels[rows].tolist(), strict=True):
                digests.append(hashlib.sha256(label.to_bytes(8, "little") + pixels.tobytes()).digest())
        whole.update(repr(tuple(images.shape)).encode() + b"".join(sorted(digests)))
    return whole.hexdigest()
