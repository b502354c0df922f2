"""Runs compared: scores counted by hand, intervals, what may be counted together, and what a damaged folder costs."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from catode.decisions import shadow
from catode.report import compare
from catode.report.compare import pictures
from catode.structures.fates import REMOVED_WITH_BLOCK
from catode.theory.plotting import new_figure
from catode.train.__main__ import main


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
    names = ["step", "kind", "block", "site", "index", "gain", "drift", "noise", "benefit_upper", "price", "fate"]
    with (folder / "structures.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows({"fate": "undecided", **row} for row in rows)
    return compare.read(folder, place)


DECISIONS = [
    *[(shadow.DERIVED, i, 10, 0.03, "confirmed", 20 + i) for i in range(6)],
    (shadow.DERIVED, 6, 10, 0.03, "regret", 15),
    (shadow.DERIVED, 7, 10, 0.03, "undecided", ""),
    (shadow.DERIVED, 8, 10, 0.03, REMOVED_WITH_BLOCK, 30),
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
    monkeypatch.setattr(pictures, "draw", lambda figure, runs: drawn.append([run.config["dataset"] for run in runs]))
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
        (break_("result.json", "{}"), "result.json must have the key 'test_accuracy'"),
        (break_("result.json", "[]"), "result.json must hold a JSON object"),
        (break_("shadow.csv", None), "`folder` must hold shadow.csv"),
        (break_("shadow.csv", "rule,step\nderived,ten\n"), "shadow.csv must have the column 'kind'"),
        (change("shadow.csv", "b,s,1,10", "b,s,1,ten"), "shadow.csv must have a decision in every row"),
        (change("shadow.csv", "fixed 0.5", "fixed 0.7"), "in column 'rule'; got 'fixed 0.7'"),
        (change("shadow.csv", REMOVED_WITH_BLOCK, "gone"), "in column 'outcome'; got 'gone'"),
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
    assert "so regrets are not known" in capsys.readouterr().out
    assert not (tmp_path / "told" / "compare.png").exists()


def test_the_package_is_a_command(tmp_path):
    write(tmp_path / "a", DECISIONS)
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "catode.report.compare", str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == compare.text(compare.read_all([tmp_path / "a"]))


def test_an_older_run_is_counted_alike(tmp_path):
    new = write(tmp_path / "new", DECISIONS)
    write(tmp_path / "old", DECISIONS)
    path = tmp_path / "old" / shadow.FILE
    path.write_text(path.read_text().replace(REMOVED_WITH_BLOCK, "promoted"))
    old = compare.read(tmp_path / "old")
    assert [d.outcome for d in old.decisions] == [d.outcome for d in new.decisions]
    assert compare.rules_table([old]) == compare.rules_table([new])


def test_runs_of_other_rules_and_other_images_are_not_counted_together(tmp_path):
    runs = [write(tmp_path / "a", DECISIONS), write(tmp_path / "b", DECISIONS, place=1, tol=0.9)]
    names = [
        "net, digits, 9 epochs, risk 0.05",
        "net, digits, 9 epochs, tolerance 0.9, which `derived` stands for here",
    ]
    assert {name: own for name, own in compare.groups(runs).items()} == dict(
        zip(names, ([run] for run in runs), strict=True)
    )
    told = compare.text(runs)
    assert "2 shadow runs, stated risk 0.05 and fixed tolerance 0.9" in told
    assert "In runs with a fixed tolerance `derived` is that rule." in told and all(
        f"## {name}" in told for name in names
    )
    figure = new_figure(14.0, 5.4)
    compare.draw(figure, runs[1:])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0].startswith("tolerance 0.9 (the run's)") and "derived" not in "".join(labels)
    legends = [
        text.get_text()
        for legend in figure.legends + [a.get_legend() for a in figure.axes]
        if legend
        for text in legend.get_texts()
    ]
    assert "tolerance 0.9: median 12" in legends and not any(
        text.startswith(("derived", "stated risk")) for text in legends
    )


def test_folders_are_told_apart_by_their_images(tmp_path):
    def one(name, place, data_dir, images, seed=0):
        run = write(tmp_path / name, DECISIONS, place=place, dataset="folder", data_dir=data_dir, seed=seed)
        if images is None:
            return run
        (tmp_path / name / "env.json").write_text(json.dumps({"images": images}))
        return compare.read(tmp_path / name, place)

    runs = [one("a", 0, "/x", "f1"), one("b", 1, "/y", "f1", seed=1), one("c", 2, "/x", "f2"), one("d", 3, "/x", None)]
    found = compare.groups(runs)
    assert [own for own in found.values()] == [runs[:2], [runs[2]], [runs[3]]]
    assert next(iter(found)).endswith("images f1") and list(found)[2].endswith("images /x")
    assert compare.read_all([tmp_path / name for name in "abc"])  # the same settings and seed, other images
    with pytest.raises(ValueError, match="with the same configuration"):
        one("e", 4, "/z", "f1")
        compare.read_all([tmp_path / name for name in "ae"])
