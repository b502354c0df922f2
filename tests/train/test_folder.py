"""Images in folders: what is decoded where, in which formats, and that none of it changes a batch."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import cut, pixels, write_folder

from catode.train import loop
from catode.train.__main__ import main
from catode.train.data import Batches, DataError, folder, load
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


def test_other_images_have_another_fingerprint(tmp_path):
    write_folder(tmp_path)
    options = [{}, {"array_bytes": 0}]
    first = [load("folder", tmp_path, **more).fingerprint for more in options]
    assert first == [load("folder", tmp_path, **more).fingerprint for more in options]
    os.rename(tmp_path / "train" / "bee" / "1.png", tmp_path / "train" / "bee" / "7.png")
    assert load("folder", tmp_path, array_bytes=0).fingerprint != first[1]
    os.rename(tmp_path / "train" / "bee" / "7.png", tmp_path / "train" / "ant" / "7.png")
    for more, before in zip(options, first, strict=True):
        assert load("folder", tmp_path, **more).fingerprint != before


def test_an_unreadable_file_in_a_worker_and_one_of_another_size(tmp_path):
    files = load("folder", write_folder(tmp_path), array_bytes=0)
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^`data_dir` must hold readable images; got .*bee/1\.png[^\n]*$"):
        list(batches(files, 1, batch_size=6).epoch(0, 0))
    Image.fromarray(pixels(9, 9, 3)).save(tmp_path / "train" / "bee" / "1.png")
    with pytest.raises(DataError, match=r"^`image_size` must be given when images differ in size; .*1\.png' of 9x9"):
        list(batches(files, 1, batch_size=6).epoch(0, 0))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_what_is_wrong_with_an_image_is_told_without_addresses(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError) as caught:
        folder._decode(str(tmp_path / "a.png"), 8)
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


# From end to end


@pytest.fixture
def quick(monkeypatch):
    """Runs without latencies and pictures, which take longer than these runs themselves."""
    monkeypatch.setattr(loop.trainer, "latency_ms", lambda *_: [[1.0], [1.0]])
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
        assert re.search(r"waiting  \d+\.\d % of the steps' time, for images", capsys.readouterr().out)
    assert_same_weights(tmp_path / "array", tmp_path / "files")


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
    assert lines[0].endswith(f"Then go on with --resume {tmp_path / 'run'}")
    monkeypatch.setattr(loop.Trainer, "save_state", save)
    path.write_bytes(good)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1", "--workers=1"]) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


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
    found = re.search(r"stopped after step (\d+); go on with --resume ", told.splitlines()[-1])
    assert found and (tmp_path / "run" / f"checkpoint-{found[1]}.pt").exists() and "Traceback" not in told, told
