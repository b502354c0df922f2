"""A labelled set of images, its statistics, and `DataError`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

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
        validation_images: Images for validation, uint8, shape (K, C, H, W); None for none.
        validation_labels: Class index of each validation image, int64, shape (K,); None for none.
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
    validation_images: torch.Tensor | ImageFiles | None = None
    validation_labels: torch.Tensor | None = None

    @property
    def validated(self) -> bool:
        """Whether there are images for validation."""
        return self.validation_labels is not None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the class names, the images and the labels in their order: what a run that goes on must find again.

        Of arrays it covers every pixel. Of class folders it covers every file's name, label, size and bytes, of very large
        ones the bytes of a sample (`catode.train.data.folder.WHOLE_BYTES`), and is the same wherever their pixels are kept.
        Unlike `pixel_fingerprint`, which tells copies of a data set apart in records, it depends on the order and on the files.
        """
        whole = hashlib.sha256(repr(self.classes).encode())
        parts = [(self.train_images, self.train_labels), (self.test_images, self.test_labels)]
        if self.validated:
            parts.insert(1, (self.validation_images, self.validation_labels))
        for images, labels in parts:
            whole.update(labels.numpy().tobytes())
            if self.contents is None:
                whole.update(repr(tuple(images.shape)).encode())
                whole.update(images.contiguous().numpy().data)
        whole.update(self.contents or b"")
        return whole.hexdigest()


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose a share of the training images of every class.

    The number of images is ``round(share * N)``; each class gives its share rounded down, the rest comes from the classes
    with the largest remainders. Every class keeps a training image.

    Args:
        labels: Class index of each training image, shape (N,).
        share: Share for validation, in (0, 1).
        seed: Seed of the split; the order of the images and it alone decide.

    Returns:
        Which images are held out, shape (N,).

    Raises:
        DataError: if no image would be held out.
    """
    # RandomState, not default_rng: its stream is frozen, so the split is the same under every version of numpy.
    random = np.random.RandomState(seed)
    counts = np.bincount(labels)
    wanted = share * counts
    taken = np.floor(wanted).astype(np.int64)
    rest = round(share * len(labels)) - int(taken.sum())
    order = random.permutation(len(counts))  # ties of the remainders
    order = order[np.argsort(-(wanted - taken)[order], kind="stable")]
    taken[order[taken[order] + 1 < counts[order]][:rest]] += 1
    if not taken.any():
        raise DataError(
            f"`validation_share` must leave an image for validation, or be 0; got validation_share={share:g} of "
            f"{len(labels)} training images. Use a larger share, or 0 for none."
        )
    chosen = np.zeros(len(labels), dtype=bool)
    for k, number in enumerate(taken):
        chosen[random.permutation(np.flatnonzero(labels == k))[:number]] = True
    return chosen


def assemble(
    name: str, train: tuple, test: tuple, classes: tuple[str, ...], validation_share: float = 0.0, split_seed: int = 0
) -> ImageData:
    """Make an `ImageData` from arrays; holds out images for validation and computes the training statistics.

    Args:
        name: Name of the data set.
        train: Images, uint8, shape (N, C, H, W), and class indices, shape (N,).
        test: The same for the test images.
        classes: Class names in the order of the labels.
        validation_share: Share of the training images to hold out (see `held_out`); 0 for none.
        split_seed: Seed of that choice.
    """
    parts = [train, test]
    if validation_share:
        chosen = held_out(np.asarray(train[1], dtype=np.int64), validation_share, split_seed)
        parts = [*((train[0][own], np.asarray(train[1])[own]) for own in (~chosen, chosen)), test]
    parts = [(torch.from_numpy(x), torch.from_numpy(np.asarray(y, dtype=np.int64))) for x, y in parts]
    mean, std = statistics(parts[0][0])
    validation = (
        dict(zip(("validation_images", "validation_labels"), parts[1], strict=True)) if validation_share else {}
    )
    return ImageData(name, *parts[0], *parts[-1], classes, mean, std, **validation)


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


def resized(data: ImageData, side: int | None) -> ImageData:
    """The same square images at another size, bilinearly, with the training statistics of these; None: as they are.

    Args:
        data: Images in memory.
        side: Pixels of a side.
    """
    if side is None or tuple(data.train_images.shape[2:]) == (side, side):
        return data

    def resize(images: torch.Tensor) -> torch.Tensor:
        out = torch.empty((*images.shape[:2], side, side), dtype=torch.uint8)
        for part, place in zip(images.split(1024), out.split(1024), strict=True):
            wide = F.interpolate(part.float(), (side, side), mode="bilinear", antialias=side < part.shape[-1])
            place.copy_(wide.round_().clamp_(0, 255))
        return out

    parts = {name: getattr(data, name) for name in ("train_images", "validation_images", "test_images")}
    parts = {name: resize(images) for name, images in parts.items() if images is not None}
    mean, std = statistics(parts["train_images"])
    return replace(data, **parts, mean=mean, std=std)


def pixel_fingerprint(data: ImageData) -> str:
    """SHA-256 of all pixels and labels, independent of file names and of the order of the images.

    For each image, the SHA-256 of its class index (int64, little-endian) and its uint8 pixels in the order channel, row,
    column. For each split, training then test, the shape as text and the sorted digests of its images are hashed. Validation
    images count as training images, so that it does not depend on how these are divided. A resumed run depends on the order
    of the images: use `ImageData.fingerprint` there.

    Args:
        data: A data set in memory or on the disk; images on the disk are decoded at the data set's image size.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: if an image cannot be decoded.
    """
    whole = hashlib.sha256()
    training = [(data.train_images, data.train_labels)]
    if data.validated:
        training.append((data.validation_images, data.validation_labels))
    for parts in (training, [(data.test_images, data.test_labels)]):
        digests = []
        for images, labels in parts:
            for rows in torch.arange(len(labels)).split(4096):
                part = images[rows] if isinstance(images, torch.Tensor) else images.array(rows.numpy())
                for pixels, label in zip(part.numpy(), labels[rows].tolist(), strict=True):
                    digests.append(hashlib.sha256(label.to_bytes(8, "little") + pixels.tobytes()).digest())
        shape = (len(digests), *data.train_images.shape[1:])
        whole.update(repr(shape).encode() + b"".join(sorted(digests)))
    return whole.hexdigest()
