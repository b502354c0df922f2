"""TensorBoard's events say what metrics.csv says, also after a run was cut off; without the package one line says so."""

from __future__ import annotations

import csv
import importlib.util

import pytest

from catode.train import loop
from catode.train.__main__ import main

FLAGS = ["--arch=resnet14", "--epochs=2", "--batch-size=256", "--memory=10", "--threads=1", "--tensorboard"]


def test_events_are_the_metrics_once_each(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    before, folder = loop.Trainer.save_state, tmp_path / "run"

    def interrupt(self):
        if self.epochs_done == 1:
            raise KeyboardInterrupt  # the first epoch's events are written, its state is not
        before(self)

    monkeypatch.setattr(loop.Trainer, "save_state", interrupt)
    assert main([*FLAGS, "--out", str(folder)]) == 130
    monkeypatch.undo()
    monkeypatch.setattr("catode.report.report.write", lambda folder: None)  # pictures take longer than the training
    assert main(["--resume", str(folder)]) == 0
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    tags = events.Tags()
    assert set(tags["scalars"]) == rows[0].keys() - {"step", "time"}
    for name in tags["scalars"]:
        found = events.Scalars(name)
        assert [event.step for event in found] == steps
        if name not in ("seconds", "wait_share"):
            assert [event.value for event in found] == pytest.approx([float(row[name]) for row in rows], rel=1e-4)
    assert set(tags["histograms"]) == {"keep_prob/layers", "keep_prob/units"}
    numbers = {name: [event.histogram_value.num for event in events.Histograms(name)] for name in tags["histograms"]}
    assert numbers == {"keep_prob/layers": [6] * 2, "keep_prob/units": [2 * (16 + 32 + 64)] * 2}


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else found(name, *a)
    )
    assert main([*FLAGS, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: `tensorboard` must be left out") and "catode[tensorboard]" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())
