"""Validation images: which they are, that they alone are looked at while training, and that test images are read once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import write_folder

from catode.records import read_config, read_result, read_rows
from catode.train import loop
from catode.train.data import DataError, load
from catode.train.data.images import held_out, pixel_fingerprint
from catode.train.settings.config import Config

CIFAR_LABELS = np.random.RandomState(5).permutation(np.repeat(np.arange(10), 5000))


def rows_of(images: torch.Tensor) -> list[bytes]:
    return [bytes(image) for image in images.flatten(1).numpy()]


# Which images


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    st.floats(0.01, 0.5),
    st.integers(0, 2**32 - 1),
)
def test_law_every_class_gives_its_share_and_keeps_a_training_image(counts, share, seed):
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(len(counts)), counts))
    try:
        chosen = held_out(labels, share, seed)
    except DataError as error:
        assert "`validation_share` must leave an image for validation, or be 0; got" in str(error)
        return
    taken = np.bincount(labels[chosen], minlength=len(counts))
    assert (np.abs(taken - share * np.array(counts)) < 1).all()
    assert (taken < np.array(counts))[np.array(counts) > 0].all()
    assert 0 < chosen.sum() <= round(share * len(labels))
    if min(counts) >= 2:  # every class has an image to spare
        assert chosen.sum() == round(share * len(labels))
    assert np.array_equal(chosen, held_out(labels, share, seed))


def test_cifar_is_divided_into_45000_and_5000():
    chosen = held_out(CIFAR_LABELS, 0.1, 0)
    assert chosen.sum() == 5000 and np.bincount(CIFAR_LABELS[chosen]).tolist() == [500] * 10
    assert np.bincount(CIFAR_LABELS[~chosen]).tolist() == [4500] * 10
    other = held_out(CIFAR_LABELS, 0.1, 1)
    assert 400 < (chosen & other).sum() < 600  # two choices of a tenth share a tenth of their images


def test_the_split_is_the_same_in_another_process():
    code = "import numpy as np, hashlib; from catode.train.data.images import held_out; "
    code += "labels = np.random.RandomState(5).permutation(np.repeat(np.arange(10), 5000)); "
    code += "print(hashlib.sha256(held_out(labels, 0.1, 0).tobytes()).hexdigest())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == hashlib.sha256(held_out(CIFAR_LABELS, 0.1, 0).tobytes()).hexdigest()
    assert said == SPLIT  # and in every version


SPLIT = "93bb98187498d4a854cef97429c1df89fee232457383c08b842884f43fbf1361"
"""SHA-256 of the choice of CIFAR-like validation images with split seed 0."""


def test_digits_are_divided_without_loss_and_the_test_images_stay():
    whole, split = load("digits"), load("digits", validation_share=0.1)
    assert whole.validation_images is None and not whole.validated
    assert [len(x) for x in (split.train_labels, split.validation_labels, split.test_labels)] == [1294, 144, 359]
    both = torch.cat([split.train_images, split.validation_images])
    assert sorted(rows_of(both)) == sorted(rows_of(whole.train_images))
    assert torch.equal(split.test_images, whole.test_images) and torch.equal(split.test_labels, whole.test_labels)
    known = {image: int(label) for image, label in zip(rows_of(whole.train_images), whole.train_labels, strict=True)}
    assert [known[x] for x in rows_of(split.validation_images)] == split.validation_labels.tolist()
    assert [known[x] for x in rows_of(split.train_images)] == split.train_labels.tolist()
    other = load("digits", validation_share=0.1, split_seed=1)
    assert not torch.equal(other.validation_images, split.validation_images)
    assert torch.equal(other.test_images, whole.test_images)
    assert len({data.fingerprint for data in (whole, split, other)}) == 3
    assert pixel_fingerprint(whole) == pixel_fingerprint(split) == pixel_fingerprint(other)
    assert split.mean[0] == pytest.approx(split.train_images.double().mean().item() / 255, rel=1e-12)


def test_a_share_too_small_for_one_image_is_refused():
    with pytest.raises(
        DataError, match=r"`validation_share` must leave an image .* got validation_share=1e-05 of 1438 tra"
    ):
        load("digits", validation_share=1e-5)


@pytest.mark.parametrize("array_bytes", [None, 0])
def test_class_folders_give_a_share_wherever_their_pixels_are(array_bytes, tmp_path):
    write_folder(tmp_path, per_class=5)
    whole = load("folder", tmp_path)
    split = load("folder", tmp_path, validation_share=0.4, array_bytes=array_bytes)
    train, validation = (x if torch.is_tensor(x) else x.array() for x in (split.train_images, split.validation_images))
    assert torch.is_tensor(split.validation_images) == (array_bytes is None)
    assert split.train_labels.bincount().tolist() == [3, 3] and split.validation_labels.bincount().tolist() == [2, 2]
    assert sorted(rows_of(torch.cat([train, validation]))) == sorted(rows_of(whole.train_images))
    assert split.fingerprint == load("folder", tmp_path, validation_share=0.4).fingerprint != whole.fingerprint
    (tmp_path / "train" / "ant" / "new.png").write_bytes((tmp_path / "train" / "ant" / "0.png").read_bytes())
    assert load("folder", tmp_path, validation_share=0.4).fingerprint != split.fingerprint


def test_test_images_without_labels_are_no_test(tmp_path):
    """As ImageNet is laid out: val/ is then the test, and a share of the training images is for validation."""
    write_folder(tmp_path, held_out="val")
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "val" / "ant" / "0.png", tmp_path / "test" / "0001.png")
    found = load("folder", tmp_path, validation_share=0.34)
    assert found.notes == (f"{str(tmp_path)!r} holds test/ and val/: val/ is the test, test/ is not read.",)
    assert [len(x) for x in (found.train_labels, found.validation_labels, found.test_labels)] == [4, 2, 6]


# What is read when


class Watched(torch.Tensor):
    """Images that write down when they are taken."""

    read: list
    split_name: str

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[0], cls):
            args[0].read.append(args[0].split_name)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def watched(images: torch.Tensor, name: str, read: list) -> torch.Tensor:
    images = images.as_subclass(Watched)
    images.read, images.split_name = read, name
    return images


SMALL = dict(dataset="digits", arch="resnet14", epochs=3, batch_size=256, threads=1, nu=20.0, memory=10, check_every=1)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("share", [0.1, 0.0])
def test_test_images_are_read_once_after_the_last_epoch(share, ema, tmp_path, monkeypatch):
    monkeypatch.setattr("catode.train.loop.result.latency_ms", lambda *args: [[1.0], [1.0]])
    events, epoch = [], loop.Trainer.epoch

    def watch(self, number):
        events.append(f"epoch {number}")
        return epoch(self, number)

    monkeypatch.setattr(loop.Trainer, "epoch", watch)
    config = Config.from_presets(**SMALL, ema=ema, validation_share=share, out=str(tmp_path / "run"))
    setup = loop.prepare(config)
    images, names = setup.images, ["test_images", *(["validation_images"] if share else [])]
    parts = {name: watched(getattr(images, name), name.removesuffix("_images"), events) for name in names}
    loop.train(dataclasses.replace(setup, images=dataclasses.replace(images, **parts)), progress=False)
    each = ["validation"] if share else []
    assert events == ["epoch 0", *each, "epoch 1", *each, "epoch 2", *each, *each, "test"]
    rows, result = read_rows(tmp_path / "run" / "metrics.csv"), read_result(tmp_path / "run")
    assert len(rows) == 3 and "test_accuracy" not in rows[0] and ("validation_loss" in rows[0]) == bool(share)
    assert (result["validation_accuracy"] is None) == (share == 0) and 0 < result["test_accuracy"] <= 1
    assert (result["test_accuracy_without_ema"] is None) == (ema == 0)
    assert len(result["validation_accuracy_history"]) == (3 if share else 0)


def test_a_network_that_is_no_longer_finite_is_seen_without_validation_images(tmp_path, monkeypatch):
    settle = loop.Trainer.settle

    def spoil(self):
        settle(self)
        next(self.model.parameters()).data.fill_(1e38)  # finite: the logits are not

    monkeypatch.setattr(loop.Trainer, "settle", spoil)
    config = Config.from_presets(
        **SMALL | {"nu": 0.0}, warmup_epochs=0.0, validation_share=0.0, out=str(tmp_path / "run")
    )
    with pytest.raises(loop.NotFinite, match="got a non-finite loss, logit or gradient at step 5 "):
        loop.run(config, progress=False)
    kept = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_the_loss_is_the_mean_cross_entropy_without_smoothing():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    labels = torch.tensor([0, 1, 1])
    (score,) = loop.evaluate(model, [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    expected = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0)), np.log1p(np.exp(3.0))])
    assert score.accuracy == 2 / 3 and score.loss == pytest.approx(expected, rel=1e-6)
    assert model.training
    (bad,) = loop.evaluate(model, [(logits * torch.inf, labels)])
    assert np.isnan(bad.accuracy) and np.isnan(bad.loss)


def test_runs_of_earlier_versions_had_no_validation_images(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0}))
    (tmp_path / "result.json").write_text(json.dumps({"accuracy": 0.5, "accuracy_history": [0.1, 0.5]}))
    assert read_config(tmp_path)["validation_share"] == 0
    assert read_result(tmp_path) == {"test_accuracy": 0.5, "test_accuracy_history": [0.1, 0.5]}
