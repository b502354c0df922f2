"""Random augmentation: the random numbers of an epoch, and the operations on whole batches.

The random numbers depend only on (seed, epoch) and are indexed by position in the epoch, so any process can make any batch
without those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

AUGMENTATIONS = {"none": 0, "shift": 1, "crop-flip": 4, "resized-crop": 0}
"""Name of each augmentation, and its padding in pixels on every side."""

MIRRORED = ("crop-flip", "resized-crop")
"""Augmentations that flip half of the images horizontally."""
CROP_AREA = (0.08, 1.0)
"""Range of the area of a resized crop, as a share of the image."""
CROP_RATIO = 4 / 3
"""Largest aspect ratio of a resized crop; the smallest is its inverse."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of an epoch, for each of its N positions.

    Args:
        order: Index of the image (the shuffle), int64, shape (N,).
        rows: First row of the crop in the padded image, shape (N,).
        columns: First column of the crop, shape (N,).
        flip: Whether the image is flipped, used by the augmentations in `MIRRORED`, shape (N,).
        crop: Four uniform numbers for `crop_boxes`, float64, shape (N, 4); (0, 4) without resized crops.
    """

    order: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    flip: torch.Tensor
    crop: np.ndarray


def draw(augment: str, count: int, epoch: int, seed: int) -> Draws:
    """The random numbers of one epoch over `count` images."""
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )
    order = torch.randperm(count, generator=generator)
    rows, columns = torch.randint(0, 2 * AUGMENTATIONS[augment] + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    needed = count if augment == "resized-crop" else 0
    crop = torch.rand(needed, 4, generator=generator, dtype=torch.float64)
    return Draws(order, rows, columns, flip, crop.numpy())


def crop_boxes(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes of random area, aspect ratio and position in images of one size.

    The share of the area is uniform in `CROP_AREA`, the logarithm of the ratio uniform in ±log `CROP_RATIO`; a side longer
    than the image's is clipped to it.

    Args:
        draws: Uniform numbers in [0, 1), shape (n, 4).
        height: Height of the images, pixels.
        width: Width of the images, pixels.

    Returns:
        Left, top, width and height in pixels, shape (n, 4).
    """
    least, most = CROP_AREA
    area = (least + (most - least) * draws[:, 0]) * height * width
    ratio = np.exp((2 * draws[:, 1] - 1) * math.log(CROP_RATIO))
    wide, high = np.minimum(np.sqrt(area * ratio), width), np.minimum(np.sqrt(area / ratio), height)
    return np.stack([draws[:, 2] * (width - wide), draws[:, 3] * (height - high), wide, high], axis=1)


def resize_crops(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Crop a box from each image and resize it to the image's size, bilinearly.

    Args:
        images: Floating point, shape (n, C, H, W).
        boxes: Left, top, width and height in pixels, shape (n, 4).

    Returns:
        The resized crops, shape (n, C, H, W).
    """
    height, width = images.shape[2:]
    left, top, wide, high = boxes.T[:, :, None]
    # grid_sample coordinates run from -1 at the first pixel's outer edge to 1 at the last pixel's
    x = (left + wide * _centres(width, images.device)) * (2 / width) - 1
    y = (top + high * _centres(height, images.device)) * (2 / height) - 1
    size = (len(images), height, width)
    grid = torch.stack([x[:, None, :].expand(size), y[:, :, None].expand(size)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(count: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(count, device=device) + 0.5) / count


def mixing_share(alpha: float, epoch: int, seed: int, batch: int) -> float:
    """Weight of the first image of each mixup pair, the same for a whole batch: Beta(alpha, alpha)."""
    return float(np.random.default_rng([seed, epoch, batch]).beta(alpha, alpha))
