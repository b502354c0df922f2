"""What the tables of the benchmarks say, from records and results made by hand."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cifar, sensitivity
from benchmarks._common import read_rows
from catode.train import shadow
from catode.train.config import Config, ConfigError
from catode.train.models import build
from catode.train.structure import count


def record(seed=0, accuracy=0.8, macs=40e6, **settings):
    config = json.loads(Config.from_presets(dataset="cifar10", data_dir="d", seed=seed, **settings).to_json())
    result = dict(
        accuracy=accuracy, macs=macs, macs_dense=40e6, params=1e5, layers_kept=9, layers_total=9, units_kept=100
    )
    result |= dict(units_total=336, decided_by_rule=1.0, latency_ms_128=1.0, latency_dense_ms_128=1.0, seconds=60.0)
    env = dict(processor="p", cores=2, torch="t", threads=1, python="3")
    return cifar.Record(config, result | {"cpu_seconds": 60.0}, env, [])


COMMANDS = sorted(p.stem for p in Path(cifar.__file__).parent.glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_starts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"benchmarks.{name}").main()
    assert left.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out


def rows(text, start):
    """Cells of the table whose header begins with a text."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {start}"))
    table = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_pairs_are_formed_at_equal_macs_and_against_the_dense_network():
    rival = dataclasses.replace(record(nu=0.0, macs=18.5e6, accuracy=0.79))
    rival.config["rival"] = "torch-pruning 1"
    told = cifar.table(
        [
            *(record(seed, 0.80 + 0.02 * seed, 18e6) for seed in (0, 1)),
            *(record(seed, 0.90, nu=0.0) for seed in (0, 1)),
            record(0, 0.70, 18e6, nu=0.0, hidden_scale=0.46),
            record(0, 0.60, 9e6, nu=0.0, hidden_scale=0.2),
            record(0, 0.75, 18.2e6, alpha=0.0),
            record(0, 0.50, 18e6, epochs=9),
            rival,
        ]
    )
    pairs = {row[0]: row[1:] for row in rows(told, "difference")}
    assert pairs == {
        "cifar10, pruned resnet20 - dense resnet20": ["20", "2", "-9.00 ± 1.41", "45.0 ± 0.0"],
        "cifar10, pruned resnet20 - narrow resnet20 (hidden_scale=0.46)": ["20", "1", "+10.00", "100.0"],
        "cifar10, pruned resnet20 - torch-pruning 1 resnet20": ["20", "1", "+1.00", "97.3"],
        "cifar10, pruned resnet20 - pruned resnet20 (alpha=0)": ["20", "1", "+5.00", "98.9"],
        "cifar10, pruned resnet20 (alpha=0) - dense resnet20": ["20", "1", "-15.00", "45.5"],
        "cifar10, pruned resnet20 (alpha=0) - narrow resnet20 (hidden_scale=0.46)": ["20", "1", "+5.00", "101.1"],
        "cifar10, pruned resnet20 (alpha=0) - torch-pruning 1 resnet20": ["20", "1", "-4.00", "98.4"],
    }
    networks = {(row[1], row[2]): row for row in rows(told, "data")}
    assert networks["pruned resnet20", "20"][4] == "81.00 ± 1.41"
    assert networks["narrow resnet20 (hidden_scale=0.46)", "20"][6] == "45.0"


def test_a_condensed_run_keeps_every_decision_and_no_path(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    made = record()
    (folder / "config.json").write_text(json.dumps(made.config | {"data_dir": "/secret/place/data"}))
    (folder / "result.json").write_text(json.dumps(made.result))
    (folder / "env.json").write_text(json.dumps(made.env))
    names = ["step", "kind", "block", "site", "index", "keep_prob", "state", "rule"]
    for name in ("metrics.csv", "structures.csv", shadow.FILE):
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            for step in range(200):
                for index in range(3):
                    state = "committed" if step == 199 - index else "undecided"
                    keep = 0.123456789 * step
                    rule = shadow.DERIVED if (step, index) == (101, 2) else shadow.ZERO
                    writer.writerow(dict(zip(names, (step, "unit", "b", "s", index, keep, state, rule), strict=True)))
    cifar.condense(folder, tmp_path / "to", limit=1500)
    to = tmp_path / "to" / "run"
    assert "/secret" not in (to / "config.json").read_text()
    assert (to / "structures.csv.gz").stat().st_size <= 1500
    kept = read_rows(to, "structures.csv")
    assert len(kept) < 600
    assert ("101", "2") in {(row["step"], row["index"]) for row in kept}
    last = {row["index"]: row for row in kept}
    assert last["0"]["step"] == "199" and float(last["0"]["keep_prob"]) == pytest.approx(0.123456789 * 199)
    assert len(read_rows(to, shadow.FILE)) == 600


def test_the_sentence_of_a_knob_is_the_change_at_equal_other_settings():
    grid = {"nu": [1.0, 9.0], "beta": [0.0, 1.0]}
    found = []
    for point in sensitivity.points(grid, 1):
        macs = 80 - 5 * point["nu"] + 10 * point["beta"]
        result = dict(macs=macs, macs_dense=100, params=50, params_dense=100, layers_kept=9, units_kept=5, accuracy=0.9)
        found.append((point, result))
    told = sensitivity.table(grid, found)
    assert "- `nu` from 1 to 9: MACs -40.0 points (up in 0 of 2), parameters +0.0 points (up in 0 of 2)" in told
    assert "- `beta` from 0 to 1: MACs +10.0 points (up in 2 of 2)" in told


@pytest.mark.parametrize("text", ["nu=1", "nu", "alpha=0,2", "neu=1,2"])
def test_wrong_grids_are_refused(text):
    with pytest.raises(ConfigError, match="` must "):
        sensitivity.parse_grid([text])


def test_torch_pruning_meets_the_macs():
    pytest.importorskip("torch_pruning", reason="the rival's package is no part of the tests' environment")
    from benchmarks.rival import prune

    model, example = build("resnet14", in_channels=3, classes=10), torch.zeros(1, 3, 32, 32)
    share = count(prune(model, example, 0.5), example).macs / count(model, example).macs
    assert 0.45 < share <= 0.5
