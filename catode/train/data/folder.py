"""Images in class folders: an array in memory where they fit, decoded in worker processes at every use where not."""

from __future__ import annotations

import io
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from catode.train.data.augment import crop_boxes
from catode.train.data.images import DataError, ImageData, statistics
from catode.train.stop import held_back, outlive

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ANNOTATIONS = "val_annotations.txt"
"""Where Tiny-ImageNet keeps the classes of the files in val/images/."""
ARRAY_SHARE = 0.25
"""Share of the memory that decoded images may take before they are left on the disk."""
STATISTICS_IMAGES = 4096
"""Training images, evenly spread over the classes, from which mean and standard deviation are taken."""
PAUSES = 0.5, 3.0
"""Seconds before a file that could not be read is tried again."""
BATCHES_AHEAD = 3
"""Batches that each worker decodes ahead of the step."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images on the disk, decoded whenever they are asked for; stands where a uint8 tensor (N, 3, H, W) would.

    Args:
        root: Folder that the names are relative to.
        names: Path of each image as the file system's bytes, shape (N,): one array, as a million `Path`s would take
            half a gigabyte, copied into every worker.
        height: Height of a decoded image.
        width: Its width.
        image_size: Side to which images are resized and cropped; None for images that share one size.
    """

    root: str
    names: np.ndarray
    height: int
    width: int
    image_size: int | None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> torch.Size:
        """That of the tensor it stands for."""
        return torch.Size((len(self), 3, self.height, self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor it stands for."""
        return math.prod(self.shape)

    def decode(self, i: int, crop: np.ndarray | None = None) -> np.ndarray:
        """One image, uint8, shape (3, H, W).

        Args:
            i: Which one.
            crop: Four uniform numbers for `crop_boxes`, to cut a random box from the whole picture; None for the centre.

        Raises:
            DataError: if the file cannot be decoded, or has another size and `image_size` is None.
        """
        path = os.path.join(self.root, os.fsdecode(self.names[i]))
        image = _decode(path, self.image_size, crop)
        if image.shape != (3, self.height, self.width):
            raise DataError(
                "`image_size` must be given when images differ in size; "
                f"got image_size=None with {path!r} of {image.shape[1]}x{image.shape[2]} "
                f"among {self.height}x{self.width} (height x width). Pass image_size."
            )
        return image

    def array(self, rows: np.ndarray | None = None) -> torch.Tensor:
        """Those images, or all, decoded by threads: decoding releases the GIL."""
        rows = np.arange(len(self)) if rows is None else rows
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)

        def fill(k: int) -> None:
            out[k] = self.decode(int(rows[k]))

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(len(rows))):
                pass
        return torch.from_numpy(out)


Request = tuple[np.ndarray, np.ndarray | None]
"""Numbers of the images of one batch, and the draws of their crops, shape (n, 4), or None."""


class _Decoding(Dataset):
    """Answers a request with a batch, uint8, shape (n, 3, H, W), or with the error that it met."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, request: Request) -> torch.Tensor | DataError:
        rows, crops = request
        out = np.empty((len(rows), *self.files.shape[1:]), dtype=np.uint8)
        try:
            for k, i in enumerate(rows):
                out[k] = self.files.decode(int(i), None if crops is None else crops[k])
        except DataError as error:
            return error
        return torch.from_numpy(out)


def stream(
    files: ImageFiles, requests: Sequence[Request], workers: int, *, pin: bool = False
) -> Iterator[torch.Tensor]:
    """Decoded batches in the order of the requests, which alone say what is in them.

    Args:
        files: The images.
        requests: One for each batch.
        workers: Processes that decode ahead; 0 decodes here, when a batch is asked for.
        pin: Deliver in page-locked memory, from where a copy to a GPU need not be waited for.

    Raises:
        DataError: if a file cannot be decoded, or a worker is killed.
    """
    loader = DataLoader(
        _Decoding(files),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        pin_memory=pin,
        worker_init_fn=outlive,
        generator=torch.Generator(),  # its own, or it would draw from the global one
    )
    with held_back():
        batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # the loader's word for a worker that died
            raise _worker_died(error, workers) from error
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _worker_died(error: RuntimeError, workers: int) -> DataError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return DataError(
        f"`workers` must be processes that stay alive; got workers={workers} and: {reason}. Use fewer workers or "
        "smaller batches, or give the machine more (shared) memory."
    )


@contextmanager
def workers_watched(workers: int) -> Iterator[None]:
    """Tell of a worker that dies while no batch is waited for: the loader's signal handler then raises wherever it is.

    Args:
        workers: How many there are.

    Raises:
        DataError: in place of the loader's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _worker_died(error, workers) from error


def read(
    root: Path, image_size: int | None, *, whole_pictures: bool = False, array_bytes: int | None = None
) -> ImageData:
    """Read train/<class>/... and test/ or val/, RGB.

    Decoded images of both splits stay in memory as an array if they take at most `array_bytes`; both are `ImageFiles` if
    not. Mean and standard deviation are those of up to `STATISTICS_IMAGES` training images, so that nothing but the
    place of the pixels depends on this.

    Args:
        root: The folder.
        image_size: Side to which images are resized and cropped; None for images that share one size.
        whole_pictures: The training images are needed at their own size, and so are left on the disk if `image_size` is
            given.
        array_bytes: The limit; None for `ARRAY_SHARE` of the machine's memory.

    Raises:
        DataError: if the layout or an image that is decoded now cannot be used.
    """
    if not (root / "train").is_dir():
        raise DataError(
            f"`data_dir` must hold a folder train/; got data_dir={str(root)!r} without it. "
            "Lay the images out as train/<class>/..."
        )
    annotations = root / "val" / ANNOTATIONS
    listed = annotations.is_file()
    held_out = "val" if listed else next((s for s in ("test", "val") if (root / s).is_dir()), None)
    if held_out is None:
        raise DataError(
            f"`data_dir` must hold a folder test/ or val/ beside train/; got data_dir={str(root)!r} with neither. "
            "Lay the held-out images out as test/<class>/..."
        )
    splits = {
        "train": _class_files(root, "train"),
        held_out: _annotated_files(root, annotations) if listed else _class_files(root, held_out),
    }
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
    if image_size:
        height = width = image_size
    else:
        height, width = _decode(os.path.join(root, splits["train"][classes[0]][0]), None).shape[1:]
    (train, train_labels), (test, test_labels) = (
        (
            ImageFiles(
                str(root), np.array([os.fsencode(f) for k in classes for f in found[k]]), height, width, image_size
            ),
            torch.from_numpy(np.repeat(np.arange(len(classes)), [len(found[k]) for k in classes])),
        )
        for found in splits.values()
    )
    sample = np.unique(np.linspace(0, len(train) - 1, min(len(train), STATISTICS_IMAGES)).round().astype(np.int64))
    stay = train if whole_pictures and image_size else None
    need = test.nbytes + (0 if stay else train.nbytes)
    if need <= (_array_bytes() if array_bytes is None else array_bytes):
        images = stay or train.array(), test.array()
    else:
        images = train, test
    mean, std = statistics(images[0][sample] if torch.is_tensor(images[0]) else train.array(sample))
    return ImageData("folder", images[0], train_labels, images[1], test_labels, classes, mean, std)


def _array_bytes() -> int:
    """Default limit of an array: a share of the memory of the machine or the control group, for each local process."""
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return int(min(found, default=2**34) * ARRAY_SHARE / local_processes())


def local_processes() -> int:
    """Processes of this run on this machine, as torchrun counts them."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """One worker for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes())


def _class_files(root: Path, split: str) -> dict[str, list[str]]:
    """Image files of each class folder relative to `root`, classes and files sorted, nested folders included."""
    folders = sorted(d for d in (root / split).iterdir() if d.is_dir() and not d.name.startswith("."))
    if not folders:
        raise DataError(
            f"`data_dir` must hold one folder a class in {split}/; got none in {str(root / split)!r}. "
            f"Lay the images out as {split}/<class>/..."
        )
    found = {}
    for folder in folders:
        found[folder.name] = sorted(
            os.path.join(within, f)
            for place, _, names in os.walk(folder)
            for within in [os.path.relpath(place, root)]  # once a folder: it is slow
            for f in names
            if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")
        )
        if not found[folder.name]:
            raise DataError(
                f"`data_dir` must hold images in every class folder; got none in {str(folder)!r}. "
                "Add images there or remove the class folder."
            )
    return found


def _annotated_files(root: Path, annotations: Path) -> dict[str, list[str]]:
    """Image files of each class as Tiny-ImageNet lists them: lines that begin with file name, tab, class."""
    found: dict[str, list[str]] = {}
    there = (
        {entry.name for entry in os.scandir(root / "val" / "images")} if (root / "val" / "images").is_dir() else set()
    )
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not label or name not in there:
            what = f"no file {name!r} in val/images/" if label else f"no class in {line[:40]!r}"
            raise DataError(
                f"`data_dir` must hold the images that {ANNOTATIONS} lists as file, tab, class; "
                f"got {str(annotations)!r}, line {number}: {what}. Unpack the data set again."
            )
        found.setdefault(label, []).append(os.path.join("val", "images", name))
    return {label: sorted(files) for label, files in sorted(found.items())}


def _decode(path: str, image_size: int | None, crop: np.ndarray | None = None) -> np.ndarray:
    """One image as uint8 (3, H, W): whole, or resized and its centre cut out, or a random box of it resized."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(_read(path))) as image:
            if image_size is None:
                return np.asarray(_rgb(image)).transpose(2, 0, 1)
            if crop is None:
                box, enough = None, 2 * image_size
            else:
                box = crop_boxes(crop[None], *reversed(image.size))[0]
                enough = math.ceil(image_size * max(*image.size) / min(box[2:]))
            before = image.size
            image.draft("RGB", (enough, enough))  # JPEG decodes large images at a fraction of their size, faster
            if box is not None:
                box *= image.size[0] / before[0]
            image = _rgb(image)
            return np.asarray(_centre(image, image_size) if box is None else _cut(image, box, image_size)).transpose(
                2, 0, 1
            )
    except Exception as error:  # damaged files make PIL raise many types; all of them mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", reason)  # the bytes have an address, the file has a name
        raise DataError(
            f"`data_dir` must hold readable images; got {str(path)!r}, which cannot be decoded ({reason}). "
            "Replace the file."
        ) from error


def _read(path: str) -> bytes:
    """A file's bytes; a disk or a network that fails for a moment is given two more chances."""
    for pause in PAUSES:
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return Path(path).read_bytes()


def _rgb(image):
    """An image in 8-bit RGB; transparency is left out, 16-bit grey is scaled down."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its grey values do not fit into 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its grey values are floating-point numbers")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _centre(image, side: int):
    """The shorter side resized to `side` pixels, the centre cut to a square."""
    from PIL import Image

    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + side, top + side))


def _cut(image, box: np.ndarray, side: int):
    """A box (left, top, width, height) resized to a square of `side` pixels."""
    from PIL import Image

    left, top, wide, high = box
    right, bottom = min(left + wide, image.size[0]), min(top + high, image.size[1])
    return image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
