"""Reader of the official pickle files of CIFAR-10 and CIFAR-100 that runs no code from them."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from catode.train.data.download import alone, fetch
from catode.train.data.images import DataError, ImageData, assemble


@dataclass(frozen=True)
class _Cifar:
    """File names, dictionary keys and download address of one CIFAR data set."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str
    url: str
    md5: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files to read."""
        return (*self.train, *self.test, self.meta)


CIFAR = {
    "cifar10": _Cifar(
        "cifar10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": _Cifar(
        "cifar100",
        "cifar-100-python",
        ("train",),
        ("test",),
        "meta",
        "fine_labels",
        "fine_label_names",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
}


def _find(root: Path, spec: _Cifar) -> Path | None:
    """The folder of the official files, `root` or a folder in it; None if not found."""
    if (root / spec.folder).is_dir():
        return root / spec.folder
    return root if any((root / f).is_file() for f in spec.files) else None


def download(root: Path, spec: _Cifar) -> None:
    """Download and unpack the official archive, unless its files exist; an archive that exists is used.

    Args:
        root: The official folder or its parent; created if it does not exist.
        spec: The data set.

    Raises:
        DataError: if the archive cannot be downloaded, has a wrong checksum, or cannot be unpacked.
    """
    if root.name == spec.folder:
        root = root.parent
    archive, folder, part = root / spec.url.rpartition("/")[2], root / spec.folder, root / (spec.folder + ".part")

    def complete() -> bool:
        return any(all((place / file).is_file() for file in spec.files) for place in (folder, root))

    if complete():  # before locking, as the folder may be read-only
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / f".{archive.name}.lock"):
            if complete():
                return
            fetch(spec.url, archive, spec.md5)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            with tarfile.open(archive) as packed:
                for file in spec.files:
                    with packed.extractfile(f"{spec.folder}/{file}") as source, (part / file).open("wb") as target:
                        shutil.copyfileobj(source, target)
            folder.mkdir(exist_ok=True)
            for file in spec.files:
                os.replace(part / file, folder / file)
            part.rmdir()
            archive.unlink()
    except (OSError, KeyError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"`data_dir` must be a folder where {spec.name} can be unpacked; got data_dir={str(root)!r}: {reason}. "
            "Choose another folder, or unpack the official archive by hand."
        ) from error


def read(root: Path, spec: _Cifar, validation_share: float = 0.0, split_seed: int = 0) -> ImageData:
    """Read the official pickles of CIFAR-10 or CIFAR-100 from their folder or its parent; shares as `assemble` takes them."""
    folder, files = _find(root, spec), spec.files
    if folder is None and root.name == spec.folder:
        folder = root
    if folder is None:
        raise DataError(
            f"`data_dir` must be the folder {spec.folder} or its parent; "
            f"got data_dir={str(root)!r}, where it is not found. "
            f"Add --download, or unpack the official python version of {spec.name} there."
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
    return assemble(spec.name, train, test, classes, validation_share, split_seed)


def _batch(path: Path, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, 3, 32, 32), and labels, int64 (n,), of one official pickle."""
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
    """The value under `key`, a text or, as written by Python 2, bytes."""
    if not isinstance(content, dict):
        raise _malformed(path, f"must be a dictionary, got {type(content).__name__}")
    for k in (key.encode(), key):
        if k in content:
            value = content[k]
            return value.value if isinstance(value, _Array) else value
    raise _malformed(path, f"has no entry {key!r}")


def _unpickle(path: Path) -> object:
    """Read one pickle without running code from it."""
    try:
        return _RestrictedUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
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
    """Stand-in for `_codecs.encode`, with which Python 3 writes bytes in the pickle protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes may only be written in latin1, not {encoding!r}")
    return text.encode("latin-1")


def _empty() -> bytes:
    """Stand-in for `bytes`, which these protocols call for an empty value."""
    return b""


class _RestrictedUnpickler(pickle._Unpickler):
    """Reads built-in containers, text, numbers and integer arrays; every global in the file maps to a stand-in above.

    Pure Python: the C unpickler allocates memory for any memo index in a damaged file, up to 64 GiB.
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
                f"it names {module}.{name}, which image data do not need; none of its code was run"
            )
        return self.ALLOWED[name]
