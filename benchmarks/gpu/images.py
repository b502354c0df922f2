"""CIFAR-10 from an archive of JPEG files, laid out as the official pickles: python -m benchmarks.gpu.images ARCHIVE DEST

The archive is a tar of ``.../{train,test}/<class>/*.jpg``, compressed in any way that `tarfile` reads. Files are decoded by several
processes. Prints what it took as JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "cifar-10-batches-py"
META = "batches.meta"
PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
SIDE, CHUNK, MOST_PROCESSES = 32, 500, 16


def complete(folder: Path) -> Path | None:
    """The official pickles in a folder, or in a folder of it; None if they are not there."""
    for place in (folder, folder / FOLDER):
        if all((place / name).is_file() for name in (*PARTS["train"], *PARTS["test"], META)):
            return place
    return None


def decoded(files: Sequence[bytes]) -> np.ndarray:
    """Pixels of files, uint8, shape (n, 3072), channel by channel."""
    rows = []
    for content in files:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        if pixels.shape != (SIDE, SIDE, 3):
            raise ValueError(f"`images` must hold pictures of {SIDE} x {SIDE} pixels; got shape {pixels.shape}.")
        rows.append(pixels.transpose(2, 0, 1).reshape(-1))
    return np.stack(rows)


def read(archive: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    """Class, name and content of every file of each split, sorted by class and name.

    Raises:
        ValueError: if the archive does not hold both splits with the same classes.
    """
    found: dict[str, list[tuple[str, str, bytes]]] = {split: [] for split in PARTS}
    with tarfile.open(archive, mode="r|*") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) >= 3 and parts[-3] in found:
                found[parts[-3]].append((parts[-2], parts[-1], tar.extractfile(member).read()))
    labels = [{label for label, _, _ in files} for files in found.values()]
    if not labels[0] or labels[0] != labels[1]:
        raise ValueError(f"`images` must be an archive of train/ and test/ with the same class folders; got {archive}.")
    return {split: sorted(files) for split, files in found.items()}


def unpack(archive: Path, target: Path) -> dict[str, float]:
    """Write the official pickles; the order of the images is a fixed random one.

    Args:
        archive: The archive.
        target: A folder, which gets the folder of the pickles.

    Returns:
        Seconds of each part, and the number of images.
    """
    marks = [time.perf_counter()]
    files = read(archive)
    marks.append(time.perf_counter())
    classes = sorted({label for label, _, _ in files["train"]})
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    pixels: dict[str, np.ndarray] = {}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for split, own in files.items():
            contents = [content for _, _, content in own]
            chunks = [contents[i : i + CHUNK] for i in range(0, len(contents), CHUNK)]
            pixels[split] = np.concatenate(list(pool.imap(decoded, chunks)))
    marks.append(time.perf_counter())
    out = target / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    for split, names in PARTS.items():
        own = files[split]
        labels = np.array([classes.index(label) for label, _, _ in own])
        order = np.random.default_rng(0).permutation(len(own))
        for name, rows in zip(names, np.array_split(order, len(names)), strict=True):
            batch = {b"batch_label": name.encode(), b"labels": labels[rows].tolist(), b"data": pixels[split][rows]}
            batch[b"filenames"] = [own[i][1].encode() for i in rows]
            (out / name).write_bytes(pickle.dumps(batch))
    meta = {b"num_cases_per_batch": 10000, b"label_names": [c.encode() for c in classes], b"num_vis": 3 * SIDE**2}
    (out / META).write_bytes(pickle.dumps(meta))
    marks.append(time.perf_counter())
    parts = dict(zip(("read", "decoded", "written"), np.diff(marks).round(2).tolist(), strict=True))
    return {**parts, "processes": processes, "images": sum(map(len, files.values()))}


def make_small(archive: Path, each: int = 16) -> None:
    """An archive of random pictures in the same form, to try the way of the real one."""
    rng = np.random.default_rng(0)
    with tarfile.open(archive, "w:xz") as tar:
        for split, number in (("train", each), ("test", max(each // 4, 2))):
            for label in range(10):
                for k in range(number):
                    file = io.BytesIO()
                    pixels = np.full((SIDE, SIDE, 3), 25 * label, dtype=np.uint8)
                    Image.fromarray(pixels + rng.integers(0, 20, pixels.shape, dtype=np.uint8)).save(file, "JPEG")
                    info = tarfile.TarInfo(f"images/{split}/class{label}/{k:04}.jpg")
                    info.size = file.tell()
                    file.seek(0)
                    tar.addfile(info, file)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    print(json.dumps(unpack(args.archive, args.target)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
