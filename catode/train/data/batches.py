"""Batches of images, augmented a whole batch at a time.

Gather, flip, pad and crop work on `uint8`; conversion to floating point and normalisation come last, for speed.
`python -m benchmarks.loading` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from catode.prune.devices.transfer import upload
from catode.train.data.augment import AUGMENTATIONS, MIRRORED, Draws, crop_boxes, draw, mixing_share, resize_crops
from catode.train.data.folder import ImageFiles, default_workers, stream
from catode.train.data.images import DataError

HOME_SHARE = 0.25
"""Share of a GPU's free memory that an array of images may take; a larger array stays in host memory."""


class Batches:
    """Shuffled, augmented, normalised batches of one training set.

    Order and augmentation of an epoch depend only on (seed, epoch), not on the batch size, the device, the number of worker
    processes or any global random state. The weight of `mixup` also depends on the index of the batch.

    Example:
        >>> data = load("digits")
        >>> batches = Batches(data.train_images, data.train_labels, 64, data.mean, data.std, augment="shift")
        >>> for x, y in batches.epoch(0, seed=0):
        ...     pass

    Args:
        images: Images, uint8, shape (N, C, H, W), copied once to the device if they fit (`HOME_SHARE`); or `ImageFiles`.
        labels: Class indices, int64, shape (N,).
        batch_size: Images in a batch; the incomplete last batch of an epoch is dropped.
        mean: Mean of each channel in [0, 1], shape (C,).
        std: Standard deviation of each channel in [0, 1], positive, shape (C,).
        augment: `none`; `crop-flip` flips half of the images, pads 4 pixels of the mean colour and crops at random;
            `shift` moves by at most one pixel along each axis, with black padding; `resized-crop` flips half of the images
            and resizes a random box of each (see `crop_boxes`) to full size. For `ImageFiles` with an image size the box is
            cropped from the original image when it is decoded.
        mixup: Parameter of mixup: image i is mixed with image i + batch_size/2 (cyclic), with a weight drawn from
            Beta(mixup, mixup); 0 for none. Labels are then distributions.
        classes: Number of classes, needed for `mixup`.
        workers: Worker processes that decode `ImageFiles` ahead; 0 decodes in this process, None is one for each core.
        device: Device of the batches.
        dtype: Floating-point type of the images in a batch.
        channels_last: Return images in the channels-last memory format.
        shard: (rank, world), number of this process and number of processes: this process gets rows rank::world of each
            batch.

    Raises:
        DataError: if the arguments are inconsistent.
    """

    def __init__(
        self,
        images: torch.Tensor | ImageFiles,
        labels: torch.Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        augment: str = "none",
        mixup: float = 0.0,
        classes: int | None = None,
        workers: int | None = None,
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
        if mixup < 0 or (mixup and (classes is None or classes <= int(labels.max()))):
            raise DataError(
                f"`mixup` must be >= 0, and `classes` above every label with it; got mixup={mixup}, classes={classes}. "
                "Use mixup=0 for none."
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
        self.mixup = mixup
        self.classes = classes
        self.workers = default_workers() if workers is None else workers
        self.device = torch.device(device)
        self.dtype = dtype
        self.channels_last = channels_last
        # Stored as (N, H, W, C) for channels-last: each row of a window is then contiguous.
        self._rows, self._columns = (1, 2) if channels_last else (2, 3)
        self._files = images if isinstance(images, ImageFiles) else None
        if self._files is None:
            self._home = self.device if images.nbytes <= _image_budget(self.device) else torch.device("cpu")
            self._images = self._lay_out(images.to(self._home))
        self._labels = labels.to(self.device)
        shape = (1, 1, 1, channels) if channels_last else (1, channels, 1, 1)
        std_tensor = torch.tensor(std, dtype=torch.float64).view(shape)
        mean_tensor = torch.tensor(mean, dtype=torch.float64).view(shape)
        # Expanded to the size of an image, not broadcast: three times as fast for channels-last.
        height, width = images.shape[2:]
        like = torch.empty((1, height, width, channels) if channels_last else (1, channels, height, width))
        self._scale = (1 / (255 * std_tensor)).float().expand_as(like).contiguous().to(self.device)
        self._shift = (-mean_tensor / std_tensor).float().expand_as(like).contiguous().to(self.device)
        fill = (mean_tensor * 255).round() if augment == "crop-flip" else torch.zeros_like(mean_tensor)
        self._fill = fill.to(self.device, torch.uint8)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._labels) // self.batch_size

    def epoch(self, epoch: int, seed: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch.

        Args:
            epoch: Index of the epoch, from 0.
            seed: Seed of the run.
            start: Index of the first batch; earlier ones are skipped.

        Returns:
            Iterator over `len(self) - start` pairs of images (n, C, H, W) and labels (n,), or with `mixup` distributions
            over the classes (n, classes), n = batch_size / world.

        Raises:
            DataError: from the iterator, if an image file cannot be decoded.
        """
        draws = draw(self.augment, len(self._labels), epoch, seed)
        rank, world = self.shard
        own = torch.arange(rank, self.batch_size, world)
        places, partner = own, None
        if self.mixup:
            # only this process' rows if both images of every pair are among them
            partner = (own + self.batch_size // 2) % self.batch_size
            places = torch.cat([own, partner]).unique()
            own, partner = (torch.searchsorted(places, p).to(self.device) for p in (own, partner))
        order, rows, columns, flip = (t.to(self.device) for t in (draws.order, draws.rows, draws.columns, draws.flip))
        here = places.to(self.device)
        margin = AUGMENTATIONS[self.augment]
        canvas = self._canvas(len(places), margin)
        boxes = None
        if self.augment == "resized-crop" and not self._cut_when_decoded:
            boxes = torch.from_numpy(crop_boxes(draws.crop, *self._size)).float().to(self.device)
        for k, images in enumerate(self._raw(draws, places, start), start):
            part = k * self.batch_size + here
            if self.augment in MIRRORED:
                images = torch.where(flip[part].view(-1, 1, 1, 1), images.flip(self._columns), images)
            if margin:
                images = self._window(images, canvas, rows[part], columns[part])
            if boxes is not None:
                images = self._resize(images, boxes[part])
            x, y = self._normalise(images), self._labels[order[part]]
            if partner is not None:
                share = mixing_share(self.mixup, epoch, seed, k)
                y = F.one_hot(y, self.classes).float()
                x, y = (t[partner].lerp_(t if len(own) == len(t) else t[own], share) for t in (x, y))
            yield self._deliver(x), y

    def evaluation(
        self, images: torch.Tensor | ImageFiles, labels: torch.Tensor, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches in order, without augmentation, normalised like the training images; the last may be smaller.

        Args:
            images: Images, uint8, shape (M, C, H, W), or `ImageFiles`.
            labels: Class indices, int64, shape (M,).
            batch_size: Images in a batch.

        Returns:
            Iterator over pairs of images (n, C, H, W) and labels (n,); all shards together cover every image once.

        Raises:
            DataError: if the arguments are inconsistent; from the iterator, if an image file cannot be decoded.
        """
        _check_images(images, labels, batch_size)
        if tuple(images.shape[1:]) != (self._channels, *self._size):
            raise DataError(
                f"`images` must have the training images' channels and size; got shape {tuple(images.shape)}. "
                "Resize them as the training images were."
            )
        rank, world = self.shard
        labels = labels[rank::world]
        if isinstance(images, ImageFiles):
            rows = np.arange(rank, len(images), world)
            parts = self._stream(images, [(rows[i : i + batch_size], None) for i in range(0, len(rows), batch_size)])
        else:
            parts = (part.to(self.device) for part in images[rank::world].split(batch_size))
        return (
            (self._deliver(self._normalise(self._lay_out(x))), y.to(self.device))
            for x, y in zip(parts, labels.split(batch_size), strict=True)
        )

    @property
    def _channels(self) -> int:
        return self._scale.shape[3 if self.channels_last else 1]

    @property
    def _size(self) -> tuple[int, int]:
        return self._scale.shape[self._rows], self._scale.shape[self._columns]

    @property
    def _cut_when_decoded(self) -> bool:
        """Whether the decoder crops the random boxes, from the original images."""
        return self._files is not None and self._files.image_size is not None and self.augment == "resized-crop"

    def _raw(self, draws: Draws, places: torch.Tensor, start: int) -> Iterator[torch.Tensor]:
        """The images at positions `places` of each batch from `start` on, uint8, on the device, in the memory layout."""
        steps = range(start, len(self))
        if self._files is None:
            order, here = draws.order.to(self._home), places.to(self._home)
            for k in steps:
                chosen = self._images.index_select(0, order[k * self.batch_size + here])
                yield upload(chosen, self.device)
            return
        parts = (k * self.batch_size + places for k in steps)
        requests = [
            (draws.order[part].numpy(), draws.crop[part.numpy()] if self._cut_when_decoded else None) for part in parts
        ]
        for images in self._stream(self._files, requests):
            yield self._lay_out(images)

    def _stream(self, files: ImageFiles, requests: list) -> Iterator[torch.Tensor]:
        for images in stream(files, requests, self.workers, pin=self.device.type == "cuda"):
            yield images.to(self.device, non_blocking=self.device.type != "mps")  # for CUDA they are in pinned memory

    def _lay_out(self, images: torch.Tensor) -> torch.Tensor:
        return (images.permute(0, 2, 3, 1) if self.channels_last else images).contiguous()

    def _canvas(self, count: int, margin: int) -> torch.Tensor:
        """Padding-coloured images, `margin` pixels larger on every side; the border never changes, so an epoch needs one."""
        shape = [count, *self._scale.shape[1:]]
        shape[self._rows] += 2 * margin
        shape[self._columns] += 2 * margin
        return self._fill.expand(shape).contiguous()

    def _window(
        self, images: torch.Tensor, canvas: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Crops of the padded images that begin at (rows, columns), by one gather for the whole batch."""
        margin = (canvas.shape[self._rows] - images.shape[self._rows]) // 2
        inner = canvas
        for axis in (self._rows, self._columns):
            inner = inner.narrow(axis, margin, images.shape[axis])
        inner.copy_(images)
        # A view of shape (B, shifts, shifts, *image); indexing its first three axes copies one crop for each image.
        stride, steps = canvas.stride(), 2 * margin + 1
        windows = canvas.as_strided(
            (len(canvas), steps, steps, *images.shape[1:]),
            (stride[0], stride[self._rows], stride[self._columns], *stride[1:]),
        )
        return windows[torch.arange(len(canvas), device=canvas.device), rows, columns]

    def _resize(self, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes of the images, resized to full size, floating point."""
        if self.channels_last:
            images = images.permute(0, 3, 1, 2)
        images = resize_crops(images.float().contiguous(), boxes)
        return self._lay_out(images)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self._shift, images.to(torch.float32), self._scale)

    def _deliver(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.dtype)
        return images.permute(0, 3, 1, 2) if self.channels_last else images


def _image_budget(device: torch.device) -> float:
    """Bytes of images that may be stored on a device."""
    return HOME_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _check_images(images: torch.Tensor | ImageFiles, labels: torch.Tensor, batch_size: int) -> None:
    if torch.is_tensor(images) and (images.dtype != torch.uint8 or images.ndim != 4 or not len(images)):
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
