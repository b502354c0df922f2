"""Images in class folders: an array in memory if they fit, else decoded in worker processes at every use."""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from catode.train.data import listing
from catode.train.data.augment import crop_boxes
from catode.train.data.images import DataError, ImageData, held_out, statistics
from catode.train.stop import held_back, outlive

ARRAY_SHARE = 0.25
"""Largest share of the memory for decoded images; more stay on the disk."""
STATISTICS_IMAGES = 4096
"""Training images, evenly spread over the classes, from which mean and standard deviation are taken."""
WHOLE_BYTES = 2**32
"""Most bytes in the image files of a split that are all read when a run begins, to know each of them again; of larger splits
only `STATISTICS_IMAGES`, evenly spread."""
LARGE, _LARGE = 2**24, threading.Lock()
"""Pixels from which images are decoded one at a time, so that a few of them do not fill the memory."""
PAUSES = 0.5, 3.0
"""Seconds before a file that could not be read is tried again."""
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
"""Number of the EXIF tag, and its values that exchange height and width."""
BATCHES_AHEAD = 3
"""Batches that each worker process decodes ahead."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images on the disk, decoded at every use; replaces a uint8 tensor (N, 3, H, W).

    Args:
        root: Folder that the names are relative to.
        names: Path of each image as the file system's bytes, shape (N,): one array, as a million `Path`s would take
            half a gigabyte, copied into every worker.
        sizes: Size of each file in bytes when the run began, int64, shape (N,).
        digests: Digest of each file's bytes when the run began, uint64, shape (N,); 0 where it was not read.
        height: Height of a decoded image.
        width: Its width.
        image_size: Side to which images are resized and cropped; None for images that share one size.
    """

    root: str
    names: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    height: int
    width: int
    image_size: int | None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded images as a tensor, (N, 3, H, W)."""
        return torch.Size((len(self), 3, self.height, self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images as a tensor."""
        return math.prod(self.shape)

    def path(self, i: int) -> str:
        """Where one image is."""
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def decode(self, i: int, crop: np.ndarray | None = None) -> np.ndarray:
        """One image, uint8, shape (3, H, W).

        Args:
            i: Index of the image.
            crop: Uniform numbers for `crop_boxes`, shape (4,), to crop a random box of the original image; None for the
                centre.

        Raises:
            DataError: if the file cannot be decoded or has changed since the run began, or if the image has another size and
                `image_size` is None.
        """
        path = self.path(i)
        content = _content(path)
        image = _decode(path, content, self.image_size, crop)
        if len(content) != self.sizes[i] or self.digests[i] not in (0, _digest(content)):
            size = f" of {len(content)} bytes instead of {self.sizes[i]}" if len(content) != self.sizes[i] else ""
            raise DataError(
                f"`data_dir` must hold images that do not change while a run uses them; got {path!r}"
                f"{size or ' with other contents'}. Restore the file, or start anew."
            )
        if image.shape != (3, self.height, self.width):
            raise DataError(
                "`image_size` must be given when images differ in size; "
                f"got image_size=None with {path!r} of {image.shape[1]}x{image.shape[2]} "
                f"among {self.height}x{self.width} (height x width). Pass image_size."
            )
        return image

    def array(self, rows: np.ndarray | None = None) -> torch.Tensor:
        """The images `rows`, or all, uint8 (n, 3, H, W), decoded by threads: decoding releases the GIL."""
        rows = np.arange(len(self)) if rows is None else rows
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)

        def fill(k: int) -> None:
            out[k] = self.decode(int(rows[k]))

        with _quiet_metadata(), ThreadPoolExecutor(max_workers=min(listing.READERS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(len(rows))):
                pass
        return torch.from_numpy(out)


def contents(files: ImageFiles) -> bytes:
    """Digest of image files: every name and size, and the bytes of those that were read when the run began."""
    whole = hashlib.sha256(b"\0".join(files.names.tolist()))
    whole.update(files.sizes.tobytes())
    whole.update(files.digests.tobytes())
    return whole.digest()


def _digest(content: bytes) -> int:
    """64 bits of a file's SHA-256, not 0."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") or 1


def _digests(root: Path, names: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Digests of image files, uint64, shape (N,): of all, or of a sample where they hold more than `WHOLE_BYTES`, else 0.

    Raises:
        DataError: if a file cannot be read.
    """
    found = np.zeros(len(names), dtype=np.uint64)
    which = np.arange(len(names)) if sizes.sum() <= WHOLE_BYTES else _sample(len(names))

    def read(part: np.ndarray) -> None:
        found[part] = [_digest(_content(os.path.join(root, os.fsdecode(names[i])))) for i in part]

    listing.in_threads(
        read, np.array_split(which, -(-len(which) // 256))
    )  # a task for each file would cost more than it
    return found


def _sample(count: int) -> np.ndarray:
    """Numbers of up to `STATISTICS_IMAGES` of so many images, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, STATISTICS_IMAGES)).round().astype(np.int64))


Request = tuple[np.ndarray, np.ndarray | None]
"""Indices of the images of one batch, shape (n,), and the uniform numbers of their crops, shape (n, 4), or None."""


class _Decoding(Dataset):
    """Returns the batch of a request, uint8, shape (n, 3, H, W), or the error of a file."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, request: Request) -> torch.Tensor | DataError:
        rows, crops = request
        out = np.empty((len(rows), *self.files.shape[1:]), dtype=np.uint8)
        try:
            with _quiet_metadata():
                for k, i in enumerate(rows):
                    out[k] = self.files.decode(int(i), None if crops is None else crops[k])
        except DataError as error:
            return error
        return torch.from_numpy(out)


def stream(
    files: ImageFiles, requests: Sequence[Request], workers: int, *, pin: bool = False
) -> Iterator[torch.Tensor]:
    """Decoded batches, uint8 (n, 3, H, W), in the order of the requests.

    Args:
        files: The images.
        requests: One for each batch.
        workers: Worker processes that decode ahead; 0 decodes in this process.
        pin: Return batches in pinned memory, for asynchronous copies to a GPU.

    Raises:
        DataError: if a file cannot be decoded, or a worker process is killed.
    """
    workers = min(workers, len(requests))
    loader = DataLoader(
        _Decoding(files),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        pin_memory=pin,
        worker_init_fn=outlive,
        generator=torch.Generator(),  # otherwise it would use the global one
    )
    with held_back():
        batches = iter(loader)
    try:
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
    finally:
        batches = None  # ends the workers here and now; an error's traceback would keep them until it is collected


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
    root: Path,
    image_size: int | None,
    *,
    validation_share: float = 0.0,
    split_seed: int = 0,
    whole_pictures: bool = False,
    array_bytes: int | None = None,
) -> ImageData:
    """Read train/<class>/... and test/ or val/, RGB; with both, val/ is for validation, else a share of train/ is.

    If the decoded images of all splits take at most `array_bytes` they are arrays in memory, else `ImageFiles`. Mean and
    standard deviation are those of up to `STATISTICS_IMAGES` training images in both cases, so results do not depend on it.

    Args:
        root: The folder.
        image_size: Side to which images are resized and cropped, pixels; None if all images have the same size.
        validation_share: Share of the training images of every class for validation, where val/ does not hold them; 0 for no
            validation images.
        split_seed: Seed of that choice.
        whole_pictures: The training images are needed at their original size, so they stay on the disk if `image_size`
            is given.
        array_bytes: The limit in bytes; None for `ARRAY_SHARE` of the machine's memory.

    Raises:
        DataError: if the layout is wrong or an image cannot be decoded.
    """
    splits, notes = listing.splits(root, validation=validation_share > 0)
    classes = tuple(splits["train"])
    names = {split: np.array([os.fsencode(f) for k in classes for f in found[k]]) for split, found in splits.items()}
    labels = {
        split: np.repeat(np.arange(len(classes)), [len(found[k]) for k in classes]) for split, found in splits.items()
    }
    if validation_share and "validation" not in splits:
        chosen = held_out(labels["train"], validation_share, split_seed)
        for parts in (names, labels):
            parts["train"], parts["validation"] = parts["train"][~chosen], parts["train"][chosen]
    sizes = {split: listing.sizes(root, own) for split, own in names.items()}  # before any file is opened
    if image_size:
        height = width = image_size
    else:
        first = os.path.join(root, os.fsdecode(names["train"][0]))
        with _quiet_metadata():
            height, width = _decode(first, _content(first), None).shape[1:]
    files = {
        split: ImageFiles(str(root), own, sizes[split], _digests(root, own, sizes[split]), height, width, image_size)
        for split, own in names.items()
    }
    sample = _sample(len(files["train"]))
    on_disk = {"train"} if whole_pictures and image_size else set()
    need = sum(own.nbytes for split, own in files.items() if split not in on_disk)
    if need > (_array_bytes() if array_bytes is None else array_bytes):
        on_disk = set(files)
    images = {split: own if split in on_disk else own.array() for split, own in files.items()}
    train = images["train"]
    mean, std = statistics(train[sample] if torch.is_tensor(train) else train.array(sample))
    order = ("train", "validation", "test")
    digest = b"".join(contents(files[split]) for split in order if split in files)
    parts = {f"{split}_images": own for split, own in images.items()}
    parts |= {f"{split}_labels": torch.from_numpy(own) for split, own in labels.items()}
    return ImageData(name="folder", classes=classes, mean=mean, std=std, contents=digest, notes=notes, **parts)


def _array_bytes() -> int:
    """Default `array_bytes`: a share of the memory of the machine or its cgroup, divided by the local processes."""
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no cgroup, or no limit
            continue
    return int(min(found, default=2**34) * ARRAY_SHARE / local_processes())


def local_processes() -> int:
    """Number of processes of this run on this machine, set by torchrun."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """One worker process for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes())


def _decode(path: str, content: bytes, image_size: int | None, crop: np.ndarray | None = None) -> np.ndarray:
    """One image as uint8 (3, H, W): whole, or resized and its centre cut out, or a random box of it resized."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image, _LARGE if math.prod(image.size) > LARGE else nullcontext():
            if image.format not in ("JPEG", "MPO"):
                image.load()  # TIFF is turned by this
            orientation = _orientation(image)
            if image_size is None:
                return np.asarray(_upright(_rgb(image), orientation)).transpose(2, 0, 1)
            before = image.size[::-1] if orientation in QUARTER_TURNS else image.size
            if crop is None:
                box, enough = None, 2 * image_size
            else:
                box = crop_boxes(crop[None], *reversed(before))[0]
                enough = math.ceil(image_size * max(*before) / min(box[2:]))
            image.draft("RGB", (enough, enough))  # JPEG decodes large images at a fraction of their size, faster
            image = _upright(_rgb(image), orientation)
            if box is not None:
                box *= image.size[0] / before[0]
            return np.asarray(_centre(image, image_size) if box is None else _cut(image, box, image_size)).transpose(
                2, 0, 1
            )
    except Exception as error:  # damaged files make PIL raise many types; all of them mean the same to the user
        raise listing.unreadable(path, "decoded", error) from error


def _content(path: str) -> bytes:
    """A file's bytes.

    Raises:
        DataError: if they cannot be read.
    """
    try:
        return _read(path)
    except OSError as error:
        raise listing.unreadable(path, "read", error) from error


def _read(path: str) -> bytes:
    """A file's bytes; two retries, for a disk or network that fails temporarily."""
    for pause in PAUSES:
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return Path(path).read_bytes()


@contextmanager
def _quiet_metadata() -> Iterator[None]:
    """Silence Pillow's warnings of damaged metadata, which name no file; only the orientation is read of them.

    Its warning of images of more than 89 million pixels becomes an error.

    Enter it outside the threads that decode: the filters of warnings are common to all.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # more pixels than Pillow takes without a word
        yield


def _orientation(image) -> int:
    """How the camera was held, 1 to 8 as EXIF counts; 1, upright, where nothing readable says so."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata make PIL raise many types; the picture may be whole
        return 1


def _upright(image, orientation: int):
    """An image turned and mirrored as its orientation demands."""
    from PIL.Image import Transpose

    method = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def _rgb(image):
    """An image in 8-bit RGB; transparency is dropped, 16-bit grey is scaled to 8 bits."""
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
    """The shorter side resized to `side` pixels, the centre cut to a square; nothing outside the square is resized."""
    from PIL import Image

    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) == image.size:
        return image.crop((left, top, left + side, top + side))
    # only what the square is made of, with the reach of the filter: of 20000x1 pixels the whole would be 20000 squares
    x, y = image.size[0] / width, image.size[1] / height
    box = np.array([left * x, top * y, (left + side) * x, (top + side) * y])
    reach = np.ceil([max(1, x), max(1, y)]) + 1
    near = np.concatenate([np.maximum(0, np.floor(box[:2]) - reach), np.minimum(image.size, np.ceil(box[2:]) + reach)])
    box = (box - np.tile(near[:2], 2)).clip(0, np.tile(near[2:] - near[:2], 2))
    return image.crop(tuple(near.astype(int).tolist())).resize(
        (side, side), Image.Resampling.BILINEAR, tuple(box.tolist())
    )


def _cut(image, box: np.ndarray, side: int):
    """A box (left, top, width, height) resized to a square of `side` pixels."""
    from PIL import Image

    left, top, wide, high = box
    right, bottom = min(left + wide, image.size[0]), min(top + high, image.size[1])
    return image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
