"""Whole runs of the trainer on a device: every precision, compilation, workers, measured prices, and going on after a stop.

On scikit-learn's digits, or on images made here, so that no data need be at hand.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.units import Finding, Place, unit
from catode.records import read_rows
from catode.train import loop
from catode.train.loop import trainer
from catode.train.settings.config import Config
from catode.train.stop import Stopped

DIGITS: dict[str, Any] = dict(dataset="digits", arch="resnet14", hidden_scale=0.5, epochs=6, batch_size=64, memory=10)
DIGITS |= dict(
    warmup_epochs=0.5, check_every=10, nu=12.0, layers_per_probe=3, measure_every=2, probe_size=16, threads=1
)
TIMES = ("seconds", "wait_share")  # columns of metrics.csv that are measured anew


def settings(place: Place, folder: Path, **more: Any) -> Config:
    """Settings of a short run."""
    small = dict(hidden_scale=0.25, epochs=1, batch_size=128) if place.smoke else {}
    return Config.from_presets(**{**DIGITS, **small, "device": place.device, "out": str(folder), **more})


def _result(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    return {name: result[name] for name in ("test_accuracy", "macs", "macs_dense", "units_kept", "units_total")}


def _judged(result: dict[str, Any], pruned: bool) -> Finding:
    """Whether a run ended well, and removed something if it is long enough for that."""
    ok = 0.0 <= result["test_accuracy"] <= 1.0 and (not pruned or result["macs"] < result["macs_dense"])
    return Finding(ok, result)


def whole(place: Place, **more: Any) -> Finding:
    """A run of the trainer from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        out = loop.run(settings(place, Path(folder) / "run", **more), progress=False)
        return _judged(_result(out), more.get("nu") != 0.0 and not place.smoke)


@unit("checks", "trainer, fp32", 60)
def fp32(place: Place) -> Finding:
    """Images held on the device, gates, probes, checks, validation, averaged weights, checkpoints."""
    return whole(place, ema=0.9, clip_grad=5.0)


@unit("checks", "trainer, bf16", 60)
def bf16(place: Place) -> Finding:
    """The same under bf16, with mixed images and gates drawn by example."""
    return whole(place, amp="bf16", mixup=0.2, per_example_gates=True)


@unit("checks", "trainer, fp16", 60, needs_cuda=True)
def fp16(place: Place) -> Finding:
    """The same under fp16 with a fused optimizer, whose skipped steps the host does not wait for, in micro-batches."""
    return whole(place, amp="fp16", accumulate=2, optimizer="adamw", momentum=0.0)


@unit("checks", "trainer, prices by measured times", 60)
def latency(place: Place) -> Finding:
    """Prices by the times of the layers on this device, which are measured before the run."""
    return whole(place, cost="latency")


@unit("checks", "trainer, images decoded by workers", 60)
def workers(place: Place) -> Finding:
    """Images that worker processes decode into pinned memory, cropped and resized."""
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        for split, number in (("train", 48), ("test", 8)):
            for label in ("a", "b"):
                place_of = root / "images" / split / label
                place_of.mkdir(parents=True)
                for k in range(number):
                    pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place_of / f"{k}.png")
        more = dict(dataset="folder", data_dir=str(root / "images"), image_size=32, array_gib=0.0, workers=2)
        more |= dict(augment="resized-crop", batch_size=16, epochs=1)
        out = loop.run(settings(place, root / "run", **more), progress=False)
        return _judged(_result(out), False)


# --- going on after a stop ------------------------------------------------------------------------------------------


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let PyTorch refuse what is not deterministic, or not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Let the trainer get a signal in a step."""
    inner = trainer.Trainer.prune

    def prune(self: trainer.Trainer, *args: Any) -> None:
        inner(self, *args)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.Trainer.prune = prune
    try:
        yield
    finally:
        trainer.Trainer.prune = inner


def _end(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]], bytes]:
    """Weights, epochs without times, and decisions of a finished run."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "metrics.csv")]
    weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    return weights, rows, (folder / "structures.csv").read_bytes()


def _difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of weights; infinite for networks of different shapes."""
    if [t.shape for t in one.values()] != [t.shape for t in other.values()]:
        return float("inf")
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one.values(), other.values(), strict=True))


def _resumed(place: Place, root: Path) -> tuple[Any, Any, Any]:
    """Ends of a whole run, of the same again, and of one that was stopped in between and went on."""
    ends = []
    for name in ("whole", "again"):
        ends.append(_end(loop.run(settings(place, root / name), progress=False)))
    folder = root / "stopped"
    steps = sum(1 for _ in read_rows(root / "whole" / "metrics.csv"))
    last = int(read_rows(root / "whole" / "metrics.csv")[-1]["step"])
    step = last // 2 + 3 if steps > 1 else last // 2
    try:
        with stopped_after(step):
            loop.run(settings(place, folder), progress=False)
    except Stopped:
        pass
    else:
        raise RuntimeError(f"the run did not stop after step {step} of {last}")
    config = Config.from_json((folder / "config.json").read_text(), resume=str(folder), out=str(folder))
    ends.append(_end(loop.run(config, progress=False)))
    return tuple(ends)


@unit("checks", "resume", 120)
def resume(place: Place) -> Finding:
    """A run that was stopped and went on against an uninterrupted one: bit by bit with deterministic algorithms.

    Without them two uninterrupted runs may differ, too; both differences are recorded.
    """
    numbers: dict[str, Any] = {}
    for name, on in (("deterministic", True), ("default", False)):
        with tempfile.TemporaryDirectory() as folder, deterministic(on):
            whole, again, gone_on = _resumed(place, Path(folder))
        numbers[f"{name}, again"] = _difference(whole[0], again[0])
        numbers[f"{name}, resumed"] = _difference(whole[0], gone_on[0])
        numbers[f"{name}, tables are the same"] = whole[1:] == gone_on[1:]
        if place.smoke:
            break
    ok = numbers["deterministic, again"] == numbers["deterministic, resumed"] == 0.0
    return Finding(ok and numbers["deterministic, tables are the same"], numbers)
