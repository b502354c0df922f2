"""Data sets in memory, and batches."""

import contextlib
import dataclasses
import io
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catode.train.data import AUGMENTATIONS, Batches, DataError, cifar, load


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_cifar10(folder, per_batch=6, protocol=2):
    """Small files in the official layout; returns what they hold."""
    folder.mkdir(parents=True)
    held = []
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images = pixels(per_batch, 3072, seed=k)
        labels = [(k + j) % 10 for j in range(per_batch)]
        content = {b"batch_label": name.encode(), b"labels": labels, b"data": images, b"filenames": [b"x"] * per_batch}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
        held.append((images, labels))
    names = [b"c%d" % k for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol))
    return held


def write_cifar100(folder, count=12):
    folder.mkdir(parents=True)
    for k, name in enumerate(("train", "test")):
        content = {
            b"fine_labels": [(7 * j + k) % 100 for j in range(count)],
            b"coarse_labels": [0] * count,
            b"data": pixels(count, 3072, seed=k),
        }
        (folder / name).write_bytes(pickle.dumps(content, 2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"f%d" % k for k in range(100)]}, 2))


def write_folder(root, held_out="test", size=(12, 10), classes=("ant", "bee"), per_class=3):
    for split in ("train", held_out):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(per_class):
                image = Image.fromarray(pixels(size[1], size[0], 3, seed=10 * k + j))
                image.save(root / split / name / f"{j}.png")
    return root


# What is read


def test_digits():
    one, other = load("digits"), load("digits")
    assert one.train_images.shape == (len(one.train_labels), 1, 8, 8) and one.train_images.dtype == torch.uint8
    assert len(one.train_labels) + len(one.test_labels) == 1797
    assert one.classes == tuple("0123456789")
    assert (one.train_images.min(), one.train_images.max()) == (0, 255)
    assert torch.equal(one.test_images, other.test_images) and torch.equal(one.test_labels, other.test_labels)
    every = one.train_labels.bincount() + one.test_labels.bincount()
    assert torch.equal(one.test_labels.bincount(), (0.2 * every).round().long())


def test_digits_split_covers_every_scan_once():
    from sklearn.datasets import load_digits

    split = load("digits")
    both = torch.cat([split.train_images, split.test_images]).flatten(1).numpy()
    raw = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, raw))


def test_statistics_are_those_of_the_training_images():
    split = load("digits")
    x = split.train_images.double() / 255
    assert split.mean[0] == pytest.approx(x.mean().item(), rel=1e-12)
    assert split.std[0] == pytest.approx(x.std(unbiased=False).item(), rel=1e-12)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("parent", [False, True])
def test_cifar10(tmp_path, protocol, parent):
    folder = tmp_path / "cifar-10-batches-py"
    held = write_cifar10(folder, protocol=protocol)
    read = load("cifar10", tmp_path if parent else folder)
    assert read.train_images.shape == (30, 3, 32, 32) and read.test_images.shape == (6, 3, 32, 32)
    assert torch.equal(read.train_images[:6].flatten(1), torch.from_numpy(held[0][0]))
    assert read.test_labels.tolist() == held[-1][1] and read.train_labels.dtype == torch.int64
    assert read.classes == tuple(f"c{k}" for k in range(10)) and len(read.mean) == len(read.std) == 3


def test_cifar10_under_another_name(tmp_path):
    write_cifar10(tmp_path / "mine")
    assert len(load("cifar10", tmp_path / "mine").train_labels) == 30


def test_numpy_labels_and_fortran_order_are_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    images = pixels(4, 3072)
    content = {"data": np.asfortranarray(images), "labels": [np.int64(3), np.int64(1), np.int64(2), np.int64(0)]}
    (folder / "test_batch").write_bytes(pickle.dumps(content, 2))
    read = load("cifar10", folder)
    assert torch.equal(read.test_images.flatten(1), torch.from_numpy(images))
    assert read.test_labels.tolist() == [3, 1, 2, 0]
    (folder / "test_batch").write_bytes(pickle.dumps({"data": images, "labels": np.array([1, 2, 3, 4])}))
    assert load("cifar10", folder).test_labels.tolist() == [1, 2, 3, 4]


def test_python_2_pickle_is_read(tmp_path):
    """Protocol 0 of Python 2, the way the official files name numpy and hold byte strings."""
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    raw = "".join(f"\\x{v:02x}" for v in pixels(3072))
    text = (
        "(dp0\nS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nI3072\ntcnumpy\n"
        f"dtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'{raw}'\ntbsS'labels'\n(lp1\nI6\nas."
    )
    (folder / "test_batch").write_bytes(text.encode("ascii"))
    read = load("cifar10", folder)
    assert read.test_labels.tolist() == [6]
    assert torch.equal(read.test_images.flatten(), torch.from_numpy(pixels(3072)))


def test_cifar100(tmp_path):
    write_cifar100(tmp_path / "cifar-100-python")
    read = load("cifar100", tmp_path)
    assert len(read.classes) == 100 and read.train_labels.tolist() == [(7 * j) % 100 for j in range(12)]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder(tmp_path, held_out):
    read = load("folder", write_folder(tmp_path, held_out))
    assert read.train_images.shape == (6, 3, 10, 12) and read.classes == ("ant", "bee")
    assert read.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.from_numpy(pixels(10, 12, 3, seed=11)).permute(2, 0, 1)
    assert torch.equal(read.train_images[4], expected)


def test_folder_reads_nested_grey_and_upper_case(tmp_path):
    write_folder(tmp_path, size=(8, 8))
    (tmp_path / "train" / "ant" / "images").mkdir()
    Image.fromarray(pixels(8, 8)).save(tmp_path / "train" / "ant" / "images" / "grey.JPEG")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    read = load("folder", tmp_path)
    assert read.train_images.shape == (7, 3, 8, 8)


def test_image_size_crops_the_centre(tmp_path):
    write_folder(tmp_path, size=(12, 10))
    Image.fromarray(pixels(40, 20, 3)).save(tmp_path / "train" / "ant" / "tall.jpg")
    with pytest.raises(DataError, match=r"`image_size` must be given when images differ in size; .*tall\.jpg"):
        load("folder", tmp_path)
    read = load("folder", tmp_path, image_size=10)
    assert read.train_images.shape == (7, 3, 10, 10)
    expected = torch.from_numpy(pixels(10, 12, 3, seed=0)).permute(2, 0, 1)[:, :, 1:11]
    assert torch.equal(read.train_images[0], expected)
    assert load("folder", tmp_path, image_size=4).train_images.shape == (7, 3, 4, 4)


def test_decoding_leaves_no_thread_behind(tmp_path):
    before = threading.active_count()
    load("folder", write_folder(tmp_path, per_class=20, size=(4, 4)))
    assert threading.active_count() == before


def test_the_fingerprint_is_of_every_pixel_and_label_in_order(tmp_path):
    place = tmp_path / "cifar-10-batches-py"
    write_cifar10(place)
    first = load("cifar10", place).fingerprint
    assert first == load("cifar10", tmp_path).fingerprint and len(first) == 64
    seen = {first}
    for name in ("data_batch_4", "test_batch"):
        good = (place / name).read_bytes()
        for change in (
            lambda c: c[b"data"].__setitem__((5, 3071), c[b"data"][5, 3071] ^ 1),
            lambda c: c[b"labels"].reverse(),
            lambda c: c.update({b"data": c[b"data"][::-1].copy()}),
            lambda c: c.update({b"data": c[b"data"][::-1].copy(), b"labels": c[b"labels"][::-1]}),
        ):
            content = pickle.loads(good)
            change(content)
            (place / name).write_bytes(pickle.dumps(content, 2))
            seen.add(load("cifar10", place).fingerprint)
        (place / name).write_bytes(good)
    assert len(seen) == 9 and load("cifar10", place).fingerprint == first
    digits = load("digits")
    assert digits.fingerprint == load("digits").fingerprint
    other = digits.test_images.clone()
    other[-1, 0, 7, 7] += 1
    assert dataclasses.replace(digits, test_images=other).fingerprint != digits.fingerprint


# What is refused

CIFAR_DAMAGE = {
    "not a pickle": (lambda f: (f / "data_batch_3").write_bytes(b"hello"), "data_batch_3"),
    "empty file": (lambda f: (f / "data_batch_3").write_bytes(b""), "data_batch_3"),
    "truncated": (lambda f: (f / "test_batch").write_bytes((f / "test_batch").read_bytes()[:9000]), "test_batch"),
    "missing batch": (lambda f: (f / "data_batch_4").unlink(), "without data_batch_4"),
    "missing meta": (lambda f: (f / "batches.meta").unlink(), "without batches.meta"),
    "meta without names": (lambda f: dump(f / "batches.meta", {b"x": 1}), "has no entry 'label_names'"),
    "names not a list": (lambda f: dump(f / "batches.meta", {b"label_names": 3}), "must be a list of class names"),
    "not a dictionary": (lambda f: dump(f / "test_batch", [1, 2]), "must be a dictionary, got list"),
    "no data": (lambda f: dump(f / "test_batch", {b"labels": [1]}), "has no entry 'data'"),
    "data a list": (lambda f: batch(f, [1, 2], [1, 2]), "got list"),
    "wrong width": (lambda f: batch(f, pixels(2, 3000), [1, 2]), r"got uint8 of shape \(2, 3000\)"),
    "wrong type": (lambda f: batch(f, pixels(2, 3072).astype(np.int64), [1, 2]), "got int64"),
    "float array": (lambda f: batch(f, pixels(2, 3072) / 255, [1, 2]), "only integer arrays"),
    "no images": (lambda f: batch(f, pixels(0, 3072), np.zeros(0, int)), "at least one image"),
    "too few labels": (lambda f: batch(f, pixels(3, 3072), [1, 2]), "3 integers, one an image"),
    "text labels": (lambda f: batch(f, pixels(2, 3072), ["a", "b"]), "integers"),
    "ragged labels": (lambda f: batch(f, pixels(2, 3072), [[1], [1, 2]]), "integers"),
    "label too large": (lambda f: batch(f, pixels(2, 3072), [1, 10]), r"must lie in 0\.\.9, got 10"),
    "label negative": (lambda f: batch(f, pixels(2, 3072), [-1, 3]), r"must lie in 0\.\.9, got -1"),
}


def dump(path, content):
    path.write_bytes(pickle.dumps(content, 2))


def batch(folder, images, labels):
    dump(folder / "test_batch", {b"data": images, b"labels": labels})


def refused(expected, *arguments, **options):
    with pytest.raises(DataError, match=expected) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("`") and "; got " in message and message.endswith(".")
    return message


@pytest.mark.parametrize("damage", CIFAR_DAMAGE)
def test_damaged_cifar_is_refused(tmp_path, damage):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    apply, expected = CIFAR_DAMAGE[damage]
    apply(folder)
    message = refused(expected, "cifar10", tmp_path)
    assert str(folder) in message


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    content = {b"data": Evil(tmp_path / "owned"), b"labels": [1]}
    (folder / "data_batch_2").write_bytes(pickle.dumps(content, protocol))
    refused("data_batch_2.*mkdir.*none of its code was run", "cifar10", folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["builtins\neval", "numpy\nload", "os\nsystem", "numpy.core.multiarray\nencode.x"])
def test_other_globals_are_refused(tmp_path, name):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "test_batch").write_bytes(f"c{name}\n(S'1'\ntR.".encode())
    refused("test_batch", "cifar10", folder)


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=80), place=st.integers(0, 300))
def test_no_damage_to_a_pickle_raises_anything_else(tmp_path_factory, noise, place):
    good = pickle.dumps({b"data": pixels(1, 3072), b"labels": [1]}, 2)
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(good[:place] + noise + good[place + len(noise) :])
    with contextlib.suppress(DataError):
        cifar._unpickle(path)


def test_damage_reserves_no_memory(tmp_path):
    """A memo index of 2**32 - 1 makes the unpickler in C fill 64 GiB."""
    (tmp_path / "damaged").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    assert cifar._unpickle(tmp_path / "damaged") == {}


FOLDER_DAMAGE = {
    "no train": (lambda r: (r / "train").rename(r / "training"), "without it"),
    "neither test nor val": (lambda r: (r / "test").rename(r / "held-out"), "with neither"),
    "no classes": (lambda r: (clear(r / "train"), (r / "train").mkdir()), "one folder a class in train/"),
    "empty class": (lambda r: (clear(r / "train" / "bee"), (r / "train" / "bee").mkdir()), "got none in .*train/bee'"),
    "empty test class": (
        lambda r: (clear(r / "test" / "ant"), (r / "test" / "ant").mkdir()),
        "got none in .*test/ant'",
    ),
    "class missing in test": (lambda r: clear(r / "test" / "bee"), "got 'bee' in .*train' only"),
    "class missing in train": (lambda r: clear(r / "train" / "bee"), "got 'bee' in .*test' only"),
    "one class": (lambda r: (clear(r / "train" / "bee"), clear(r / "test" / "bee")), "at least two classes"),
    "not an image": (
        lambda r: (r / "test" / "ant" / "0.png").write_text("text"),
        r"ant/0\.png', which cannot be decoded",
    ),
    "empty image": (
        lambda r: (r / "train" / "ant" / "0.png").write_bytes(b""),
        r"ant/0\.png', which cannot be decoded",
    ),
    "truncated jpeg": (
        lambda r: cut(r / "train" / "bee" / "cut.jpg", "JPEG"),
        r"bee/cut\.jpg', which cannot be decoded",
    ),
    "truncated png": (lambda r: cut(r / "train" / "bee" / "cut.png", "PNG"), r"bee/cut\.png', which cannot be decoded"),
}


def clear(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        path.rmdir()


def cut(path, kind):
    whole = io.BytesIO()
    Image.fromarray(pixels(10, 12, 3)).save(whole, kind)
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])


@pytest.mark.parametrize("image_size", [None, 8])
@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
def test_damaged_folder_is_refused(tmp_path, damage, image_size):
    write_folder(tmp_path)
    apply, expected = FOLDER_DAMAGE[damage]
    apply(tmp_path)
    message = refused(expected, "folder", tmp_path, image_size=image_size)
    assert str(tmp_path) in message


def test_wrong_arguments_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused("`dataset` must be one of", "mnist")
    refused("`data_dir` must be given for dataset='folder'", "folder")
    refused("`data_dir` must be an existing folder; got .*does not exist", "cifar10", tmp_path / "nowhere")
    refused("`data_dir` must be an existing folder; got .*a file", "folder", tmp_path / "file")
    refused("`data_dir` must be the folder cifar-10-batches-py or its parent", "cifar10", tmp_path)
    refused("`data_dir` must be the folder cifar-100-python or its parent", "cifar100", tmp_path)
    for size in (0, -3, 2.0, True):
        refused("`image_size` must be an integer >= 1", "folder", tmp_path, image_size=size)


# Batches


def some(count=20, channels=3, size=8):
    images = torch.from_numpy(pixels(count, channels, size, size + 2))
    return images, torch.arange(count), (0.4,) * channels, (0.2,) * channels


def make(batch_size=4, augment="crop-flip", count=20, **options):
    images, labels, mean, std = some(count)
    return Batches(images, labels, batch_size, mean, std, augment=augment, **options)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_follow_from_seed_and_epoch_alone(augment):
    def collect(batches, k, seed):
        parts = list(batches.epoch(k, seed))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    x, y = collect(make(4, augment), 3, 7)
    torch.manual_seed(123)
    again = make(4, augment)
    list(again.epoch(0, 0))
    for other in (again, make(10, augment), make(4, augment, channels_last=True)):
        x2, y2 = collect(other, 3, 7)
        assert torch.equal(y, y2) and torch.equal(x, x2)
    for k, seed in ((4, 7), (3, 8), (7, 3)):
        assert not torch.equal(y, collect(again, k, seed)[1])


@settings(max_examples=25, deadline=None)
@given(
    augment=st.sampled_from(list(AUGMENTATIONS)),
    world=st.sampled_from([1, 2, 3]),
    start=st.integers(0, 3),
    epoch=st.integers(0, 9),
    channels_last=st.booleans(),
)
def test_shards_and_later_starts_are_parts_of_the_whole_epoch(augment, world, start, epoch, channels_last):
    whole = list(make(6, augment, channels_last=channels_last).epoch(epoch, 5))
    shards = [make(6, augment, channels_last=channels_last, shard=(r, world)) for r in range(world)]
    parts = [list(s.epoch(epoch, 5, start=start)) for s in shards]
    assert all(len(p) == len(whole) - start for p in parts)
    for k, (x, y) in enumerate(whole[start:]):
        for rank in range(world):
            assert torch.equal(parts[rank][k][0], x[rank::world]) and torch.equal(parts[rank][k][1], y[rank::world])


def test_an_epoch_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(make().epoch(0, 0))
    assert torch.equal(torch.rand(3), expected)


def test_incomplete_last_batch_is_dropped_in_training_and_kept_in_evaluation():
    batches = make(batch_size=6)
    parts = list(batches.epoch(0, 0))
    assert len(parts) == len(batches) == 3 and all(len(y) == 6 for _, y in parts)
    assert len(torch.cat([y for _, y in parts]).unique()) == 18
    images, labels, mean, _ = some()
    parts = list(batches.evaluation(images, labels, 6))
    assert [len(y) for _, y in parts] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([y for _, y in parts]), labels)
    expected = (images.double() / 255 - mean[0]) / 0.2
    assert torch.allclose(torch.cat([x for x, _ in parts]).double(), expected, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_memory_format(channels_last, dtype):
    batches = make(channels_last=channels_last, dtype=dtype)
    images, labels, _, _ = some()
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for x, _ in (*batches.epoch(0, 0), *batches.evaluation(images, labels, 7)):
        assert x.dtype == dtype and x.shape[1:] == (3, 8, 10)
        assert x.is_contiguous(memory_format=wanted)


@settings(max_examples=40, deadline=None)
@given(
    augment=st.sampled_from(["crop-flip", "shift", "none"]),
    seed=st.integers(0, 2**31),
    k=st.integers(0, 1000),
    channels=st.sampled_from([1, 3]),
    size=st.integers(1, 9),
    channels_last=st.booleans(),
)
def test_augmented_image_is_exactly_one_window(augment, seed, k, channels, size, channels_last):
    """Every image of a batch is a window of the padded, perhaps mirrored original, and nothing else."""
    images, labels, mean, std = some(12, channels, size)
    batches = Batches(images, labels, 5, mean, std, augment=augment, channels_last=channels_last)
    margin = AUGMENTATIONS[augment]
    fill = round(255 * mean[0]) if augment == "crop-flip" else 0
    scale, shift = np.float32(1 / (255 * std[0])), np.float32(-mean[0] / std[0])
    for x, y in batches.epoch(k, seed):
        for image, label in zip(x, y, strict=True):
            found = False
            for original in (images[label], images[label].flip(2)) if augment == "crop-flip" else (images[label],):
                padded = torch.nn.functional.pad(original, (margin,) * 4, value=fill).float() * scale + shift
                windows = padded.unfold(1, size, 1).unfold(2, size + 2, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
                assert len(windows) == (2 * margin + 1) ** 2
                found |= bool(((windows - image).abs().amax((1, 2, 3)) < 1e-5).any())
            assert found


def test_every_shift_and_both_directions_occur():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 3] = 255
    copies, labels = image.expand(4000, 1, 9, 9).contiguous(), torch.zeros(4000, dtype=torch.int64)
    batches = Batches(copies, labels, 4000, (0.0,), (1.0,), augment="crop-flip")
    ((x, _),) = batches.epoch(0, 0)
    rows, columns = x[:, 0].flatten(1).argmax(1) // 9, x[:, 0].flatten(1).argmax(1) % 9
    assert set(rows.tolist()) == set(range(9))
    inside = (columns > 0) | (x[:, 0, :, 0].amax(1) > 0)
    assert 0.4 < (x[:, 0].flatten(1).amax(1) > 0).float().mean() <= 1
    assert set(columns[inside].tolist()) == set(range(9))


WRONG_BATCHES = [
    ({"augment": "cutout"}, "`augment` must be one of none, shift, crop-flip"),
    ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
    ({"batch_size": 2.0}, "`batch_size` must be an integer >= 1"),
    ({"batch_size": 21}, "`batch_size` must be <= 20, the number of training images; got batch_size=21"),
    ({"shard": (0, 3)}, r"`shard` must be .*; got shard=\(0, 3\) with batch_size=4"),
    ({"shard": (2, 2)}, r"`shard` must be \(rank, world\)"),
    ({"mean": (0.5,)}, "`mean` and `std` must hold 3 values"),
    ({"std": (0.5, 0.0, 1.0)}, "`mean` and `std` must hold 3 values"),
    ({"images": torch.zeros(20, 3, 8, 8)}, "`images` must be a non-empty uint8 tensor"),
    ({"images": torch.zeros(20, 8, 8, dtype=torch.uint8)}, "`images` must be a non-empty uint8 tensor"),
    ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, "`images` must be a non-empty uint8 tensor"),
    ({"labels": torch.zeros(19, dtype=torch.int64)}, "`labels` must be an int64 tensor of shape"),
    ({"labels": torch.zeros(20)}, "`labels` must be an int64 tensor of shape"),
]


@pytest.mark.parametrize(("wrong", "expected"), WRONG_BATCHES)
def test_wrong_batches_are_refused(wrong, expected):
    images, labels, mean, std = some()
    good = {"images": images, "labels": labels, "batch_size": 4, "mean": mean, "std": std}
    with pytest.raises(DataError, match=expected):
        Batches(**{**good, **wrong})


def test_evaluation_of_another_size_is_refused():
    batches = make()
    with pytest.raises(DataError, match="training images' channels and size"):
        batches.evaluation(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2)
