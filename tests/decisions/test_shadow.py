"""Shadow runs: decisions by the rules' definitions, outcomes by first passage, nothing removed before theta is 0; compare."""

from __future__ import annotations

import csv
import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from catode.decisions import shadow
from catode.decisions.outcomes import PRUNED_TOLERANCE, PRUNED_ZERO
from catode.decisions.shadow import Shadow
from catode.prune.pruner import Pruner
from catode.report import compare
from catode.theory.plotting import new_figure
from catode.train.__main__ import main
from catode.train.data import load
from catode.train.models import DenseResNet

STEPS, AFTER = 180, 40


def found(theta):
    """What is measured of structures whose benefit is a tenth of their price."""
    n = len(theta)
    values = dict(
        benefit=0.01, benefit_upper=0.02, benefit_lower=0.0, price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0, noise=0.02
    )
    values |= dict(benefit_noise=0.0, drift=0.0, step_time=0.01)
    return {"keep_prob": np.array(theta), **{name: np.full(n, value) for name, value in values.items()}}


@settings(max_examples=60)
@given(data=st.data(), every=st.integers(1, 4), n=st.integers(1, 3))
def test_law_decisions_and_outcomes_are_those_of_the_definition(data, every, n):
    levels = st.sampled_from([0.0, 0.0005, 0.04, 0.3, 0.5, 0.51, 0.9, 1.0])
    paths = np.array(data.draw(st.lists(st.lists(levels, min_size=12, max_size=12), min_size=n, max_size=n)))
    watch, gone = Shadow(n), np.zeros(n, dtype=bool)
    sizes = {name: np.full(n, np.inf) for name in (shadow.FILTER, shadow.SCALE)}
    for step in range(1, 13):
        theta = np.where(gone, 0.0, paths[:, step - 1])
        watch.passed(step, float(step), theta, ~gone)
        gone |= theta == 0.0
        if step % every == 0:
            watch.decide(
                step,
                float(step),
                found(theta),
                ~gone,
                safe=~gone & (theta <= 0.1),
                tolerance_values=np.full(n, 0.1),
                memory=np.zeros(n),
                sizes=sizes,
            )
    rows = watch.rows([dict(kind="unit", block="b", site="s", index=i) for i in range(n)])
    for rule, limit in ((shadow.DERIVED, 0.1), *((f"fixed {t:g}", t) for t in shadow.FIXED)):
        for s in range(n):
            zeros = np.flatnonzero(paths[s] == 0.0)
            life = zeros[0] if len(zeros) else 12
            checks = [k for k in range(every - 1, life, every) if 0.0 < paths[s, k] <= limit]
            own = [row for row in rows if row["rule"] == rule and row["index"] == s]
            assert [row["step"] for row in own] == [k + 1 for k in checks[:1]]
            if own:
                ends = [k for k in range(checks[0] + 1, 12) if paths[s, k] in (0.0, 1.0)][:1]
                expected = {0.0: "confirmed", 1.0: "regret"}[paths[s, ends[0]]] if ends else "undecided"
                assert own[0]["outcome"] == expected
                assert own[0]["outcome_step"] == (ends[0] + 1 if ends else "")


def test_rules_by_size_take_as_many_units_as_the_derived_one():
    watch, sizes = Shadow(4), np.array([3.0, 1.0, 2.0, np.inf])
    watch.decide(
        5,
        0.5,
        found([0.01, 1.0, 1.0, 0.01]),
        np.ones(4, dtype=bool),
        safe=np.array([True, False, False, True]),  # one unit, and one that is none
        tolerance_values=np.full(4, 0.1),
        memory=np.zeros(4),
        sizes={shadow.FILTER: sizes, shadow.SCALE: -sizes},
    )
    chosen = {
        rule: np.flatnonzero(watch.step[shadow.RULES.index(rule)]).tolist() for rule in (shadow.FILTER, shadow.SCALE)
    }
    assert chosen[shadow.FILTER] == [1]
    assert len(chosen[shadow.SCALE]) == 1


def train(steps, **changes):
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=3, width=32, hidden=24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    options = dict(nu=4.0, rate_ratio=0.015, steps=STEPS, warmup=20, check_every=2, probe_size=16, memory=50)
    pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **options | changes)
    images = load("digits")
    x = (images.train_images.float() / 255 - images.mean[0]) / images.std[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        part = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model.train()(x[part]), images.train_labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    return pruner


@pytest.fixture(scope="module")
def watched():
    return train(STEPS + AFTER, shadow=STEPS + AFTER)


def test_nothing_is_removed_before_its_theta_is_0(watched):
    assert watched.finished
    assert not (watched.state == PRUNED_TOLERANCE).any()
    rows = watched.shadow.rows(watched.names())
    derived = [row for row in rows if row["rule"] == shadow.DERIVED]
    assert len(derived) >= 5 and all(0.0 < row["keep_prob"] <= row["tolerance"] for row in derived)
    assert all(row["benefit_upper"] < row["price"] and row["escape"] <= watched.risk for row in derived)
    zero = [(row["block"], row["index"]) for row in rows if row["rule"] == shadow.ZERO]
    names = watched.names()
    assert sorted(zero, key=str) == sorted(
        [(names[s]["block"], names[s]["index"]) for s in np.flatnonzero(watched.state == PRUNED_ZERO)], key=str
    )
    confirmed = {(row["block"], row["index"]) for row in derived if row["outcome"] == "confirmed"}
    assert confirmed and confirmed <= set(zero)


def test_a_higher_risk_decides_no_later(watched):
    steps = {rule: watched.shadow.step[i].astype(float) for i, rule in enumerate(shadow.RULES)}
    for value in steps.values():
        value[value == 0] = np.inf
    order = [f"derived@{risk:g}" for risk in sorted(shadow.RISKS, reverse=True)]
    assert all((steps[a] <= steps[b]).all() for a, b in pairwise(order))


def test_what_is_open_at_the_end_of_deciding_is_watched_on():
    pruner = train(STEPS, shadow=STEPS + AFTER)
    open_ = pruner.state == "undecided"
    assert open_.any() and not pruner.finished
    assert (open_ <= pruner.shadow.watching()).all()


def test_decisions_end_with_the_deciding_phase(watched):
    rows = watched.shadow.rows(watched.names())
    assert max(row["step"] for row in rows if row["rule"] != shadow.ZERO) <= STEPS < max(row["step"] for row in rows)


def test_the_record_survives_a_checkpoint():
    first = train(100, shadow=STEPS)
    state = first.state_dict()
    second = train(0, shadow=STEPS)
    second.load_state_dict(state)
    told = [[{k: str(v) for k, v in row.items()} for row in p.shadow.rows(p.names())] for p in (first, second)]
    assert told[0] and told[0] == told[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shadow=STEPS - 1), "`shadow` must be an integer of at least 180; got shadow=179"),
        (dict(shadow=STEPS, target_macs=0.5), "`shadow` must be None with a target"),
        (dict(alpha=5e-324), "`nu` must give every gated structure a price"),
        (dict(shadow=STEPS, round_to=8), "`shadow` must be None with a target"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError) as caught:
        train(0, **change)
    assert message in str(caught.value)


def test_the_trainer_writes_the_record_and_compare_reads_it(tmp_path, capsys):
    folder = tmp_path / "run"
    line = "--shadow --arch resnet14 --epochs 2 --warmup-epochs 0.5 --nu 30 --sink-share 0.05 --threads 1"
    assert main([*line.split(), "--out", str(folder)]) == 0
    with (folder / shadow.FILE).open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows and set(rows[0]) == set(shadow.FIELDS) and {row["rule"] for row in rows} <= set(shadow.RULES)
    capsys.readouterr()
    assert compare.main([str(folder), "--out", str(tmp_path / "told")]) == 0
    assert capsys.readouterr().out == (tmp_path / "told" / "compare.md").read_text()
    assert (tmp_path / "told" / "compare.png").stat().st_size > 10_000


# --- compare --------------------------------------------------------------------------------------------------------


def write(folder: Path, decisions, rows=(), place=0, **changed):
    """A folder with shadow.csv of (rule, index, step, escape, outcome, outcome_step)."""
    folder.mkdir()
    config = dict(arch="net", dataset="digits", nu=1.0, alpha=0.5, beta=0.0, seed=0, risk=0.05, tol=None, epochs=9)
    config |= dict(shadow=True) | changed
    result = dict(
        accuracy=0.9,
        macs=5,
        macs_dense=10,
        layers_kept=1,
        layers_total=2,
        units_kept=3,
        units_total=4,
        decided_by_rule=1.0,
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    with (folder / shadow.FILE).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, shadow.FIELDS)
        writer.writeheader()
        for rule, index, step, escape, outcome, end in decisions:
            numbers = {name: 0.01 for name in shadow.NUMBERS} | {"escape": escape}
            structure = dict(kind="unit", block="b", site="s", index=index)
            writer.writerow(
                dict(rule=rule, **structure, step=step, **numbers, outcome=outcome, outcome_step=end, outcome_time="")
            )
    names = ["step", "kind", "block", "site", "index", "gain", "drift", "noise", "benefit_upper", "price"]
    with (folder / "structures.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    return compare.read(folder, place)


DECISIONS = [
    *[(shadow.DERIVED, i, 10, 0.03, "confirmed", 20 + i) for i in range(6)],
    (shadow.DERIVED, 6, 10, 0.03, "regret", 15),
    (shadow.DERIVED, 7, 10, 0.03, "undecided", ""),
    (shadow.DERIVED, 8, 10, 0.03, "promoted", 30),
    ("fixed 0.5", 0, 10, 0.03, "confirmed", 20),
    ("fixed 0.5", 9, 40, 0.7, "regret", 50),
    *[
        (shadow.ZERO, i, 20 + i, float("nan"), "undecided", "") for i in range(7)
    ],  # 6 came back first, and went in the end
]


def test_scores_are_those_counted_by_hand(tmp_path):
    run = write(tmp_path / "a", DECISIONS)
    score = compare.rules([run])[shadow.DERIVED]
    assert (score.decisions, score.confirmed, score.regrets, score.open) == (9, 6, 1, 2)
    assert score.low == compare.interval(1, 9)[0] and score.high == compare.interval(3, 9)[1]
    assert (score.precision, score.recall) == (7 / 8, 1.0)
    assert score.leads.tolist() == [10, 11, 12, 13, 14, 15]  # not of the regret, which went in the end
    assert (score.checks, score.regretted) == (1, 1)
    bins = compare.calibration([run])  # the one of `fixed 0.5` at the same step counts once
    assert [(low, n, regrets, left) for low, _, _, n, regrets, left in bins] == [(0.02, 9, 1, 2), (0.5, 1, 1, 0)]


def test_two_runs_add_up(tmp_path):
    runs = [write(tmp_path / name, DECISIONS, place=place, seed=place) for place, name in enumerate("ab")]
    score = compare.rules(runs)[shadow.DERIVED]
    assert (score.decisions, score.recall, score.checks, score.regretted) == (18, 1.0, 2, 2)
    assert [n for *_, n, _, _ in compare.calibration(runs)] == [18, 2]
    low, high = (f"{100 * end:.1f}" for end in (score.low, score.high))
    told = (
        f"18 decisions, 18 on units with 2 regrets ({low} to {high} %) and none on layers, taken at 2 different checks"
    )
    assert f"{told}; a regret in 2 of 2 runs" in compare.text(runs)
    assert compare.rules(runs, "unit").keys() == compare.rules(runs).keys()
    assert (
        compare.rules(runs, "unit")[shadow.DERIVED].regrets == 2
        and compare.rules(runs, "layer")[shadow.DERIVED].decisions == 0
    )


def test_a_bin_takes_each_structure_once_by_its_first_decision_in_it(tmp_path):
    decisions = [
        ("derived@0.4", 0, 10, 0.30, "regret", 15),
        ("derived@0.3", 0, 20, 0.25, "confirmed", 40),  # after the regret, in the same bin
        ("derived@0.1", 0, 30, 0.07, "confirmed", 40),  # another bin
        ("derived@0.3", 1, 20, 0.25, "confirmed", 40),
        ("derived@0.4", 1, 12, 0.28, "confirmed", 40),
    ]
    bins = compare.calibration([write(tmp_path / "a", decisions)])
    assert [(low, n, regrets) for low, _, _, n, regrets, _ in bins] == [(0.05, 1, 0), (0.2, 2, 1)]
    assert bins[1][2] == pytest.approx((0.30 + 0.28) / 2)


def test_different_tasks_are_told_and_drawn_apart(tmp_path, capsys, monkeypatch):
    for place, changed in enumerate((dict(), dict(seed=1), dict(dataset="cifar10", risk=0.1))):
        write(tmp_path / str(place), DECISIONS, **changed)
    folders, draw, drawn = [str(tmp_path / str(place)) for place in range(3)], compare.draw, []
    monkeypatch.setattr(compare, "draw", lambda figure, runs: drawn.append([run.config["dataset"] for run in runs]))
    assert compare.main([*folders, "--out", str(tmp_path / "told")]) == 0
    told = capsys.readouterr().out
    assert (
        told.count("## net, digits, 9 epochs, risk 0.05\n") == told.count("## net, cifar10, 9 epochs, risk 0.1\n") == 3
    )
    assert told.count("| derived | 18 |") == told.count("| derived | 9 |") == 1
    assert drawn == [["digits", "digits"], ["cifar10"]]
    runs = compare.read_all([Path(folder) for folder in folders])
    with pytest.raises(
        ValueError, match="`runs` must be of one group; got net, digits, 9 epochs, risk 0.05; net, cifar10"
    ):
        draw(new_figure(9, 3), runs)


@pytest.mark.parametrize(
    ("names", "changed", "expected"),
    [
        ("aa", {}, "Name each folder once"),
        ("ab", {}, "with the same configuration and seed=0"),
        ("ab", {"tensorboard": True}, "with the same configuration and seed=0"),  # decides nothing
        ("ab", {"seed": 1}, None),
        ("ab", {"epochs": 8}, None),
        ("ab", {"nu": 2.0}, None),
    ],
)
def test_a_run_counts_once(tmp_path, capsys, names, changed, expected):
    write(tmp_path / "a", DECISIONS)
    write(tmp_path / "b", DECISIONS, **changed)
    folders = [str(tmp_path / names[0]), str(tmp_path / "b" / ".." / names[1])]
    assert compare.main(folders) == (0 if expected is None else 2)
    error = capsys.readouterr().err
    assert not error if expected is None else (expected in error and error.count("\n") == 1)


def test_excess_over_a_bound_is_counted_up_to_the_end_of_the_observation(tmp_path):
    place = dict(kind="unit", block="b", site="s", drift=0.0, noise=1.0, benefit_upper=0.1, price=1.0)
    rows = [
        dict(place, index=0, step=10, gain=1.0),
        dict(place, index=0, step=20, gain=3.0),
        dict(place, index=0, step=30, gain=9.0),  # after the observation
        dict(place, index=6, step=10, gain=1.0),
        dict(place, index=6, step=15, gain=0.5) | {"benefit_upper": 1.5},
    ]
    told = compare.assumptions([write(tmp_path / "a", DECISIONS, rows)])
    assert told["gain"] == (2, 1, 0, 3.0)
    assert told["benefit"] == (2, 1, 1, 1.5)
    assert told["drift"][:2] == (2, 0)


@given(n=st.integers(1, 300), share=st.floats(0, 1))
def test_law_the_interval_is_clopper_pearsons(n, share):
    k = round(share * n)
    low, high = compare.interval(k, n)
    assert 0.0 <= low <= k / n <= high <= 1.0
    if k > 0:
        assert binom.sf(k - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert binom.cdf(k, n, high) == pytest.approx(0.025, rel=1e-6)
    assert compare.interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_known_interval():
    assert compare.interval(0, 72)[1] == pytest.approx(1 - 0.025 ** (1 / 72), rel=1e-12)
    assert compare.interval(0, 0) == (0.0, 1.0)


def break_(name, content):
    def do(folder):
        (folder / name).unlink() if content is None else (folder / name).write_text(content)

    return do


def pack(name, damage):
    def do(folder):
        (folder / f"{name}.gz").write_bytes(damage(gzip.compress((folder / name).read_bytes())))

    return do


def change(name, old, new):
    def do(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return do


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (break_("config.json", None), "`folder` must hold config.json"),
        (break_("config.json", "{}"), "config.json must have the key 'dataset'"),
        (change("config.json", '"nu": 1.0', '"nu": "much"'), "config.json must have a number at 'nu'"),
        (change("config.json", '"shadow": true', '"shadow": 1'), "config.json must have true or false at 'shadow'"),
        (break_("structures.csv", None), "`folder` must hold structures.csv"),
        (break_("structures.csv", "step,kind\n1,unit\n"), "structures.csv must have the column 'block'"),
        (change("structures.csv", "1.5", "much"), "structures.csv must hold numbers in column 'gain'"),
        (break_("result.json", "{"), "result.json must hold valid JSON"),
        (break_("result.json", "{}"), "result.json must have the key 'accuracy'"),
        (break_("result.json", "[]"), "result.json must hold a JSON object"),
        (break_("shadow.csv", None), "`folder` must hold shadow.csv"),
        (break_("shadow.csv", "rule,step\nderived,ten\n"), "shadow.csv must have the column 'kind'"),
        (change("shadow.csv", "b,s,1,10", "b,s,1,ten"), "shadow.csv must have a decision in every row"),
        (change("shadow.csv", "fixed 0.5", "fixed 0.7"), "in column 'rule'; got 'fixed 0.7'"),
        (change("shadow.csv", "promoted", "gone"), "in column 'outcome'; got 'gone'"),
        (pack("shadow.csv", lambda b: b[:-20]), "shadow.csv.gz must be a whole file"),
        (pack("shadow.csv", lambda b: b[:30] + bytes(9) + b[39:]), "shadow.csv.gz must be a whole file"),
        (pack("structures.csv", lambda b: b"no gzip"), "structures.csv.gz must be a whole file"),
    ],
)
def test_damaged_folders_cost_one_line(tmp_path, capsys, damage, expected):
    place = dict(kind="unit", block="b", site="s", drift=0.0, noise=1.0, benefit_upper=0.1, price=1.0)
    write(tmp_path / "a", DECISIONS, [dict(place, index=0, step=10, gain=1.5)])
    damage(tmp_path / "a")
    assert compare.main([str(tmp_path / "a")]) == 2
    told = capsys.readouterr()
    assert expected in told.err and told.err.count("\n") == 1 and not told.out


def test_a_file_in_place_of_the_output_folder_costs_one_line(tmp_path, capsys):
    write(tmp_path / "a", DECISIONS)
    assert compare.main([str(tmp_path / "a"), "--out", __file__]) == 2
    assert "`out` must be a folder" in capsys.readouterr().err


def test_a_shadow_run_without_decisions_is_one_still(tmp_path, capsys):
    write(tmp_path / "a", [])
    assert compare.main([str(tmp_path / "a"), "--out", str(tmp_path / "told")]) == 0
    told = "0 decisions, none on units and none on layers, taken at 0 different checks; a regret in 0 of 1 runs"
    assert told in capsys.readouterr().out


def test_no_folder_is_one_line(capsys):
    assert compare.main([]) == 2
    assert "FOLDER" in capsys.readouterr().err


def test_runs_that_are_no_shadow_runs_are_listed(tmp_path, capsys):
    write(tmp_path / "a", DECISIONS, shadow=False)
    assert compare.main([str(tmp_path / "a"), "--out", str(tmp_path / "told")]) == 0
    assert "nothing to say about regrets" in capsys.readouterr().out
    assert not (tmp_path / "told" / "compare.png").exists()
