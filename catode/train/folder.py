"""Images in class folders."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from catode.train.images import DataError, ImageData, assemble

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read(root: Path, image_size: int | None) -> ImageData:
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
    return assemble("folder", *arrays, classes)


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
