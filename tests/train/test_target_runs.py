"""Runs that end at a share of the MACs or parameters."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from catode.decisions.rules import NEARLY_ONE
from catode.structures import fates
from catode.train.__main__ import main


def test_what_stays_because_the_target_is_met_has_a_fate_of_its_own(tmp_path):
    folder = tmp_path / "run"
    flags = [
        "--arch=resnet14",
        "--hidden-scale=0.5",
        "--batch-size=256",
        "--epochs=4",
        "--warmup-epochs=1",
        "--alpha=0",
    ]
    flags += ["--memory=10", "--measure-every=1", "--check-every=3", "--threads=1", "--target-macs=0.5"]
    assert main([*flags, "--out", str(folder)]) == 0
    rows = {}
    for row in csv.DictReader((folder / "structures.csv").open()):
        rows[row["block"], row["site"], row["index"]] = row
    committed = [row for row in rows.values() if row["fate"] == fates.COMMITTED]
    kept = [row for row in rows.values() if row["fate"] == fates.KEPT_AT_TARGET]
    assert kept and all(float(row["keep_prob"]) >= NEARLY_ONE for row in committed)


@pytest.mark.parametrize("flags", [["--rate-ratio=1000"], ["--sink-share=1e-5"]])
def test_however_fast_a_theta_sinks_the_price_level_stays_a_number(flags, tmp_path):
    short = [
        "--arch=resnet14",
        "--hidden-scale=0.25",
        "--epochs=2",
        "--warmup-epochs=0.2",
        "--check-every=5",
        "--threads=1",
    ]
    assert main([*short, "--target-macs=0.5", *flags, "--out", str(tmp_path / "run")]) == 0
    assert np.isfinite(json.loads((tmp_path / "run" / "result.json").read_text())["macs"])


@pytest.mark.parametrize(
    "flags", [["--target-macs=0.008"], ["--target-params=0.005"], ["--target-macs=0.025", "--round-to=16"]]
)
def test_a_missed_target_is_said(tmp_path, flags, capsys):
    quantity, share = flags[0][len("--target-") :].split("=")
    run = ["--arch=resnet14", "--epochs=3", "--warmup-epochs=0.5", "--memory=20", "--threads=1"]
    assert main([*run, *flags, "--out", str(tmp_path / "run")]) == 3
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    left = result[quantity] / result[f"{quantity}_dense"]
    name = {"macs": "MACs", "params": "parameters"}[quantity]
    said = f"{left:.1%} of the {name} are left instead of {float(share):.1%}"
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"target   missed: {said}; train longer, or choose a larger share"
    assert f"**Target missed: {said}.**" in (tmp_path / "run" / "report.md").read_text()
    if len(flags) == 1:  # else what is left is the least that rounding leaves
        assert re.search(rf"everything would go at step \d+: `target_{quantity}`={share} is too small\.", printed.err)
    assert "`nu`" not in printed.err


@pytest.mark.parametrize("flags", [["--target-macs=0.4"], ["--target-params=0.6", "--alpha=0"]])
def test_run_lands_within_two_points(tmp_path, flags, capsys):
    quantity, share = flags[0][len("--target-") :].split("=")
    run = ["--arch=resnet14", "--epochs=3", "--seed=1", "--warmup-epochs=0.5", "--memory=20", "--threads=1"]
    assert main([*run, *flags, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert abs(result[quantity] / result[f"{quantity}_dense"] - float(share)) < 0.02


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--target-macs=0.4", "--target-params=0.4"], "`target_macs` must be left out with target_params"),
        (["--target-macs=0.4", "--nu=0"], "`target_macs` must be left out with nu=0"),
        (["--target-macs=1.5"], "`target_macs` must lie in (0, 1)"),
        (["--target-macs=0.001"], "`target_macs` must"),
    ],
)
def test_bad_input(tmp_path, flags, says, capsys):
    assert main([*flags, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
