"""The theory's command line: a tolerance with its reason and picture, a run's structures, one line for what is wrong."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from catode.theory import plotting, tolerance
from catode.theory.__main__ import main, read_run

GIVEN = dict(price=0.1, gain=0.5, rate_ratio=1.0, noise=0.02, decay=0.05)
FLAGS = [word for name, value in GIVEN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
MEASURED = dict(benefit=0.01, benefit_upper=0.02, benefit_lower=0.0, price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0)
MEASURED |= dict(noise=0.02, benefit_noise=0.01, drift=0.0, step_time=0.01, risk=0.05, separatrix=0.1, tolerance=0.07)


RECORD = Path(__file__).parents[2] / "benchmarks/records/pruned-s0"


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run(tmp_path):
    """A folder of an earlier version with checks of one layer and one unit, the unit's last one after an earlier one."""
    layer = {"step": 50, "kind": "layer", "block": "a", "site": "", "index": "", "keep_prob": 1.0}
    unit = {"step": 50, "kind": "unit", "block": "a", "site": "a.x", "index": 3, "keep_prob": 0.5}
    rows = [
        layer | MEASURED | {"noise": float("inf"), "state": "committed"},  # nothing known yet
        unit | MEASURED | {"state": "undecided"},
        unit | MEASURED | {"step": 100, "keep_prob": 0.04, "state": "pruned_tolerance"},
    ]
    write(tmp_path / "structures.csv", rows)
    (tmp_path / "config.json").write_text(json.dumps({"memory": 100}))
    return tmp_path


def test_one_structure_gets_its_tolerance_reason_and_picture(tmp_path, capsys):
    assert main([*FLAGS, "--out", str(tmp_path / "t.png")]) == 0
    said = capsys.readouterr().out
    expected = tolerance.derive(benefit=0.0, benefit_noise=0.0, drift=0.0, step_time=0.0, **GIVEN)
    assert f"theta_tol  {float(expected):.6g}\n" in said and expected.reason() in said
    picture = matplotlib.image.imread(tmp_path / "t.png")
    assert picture.shape[:2] == (520, 1300) and picture[..., :3].std() > 0.05


def test_the_portrait_has_the_domains_the_price_and_trajectories_that_slide(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plotting, "new_figure", lambda *size: figures.append(Figure(size)) or figures[-1])
    assert main([*FLAGS, "--gain-lower", "0.4", "--decay-upper", "0.1", "--out", str(tmp_path / "t.png")]) == 0
    ax = figures[0].axes[0]
    labels = set(ax.get_legend_handles_labels()[1])
    assert {"certain to go (D)", "undecided", "certain to stay (mirror)", "separatrix", "saddle"} <= labels
    assert {"price: θ at rest", "benefit at rest", "trajectory", "tolerance here"} <= labels
    slides = [line.get_ydata() for line in ax.lines if line.get_linewidth() == 3.0]
    assert {float(np.nanmax(y)) for y in slides} == {0.0, 1.0}
    assert [ax.get_xlabel() for ax in figures[0].axes[1:]] == ["accepted risk", "batch size / measured one"]


def test_nothing_safe_is_an_answer(tmp_path, capsys):
    assert main([*FLAGS, "--noise", "9", "--out", str(tmp_path / "t.svg")]) == 0
    assert "theta_tol  -" in capsys.readouterr().out and (tmp_path / "t.svg").stat().st_size > 5000


def test_a_run_is_read_at_the_last_check_of_each_structure(run, capsys):
    assert [row["step"] for row in read_run(run)] == [50.0, 100.0]
    assert main(["--from-run", str(run), "--out", str(run / "t.pdf")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["a", "committed", "50"] and lines[1].split()[-1] == "nan"
    same = {
        k: MEASURED[k] for k in ("gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift", "step_time", "risk")
    }
    expected = tolerance.derive(benefit=0.02, pooled=0.01, price=0.09, memory=1.0, **same)
    assert lines[2].split() == [
        "a.x[3]",
        "pruned_tolerance",
        "100",
        "0.040",
        "0.01",
        "0.1",
        "0.07",
        f"{float(expected):.3g}",
    ]
    assert lines[3].startswith("2 structures; 1 have a positive tolerance") and lines[4].startswith("Recorded and")
    assert (run / "t.pdf").stat().st_size > 5000


@pytest.mark.parametrize(("steps", "kind", "pool"), [(100, "layer", 10), (40, "layer", 8), (40, "unit", 40)])
def test_the_pool_of_an_earlier_run_is_shorter_for_layers(steps, kind, pool, run):
    with (run / "structures.csv").open(newline="") as file:
        rows = [row | {"kind": kind} for row in csv.DictReader(file)]
    write(run / "structures.csv", rows)
    (run / "config.json").write_text(json.dumps({"memory": steps}))
    assert [row["memory"] for row in read_run(run)] == [pool * MEASURED["step_time"]] * 2


def test_a_run_that_recorded_its_memories_gives_the_same_tolerances_anew(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        row = {name: rng.uniform(0.5, 1.0) * value for name, value in MEASURED.items()}
        row |= {
            "benefit": 0.01,
            "benefit_upper": rng.uniform(0.011, 0.02),
            "price": 0.1,
            "memory": rng.uniform(0.1, 9.0),
        }
        known = {name: row[name] for name in ("gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift")}
        known |= {name: row[name] for name in ("step_time", "memory", "risk")}
        lower_price = row["price"] - (row["benefit_upper"] - row["benefit"])
        found = tolerance.derive(benefit=row["benefit_upper"], pooled=row["benefit"], price=lower_price, **known)
        row |= {"separatrix": float(found.separatrix), "tolerance": float(found), "fate": "undecided"}
        rows.append({"step": 9, "kind": "unit", "block": "a", "site": "a.x", "index": i, "keep_prob": 0.5} | row)
    write(tmp_path / "structures.csv", rows)
    packed = tmp_path / "structures.csv.gz"
    for _ in ("plain", "compressed"):
        assert main(["--from-run", str(tmp_path), "--out", str(tmp_path / "t.png")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2] == "Recorded and derived anew, 20 of them differ by 0 in the median."
        assert all(line.split()[-1] == line.split()[-2] for line in lines[1:21])
        if not packed.exists():
            packed.write_bytes(gzip.compress((tmp_path / "structures.csv").read_bytes()))
            (tmp_path / "structures.csv").unlink()


def test_a_record_whose_memory_followed_from_its_length_is_read_like_one_that_states_it(tmp_path, capsys):
    for name in ("structures.csv.gz", "metrics.csv.gz"):
        shutil.copy(RECORD / name, tmp_path)
    config = json.loads((RECORD / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"memory": None, "check_every": None}))
    said = []
    for folder in (RECORD, tmp_path):
        assert main(["--from-run", str(folder), "--out", str(tmp_path / "t.png")]) == 0
        said.append(capsys.readouterr().out)
    assert config["memory"] == 200 and said[0] == said[1]
    assert "\n345 structures; 157 have a positive tolerance.\n" in said[0]


def test_a_run_in_which_nothing_was_measured_says_so_and_no_more(run, capsys):
    with (run / "structures.csv").open(newline="") as file:
        rows = [row | {"noise": "inf", "tolerance": "nan"} for row in csv.DictReader(file)]
    write(run / "structures.csv", rows)
    assert main(["--from-run", str(run), "--out", str(run / "t.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:] == ["2 structures; 0 have a positive tolerance.", f"picture {run / 't.png'}"]


WRONG = [
    ([], "`price` must be given; got none."),
    (["--price", "0.1"], "`gain` must be given; got none."),
    ([*FLAGS, "--price", "-1"], "`price` must be positive and finite; got price=-1.0."),
    ([*FLAGS, "--price", "x"], "argument --price: invalid float value: 'x'."),
    ([*FLAGS, "--noise", "nan"], "`noise` must be"),
    ([*FLAGS, "--risk", "0.5"], "`risk` must lie in (0, 0.5); got risk=0.5"),
    ([*FLAGS, "--benefit", "inf"], "`benefit` must be finite"),
    ([*FLAGS, "--gain-lower", "0.9", "--decay-upper", "1"], "`gain_lower` must lie in [0, 0.5]"),
    ([*FLAGS, "--decay-upper", "1"], "`gain_lower` must be a real number; got gain_lower=None. Give"),
    ([*FLAGS, "--zzz"], "unrecognized arguments: --zzz."),
    ([*FLAGS, "--out", "t.txt"], "`out` must end in .png, .pdf or .svg; got out='t.txt'."),
    ([*FLAGS, "--out", "nowhere/t.png"], "`out` must lie in a folder that exists"),
    (
        ["--from-run", "nowhere"],
        "must hold structures.csv, as every finished run's folder does; got nowhere without it.",
    ),
    (["--from-run", "nowhere", "--price", "1"], "`price` must be left out with from_run; got price=1."),
]


@pytest.mark.parametrize(("line", "expected"), WRONG)
def test_wrong_input_is_one_line_and_status_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and expected in said.err and len(said.err.splitlines()) == 1
    assert not said.out and not list(tmp_path.iterdir())


SPOILT = [
    ("structures.csv", lambda text: "", "must hold checks of structures; got none."),
    ("structures.csv", lambda text: text.splitlines()[0], "must hold checks of structures; got none."),
    ("structures.csv", lambda text: "a,b\n1,2\n", "must have the column 'kind'"),
    ("structures.csv", lambda text: text.replace("benefit_upper", "upper"), "must have the column 'benefit_upper'"),
    ("structures.csv", lambda text: text[:-30], "values in every row; row 4 has"),
    ("structures.csv", lambda text: text.replace("0.05", "x"), "must hold numbers in column 'decay'; got 'x'."),
    (
        "structures.csv",
        lambda text: text.replace("0.5,0.05", "-0.5,0.05"),
        "must hold what a run measured: `gain` must",
    ),
    ("structures.csv", lambda text: text.replace("committed", "x"), "must hold one of undecided, committed, "),
    ("config.json", lambda text: text[:-1], "must hold valid JSON"),
    ("config.json", lambda text: "[1]", "must hold a JSON object; got list."),
    ("config.json", lambda text: '{"memory": "x"}', "must have a number at 'memory'"),
    ("config.json", lambda text: '{"memory": null}', "must have the key 'decide_until'"),
]


@pytest.mark.parametrize(("name", "spoil", "expected"), SPOILT)
def test_spoilt_files_are_named_in_one_line(name, spoil, expected, run, capsys):
    (run / name).write_text(spoil((run / name).read_text()))
    assert main(["--from-run", str(run), "--out", str(run / "t.png")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {run / name} must ") and expected in said.err
    assert len(said.err.splitlines()) == 1 and not said.out and not (run / "t.png").exists()


@pytest.mark.parametrize("name", ["structures.csv", "config.json"])
def test_missing_files_are_named_in_one_line(name, run, capsys):
    (run / name).unlink()
    assert main(["--from-run", str(run), "--out", str(run / "t.png")]) == 2
    assert capsys.readouterr().err.startswith(f"error: `folder` must hold {name}, ")


def test_a_compressed_table_that_was_cut_short_is_named(run, capsys):
    table = run / "structures.csv"
    (run / "structures.csv.gz").write_bytes(gzip.compress(table.read_bytes())[:-20])
    table.unlink()
    assert main(["--from-run", str(run), "--out", str(run / "t.png")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {run / 'structures.csv.gz'} must be a whole file; got one that is"
    )
