"""Batches of images, augmented a whole batch at a time.

Images stay `uint8` until a batch is made: gather, flip, pad and crop touch one byte a pixel; conversion to floating point
and normalisation come last. An augmented batch of 128 CIFAR images takes about 2 ms on one CPU thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from catode.train.images import DataError

AUGMENTATIONS = {"none": 0, "shift": 1, "crop-flip": 4}
"""Name of each augmentation and the pixels it pads on every side."""


class Batches:
    """Shuffled, augmented, normalised batches of one training set.

    Order and augmentation of an epoch depend on (seed, epoch) alone: not on the batch size, the device or any global
    random state.

    Example:
        >>> data = load("digits")
        >>> batches = Batches(data.train_images, data.train_labels, 64, data.mean, data.std, augment="shift")
        >>> for x, y in batches.epoch(0, seed=0):
        ...     pass

    Args:
        images: Images, uint8, shape (N, C, H, W); copied once to the device.
        labels: Class indices, int64, shape (N,).
        batch_size: Images in a batch; the incomplete last batch of an epoch is dropped.
        mean: Mean of each channel in [0, 1], shape (C,).
        std: Standard deviation of each channel in [0, 1], positive, shape (C,).
        augment: `none`; `crop-flip` mirrors half of the images, pads 4 pixels of the mean colour and crops at random;
            `shift` moves by at most one pixel along each axis, black coming in at the edge.
        device: Where batches are made and delivered.
        dtype: Floating-point type of the images in a batch.
        channels_last: Deliver images in the channels-last memory format.
        shard: This process' number and the number of processes (rank, world): rows rank::world of each batch are
            delivered, those that one process would deliver there.

    Raises:
        DataError: if the arguments do not fit together.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        augment: str = "none",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise DataError(
                f"`augment` must be one of {', '.join(AUGMENTATIONS)}; got augment={augment!r}. Use one of these names."
            )
        _check_images(images, labels, batch_size)
        channels = images.shape[1]
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise DataError(
                f"`mean` and `std` must hold {channels} values, one a channel, std positive; "
                f"got mean={mean}, std={std}. Use those of the ImageData."
            )
        if batch_size > len(images):
            raise DataError(
                f"`batch_size` must be <= {len(images)}, the number of training images; got batch_size={batch_size}. "
                "Use a smaller batch."
            )
        rank, world = shard
        if not 0 <= rank < world or batch_size % world:
            raise DataError(
                "`shard` must be (rank, world), rank in [0, world), batch_size a multiple of world; "
                f"got shard={shard} with batch_size={batch_size}. Use a batch_size that all processes can share equally."
            )
        self.batch_size = batch_size
        self.shard = shard
        self.augment = augment
        self.device = torch.device(device)
        self.dtype = dtype
        self.channels_last = channels_last
        # Stored as (N, H, W, C) for channels-last: each row of a window is then one run of memory.
        self._images = self._lay_out(images)
        self._rows, self._columns = (1, 2) if channels_last else (2, 3)
        self._labels = labels.to(self.device)
        shape = (1, 1, 1, channels) if channels_last else (1, channels, 1, 1)
        std_tensor = torch.tensor(std, dtype=torch.float64).view(shape)
        mean_tensor = torch.tensor(mean, dtype=torch.float64).view(shape)
        # Of the full size of an image, not broadcast over pixels: three times as fast for channels-last.
        like = torch.empty(1, *self._images.shape[1:])
        self._scale = (1 / (255 * std_tensor)).float().expand_as(like).contiguous().to(self.device)
        self._shift = (-mean_tensor / std_tensor).float().expand_as(like).contiguous().to(self.device)
        fill = (mean_tensor * 255).round() if augment == "crop-flip" else torch.zeros_like(mean_tensor)
        self._fill = fill.to(self.device, torch.uint8)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._images) // self.batch_size

    def epoch(self, epoch: int, seed: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch.

        Args:
            epoch: Number of the epoch, from 0.
            seed: Seed of the run.
            start: Number of the first batch; those before it are not made.

        Returns:
            Iterator over `len(self) - start` pairs of images (n, C, H, W) and labels (n,), n = batch_size / world.
        """
        count, margin = len(self._images), AUGMENTATIONS[self.augment]
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        )
        order = torch.randperm(count, generator=generator)
        rows, columns = torch.randint(0, 2 * margin + 1, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < 0.5
        order, rows, columns = (t.to(self.device) for t in (order, rows, columns))
        canvas = self._canvas(margin)
        rank, world = self.shard
        for i in range(start, len(self)):
            part = slice(i * self.batch_size + rank, (i + 1) * self.batch_size, world)
            chosen = order[part]
            images = self._images.index_select(0, chosen)
            if self.augment == "crop-flip":
                mirrored = flip[part].nonzero().squeeze(1).to(self.device)
                images.index_copy_(0, mirrored, images.index_select(0, mirrored).flip(self._columns))
            if margin:
                images = self._window(images, canvas, rows[part], columns[part])
            yield self._normalise(images), self._labels[chosen]

    def evaluation(
        self, images: torch.Tensor, labels: torch.Tensor, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches in order, without augmentation, normalised like the training images; the last one may be smaller.

        Args:
            images: Images, uint8, shape (M, C, H, W).
            labels: Class indices, int64, shape (M,).
            batch_size: Images in a batch.

        Returns:
            Iterator over pairs of images and labels that covers every image once.

        Raises:
            DataError: if the arguments do not fit together.
        """
        _check_images(images, labels, batch_size)
        if self._lay_out(images[:1]).shape != self._scale.shape:
            raise DataError(
                f"`images` must have the training images' channels and size; got shape {tuple(images.shape)}. "
                "Resize them as the training images were."
            )
        return (
            (self._normalise(self._lay_out(x)), y.to(self.device))
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        )

    def _lay_out(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device)
        return (images.permute(0, 2, 3, 1) if self.channels_last else images).contiguous()

    def _canvas(self, margin: int) -> torch.Tensor:
        """A batch of blank images, `margin` pixels larger on every side; its border never changes, so one serves an epoch."""
        shape = [self.batch_size // self.shard[1], *self._images.shape[1:]]
        shape[self._rows] += 2 * margin
        shape[self._columns] += 2 * margin
        return self._fill.expand(shape).contiguous()

    def _window(
        self, images: torch.Tensor, canvas: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Windows of the padded images that begin at (rows, columns), one gather for the whole batch."""
        margin = (canvas.shape[self._rows] - images.shape[self._rows]) // 2
        inner = canvas
        for axis in (self._rows, self._columns):
            inner = inner.narrow(axis, margin, images.shape[axis])
        inner.copy_(images)
        # A view (B, shifts, shifts, *image) onto the canvas; indexing its first three axes copies one window an image.
        stride, steps = canvas.stride(), 2 * margin + 1
        windows = canvas.as_strided(
            (len(canvas), steps, steps, *images.shape[1:]),
            (stride[0], stride[self._rows], stride[self._columns], *stride[1:]),
        )
        return windows[torch.arange(len(canvas), device=canvas.device), rows, columns]

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        images = torch.addcmul(self._shift, images.to(torch.float32), self._scale).to(self.dtype)
        return images.permute(0, 3, 1, 2) if self.channels_last else images


def _check_images(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise DataError(
            "`images` must be a non-empty uint8 tensor of shape (N, C, H, W); "
            f"got {images.dtype} of shape {tuple(images.shape)}. Use those of an ImageData."
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(
            f"`labels` must be an int64 tensor of shape ({len(images)},); "
            f"got {labels.dtype} of shape {tuple(labels.shape)}. Pass one label an image."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(
            f"`batch_size` must be an integer >= 1; got batch_size={batch_size!r}. Use a positive number of images."
        )
