"""Which files of a folder are the images of which class; what is not read is counted and told."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from catode.train.data.images import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ANNOTATIONS = "val_annotations.txt"
"""Where Tiny-ImageNet keeps the classes of the files in val/images/."""
READERS = 8
"""Threads that ask for files at once."""


class Skipped:
    """What is not read below a folder, by reason: how many, and the first one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, path: str | os.PathLike) -> None:
        number, first = self.found.get(reason, (0, path))
        self.found[reason] = number + 1, first

    def __str__(self) -> str:
        """Reasons in the order of their names: `.heic files (2, such as train/ant/a.heic), hidden files (1, ...)`."""
        return ", ".join(
            f"{reason} ({number}{', such as' if number > 1 else ':'} {os.path.relpath(first, self.root)})"
            for reason, (number, first) in sorted(self.found.items())
        )


def splits(root: Path) -> tuple[dict[str, dict[str, list[str]]], tuple[str, ...]]:
    """The image files of each class of train/ and of the held-out split.

    That is val/ as Tiny-ImageNet annotates it, else test/, else val/.

    Args:
        root: The folder.

    Returns:
        Paths relative to `root` by split and class, classes and files sorted; and what its user should know, one line each.

    Raises:
        DataError: if the layout cannot be used.
    """
    if not (root / "train").is_dir():
        raise DataError(
            f"`data_dir` must hold a folder train/; got data_dir={str(root)!r} without it. "
            "Lay the images out as train/<class>/..."
        )
    annotations = root / "val" / ANNOTATIONS
    listed = annotations.is_file()
    there = [name for name in (("val", "test") if listed else ("test", "val")) if (root / name).is_dir()]
    if not there:
        raise DataError(
            f"`data_dir` must hold a folder test/ or val/ beside train/; got data_dir={str(root)!r} with neither. "
            "Lay the held-out images out as test/<class>/..."
        )
    held_out, skipped, notes = there[0], Skipped(root), []
    if len(there) > 1:
        notes.append(
            f"{str(root)!r} holds test/ and val/: the images of {held_out}/ are held out, {there[1]}/ is not read."
        )
    found = {
        "train": _class_files(root, "train", skipped),
        held_out: _annotated_files(root, annotations, skipped) if listed else _class_files(root, held_out, skipped),
    }
    classes = tuple(found["train"])
    differing = sorted(set(classes) ^ set(found[held_out]))
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
    if skipped.found:
        notes.append(f"not read in {str(root)!r}: {skipped}. Images are files in {', '.join(IMAGE_SUFFIXES)}.")
    return found, tuple(notes)


def _class_files(root: Path, split: str, skipped: Skipped) -> dict[str, list[str]]:
    """Image files of each class folder relative to `root`, classes and files sorted, nested folders included."""
    folders = []
    for entry in sorted((root / split).iterdir()):
        if entry.name.startswith("."):
            skipped.add("hidden folders" if entry.is_dir() else "hidden files", entry)
        elif entry.is_dir():
            folders.append(entry)
        else:
            skipped.add("files outside the class folders", entry)
    if not folders:
        raise DataError(
            f"`data_dir` must hold one folder a class in {split}/; got none in {str(root / split)!r}. "
            f"Lay the images out as {split}/<class>/..."
        )
    found = {}
    for folder in folders:
        own = Skipped(root)
        found[folder.name] = sorted(_images_below(root, folder, (skipped, own)))
        if not found[folder.name]:
            raise DataError(
                f"`data_dir` must hold images in every class folder; got none in {str(folder)!r}"
                f"{f', but {own}' if own.found else ''}. Add images there or remove the class folder."
            )
    return found


def _images_below(root: Path, folder: Path, skipped: Sequence[Skipped]) -> list[str]:
    """Image files below a class folder relative to `root`; links to folders are not followed, what is hidden is left out."""
    images = []

    def refuse(error: OSError) -> None:
        raise DataError(
            f"`data_dir` must hold class folders that can be read; got {error.filename!r} ({error.strerror}). Change its "
            "permissions, or remove it."
        )

    for place, folders, names in os.walk(folder, onerror=refuse):
        for name in sorted(folders):
            path = os.path.join(place, name)
            reason = "hidden folders" if name.startswith(".") else "links to folders" if os.path.islink(path) else None
            if reason:
                folders.remove(name)
                for counts in skipped:
                    counts.add(reason, path)
        within = os.path.relpath(place, root)  # once a folder: it is slow
        for name in sorted(names):
            hidden = name.startswith(".")
            if name.lower().endswith(IMAGE_SUFFIXES) and not hidden:
                images.append(os.path.join(within, name))
                continue
            suffix = os.path.splitext(name)[1].lower()
            for counts in skipped:
                counts.add(
                    "hidden files" if hidden else f"{suffix} files" if suffix else "files without suffix",
                    os.path.join(place, name),
                )
    return images


def _annotated_files(root: Path, annotations: Path, skipped: Skipped) -> dict[str, list[str]]:
    """Image files of each class as Tiny-ImageNet lists them: lines that begin with file name, tab, class."""
    found: dict[str, list[str]] = {}
    images = root / "val" / "images"
    there = {entry.name for entry in os.scandir(images)} if images.is_dir() else set()
    first: dict[str, int] = {}
    for number, line in enumerate(annotations.read_text("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        what = ""
        if not label:
            what = f"no class in {line[:40]!r}"
        elif name not in there:
            what = f"no file {name!r} in val/images/"
        elif (before := first.setdefault(name, number)) != number:
            what = f"{name!r} again, which is in line {before}"
        if what:
            raise DataError(
                f"`data_dir` must hold the images that {ANNOTATIONS} lists as file, tab, class; "
                f"got {str(annotations)!r}, line {number}: {what}. Unpack the data set again."
            )
        found.setdefault(label, []).append(os.path.join("val", "images", name))
    listed = {os.path.basename(file) for files in found.values() for file in files}
    for name in sorted(there - listed):
        skipped.add(f"files that {ANNOTATIONS} does not list", images / name)
    for entry in sorted((root / "val").iterdir()):
        if entry not in (images, annotations):
            skipped.add("entries of val/ beside images/", entry)
    return {label: sorted(files) for label, files in sorted(found.items())}


def sizes(root: Path, names: Sequence[str]) -> np.ndarray:
    """Sizes of files below `root`, in bytes, int64."""

    def size(names: Sequence[str]) -> list[int]:
        found = []
        for name in names:
            path = os.path.join(root, name)
            try:
                status = os.stat(path)
            except OSError as error:
                raise unreadable(path, "read", error) from error
            if not stat.S_ISREG(status.st_mode):
                raise unreadable(path, "read", OSError("it is not a regular file"))
            found.append(status.st_size)
        return found

    parts = [names[i : i + 4096] for i in range(0, len(names), 4096)]
    return np.concatenate([np.array(part, dtype=np.int64) for part in in_threads(size, parts)])


def unreadable(path: str, what: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", reason)  # the address of the bytes; the file is named
    return DataError(
        f"`data_dir` must hold readable images; got {path!r}, which cannot be {what} ({reason}). Replace the file."
    )


def in_threads(function: Callable, items: Sequence) -> list:
    """The function of each item, in order; for functions that wait for a disk, as more threads than cores are at work."""
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        return list(pool.map(function, items))
