"""A run that was cut off goes on to the same end, bit by bit."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from catode.train import checkpoint, loop
from catode.train.__main__ import main

# units and layers go, dead channels stay, every state of a pruner is passed through
FLAGS = [
    "--nu=20",
    "--epochs=6",
    "--warmup-epochs=2",
    "--memory=10",
    "--check-every=7",
    "--width-multiple=8",
    "--threads=1",
]


def end(folder):
    """Everything of a finished run that must not depend on its having been cut off."""
    result = json.loads((folder / "result.json").read_text())
    result = {k: v for k, v in result.items() if k != "seconds" and "latency" not in k}
    metrics = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in metrics:
        del row["seconds"], row["wait_share"]
    weights = torch.load(folder / "model.pt", weights_only=True)
    return result, metrics, (folder / "structures.csv").read_text(), (folder / "structure.json").read_text(), weights


def assert_same_end(a, b):
    *others, weights = end(a)
    *expected, expected_weights = end(b)
    assert others == expected and weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[k], expected_weights[k]) for k in weights)


@pytest.fixture(scope="module", params=["pruned", "ungated"])
def whole(request, tmp_path_factory):
    """Flags and folder of a run that was not cut off."""
    flags = FLAGS if request.param == "pruned" else ["--nu=0", "--epochs=3", "--threads=1"]
    folder = tmp_path_factory.mktemp("whole") / request.param
    assert main([*flags, "--out", str(folder)]) == 0
    if request.param == "pruned":
        result = json.loads((folder / "result.json").read_text())
        assert result["macs_executed"] > result["macs"] and result["units_kept"] < result["units_total"]
    return flags, folder


def cut_off(monkeypatch, flags, folder, step):
    """Run until `step`, as far as an interrupt lets it."""
    before = loop._Trainer.prune if "--nu=20" in flags else loop._Trainer.show
    name = before.__name__

    def interrupt(self, *args):
        if self.step >= step:
            raise KeyboardInterrupt
        return before(self, *args)

    monkeypatch.setattr(loop._Trainer, name, interrupt)
    assert main([*flags, "--out", str(folder)]) == 130
    monkeypatch.setattr(loop._Trainer, name, before)


@pytest.mark.parametrize("step", [5, 61, 100, 120])
def test_a_resumed_run_ends_as_the_whole_one(whole, step, tmp_path, monkeypatch, capsys):
    flags, expected = whole
    if "--nu=0" in flags and step > 61:
        pytest.skip("the ungated run is shorter")
    cut_off(monkeypatch, flags, tmp_path / "run", step)
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert_same_end(tmp_path / "run", expected)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_kill_at_random_moments_and_resume(tmp_path):
    flags = [*FLAGS, "--epochs=4"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    folder, chance, kills = tmp_path / "run", random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "catode.train"]
    arguments = [*flags, "--out", str(folder)]
    while True:
        process = subprocess.Popen(command + arguments, env=environment, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        patience = chance.uniform(0.0, 0.6)
        while not (folder / "config.json").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        if kills < 5:
            seen = os.path.getmtime(folder / "metrics.csv") if (folder / "metrics.csv").exists() else 0
            while process.poll() is None and os.path.getmtime(folder / "metrics.csv") == seen:
                time.sleep(0.005)
            time.sleep(patience)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        if process.wait() == 0:
            break
        arguments = ["--resume", str(folder), "--threads", "1"]
    assert kills >= 2
    assert_same_end(folder, tmp_path / "whole")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    cut_off(monkeypatch, FLAGS, tmp_path / "run", 75)
    return tmp_path / "run"


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(interrupted, tmp_path):
    newest = interrupted / checkpoint.STATE
    newest.write_bytes(newest.read_bytes()[:5000])
    before = torch.load(interrupted / checkpoint.PREVIOUS, weights_only=True)["step"]
    assert checkpoint.load_state(interrupted)["step"] == before
    assert main(["--resume", str(interrupted), "--threads", "1"]) == 0
    assert main([*FLAGS, "--out", str(tmp_path / "whole")]) == 0
    assert_same_end(interrupted, tmp_path / "whole")


def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(interrupted, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(interrupted, copy)
    for name in (checkpoint.STATE, checkpoint.PREVIOUS):
        (copy / name).write_bytes(b"nonsense")
    contents = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert main(["--resume", str(copy)]) == 2
    assert "error: `resume` must name a run with a readable checkpoint" in capsys.readouterr().err
    for path in interrupted.glob("checkpoint*"):
        shutil.copy(path, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "seed": 7}))
    contents["config.json"] = (copy / "config.json").read_bytes()
    assert main(["--resume", str(copy)]) == 2
    assert "checkpoint and config.json fit" in capsys.readouterr().err
    assert all((copy / name).read_bytes() == content for name, content in contents.items() if "checkpoint" not in name)
    assert main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert main(["--resume", str(interrupted), "--seed", "1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_a_finished_run_is_not_resumed(whole, capsys):
    assert main(["--resume", str(whole[1])]) == 2
    assert "which is finished" in capsys.readouterr().err
