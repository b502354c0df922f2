"""Trainings of networks that nobody here wrote: the table is that of the records, which are small and agree with themselves."""

from __future__ import annotations

import gzip

import pytest

from benchmarks.anymodel import picture, table
from benchmarks.anymodel.__main__ import RECORDS
from benchmarks.anymodel.rows import ROWS, SHARE
from benchmarks.common import RESULTS

RUNS = table.read(RECORDS)


def test_the_committed_table_is_made_of_the_committed_records():
    assert (RESULTS / "anymodel.md").read_text().rstrip() == table.text(RECORDS).rstrip()


@pytest.mark.parametrize("name", RUNS)
def test_a_record_is_small_and_counts_what_its_result_counts(name):
    run = RUNS[name]
    assert sum(path.stat().st_size for path in (RECORDS / name).iterdir()) < 200 * 1024
    units = sum(int(row["kept"]) for row in run["parts"] if row["kind"] != "branch")
    branches = sum(int(row["kept"]) for row in run["parts"] if row["kind"] == "branch")
    assert (units, branches) == (run["result"]["units_kept"], run["result"]["layers_kept"])
    for row in run["parts"]:
        assert 0 <= int(row["kept"]) <= int(row["total"]) and 0 <= float(row["macs"]) <= 1
    share = run["result"]["macs"] / run["result"]["macs_dense"]
    assert share == 1 if name.endswith("dense") else share <= SHARE + 0.01
    lines = gzip.decompress((RECORDS / name / "metrics.csv.gz").read_bytes()).decode().splitlines()
    assert len(lines) == 1 + run["config"]["epochs"]


def test_a_twin_differs_in_its_gates_alone():
    for row in ROWS:
        half, dense = (row.settings(kind, False) for kind in ("half", "dense"))
        assert {name for name in half | dense if half.get(name) != dense.get(name)} == {"target_macs", "nu"}
        assert row.settings("half", True)["dataset"] == "digits"


def test_the_picture_is_drawn_of_the_records(tmp_path):
    picture.draw(RECORDS).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_without_records_the_table_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"^`records` must hold a finished run; got [^\n]+ Train one, with --runs and "
    ):
        table.text(tmp_path)
