"""Ending at a share of the MACs or parameters: the laws of `catode.decisions.target`, and a run that lands there."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catode.decisions.rules import NEARLY_ONE
from catode.decisions.target import HEADROOM, LAG, RAMP, SLACK, Target
from catode.prune.describe.costs import describe
from catode.train.__main__ import main
from catode.train.models import Architecture, ResNet

MODEL = ResNet(Architecture("basic", (1, 1, 1), 16, "A", "cifar"), 1, 3)
COST = describe(MODEL, MODEL.structures(), torch.zeros(1, 1, 8, 8))
BLOCKS = COST.blocks


@st.composite
def states(draw):
    """A target, a closed network above it, what is undecided in it, and what each is worth."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = Target(COST, draw(st.sampled_from(["macs", "params"])), draw(st.floats(0.1, 0.95)))
    kept = COST.close(rng.random(COST.size) < draw(st.floats(0.6, 1.0)))
    open_ = kept & (rng.random(COST.size) < draw(st.floats(0.0, 1.0)))
    return target, kept, open_, rng.gamma(1.0, size=COST.size)


@given(states(), st.integers(0, 2**32 - 1))
def test_removal_goes_no_further_than_the_target(state, seed):
    target, kept, open_, worth = state
    going = open_ & (np.random.default_rng(seed).random(COST.size) < 0.7)
    left = target.remove(kept, going, open_, worth)
    assert not (left & ~kept).any() and (left == COST.close(left)).all()
    gone, cost = kept & ~left, target.of(kept) - target.share
    if cost > 0:
        # past the target by no more than the slack, or by the least single part plus what it promotes
        least = target.parts(kept)[open_].min(initial=0.0)
        emptied = target.of(left) < target.share - max(SLACK, least) and (gone & ~going).any()
        assert target.of(left) >= target.share - max(SLACK, least) - 1e-12 or emptied
    else:
        assert not gone.any() or target.of(COST.close(kept & ~going)) >= target.share


@given(states())
def test_what_stays_short_of_the_target_is_worth_more(state):
    target, kept, open_, worth = state
    units = open_ & (np.arange(COST.size) >= BLOCKS)
    left = target.remove(kept, units, units, worth)
    if target.of(left) > target.share + SLACK:  # then all that could go went
        assert not (units & left).any()
    elif (units & left).any() and target.of(kept) > target.share:
        assert abs(target.of(left) - target.share) < SLACK + 2 * target.parts(kept)[units].max()


@given(states(), st.floats(0.0, 1.0))
def test_level_prices_out_just_enough(state, progress):
    target, kept, open_, worth = state
    level = target.level(kept, open_, worth, progress)
    due = target.due(progress)
    if target.of(kept) <= due or target.of(COST.close(kept & ~open_)) > due:
        assert level is None
        return
    marginal = level / HEADROOM
    assert target.of(COST.close(kept & ~(open_ & (worth <= marginal * (1 + 1e-9))))) <= due
    assert target.of(COST.close(kept & ~(open_ & (worth < marginal * (1 - 1e-9))))) > due


@given(st.floats(0.1, 0.9), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_share_due_falls_to_the_target(share, first, second):
    target = Target(COST, "macs", share)
    early, late = sorted((first, second))
    assert 1.0 >= target.due(early) >= target.due(late) >= share - 1e-12
    assert target.due(RAMP) == pytest.approx(share) and target.due(-LAG) == 1.0
    whole, none = np.ones(COST.size), np.zeros(COST.size)
    assert target.lags(whole, whole > 0, late) and not target.lags(none, none > 0, late)


def test_parts_are_what_goes_with_each_structure():
    target, kept = Target(COST, "params", 0.5), np.ones(COST.size, dtype=bool)
    parts = target.parts(kept)
    for s in (0, BLOCKS - 1, BLOCKS, COST.size - 1):
        without = kept.copy()
        without[s] = False
        assert parts[s] == pytest.approx(1.0 - target.of(without), rel=1e-12)


def test_what_stays_because_the_target_is_met_is_counted_as_rounded(tmp_path):
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
    committed = [row for row in rows.values() if row["state"] == "committed"]
    forced = [row for row in rows.values() if row["state"] == "forced"]
    assert forced and all(float(row["keep_prob"]) >= NEARLY_ONE for row in committed)


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


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 1e-4])
def test_out_of_reach(share):
    with pytest.raises(ValueError, match="`target_macs` must"):
        Target(COST, "macs", share)


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
        (["--target-macs=0.4", "--nu=0"], "`target_macs` must be left out for the ungated network"),
        (["--target-macs=1.5"], "`target_macs` must lie in (0, 1)"),
        (["--target-macs=0.001"], "`target_macs` must"),
    ],
)
def test_bad_input(tmp_path, flags, says, capsys):
    assert main([*flags, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
