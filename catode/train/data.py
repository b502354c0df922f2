"""Image data sets held in memory, and batches augmented a whole batch at a time.

Images stay `uint8` until a batch is made: gather, flip, pad and crop touch one byte a pixel; conversion to floating point
and normalisation come last. An augmented batch of 128 CIFAR images takes about 2 ms on one CPU thread.
"""

import io
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

DATASETS = ("digits", "cifar10", "cifar100", "folder")
AUGMENTATIONS = {"none": 0, "shift": 1, "crop-flip": 4}
"""Name of each augmentation and the pixels it pads on every side."""

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_SHARE = 0.2


class DataError(ValueError):
    """Data that is missing, malformed or unusable; one line: argument, constraint, value, mend."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification, all of it in memory.

    Args:
        name: Name of the data set.
        train_images: Training images, uint8, shape (N, C, H, W).
        train_labels: Class index of each training image, int64, shape (N,).
        test_images: Test images, uint8, shape (M, C, H, W).
        test_labels: Class index of each test image, int64, shape (M,).
        classes: Class names in the order of the labels.
        mean: Mean of each channel over the training images, in [0, 1].
        std: Standard deviation of each channel over the training images, in [0, 1]; at least 1/255.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    dataset: str, data_dir: str | os.PathLike | None = None, *, seed: int = 0, image_size: int | None = None
) -> ImageData:
    """Read a whole data set into memory.

    Args:
        dataset: `digits`, `cifar10`, `cifar100` or `folder`.
        data_dir: Folder with the data; for CIFAR the official folder or its parent. Not used for `digits`.
        seed: Accepted so that a run can pass its own, and without effect: no split depends on the run, so that accuracies
            stay comparable.
        image_size: For `folder`: the shorter side is resized to this many pixels and the centre cropped to a square.
            Without it all images must share one size.

    Returns:
        The images and labels of both splits with the training statistics.

    Raises:
        DataError: if the data are missing, malformed or do not fit together.
    """
    del seed
    if dataset not in DATASETS:
        raise DataError(
            f"`dataset` must be one of {', '.join(DATASETS)}; got dataset={dataset!r}. Use one of these names."
        )
    if image_size is not None:
        if dataset != "folder":
            raise DataError(
                "`image_size` must be left out unless dataset='folder'; "
                f"got image_size={image_size} with dataset={dataset!r}. Leave it out."
            )
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise DataError(
                f"`image_size` must be an integer >= 1; got image_size={image_size!r}. "
                "Use the side in pixels, such as 64."
            )
    if dataset == "digits":
        return _digits()
    if data_dir is None:
        raise DataError(
            f"`data_dir` must be given for dataset={dataset!r}; got data_dir=None. Pass the folder that holds the data."
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "a path that does not exist"
        raise DataError(
            f"`data_dir` must be an existing folder; got data_dir={str(root)!r}, {found}. "
            "Pass the folder that holds the data."
        )
    if dataset == "folder":
        return _folder(root, image_size)
    return _cifar(root, CIFAR[dataset])


def _assemble(name: str, train: tuple, test: tuple, classes: tuple[str, ...]) -> ImageData:
    """Join two (images, labels) pairs of numpy arrays and add the training statistics."""
    (train_images, train_labels), (test_images, test_labels) = (
        (torch.from_numpy(x), torch.from_numpy(np.asarray(y, dtype=np.int64))) for x, y in (train, test)
    )
    mean, std = _statistics(train_images)
    return ImageData(name, train_images, train_labels, test_images, test_labels, classes, mean, std)


def _statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel, in [0, 1] units, of uint8 images (N, C, H, W)."""
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


# digits


def _digits() -> ImageData:
    """The 1,797 scans that scikit-learn ships, 8x8, with one fixed stratified split."""
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
    return _assemble(
        "digits", (images[~test], labels[~test]), (images[test], labels[test]), tuple(str(k) for k in range(10))
    )


# CIFAR


@dataclass(frozen=True)
class _Cifar:
    """Where the official files of one CIFAR data set keep what."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str


CIFAR = {
    "cifar10": _Cifar(
        "cifar10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": _Cifar(
        "cifar100", "cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"
    ),
}


def _cifar(root: Path, spec: _Cifar) -> ImageData:
    """Read the official pickles of CIFAR-10 or CIFAR-100 from their folder or its parent."""
    files = (*spec.train, *spec.test, spec.meta)
    if (root / spec.folder).is_dir():
        folder = root / spec.folder
    elif root.name == spec.folder or any((root / f).is_file() for f in files):
        folder = root
    else:
        raise DataError(
            f"`data_dir` must be the folder {spec.folder} or its parent; "
            f"got data_dir={str(root)!r}, where it is not found. "
            f"Unpack the official python version of {spec.name} there."
        )
    for file in files:
        if not (folder / file).is_file():
            raise DataError(
                f"`data_dir` must hold {', '.join(files)}; got {str(folder)!r} without {file}. "
                f"Unpack the official archive of {spec.name} again."
            )
    path = folder / spec.meta
    names = _entry(_unpickle(path), spec.names, path)
    if not isinstance(names, list) or not names or not all(isinstance(n, str | bytes) for n in names):
        raise _malformed(path, f"{spec.names} must be a list of class names")
    classes = tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names)
    parts = {
        split: [_batch(folder / f, spec.labels, len(classes)) for f in batch]
        for split, batch in (("train", spec.train), ("test", spec.test))
    }
    train, test = ((np.concatenate([x for x, _ in p]), np.concatenate([y for _, y in p])) for p in parts.values())
    return _assemble(spec.name, train, test, classes)


def _batch(path: Path, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) and labels (n,) of one official pickle."""
    content = _unpickle(path)
    images, labels = _entry(content, "data", path), _entry(content, key, path)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        found = f"{images.dtype} of shape {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise _malformed(path, f"data must be a uint8 array of shape (n, 3072), got {found}")
    try:
        labels = np.asarray(labels)
    except (ValueError, TypeError):
        labels = np.empty(0, dtype=object)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise _malformed(
            path, f"{key} must be {len(images)} integers, one an image, got {labels.dtype} of shape {labels.shape}"
        )
    if not len(images):
        raise _malformed(path, "data must hold at least one image, got none")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise _malformed(path, f"{key} must lie in 0..{classes - 1}, got {wrong}")
    return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _malformed(path: Path, what: str) -> DataError:
    return DataError(
        f"`data_dir` must hold readable official files; got {str(path)!r}: {what}. Unpack the official archive again."
    )


def _entry(content: object, key: str, path: Path) -> object:
    """The value under `key`, which Python 2 wrote as bytes."""
    if not isinstance(content, dict):
        raise _malformed(path, f"must be a dictionary, got {type(content).__name__}")
    for k in (key.encode(), key):
        if k in content:
            value = content[k]
            return value.value if isinstance(value, _Array) else value
    raise _malformed(path, f"has no entry {key!r}")


def _unpickle(path: Path) -> object:
    """Read one pickle without running anything that it names."""
    try:
        return _RestrictedUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way; nothing but the decoding runs here
        raise _malformed(
            path, f"not a readable pickle ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


class _Dtype:
    """Stand-in for `numpy.dtype` in a pickle: integers only."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "|"
        if self.code not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"only integer arrays may appear, not {self.code!r}")

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def make(self) -> np.dtype:
        return np.dtype((self.order if self.order in "<>" else "=") + self.code)


class _Array:
    """Stand-in for `numpy.ndarray` in a pickle, filled from plain bytes with every length checked."""

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C").value


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = np.frombuffer(data, dtype=dtype.make()).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(dtype: _Dtype, data: bytes) -> int:
    return int(np.frombuffer(data, dtype=dtype.make(), count=1)[0])


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the pickle protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes may only be written in latin1, not {encoding!r}")
    return text.encode("latin-1")


def _empty() -> bytes:
    """How they write bytes of length zero."""
    return b""


class _RestrictedUnpickler(pickle._Unpickler):
    """Reads built-in containers, text, numbers and integer arrays; every global in the file names a stand-in above.

    The pure Python unpickler: the one in C reserves memory for whatever memo index a damaged file names, up to 64 GiB.
    """

    ALLOWED: ClassVar[dict[str, Callable]] = {
        "_reconstruct": _Array,
        "ndarray": _Array,
        "dtype": _Dtype,
        "_frombuffer": _from_buffer,
        "scalar": _scalar,
        "encode": _encode,
        "bytes": _empty,
    }
    MODULES = (
        "numpy",
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy.core.numeric",
        "numpy._core.numeric",
        "_codecs",
        "builtins",
        "__builtin__",
    )

    def find_class(self, module: str, name: str) -> Callable:
        if module not in self.MODULES or name not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which image data do not need, so nothing of it was run"
            )
        return self.ALLOWED[name]


# class folders


def _folder(root: Path, image_size: int | None) -> ImageData:
    """Read train/<class>/... and test/ or val/, RGB, every image decoded now."""
    if not (root / "train").is_dir():
        raise DataError(
            f"`data_dir` must hold a folder train/; got data_dir={str(root)!r} without it. "
            "Lay the images out as train/<class>/..."
        )
    held_out = next((s for s in ("test", "val") if (root / s).is_dir()), None)
    if held_out is None:
        raise DataError(
            f"`data_dir` must hold a folder test/ or val/ beside train/; got data_dir={str(root)!r} with neither. "
            "Lay the held-out images out as test/<class>/..."
        )
    splits = {split: _class_files(root / split) for split in ("train", held_out)}
    classes = tuple(splits["train"])
    differing = sorted(set(classes) ^ set(splits[held_out]))
    if differing:
        where = "train" if differing[0] in classes else held_out
        raise DataError(
            f"`data_dir` must have the same class folders in train/ and {held_out}/; "
            f"got {differing[0]!r} in {str(root / where)!r} only ({len(differing)} differ). "
            "Add the missing class folders or remove the others."
        )
    if len(classes) < 2:
        raise DataError(
            f"`data_dir` must hold at least two classes; got {classes[0]!r} alone in {str(root / 'train')!r}. "
            "Add the other class folders."
        )
    files = {
        split: [(f, k) for k, members in enumerate(found.values()) for f in members] for split, found in splits.items()
    }
    height, width = (image_size, image_size) if image_size else _decode(files["train"][0][0], None).shape[1:]
    need = sum(map(len, files.values())) * 3 * height * width
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    if memory is not None and need > memory:
        raise DataError(
            f"`image_size` must let all images fit in memory ({memory / 2**30:.1f} GiB); "
            f"got {need / 2**30:.1f} GiB at {height}x{width}. Use a smaller image_size."
        )
    arrays = [
        (_decode_all([f for f, _ in split], height, width, image_size), np.array([k for _, k in split]))
        for split in files.values()
    ]
    return _assemble("folder", *arrays, classes)


def _class_files(split: Path) -> dict[str, list[Path]]:
    """Image files of each class folder, classes and files sorted, nested folders included."""
    folders = sorted(d for d in split.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not folders:
        raise DataError(
            f"`data_dir` must hold one folder a class in {split.name}/; got none in {str(split)!r}. "
            f"Lay the images out as {split.name}/<class>/..."
        )
    found = {}
    for folder in folders:
        found[folder.name] = sorted(
            Path(place, f)
            for place, _, names in os.walk(folder)
            for f in names
            if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")
        )
        if not found[folder.name]:
            raise DataError(
                f"`data_dir` must hold images in every class folder; got none in {str(folder)!r}. "
                "Add images there or remove the class folder."
            )
    return found


def _decode(path: Path, image_size: int | None) -> np.ndarray:
    """One image as uint8 (3, H, W)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image_size:
                image.draft(
                    "RGB", (2 * image_size, 2 * image_size)
                )  # JPEG decodes large images at a fraction of their size, faster
            image = image.convert("RGB")
            if image_size:
                scale = image_size / min(image.size)
                width, height = (max(image_size, round(side * scale)) for side in image.size)
                left, top = (width - image_size) // 2, (height - image_size) // 2
                if (width, height) != image.size:
                    image = image.resize((width, height), Image.Resampling.BILINEAR)
                image = image.crop((left, top, left + image_size, top + image_size))
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # damaged files make PIL raise many types; all of them mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"`data_dir` must hold readable images; got {str(path)!r}, which cannot be decoded ({reason}). "
            "Replace or delete the file."
        ) from error


def _decode_all(files: list[Path], height: int, width: int, image_size: int | None) -> np.ndarray:
    """All images as uint8 (N, 3, height, width); decoding releases the GIL, so threads suffice."""
    out = np.empty((len(files), 3, height, width), dtype=np.uint8)

    def decode(i: int) -> None:
        image = _decode(files[i], image_size)
        if image.shape != out.shape[1:]:
            raise DataError(
                "`image_size` must be given when images differ in size; "
                f"got image_size=None with {str(files[i])!r} of {image.shape[1]}x{image.shape[2]} "
                f"among {height}x{width} (height x width). Pass image_size."
            )
        out[i] = image

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(len(files))):
            pass
    return out


# batches


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
        self.batch_size = batch_size
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

    def epoch(self, k: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch.

        Args:
            k: Number of the epoch, from 0.
            seed: Seed of the run.

        Returns:
            Iterator over `len(self)` pairs of images (batch_size, C, H, W) and labels (batch_size,).
        """
        count, margin = len(self._images), AUGMENTATIONS[self.augment]
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        )
        order = torch.randperm(count, generator=generator)
        rows, columns = torch.randint(0, 2 * margin + 1, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < 0.5
        # everything that an epoch needs goes to the device at once, so that no batch lets the host wait
        mirrored = flip[: len(self) * self.batch_size].view(len(self), self.batch_size).nonzero()
        numbers = mirrored[:, 0].bincount(minlength=len(self)).tolist()
        order, rows, columns, mirrored = (t.to(self.device) for t in (order, rows, columns, mirrored[:, 1]))
        mirrored = mirrored.split(numbers)
        canvas = self._canvas(margin)
        for i in range(len(self)):
            part = slice(i * self.batch_size, (i + 1) * self.batch_size)
            chosen = order[part]
            images = self._images.index_select(0, chosen)
            if self.augment == "crop-flip":
                images.index_copy_(0, mirrored[i], images.index_select(0, mirrored[i]).flip(self._columns))
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
        shape = [self.batch_size, *self._images.shape[1:]]
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
