"""What happens at random to the images of an epoch, drawn at once, and the operations on whole batches.

The draws of an epoch follow from (seed, epoch) alone and are indexed by place in the epoch, so any batch can be made
without those before it, by any process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

AUGMENTATIONS = {"none": 0, "shift": 1, "crop-flip": 4, "resized-crop": 0}
"""Name of each augmentation and the pixels it pads on every side."""

MIRRORED = ("crop-flip", "resized-crop")
"""Those that mirror half of the images."""
CROP_AREA = (0.08, 1.0)
"""Range of the share of the picture that a resized crop covers."""
CROP_RATIO = 4 / 3
"""Largest ratio of the sides of a resized crop, either way."""


@dataclass(frozen=True)
class Draws:
    """What an epoch draws for each of its N places.

    Args:
        order: Which image stands there, int64, shape (N,).
        rows: First row of the window in the padded image, shape (N,).
        columns: Its first column, shape (N,).
        flip: Whether the image is mirrored, by an augmentation that mirrors, shape (N,).
        crop: Four uniform numbers from which `crop_boxes` makes a box, float64, shape (N, 4).
    """

    order: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    flip: torch.Tensor
    crop: np.ndarray


def draw(augment: str, count: int, epoch: int, seed: int) -> Draws:
    """The draws of one epoch over `count` images."""
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
    """Boxes of random area and ratio of sides, at random places, within images of one size.

    Area uniform in `CROP_AREA` of the image, logarithm of the ratio uniform in ±log `CROP_RATIO`; a side that would be
    longer than the image's is cut to it.

    Args:
        draws: Uniform numbers in [0, 1), shape (n, 4).
        height: Height of the images.
        width: Their width.

    Returns:
        Left, top, width and height in pixels, shape (n, 4).
    """
    least, most = CROP_AREA
    area = (least + (most - least) * draws[:, 0]) * height * width
    ratio = np.exp((2 * draws[:, 1] - 1) * math.log(CROP_RATIO))
    wide, high = np.minimum(np.sqrt(area * ratio), width), np.minimum(np.sqrt(area / ratio), height)
    return np.stack([draws[:, 2] * (width - wide), draws[:, 3] * (height - high), wide, high], axis=1)


def resize_crops(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Cut a box from each image and stretch it to the image's size, bilinearly.

    Args:
        images: Floating point, shape (n, C, H, W).
        boxes: Left, top, width and height in pixels, shape (n, 4).
    """
    height, width = images.shape[2:]
    left, top, wide, high = boxes.T[:, :, None]
    # grid_sample counts from -1 at the first pixel's outer edge to 1 at the last one's
    x = (left + wide * _centres(width, images.device)) * (2 / width) - 1
    y = (top + high * _centres(height, images.device)) * (2 / height) - 1
    size = (len(images), height, width)
    grid = torch.stack([x[:, None, :].expand(size), y[:, :, None].expand(size)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(count: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(count, device=device) + 0.5) / count


def mixing_share(alpha: float, epoch: int, seed: int, batch: int) -> float:
    """Share of an image in its mixture with another, for a whole batch: Beta(alpha, alpha)."""
    return float(np.random.default_rng([seed, epoch, batch]).beta(alpha, alpha))
