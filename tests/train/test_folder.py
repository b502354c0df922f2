"""Images in folders: what is decoded where, in which formats, and that none of it changes a batch."""

import errno
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_data import cut, pixels, write_cifar10, write_folder
from test_distributed import command, several, together

from catode.train import loop
from catode.train.__main__ import main
from catode.train.data import Batches, DataError, folder, load
from catode.train.data.augment import draw
from catode.train.data.folder import ImageFiles


def batches(images, workers=0, augment="crop-flip", batch_size=4, **options):
    return Batches(
        images.train_images,
        images.train_labels,
        batch_size,
        images.mean,
        images.std,
        augment=augment,
        workers=workers,
        **options,
    )


def same(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) and one
    return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures of 12x10 and one of another size in each class and split."""
    root = write_folder(tmp_path_factory.mktemp("pictures"), per_class=6)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            Image.fromarray(pixels(40, 30, 3, seed=len(name))).save(root / split / name / "large.jpg")
    return root


# The same batches, wherever images are kept and decoded


@pytest.mark.parametrize("augment", ["none", "shift", "crop-flip"])
def test_an_array_and_files_give_the_same_batches(pictures, augment):
    array, files = (load("folder", pictures, image_size=8, array_bytes=limit) for limit in (None, 0))
    assert torch.is_tensor(array.train_images) and isinstance(files.train_images, ImageFiles)
    assert array.train_images.shape == files.train_images.shape == (14, 3, 8, 8)
    assert (array.mean, array.std, array.classes) == (files.mean, files.std, files.classes)
    assert same(batches(array, 0, augment).epoch(1, 2), batches(files, 0, augment).epoch(1, 2))
    found = batches(files).evaluation(files.test_images, files.test_labels, 5)
    assert same(found, batches(array).evaluation(array.test_images, array.test_labels, 5))


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_batches_do_not_depend_on_the_workers(pictures, augment):
    files = load("folder", pictures, image_size=8, array_bytes=0, augment=augment)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    whole = list(batches(files, 0, augment).epoch(3, 4))
    for workers in (1, 2):
        assert same(whole, batches(files, workers, augment).epoch(3, 4))
        assert same(whole[1:], batches(files, workers, augment).epoch(3, 4, start=1))
    assert torch.equal(torch.rand(3), expected), "the global random state must be left alone"
    assert not torch.equal(whole[0][0], next(batches(files, 0, augment).epoch(2, 4))[0])


@pytest.mark.parametrize(("augment", "mixup"), [("crop-flip", 0.0), ("resized-crop", 0.0), ("resized-crop", 0.4)])
def test_shards_of_files_make_up_the_batch(pictures, augment, mixup):
    files = load("folder", pictures, image_size=8, array_bytes=0, augment=augment)
    options = {"augment": augment, "mixup": mixup, "classes": 2, "batch_size": 6}
    whole = list(batches(files, **options).epoch(0, 1))
    for world in (2, 3):
        for rank in range(world):
            part = batches(files, shard=(rank, world), **options).epoch(0, 1)
            assert same(((x[rank::world], y[rank::world]) for x, y in whole), part)


def test_nothing_before_the_start_nor_of_other_processes_is_decoded(pictures, monkeypatch):
    files = load("folder", pictures, image_size=8, array_bytes=0)
    asked, decode = [], ImageFiles.decode
    monkeypatch.setattr(ImageFiles, "decode", lambda self, i, crop=None: asked.append(i) or decode(self, i, crop))
    list(batches(files, shard=(1, 2)).epoch(0, 0, start=2))
    assert len(asked) == 2
    asked.clear()
    list(batches(files, shard=(1, 2), mixup=0.3, classes=2).epoch(0, 0))
    assert len(asked) == 3 * 2, "partners are the process' own where it takes whole pairs"


def test_resized_crops_are_cut_from_the_whole_picture_on_any_machine(pictures):
    for limit in (None, 0):
        read = load("folder", pictures, image_size=8, augment="resized-crop", array_bytes=limit)
        assert isinstance(read.train_images, ImageFiles)
        assert torch.is_tensor(read.test_images) == (limit is None)
    large = int(np.flatnonzero([b"large" in name for name in read.train_images.names])[0])
    whole = np.asarray(Image.open(pictures / "train" / "ant" / "large.jpg").convert("RGB"), dtype=float)
    crop = np.array([0.25, 0.5, 0.0, 1.0])  # a square of 31 % of the picture in the corner below left
    box = folder.crop_boxes(crop[None], 40, 30)[0]
    corner = whole[round(box[1]) :, : round(box[2])].mean((0, 1))
    assert read.train_images.decode(large, crop).mean((1, 2)) == pytest.approx(corner, abs=4)


def test_without_an_image_size_resized_crops_need_no_files(tmp_path):
    root = write_folder(tmp_path)
    array, files = (load("folder", root, augment="resized-crop", array_bytes=limit) for limit in (None, 0))
    assert torch.is_tensor(array.train_images) and isinstance(files.train_images, ImageFiles)
    assert same(batches(array, 0, "resized-crop").epoch(1, 2), batches(files, 0, "resized-crop").epoch(1, 2))


def test_the_limit_of_an_array_is_a_share_of_the_memory(monkeypatch):
    alone = folder._array_bytes()
    assert 0 < alone <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
    workers = folder.default_workers()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert folder._array_bytes() == alone // 2 and folder.default_workers() == max(1, workers // 2)


# Formats and layouts


def save_as(path, mode, image):
    if mode == "P":
        image.quantize(16).save(path, transparency=bytes(range(16)) if path.suffix == ".png" else 3)
    elif mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("L", "1", "LA", "RGBA", "P", "I;16")),
        *((mode, "jpg") for mode in ("L", "CMYK", "YCbCr")),
        ("P", "gif"),
        ("CMYK", "tif"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, suffix, recwarn):
    root = write_folder(tmp_path, size=(16, 16))
    grey = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[:, None], 16, axis=1)
    image = Image.fromarray(np.where(grey > 127, 255, 0).astype(np.uint8) if mode == "1" else grey).convert("RGB")
    path = root / "train" / "ant" / f"0a.{suffix}"
    save_as(path, mode, image)
    decoded = load("folder", root).train_images[1].float()
    assert torch.allclose(decoded, torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float(), atol=20)
    assert not [w for w in recwarn if "Palette" in str(w.message)]


def resized_whole(image, side):
    """The shorter side resized, the whole picture with it, then the centre cut out."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(whole.crop((left, top, left + side, top + side))).astype(int)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(0, 99))
@example(20000, 1, 8, 0)
@example(1, 20000, 8, 0)
@example(60000, 1, 4, 0)
@example(30000, 3, 16, 1)
@settings(max_examples=60, deadline=None)
def test_the_centre_is_that_of_the_whole_picture_resized(width, height, side, seed):
    image = Image.fromarray(pixels(height, width, 3, seed=seed) // 128 * 255)  # black and white: the hardest
    expected = resized_whole(image, side)
    assert np.abs(np.asarray(folder._centre(image, side)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(20000, 1), (1, 60000), (60000, 2)])
@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
@pytest.mark.parametrize("crop", [None, np.array([1.0, 0.5, 0.5, 0.5])])
def test_a_very_long_picture_takes_no_more_memory_than_itself_and_its_crop(tmp_path, monkeypatch, size, kind, crop):
    path = tmp_path / f"long.{kind}"
    Image.new("RGB", size, (200, 100, 50)).save(path, **({"quality": 100} if kind == "jpg" else {}))
    made, new = [], Image.Image._new
    monkeypatch.setattr(Image.Image, "_new", lambda self, core: made.append(math.prod(core.size)) or new(self, core))
    decoded = folder._decode(str(path), path.read_bytes(), 224, crop)
    assert decoded.shape == (3, 224, 224) and np.abs(decoded.mean((1, 2)) - (200, 100, 50)).max() < 2
    assert made and max(made) <= max(math.prod(size), 224 * 224)


def test_decoding_very_long_pictures_takes_less_than_64_mib(tmp_path):
    Image.new("L", (20000, 1)).save(tmp_path / "wide.png")
    Image.new("L", (1, 60000)).save(tmp_path / "tall.png")
    code = (
        "import resource, sys; from pathlib import Path; from catode.train.data import folder; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "[folder._decode(p, Path(p).read_bytes(), 224).shape for p in sys.argv[1:]]; print(peak() - before)"
    )
    files = [str(tmp_path / name) for name in ("wide.png", "tall.png")]
    told = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert int(told.stdout) * (1 if sys.platform == "darwin" else 1024) < 2**26, "4.5 and 12.6 GB when resized whole"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_pictures_are_turned_as_the_camera_was_held(tmp_path, orientation, kind):
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :16], picture[16:, :16] = (250, 0, 0), (0, 0, 250)
    exif, path = Image.Exif(), tmp_path / f"turned.{kind}"
    exif[folder.ORIENTATION] = orientation
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    Image.fromarray(picture).save(path, exif=exif, **lossless)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    assert expected.shape == ((48, 32, 3) if orientation in folder.QUARTER_TURNS else (32, 48, 3))

    def decoded(image_size, crop=None):
        return folder._decode(str(path), path.read_bytes(), image_size, crop).transpose(1, 2, 0).astype(int)

    assert np.array_equal(decoded(None), expected)
    assert np.abs(decoded(32) - resized_whole(Image.fromarray(expected.astype(np.uint8)), 32)).max() <= 3
    crop = np.array([0.4, 0.5, 1.0, 1.0])  # a square in the corner below right
    left, top, wide, high = folder.crop_boxes(crop[None], *expected.shape[:2])[0]
    corner = expected[round(top) : round(top + high), round(left) : round(left + wide)]
    assert np.abs(decoded(8, crop).mean((0, 1)) - corner.mean((0, 1))).max() < 12


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_metadata_leave_a_picture_as_it_is_without_a_warning(tmp_path, exif, workers, recwarn, capfd):
    root = write_folder(tmp_path)
    for name in ("train/ant/0", "train/bee/1", "test/ant/2"):
        (root / f"{name}.png").unlink()
        Image.fromarray(pixels(10, 12, 3)).save(root / f"{name}.jpg", quality=100, exif=exif)
    assert load("folder", root).train_images.shape == (6, 3, 10, 12)
    files = load("folder", root, array_bytes=0)
    assert sum(len(x) for x, _ in batches(files, workers, batch_size=6).epoch(0, 0)) == 6
    assert not recwarn.list and capfd.readouterr() == ("", "")


UNREADABLE = {
    "truncated.jpg": lambda path: cut(path, "JPEG"),
    "truncated.png": lambda path: cut(path, "PNG"),
    "text.jpg": lambda path: path.write_text("not a picture"),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "float.tif": lambda path: Image.fromarray(np.full((12, 10), 0.5, np.float32)).save(path),
    "deep.tif": lambda path: Image.fromarray(np.full((12, 10), 1 << 20, np.int32)).save(path),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_an_unreadable_file_is_named_when_it_is_decoded(tmp_path, name, augment):
    UNREADABLE[name](write_folder(tmp_path) / "train" / "bee" / name)
    with pytest.raises(DataError, match=f"`data_dir` must hold readable images; got .*{name}") as caught:
        files = load("folder", tmp_path, image_size=8, array_bytes=0, augment=augment)
        list(batches(files, 0, augment, batch_size=7).epoch(0, 0))
    assert "\n" not in str(caught.value)


def fails(times, error):
    """A way to read a file that fails so many times first."""
    left, read = [error] * times, Path.read_bytes

    def attempt(path):
        if left:
            raise left.pop()
        return read(path)

    return attempt, left


def test_a_file_that_fails_for_a_moment_is_read_again(tmp_path, monkeypatch):
    files = load("folder", write_folder(tmp_path), array_bytes=0).train_images
    expected, waited = files.decode(0), []
    monkeypatch.setattr(folder.time, "sleep", waited.append)
    broken = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(Path, "read_bytes", fails(2, broken)[0])
    assert np.array_equal(files.decode(0), expected) and waited == list(folder.PAUSES)
    monkeypatch.setattr(Path, "read_bytes", fails(3, broken)[0])
    with pytest.raises(DataError, match=r"Input/output error\)\. Replace the file\.$"):
        files.decode(0)
    attempt, left = fails(3, FileNotFoundError(errno.ENOENT, "No such file or directory"))
    monkeypatch.setattr(Path, "read_bytes", attempt)
    with pytest.raises(DataError, match="No such file"):
        files.decode(0)
    assert len(left) == 2


def repaint(path, value=7):
    """Another picture in a file of the same size."""
    size = path.stat().st_size
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert path.stat().st_size == size


def swap(one, other):
    """Exchange two files or folders."""
    os.rename(one, one.with_name("aside"))
    os.rename(other, one)
    os.rename(one.with_name("aside"), other)


OTHER_IMAGES = {
    "a renamed file": lambda r: os.rename(r / "train/bee/1.png", r / "train/bee/7.png"),
    "a file of another class": lambda r: os.rename(r / "train/bee/1.png", r / "train/ant/7.png"),
    "one file less": lambda r: (r / "test/bee/1.png").unlink(),
    "two classes exchanged": lambda r: swap(r / "train/ant", r / "train/bee"),
    "two images exchanged": lambda r: swap(r / "train/ant/0.png", r / "train/bee/1.png"),
    "another training image": lambda r: repaint(r / "train/ant/2.png"),
    "another test image": lambda r: repaint(r / "test/ant/2.png"),
    "a longer file": lambda r: (r / "test/bee/0.png").open("ab").write(b"\0"),
    "renamed classes": lambda r: [os.rename(r / split / "bee", r / split / "bug") for split in ("train", "test")],
}


@pytest.mark.parametrize("change", OTHER_IMAGES)
def test_other_images_have_another_fingerprint_wherever_they_are_kept(tmp_path, change):
    write_folder(tmp_path / "set")
    places = [{}, {"array_bytes": 0}, {"augment": "resized-crop", "image_size": 10}]
    first = {load("folder", tmp_path / "set", **more).fingerprint for more in places}
    assert len(first) == 1, "one set has one fingerprint"
    os.rename(tmp_path / "set", tmp_path / "moved")
    assert {load("folder", tmp_path / "moved").fingerprint} == first
    OTHER_IMAGES[change](tmp_path / "moved")
    assert len({load("folder", tmp_path / "moved", **more).fingerprint for more in places} | first) == 2


def test_a_changed_picture_anywhere_changes_the_fingerprint(tmp_path, monkeypatch):
    """Of the same name and size, and outside the sample from which mean and deviation are taken."""
    monkeypatch.setattr(folder, "STATISTICS_IMAGES", 2)
    root, places = write_folder(tmp_path), [{}, {"array_bytes": 0}]
    for path in sorted(root.rglob("*.png")):
        first = {load("folder", root, image_size=8, **more).fingerprint for more in places}
        assert len(first) == 1
        content, when = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # behind the pixels
        os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
        assert not {load("folder", root, image_size=8, **more).fingerprint for more in places} & first
        path.write_bytes(content)  # at another time
        assert load("folder", root, image_size=8).fingerprint in first


def test_of_very_many_bytes_every_size_and_the_bytes_of_a_sample_are_in_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "STATISTICS_IMAGES", 2)
    root, places = write_folder(tmp_path), [{}, {"array_bytes": 0}]
    whole = sum(path.stat().st_size for path in (root / "train").rglob("*.png"))
    for limit, names in ((whole, ["0.png"] * 5 + ["1.png"] * 4 + ["2.png"] * 5), (0, ["0.png"] * 3 + ["2.png"] * 3)):
        monkeypatch.setattr(folder, "WHOLE_BYTES", limit)
        read = []
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "read_bytes", lambda path, real=Path.read_bytes, read=read: read.append(path.name) or real(path)
            )
            first = {load("folder", root, image_size=8, array_bytes=0).fingerprint}
        assert sorted(read) == names, "those of each split for the fingerprint, two of train for its mean"
        first |= {load("folder", root, image_size=8, **more).fingerprint for more in places}
        assert len(first) == 1
    repaint(root / "train" / "ant" / "1.png")
    assert {load("folder", root, image_size=8, **more).fingerprint for more in places} == first, "not in the sample"
    repaint(root / "train" / "bee" / "2.png")  # the last one is
    assert not {load("folder", root, image_size=8, **more).fingerprint for more in places} & first


def test_an_unreadable_file_in_a_worker_and_one_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "STATISTICS_IMAGES", 2)  # so that this one is not decoded at the start
    files = load("folder", write_folder(tmp_path), array_bytes=0)
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^`data_dir` must hold readable images; got .*bee/1\.png[^\n]*$"):
        list(batches(files, 1, batch_size=6).epoch(0, 0))
    Image.fromarray(pixels(9, 9, 3)).save(tmp_path / "train" / "bee" / "1.png")
    with pytest.raises(
        DataError, match=r"^`data_dir` must hold images that do not change while .*bee/1\.png' of \d+ bytes"
    ):
        list(batches(files, 1, batch_size=6).epoch(0, 0))
    files = load("folder", tmp_path, array_bytes=0)
    with pytest.raises(DataError, match=r"^`image_size` must be given when images differ in size; .*1\.png' of 9x9"):
        list(batches(files, 1, batch_size=6).epoch(0, 0))


@pytest.mark.parametrize("change", ["deleted", "longer", "shorter", "repainted", "exchanged"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_during_training_is_named(tmp_path, change, workers):
    files = load("folder", write_folder(tmp_path), array_bytes=0)
    path = tmp_path / "train" / "bee" / "1.png"
    content = path.read_bytes()
    expected = "cannot be read"
    if change == "repainted":
        repaint(path)
    elif change == "exchanged":
        swap(path, path.with_name("2.png"))
    else:
        path.unlink()
    if change in ("longer", "shorter"):
        path.write_bytes(content + b"\0" if change == "longer" else content[:-1])
    if change != "deleted":
        same = path.stat().st_size == len(content)
        expected = "with other contents" if same else f"of {path.stat().st_size} bytes instead of {len(content)}"
    with pytest.raises(DataError, match=rf"bee/1\.png'[^\n]* {expected}[^\n]*$"):
        list(batches(files, workers, batch_size=6).epoch(0, 0))


NO_FILES = {
    "pipe": lambda path: os.mkfifo(path),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_no_file_is_named_before_anything_is_read(tmp_path, kind, split):
    NO_FILES[kind](write_folder(tmp_path) / split / "ant" / "0.jpg")
    with pytest.raises(
        DataError, match=r"^`data_dir` must hold readable images; got .*ant/0\.jpg', which cannot be read"
    ):
        load("folder", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_what_is_wrong_with_an_image_is_told_without_addresses(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError) as caught:
        folder._decode(str(tmp_path / "a.png"), content, 8)
    assert "a.png" in str(caught.value) and " at 0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_killed_worker_is_one_clear_line(tmp_path, monkeypatch):
    files = load("folder", write_folder(tmp_path), array_bytes=0)
    monkeypatch.setattr(ImageFiles, "decode", lambda self, i, crop=None: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"^`workers` must be processes that stay alive; got workers=1 and: [^\n]*$"):
        list(batches(files, 1).epoch(0, 0))


def write_tiny(root):
    """Tiny-ImageNet's own layout, with its unlabelled test images."""
    write_folder(root, size=(8, 8))
    for name in ("ant", "bee"):
        (root / "train" / name / "images").mkdir()
        for path in (root / "train" / name).glob("*.png"):
            path.rename(root / "train" / name / "images" / path.name)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0.png\t0\t0\t7\t7\n")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for k in range(4):
        Image.fromarray(np.full((8, 8, 3), 10 * k, np.uint8)).save(root / "val" / "images" / f"val_{k}.png")
        lines.append(f"val_{k}.png\t{'bee' if k % 2 == 0 else 'ant'}\t0\t0\t7\t7\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_the_own_layout_of_tiny_imagenet_is_read(tmp_path):
    read = load("folder", write_tiny(tmp_path))
    assert read.classes == ("ant", "bee") and read.train_labels.tolist() == [0] * 3 + [1] * 3
    assert read.test_labels.tolist() == [0, 0, 1, 1]
    assert read.test_images[:, 0, 0, 0].tolist() == [10, 30, 0, 20]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", "in .*train' only"),
        ("val_0.png\tant\nval_1.png\tbee\nval_2.png\tcat\n", "got 'cat' in .*val' only"),
        ("val_9.png\tant\n", r"line 1: no file 'val_9\.png' in val/images/"),
        ("val_0.png\tant\n\nval_1.png\n", "line 3: no class in"),
    ],
)
def test_wrong_annotations_are_refused(tmp_path, lines, expected):
    (write_tiny(tmp_path) / "val" / "val_annotations.txt").write_text(lines)
    with pytest.raises(DataError, match=f"^`data_dir` must [^\n]*{expected}"):
        load("folder", tmp_path)


# What is not read is told


def test_a_picture_annotated_twice_is_refused(tmp_path):
    write_tiny(tmp_path)
    path = tmp_path / "val" / "val_annotations.txt"
    lines = path.read_text().splitlines()
    name = lines[0].split("\t")[0]
    path.write_text("\n".join([*lines, f"{name}\tother"]))
    with pytest.raises(DataError, match=rf"line {len(lines) + 1}: {name!r} again, which is in line 1\."):
        load("folder", tmp_path)


def test_a_folder_within_a_class_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path)
    closed = next(path for path in sorted((tmp_path / "train").iterdir())) / "closed"
    closed.mkdir()
    scan = os.scandir

    def scandir(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(closed))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=rf"got {re.escape(repr(str(closed)))} \(Permission denied\)\."):
        load("folder", tmp_path)


def test_a_picture_of_too_many_pixels_is_refused_in_one_line(tmp_path, monkeypatch, recwarn):
    write_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        DataError, match=r"cannot be decoded \(Image size \(\d+ pixels\) exceeds limit of 100 pixels[^\n]*$"
    ):
        load("folder", tmp_path)
    assert not recwarn


def test_no_more_workers_start_than_there_are_batches(pictures, monkeypatch):
    files, started, loader = load("folder", pictures, image_size=4, array_bytes=0).test_images, [], folder.DataLoader

    def counted(*given, num_workers, **options):
        started.append(num_workers)
        return loader(*given, num_workers=num_workers, **options)

    monkeypatch.setattr(folder, "DataLoader", counted)
    assert len(list(folder.stream(files, [(np.array([0]), None), (np.array([1]), None)], 8))) == 2
    assert started == [2]


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def copy_of_an_image(root, *places):
    for place in places:
        put(root / place, (root / "train" / "ant" / "0.png").read_bytes())


NOT_READ = {
    "a hidden folder": (
        lambda r: copy_of_an_image(
            r, "train/ant/.ipynb_checkpoints/0-checkpoint.png", "train/ant/.ipynb_checkpoints/1.png"
        ),
        "hidden folders (1: train/ant/.ipynb_checkpoints)",
    ),
    "a hidden folder further down": (
        lambda r: copy_of_an_image(r, "test/bee/more/.cache/deep/0.png"),
        "hidden folders (1: test/bee/more/.cache)",
    ),
    "a hidden class": (lambda r: copy_of_an_image(r, "train/.git/0.png"), "hidden folders (1: train/.git)"),
    "hidden files": (
        lambda r: copy_of_an_image(r, "train/ant/._0.jpg", "test/ant/.DS_Store", "train/.x.png"),
        "hidden files (3, such as train/.x.png)",
    ),
    "formats that are not read": (
        lambda r: [put(r / f"train/ant/{name}") for name in ("a.heic", "b.HEIC", "c.avif")],
        ".avif files (1: train/ant/c.avif), .heic files (2, such as train/ant/a.heic)",
    ),
    "files without suffix": (lambda r: put(r / "test/bee/README"), "files without suffix (1: test/bee/README)"),
    "a nested link": (
        lambda r: (r / "train/ant/more").symlink_to(r / "train/bee"),
        "links to folders (1: train/ant/more)",
    ),
    "a link in a circle": (
        lambda r: (r / "test/ant/round").symlink_to(r / "test"),
        "links to folders (1: test/ant/round)",
    ),
    "a file beside the classes": (
        lambda r: copy_of_an_image(r, "train/loose.png"),
        "files outside the class folders (1: train/loose.png)",
    ),
    "a class that is a dangling link": (
        lambda r: (r / "train/cat").symlink_to("nowhere"),
        "files outside the class folders (1: train/cat)",
    ),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_not_read_is_counted_by_reason(tmp_path, kind):
    before = load("folder", write_folder(tmp_path))
    assert before.notes == ()
    add, expected = NOT_READ[kind]
    add(tmp_path)
    after = load("folder", tmp_path)
    assert len(after.notes) == 1 and after.notes[0].startswith(
        f"not read in {str(tmp_path)!r}: {expected}. Images are "
    )
    assert after.fingerprint == before.fingerprint and torch.equal(after.train_images, before.train_images)


def test_links_to_files_and_to_classes_and_folders_within_classes_are_read(tmp_path):
    write_folder(tmp_path / "set", per_class=2)
    os.rename(tmp_path / "set" / "train" / "bee", tmp_path / "bees")
    (tmp_path / "set" / "train" / "bee").symlink_to(tmp_path / "bees")
    (tmp_path / "set" / "train" / "ant" / "link.png").symlink_to(tmp_path / "bees" / "0.png")
    copy_of_an_image(tmp_path / "set", "train/ant/more/still.more/5.PNG")
    read = load("folder", tmp_path / "set")
    assert read.notes == () and read.train_labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_class_without_readable_images_says_what_it_holds(tmp_path):
    write_folder(tmp_path)
    for k in range(3):
        os.rename(tmp_path / "train" / "ant" / f"{k}.png", tmp_path / "train" / "ant" / f"{k}.heic")
    expected = r"got none in '[^']*train/ant', but \.heic files \(3, such as train/ant/0\.heic\)\. Add images"
    with pytest.raises(DataError, match=expected):
        load("folder", tmp_path)


def test_of_test_and_val_the_one_that_is_read_is_named(tmp_path):
    write_folder(tmp_path / "both")
    shutil.copytree(tmp_path / "both" / "test", tmp_path / "both" / "val")
    repaint(tmp_path / "both" / "val" / "ant" / "0.png")
    both = load("folder", tmp_path / "both")
    assert both.notes == (f"{str(tmp_path / 'both')!r} holds test/ and val/: test/ is the test, val/ is not read.",)
    own = load("folder", tmp_path / "both", validation_share=0.1)
    assert own.notes == (
        f"{str(tmp_path / 'both')!r} holds test/ and val/: val/ is for validation, test/ is read once, at the end.",
    )
    assert torch.equal(own.train_images, both.train_images) and torch.equal(own.test_images, both.test_images)
    assert torch.equal(own.validation_labels, own.test_labels) and own.fingerprint != both.fingerprint
    assert (own.validation_images != own.test_images).flatten(1).any(1).tolist() == [True] + [False] * 5
    shutil.rmtree(tmp_path / "both" / "val")
    (tmp_path / "both" / "val").mkdir()  # no class folders: no labels
    share = load("folder", tmp_path / "both", validation_share=0.4)
    assert share.notes == both.notes and len(share.validation_labels) == 2
    shutil.rmtree(tmp_path / "both" / "val")
    alone = load("folder", tmp_path / "both")
    assert alone.notes == () and torch.equal(alone.test_images, both.test_images)
    write_tiny(tmp_path / "tiny")
    (unlisted,) = load("folder", tmp_path / "tiny").notes[1:]
    assert unlisted.startswith(
        f"not read in {str(tmp_path / 'tiny')!r}: .txt files (2, such as train/ant/ant_boxes.txt). "
    )
    assert "val/ is the test, test/ is not read." in load("folder", tmp_path / "tiny").notes[0]
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "tiny" / "val" / "images" / "val_9.png")
    shutil.copytree(tmp_path / "tiny" / "train" / "ant", tmp_path / "tiny" / "val" / "ant")
    more = load("folder", tmp_path / "tiny").notes[1]
    assert "entries of val/ beside images/ (1: val/ant), " in more
    assert "files that val_annotations.txt does not list (1: val/images/val_9.png)" in more


# From end to end


@pytest.fixture
def quick(monkeypatch):
    """Runs without latencies and pictures, which take longer than these runs themselves."""
    monkeypatch.setattr(loop.result, "latency_ms", lambda *_: [[1.0], [1.0]])
    monkeypatch.setattr("catode.report.report.write", lambda _: None)


def run(root, out, *flags):
    line = ["--arch=resnet14", "--threads=1", "--dataset=folder", "--image-size=8", "--batch-size=4", "--nu=1"]
    line += ["--check-every=2", "--measure-every=1", "--warmup-epochs=0", "--memory=10", "--epochs=2"]
    return main([*line, f"--data-dir={root}", f"--out={out}", *flags])


def assert_same_weights(one, other):
    one, other = (torch.load(out / "model.pt", weights_only=True) for out in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_ends_the_same_from_an_array_and_from_files(pictures, tmp_path, quick, capsys):
    flags = ["--mixup=0.3", "--label-smoothing=0.1"]
    for name, more in (("array", []), ("files", ["--array-gib=0", "--workers=1"])):
        assert run(pictures, tmp_path / name, *flags, *more) == 0
        assert re.search(r"waiting  \d+\.\d % of the step time, for images", capsys.readouterr().out)
    assert_same_weights(tmp_path / "array", tmp_path / "files")


def cut_off(root, out, monkeypatch, *flags):
    """A run that ends after its first checkpoint within the training."""
    save = loop.Trainer.save_state

    def leave(self):
        save(self)
        if self.step:
            raise DataError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "save_state", leave)
        assert run(root, out, *flags) == 2
    assert list(out.glob("checkpoint-*.pt")) and not (out / "result.json").exists()


@pytest.mark.parametrize(("before", "after"), [("1", "0"), ("0", "1"), ("0", "0.5")])
def test_a_run_goes_on_bit_by_bit_with_another_place_for_its_images(
    pictures, tmp_path, quick, monkeypatch, before, after
):
    assert run(pictures, tmp_path / "whole") == 0
    cut_off(pictures, tmp_path / "run", monkeypatch, f"--array-gib={before}")
    assert main(["--resume", str(tmp_path / "run"), f"--array-gib={after}", "--threads=1", "--workers=1"]) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("place", ["1", "0"])
def test_a_run_does_not_go_on_with_other_images(tmp_path, quick, monkeypatch, capsys, place):
    root = write_folder(tmp_path / "images", per_class=6)
    cut_off(root, tmp_path / "run", monkeypatch, f"--array-gib={place}")
    for spoil in (
        lambda: swap(root / "train" / "ant", root / "train" / "bee"),
        lambda: [repaint(path) for path in (root / "train").rglob("*.png")],
        lambda: repaint(root / "test" / "bee" / "3.png"),
    ):
        aside = tmp_path / "aside"
        shutil.copytree(root, aside)
        spoil()
        capsys.readouterr()
        assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 2
        told = capsys.readouterr().err
        assert "`data_dir` must hold the images that the run began with; got others" in told and told.count("\n") == 1
        shutil.rmtree(root)
        os.rename(aside, root)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 0


CHANGES = {
    "repainted": repaint,
    "exchanged": lambda path: swap(path, path.with_name(f"{(int(path.stem) + 1) % 6}.png")),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "in place of it a folder": lambda path: [path.unlink(), path.mkdir()],
}


@pytest.mark.parametrize("when", ["between epochs", "within an epoch", "in the evaluation"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_that_changes_stops_the_run_in_one_line_and_its_return_lets_it_go_on(
    tmp_path, quick, monkeypatch, capsys, change, when
):
    root, flags = (
        write_folder(tmp_path / "images", per_class=6),
        ["--array-gib=0", "--workers=0", "--checkpoint-every=1", "--validation-share=0"],
    )
    assert run(root, tmp_path / "whole", *flags) == 0
    late = next(
        i for i in draw("crop-flip", 12, 1, 0).order[8:].tolist() if i < 6
    )  # in the last batch of the second epoch
    path = root / ("test" if when == "in the evaluation" else "train") / "ant" / f"{late}.png"
    shutil.copytree(root, tmp_path / "good")
    save, done = loop.Trainer.save_state, []

    def changing(self):
        save(self)
        if not done and self.step == (4 if when == "within an epoch" else 3):
            done.append(CHANGES[change](path))

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "save_state", changing)
        assert run(root, tmp_path / "run", *flags) == 2
    lines = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("error: ")]
    named = {late, (late + 1) % 6} if change == "exchanged" else {late}
    assert len(lines) == 1 and any(f"ant/{number}.png" in lines[0] for number in named)
    assert lines[0].endswith(f"Then continue with --resume {tmp_path / 'run'}")
    assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 2, "and is refused before it is mended"
    assert len(capsys.readouterr().err.splitlines()) == 1
    shutil.rmtree(root)
    os.rename(tmp_path / "good", root)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_run_does_not_go_on_with_permuted_labels(tmp_path, quick, monkeypatch, capsys):
    """The same pixels of CIFAR: labels permuted within a file, two of them exchanged, and the classes' names permuted."""
    root = tmp_path / "cifar"
    write_cifar10(root)
    flags = ["--dataset=cifar10", "--arch=resnet14", "--hidden-scale=0.25", "--threads=1", "--nu=0", "--epochs=2"]
    flags += ["--batch-size=10", f"--data-dir={root}", f"--out={tmp_path / 'run'}"]
    save = loop.Trainer.save_state

    def leave(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "save_state", leave)
        assert main(flags) == 130
    for name, key, permute in (
        ("data_batch_2", b"labels", lambda values: values[1:] + values[:1]),
        ("data_batch_1", b"labels", lambda values: [values[1], values[0], *values[2:]]),
        ("test_batch", b"labels", lambda values: values[::-1]),
        ("batches.meta", b"label_names", lambda values: values[::-1]),
    ):
        content = (root / name).read_bytes()
        held = pickle.loads(content, encoding="bytes")
        key = key if key in held else key.decode()
        assert permute(held[key]) != held[key]
        (root / name).write_bytes(pickle.dumps({**held, key: permute(held[key])}))
        capsys.readouterr()
        assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: `data_dir` must hold the images that the run ") and told.count("\n") == 1
        (root / name).write_bytes(content)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 0


def test_a_dry_run_tells_what_the_run_tells(tmp_path, quick, capsys):
    root = write_folder(tmp_path / "images", per_class=6)
    put(root / "train" / "ant" / "a.heic")
    (root / "val").mkdir()
    assert run(root, tmp_path / "run") == 0
    told = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("note: ")]
    assert run(root, tmp_path / "dry", "--dry-run") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")] == told
    assert len(told) == 2 and not (tmp_path / "dry").exists()


def test_a_run_that_met_an_unreadable_picture_goes_on_when_it_is_mended(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(folder, "STATISTICS_IMAGES", 2)  # so that not every picture is decoded at the start
    root, flags = write_folder(tmp_path / "images", per_class=6), ["--augment=resized-crop", "--workers=0"]
    assert run(root, tmp_path / "whole", *flags) == 0
    path, save = root / "train" / "ant" / "2.png", loop.Trainer.save_state
    good = path.read_bytes()

    def damage(self):
        save(self)
        path.write_bytes(good[:50])

    monkeypatch.setattr(loop.Trainer, "save_state", damage)
    capsys.readouterr()
    assert run(root, tmp_path / "run", *flags) == 2
    lines = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "2.png', which cannot be decoded" in lines[0]
    assert lines[0].endswith(f"Then continue with --resume {tmp_path / 'run'}")
    monkeypatch.setattr(loop.Trainer, "save_state", save)
    path.write_bytes(good)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1", "--workers=1"]) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_run_tells_once_what_it_does_not_read(tmp_path, quick, capsys):
    root = write_folder(tmp_path / "images", per_class=6)
    put(root / "train" / "ant" / "a.heic")
    (root / "val").mkdir()
    for flag in ("--array-gib=1", "--array-gib=0"):
        assert run(root, tmp_path / flag, flag, "--workers=1") == 0
        told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("note: ")]
        assert [line for line in told if "holds test/ and val/" in line or ".heic files (1: " in line] == told[:2]
        assert len(told[:2]) == 2 and not [line for line in told[2:] if "heic" in line or "val/" in line]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, quick, monkeypatch, capsys):
    root = write_folder(tmp_path / "images", per_class=6)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("folder", "~/images").fingerprint == load("folder", root).fingerprint
    cut_off("~/images", tmp_path / "run", monkeypatch)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 0
    capsys.readouterr()
    assert run("~nobody-of-this-name/images", tmp_path / "other") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: `data_dir` must be an existing folder; got data_dir='~nobody-of-this-name/images'")
    assert told.count("\n") == 1


def at_home(home, flags):
    """Exit status and errors of a run whose home folder this is."""
    os.environ["HOME"] = str(home)
    status, _, told = command(flags)
    return status, told


def test_two_processes_that_see_other_images_do_not_begin(tmp_path):
    changes = {
        "an image less": lambda r: (r / "train/bee/5.png").unlink(),
        "a test image less": lambda r: (r / "test/bee/5.png").unlink(),
        "two classes exchanged": lambda r: swap(r / "train/ant", r / "train/bee"),
        "another image": lambda r: repaint(r / "train/ant/2.png"),
    }
    write_folder(tmp_path / "first" / "images", per_class=6)
    flags = ["--arch=resnet14", "--threads=1", "--dataset=folder", "--data-dir=~/images", "--image-size=8", "--nu=0"]
    flags += ["--batch-size=4", "--epochs=1", "--sync-bn", f"--out={tmp_path / 'run'}", "--workers=0"]
    cases = {rank: [] for rank in range(2)}
    for number, (change, place) in enumerate((c, p) for c in changes.values() for p in ("0", "1")):
        other = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", other)
        change(other / "images")
        for rank, home in enumerate((tmp_path / "first", other)):
            cases[rank].append((home, [*flags, f"--array-gib={place}"]))
    told, silent = together(tmp_path, several, at_home, tuple(cases.values()))
    for status, error in told:
        assert status == 2 and "the 2 processes must begin with the same settings, data and checkpoint" in error
        assert error.count("\n") == 1
    assert silent == [(2, "")] * len(told) and not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to groups of processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_lets_the_workers_finish_the_step(tmp_path, number):
    write_folder(tmp_path / "images", per_class=8)
    flags = [
        "--dataset=folder",
        f"--data-dir={tmp_path / 'images'}",
        "--arch=resnet14",
        "--hidden-scale=0.25",
        "--nu=0",
    ]
    flags += ["--image-size=8", "--batch-size=4", "--array-gib=0", "--workers=2", "--threads=1", "--epochs=9999"]
    command = [sys.executable, "-m", "catode.train", *flags, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not list((tmp_path / "run").glob("checkpoint-*.pt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, number)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    found = re.search(r"stopped after step (\d+); continue with --resume ", told.splitlines()[-1])
    assert found and (tmp_path / "run" / f"checkpoint-{found[1]}.pt").exists() and "Traceback" not in told, told
