"""The theory's command line: a tolerance with its reason and picture, a run's structures, one line for what is wrong."""

from __future__ import annotations

import csv
import json

import matplotlib.image
import pytest

from catode.theory import tolerance
from catode.theory.__main__ import main, read_run

GIVEN = dict(price=0.1, gain=0.5, rate_ratio=1.0, noise=0.02, decay=0.05)
FLAGS = [word for name, value in GIVEN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
MEASURED = dict(benefit=0.01, benefit_upper=0.02, benefit_lower=0.0, price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0)
MEASURED |= dict(noise=0.02, benefit_noise=0.01, drift=0.0, step_time=0.01, risk=0.05, separatrix=0.1, tolerance=0.07)


@pytest.fixture
def run(tmp_path):
    """A folder with checks of one layer and one unit, the unit's last one after an earlier one."""
    rows = [
        {"step": 50, "kind": "layer", "block": "a", "site": "", "index": "", "keep_prob": 1.0, "state": "committed"},
        {"step": 50, "kind": "unit", "block": "a", "site": "a.x", "index": 3, "keep_prob": 0.5, "state": "undecided"},
        {
            "step": 100,
            "kind": "unit",
            "block": "a",
            "site": "a.x",
            "index": 3,
            "keep_prob": 0.04,
            "state": "pruned_tolerance",
        },
    ]
    rows = [row | MEASURED for row in rows]
    rows[0]["noise"] = float("inf")  # nothing known yet
    with (tmp_path / "structures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "config.json").write_text(json.dumps({"memory": 100}))
    return tmp_path


def test_one_structure_gets_its_tolerance_reason_and_picture(tmp_path, capsys):
    assert main([*FLAGS, "--out", str(tmp_path / "t.png")]) == 0
    said = capsys.readouterr().out
    expected = tolerance.derive(benefit=0.0, benefit_noise=0.0, drift=0.0, step_time=0.0, **GIVEN)
    assert f"theta_tol  {float(expected):.6g}\n" in said and expected.reason() in said
    picture = matplotlib.image.imread(tmp_path / "t.png")
    assert picture.shape[:2] == (440, 1200) and picture[..., :3].std() > 0.05


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
    assert (run / "t.pdf").stat().st_size > 5000


WRONG = [
    ([], "`price` must be given; got none."),
    (["--price", "0.1"], "`gain` must be given; got none."),
    ([*FLAGS, "--price", "-1"], "`price` must be positive and finite; got price=-1.0."),
    ([*FLAGS, "--price", "x"], "argument --price: invalid float value: 'x'."),
    ([*FLAGS, "--noise", "nan"], "`noise` must be"),
    ([*FLAGS, "--risk", "0.5"], "`risk` must lie in (0, 0.5); got risk=0.5"),
    ([*FLAGS, "--benefit", "inf"], "`benefit` must be finite"),
    ([*FLAGS, "--zzz"], "unrecognized arguments: --zzz."),
    ([*FLAGS, "--out", "t.txt"], "`out` must end in .png, .pdf or .svg; got out='t.txt'."),
    ([*FLAGS, "--out", "nowhere/t.png"], "`out` must lie in a folder that exists"),
    (["--from-run", "nowhere"], "`from_run` must be a run's folder; got 'nowhere' without structures.csv."),
    (["--from-run", "nowhere", "--price", "1"], "`price` must be left out with from_run; got price=1."),
]


@pytest.mark.parametrize(("line", "expected"), WRONG)
def test_wrong_input_is_one_line_and_status_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and expected in said.err and len(said.err.splitlines()) == 1
    assert not said.out and not list(tmp_path.iterdir())


def test_spoilt_tables_are_refused(run, capsys):
    table = run / "structures.csv"
    for text, expected in (
        ("", "must hold checks of structures"),
        ("a,b\n1,2\n", "must hold checks of structures"),
        (table.read_text()[:-30], "must hold whole tables"),
    ):
        table.write_text(text)
        assert main(["--from-run", str(run), "--out", str(run / "t.png")]) == 2
        assert expected in capsys.readouterr().err
    assert not (run / "t.png").exists()
