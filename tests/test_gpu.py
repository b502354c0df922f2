"""The checks of `benchmarks.gpu`, each on the CPU and, where there is one, on a GPU (``-m cuda``), and the command itself."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import images, table, training
from benchmarks.gpu.records import BEGUN, FAILED, FILE, MEASURED, NOTED, PASSED, SKIPPED, Records
from benchmarks.gpu.units import Finding, Place, Unit, load
from benchmarks.gpu.worker import execute
from catode.prune.describe.costs import count
from catode.train import models

if torch.cuda.is_available():  # deterministic algorithms need it from the start of the process
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).parent.parent
UNITS = load()
CHECKS = UNITS["checks"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda(name):
    found = CHECKS[name].run(Place("cuda", False))
    assert found.passed, found.numbers


def line(folder: Path, *flags: str) -> list[dict]:
    """Run the command in a copy of the tree's place; returns its records."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(folder), *flags]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, (done.stderr + (folder / "log.txt").read_text())[-3000:]
    assert (folder / "gpu.md").read_text() == done.stdout
    return Records(folder / FILE).read()


@pytest.mark.smoke
def test_the_smoke_run_has_a_result_for_every_unit_and_a_second_call_does_nothing_again(tmp_path, capsys):
    records = line(tmp_path, "--minutes", "9")
    for part, units in UNITS.items():
        last = {one["name"]: one for one in records if one["part"] == part}
        for name, unit in units.items():
            wanted = SKIPPED if unit.needs_cuda else MEASURED if part == "ratios" else PASSED
            assert last[name]["status"] == wanted, last[name]
    ends = {one["name"]: one for one in records if one["part"] == "training" and one["status"] == MEASURED}
    assert ends.keys() == training.NAMES.keys() and all(one["epochs"] == 2 for one in ends.values())
    macs = {name: one["numbers"]["macs"] / one["numbers"]["macs_dense"] for name, one in ends.items()}
    assert macs["dense"] == 1 and 0.4 < macs["half"] < 0.55
    own = ends["stage-shaped"]["numbers"]["macs"] / ends["dense"]["numbers"]["macs"]
    assert 0.45 < own <= 0.5
    page = (tmp_path / "gpu.md").read_text()
    assert "no record gives widths" in page and "SKIPPED: trainer, fp16: needs CUDA, not cpu" in page
    command.main(["--smoke", "--out", str(tmp_path), "--minutes", "9"])
    again = Records(tmp_path / FILE).read()
    assert [one["part"] for one in again[len(records) :]] == ["machine"]
    assert (tmp_path / "gpu.md").read_text() == capsys.readouterr().out


# --- what a call leaves when it is stopped --------------------------------------------------------------------------


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    records = Records(tmp_path / FILE)
    records.add("checks", "a", PASSED)
    with records.path.open("a") as file:
        file.write('{"part": "checks", "na')
    records.mend()
    records.add("checks", "b", PASSED)
    assert [one["name"] for one in records.read()] == ["a", "b"]


def test_every_module_that_builds_a_network_builds_the_stage_shaped_one(monkeypatch):
    """A latency was that of the whole network, which the trainer built under its own name for the function."""
    users = [
        m for name, m in sys.modules.items() if name.startswith("catode.train.loop.") and hasattr(m, "build_model")
    ]
    assert len(users) >= 2
    for module in users:
        monkeypatch.setattr(module, "build_model", module.build_model)  # put back in the end
    training.shape_builds(None, "resnet14")
    config = SimpleNamespace(device="cpu", channels_last=True)
    for module in users:
        model = module.build_model(config, SimpleNamespace(classes=range(10)))
        share = (
            count(model, torch.zeros(1, 3, 32, 32)).macs
            / count(models.build("resnet14", in_channels=3, classes=10), torch.zeros(1, 3, 32, 32)).macs
        )
        assert 0.45 < share <= 0.5, module.__name__


def failing(place: Place) -> Finding:
    raise RuntimeError("no such kernel")


def test_an_exception_is_a_record_and_the_process_goes_on(tmp_path, capsys):
    records, far = Records(tmp_path / FILE), time.time() + 100
    assert execute(Unit("checks", "x", failing, 1.0), Place("cpu", True), records, far, far)
    assert [one["status"] for one in records.read()] == [BEGUN, FAILED]
    assert (
        records.read()[-1]["error"][-1] == "RuntimeError: no such kernel"
        and "no such kernel" in capsys.readouterr().err
    )
    assert not execute(Unit("checks", "y", broken, 1.0), Place("cuda", True), records, far, far)


def broken(place: Place) -> Finding:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_cannot_end_in_time_is_not_begun(tmp_path):
    records = Records(tmp_path / FILE)
    now, place = time.time(), Place("cpu", True)
    assert execute(Unit("checks", "x", failing, 60.0), place, records, now + 30, now + 30)
    assert execute(Unit("checks", "x", failing, 1.0), place, records, now - 1, now + 30)
    assert execute(Unit("checks", "y", failing, 60.0, needs_cuda=True), place, records, now + 30, now + 30)
    assert [(one["name"], one["status"]) for one in records.read()] == [("y", SKIPPED)]


WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.records import FILE, Records
records, [name, *_] = Records(Path(sys.argv[sys.argv.index("--out") + 1]) / FILE), eval(sys.argv[sys.argv.index("--units") + 1])
records.add("checks", name, "begun", limit=1.0)
if name == "open gates change nothing":
    time.sleep(100)
elif name == "probes":
    records.add("checks", name, "passed")
else:
    print("a last word", flush=True)
    os.abort()
"""


def test_a_unit_that_hangs_or_dies_is_told_and_the_others_are_run(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "WORKER", [sys.executable, "-c", WORKER])
    monkeypatch.setattr(command, "load", lambda: {"checks": dict.fromkeys(list(CHECKS)[:3])})
    records, now = Records(tmp_path / FILE), time.time()
    with (tmp_path / "log.txt").open("a") as log:
        call = command.Call(Place("cpu", True), records, now, now + 60, tmp_path, log)
        call.units("checks", now + 60, again=False)
        hung, died, well = records.last("checks").values()
        assert (hung["status"], hung["error"]) == (FAILED, ["stopped after 1 s"])
        assert (died["status"], died["error"]) == (FAILED, ["a last word", "the process ended with status -6"])
        assert well["status"] == PASSED and len(records.read()) == 6
        call.units("checks", now + 60, again=False)
        assert len(records.read()) == 6
        call.units("checks", now + 60, again=True)
        assert len(records.read()) == 10


def test_a_run_goes_on_from_its_archive(tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    for place in (folder, out):
        place.mkdir()
    for name, text in (("config.json", "{}"), ("metrics.csv", "epoch,macs\n1,5\n2,"), ("checkpoint-9.pt", "old")):
        (folder / name).write_text(text)
    (folder / "checkpoint-10.pt").write_text("new")
    (folder / "model.pt").write_text("large")
    records = Records(out / FILE)
    run = training.Run("half", folder, out / "half.tar")
    run.follow(records)
    run.follow(records)
    assert [(one["epoch"], one["numbers"]) for one in records.read()] == [(1, {"macs": 5.0})]
    other = training.Run("half", tmp_path / "other", out / "half.tar")
    other.unpack()
    found = sorted(path.name for path in other.folder.iterdir())
    assert found == ["checkpoint-10.pt", "config.json", "metrics.csv"] and not other.finished
    assert sorted(path.name for path in out.iterdir()) == ["half.tar", FILE]


@pytest.mark.slow
def test_runs_that_are_stopped_go_on_in_the_next_call(tmp_path):
    calls, minutes = [], 0.35
    while len(calls) < 12:
        records = line(tmp_path, "--only", "training", "--epochs", "40", "--minutes", f"{minutes:.2f}")
        calls.append(sum(one["name"] == "half" and "epoch" in one for one in records))
        if sum(one["part"] == "training" and one["status"] == MEASURED for one in records) == 3:
            break
        minutes += 0.05  # on a slow machine the first calls may not reach the first step
    assert len(calls) > 1 and calls[-1] > calls[0], "it must have been stopped in between"
    for name in training.NAMES:
        own = [one for one in records if one["name"] == name and one["part"] == "training"]
        assert [one["epoch"] for one in own if "epoch" in one] == list(range(1, 41))
        assert own[-1]["status"] == MEASURED and not [one for one in own if one["status"] == FAILED]


# --- images and networks --------------------------------------------------------------------------------------------


def test_an_archive_becomes_the_official_files(tmp_path):
    from catode.train import data

    images.make_small(tmp_path / "small.tar.xz", each=8)
    told = images.unpack(tmp_path / "small.tar.xz", tmp_path)
    assert told["images"] == 10 * (8 + 2)
    found = data.load("cifar10", tmp_path)
    assert tuple(found.train_images.shape) == (80, 3, 32, 32) and len(found.test_labels) == 20
    assert found.classes == tuple(f"class{k}" for k in range(10))
    means = found.train_images.float().mean((1, 2, 3))
    assert np.abs(means.numpy() - 25 * found.train_labels.numpy() - 9.5).max() < 3  # each picture has its label
    assert images.complete(tmp_path) == tmp_path / images.FOLDER and images.complete(tmp_path / "none") is None
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(Exception, match=r"empty|archive"):
        images.read(tmp_path / "other.tar")


def test_a_stage_has_the_mean_depth_and_width_of_the_pruned_one():
    structure = json.loads((ROOT / "benchmarks/records/r56-half-s0/structure.json").read_text())
    means = training.stage_means(structure)
    assert means.keys() == {"layer1", "layer2", "layer3"}
    assert means["layer1"][0] == sum(structure["blocks"][f"layer1.{k}"]["kept"] for k in range(9))
    one = {"blocks": {f"layer1.{k}": {"kept": k < 2, "sites": {"a": [0] * (4 + 3 * k)}} for k in range(3)}}
    assert training.stage_means(one) == {"layer1": (2, 6)}  # of 4 and 7: 5.5
    torch.manual_seed(0)
    model = training.shaped(
        models.build("resnet20", in_channels=3, classes=10), {"layer1": (2, 5), "layer2": (1, 9), "layer3": (3, 30)}
    )
    assert [(b.name, b.sites[0].width) for b in model.structures()] == [
        ("layer1.0", 5), ("layer1.1", 5), ("layer2.0", 9), ("layer3.0", 30), ("layer3.1", 30), ("layer3.2", 30),
    ]  # fmt: skip
    first = model.layer1[0].conv1.weight
    assert float(first.detach().std()) == pytest.approx(
        (2 / (5 * 9)) ** 0.5, rel=0.1
    )  # kaiming_normal_ of the new fan-out
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_narrowing_meets_the_share():
    def build(factor):
        return models.build("resnet14", in_channels=3, classes=10, hidden_scale=max(factor, 1e-3))

    example = torch.zeros(1, 3, 32, 32)
    share = count(build(training.narrowing(build, 0.5)), example).macs / count(build(1.0), example).macs
    assert 0.46 < share <= 0.5


def test_the_page_tells_what_was_cut_off_failed_and_measured(tmp_path):
    records = Records(tmp_path / FILE)
    first, second, *_ = CHECKS
    records.add("checks", first, BEGUN, limit=1)
    records.add("checks", second, FAILED, error=["Traceback", "ValueError: a | b"])
    name = next(iter(UNITS["ratios"]))
    quartiles = {"plain, ms a step": [1, 2, 3], "gated, ms a step": [2, 3, 4], "ratio": [1.1, 1.2, 1.3]}
    numbers = {
        "n": 4,
        "images in a step": 8,
        "tf32": True,
        **quartiles,
        "plain, peak bytes": 2**20,
        "gated, peak bytes": 3 * 2**20,
    }
    records.add("ratios", name, MEASURED, numbers=numbers)
    records.add("training", "dense", NOTED, epoch=3, numbers={"validation_accuracy": 0.5, "macs": 2e6, "seconds": 9.0})
    text = table.page(records)
    assert f"- CUT OFF: {first}" in text and f"- FAILED: {second}: ValueError: a | b" in text
    assert "1.200 (1.100-1.300)" in text and "1/3" in text and "fp32 is TF32 in convolutions" in text
    [row] = [line for line in text.splitlines() if line.startswith("| dense")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["dense", "3", "50.00", "", "2.0", "9", "goes on"]


@pytest.mark.parametrize(("flags", "expected"), [
    (("--minutes", "-1"), "`minutes` must be"),
    (("--images", "no-such-file"), "`images` must exist; got 'no-such-file'."),
])  # fmt: skip
def test_bad_input_is_one_line(flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--smoke", "--out", str(tmp_path / "o"), *flags])
    with pytest.raises(SystemExit) as left, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that is imported already, and is run as the command here
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith(f"error: {expected}") and told.count("\n") == 1
