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
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.train import checkpoint, loop
from catode.train.__main__ import main
from catode.train.config import Config

# units and layers go, dead channels stay, every state of a pruner is passed through
FLAGS = ["--nu=20", "--epochs=6", "--warmup-epochs=3", "--memory=10", "--measure-every=1", "--layers-per-probe=9"]
FLAGS += ["--check-every=7", "--width-multiple=8", "--threads=1"]


def end(folder):
    """Everything of a finished run that must not depend on its having been cut off."""
    result = json.loads((folder / "result.json").read_text())
    result = {k: v for k, v in result.items() if "seconds" not in k and "latency" not in k}
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


def run_whole(flags, folder):
    assert main([*flags, "--out", str(folder)]) == 0
    return flags, folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Flags and folder of a run that was not cut off; units went, dead channels stayed."""
    flags, folder = run_whole(FLAGS, tmp_path_factory.mktemp("whole") / "pruned")
    result = json.loads((folder / "result.json").read_text())
    assert result["macs_executed"] > result["macs"] and result["units_kept"] < result["units_total"]
    return flags, folder


@pytest.fixture(scope="module")
def ungated(tmp_path_factory):
    return run_whole(["--nu=0", "--epochs=3", "--threads=1"], tmp_path_factory.mktemp("whole") / "ungated")


@pytest.fixture(params=["pruned", "ungated"])
def whole(request):
    return request.getfixturevalue(request.param)


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


@pytest.mark.parametrize("step", [5, 25, 61, 100, 120])
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
    table = folder / "metrics.csv"
    while True:
        written = table.stat().st_size if table.exists() else 0
        process = subprocess.Popen(command + arguments, env=environment, stderr=subprocess.DEVNULL)
        if kills < 3:  # soon after the next row, while or after its state is written
            while process.poll() is None and not (table.exists() and table.stat().st_size > written):
                time.sleep(0.005)
            time.sleep(chance.uniform(0.0, 0.6))
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        arguments = ["--resume", str(folder), "--threads", "1"]
    assert kills >= 2
    assert_same_end(folder, tmp_path / "whole")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    cut_off(monkeypatch, FLAGS, tmp_path / "run", 75)
    return tmp_path / "run"


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def zero(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(512) + content[middle + 512 :])


def rewrite(path):
    path.write_bytes(b"nonsense")


def age(path):
    torch.save({**torch.load(path, weights_only=True), "format": 0}, path)


@pytest.mark.parametrize("damage", [truncate, zero, rewrite, age, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(damage, interrupted):
    before = torch.load(interrupted / checkpoint.PREVIOUS, weights_only=True)["step"]
    damage(interrupted / checkpoint.STATE)
    assert checkpoint.load_state(interrupted)["step"] == before
    assert not (interrupted / checkpoint.STATE).exists()


@given(position=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_law_a_flipped_bit_never_passes_unseen(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flipped")
    state = {"lengths": [1, 2], "momentum": {"a": torch.arange(50.0)}, "text": ["undecided"] * 3}
    checkpoint.save_state(folder, {**state, "step": 1})
    checkpoint.save_state(folder, {**state, "step": 2})
    content = bytearray((folder / checkpoint.STATE).read_bytes())
    content[int(position * (len(content) - 1))] ^= 1 << bit
    (folder / checkpoint.STATE).write_bytes(content)
    found = checkpoint.load_state(folder)
    assert torch.equal(found["momentum"]["a"], state["momentum"]["a"]) and found["step"] in (1, 2)


def test_a_fallback_ends_as_the_whole_run(interrupted, pruned):
    truncate(interrupted / checkpoint.STATE)
    assert main(["--resume", str(interrupted), "--threads", "1"]) == 0
    assert_same_end(interrupted, pruned[1])


def nothing_left(folder):
    for path in folder.glob("checkpoint*"):
        path.unlink()


def all_damaged(folder):
    for path in folder.glob("checkpoint*"):
        rewrite(path)


def other_seed(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "seed": 7}))


def short_table(folder):
    table = folder / "metrics.csv"
    table.write_text(table.read_text()[:-40])


def lost_table(folder):
    (folder / "structures.csv").unlink()


def half_config(folder):
    truncate_to = (folder / "config.json").read_text()[:60]
    (folder / "config.json").write_text(truncate_to)


REFUSED = [
    (nothing_left, "which has epochs but none"),
    (all_damaged, "must name a run with a readable checkpoint"),
    (other_seed, "checkpoint, config.json and tables fit"),
    (short_table, "checkpoint, config.json and tables fit"),
    (lost_table, "checkpoint, config.json and tables fit"),
    (half_config, "`config.json` must be valid JSON"),
]


def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(interrupted, tmp_path, capsys):
    for number, (spoil, message) in enumerate(REFUSED):
        copy = tmp_path / str(number)
        shutil.copytree(interrupted, copy)
        spoil(copy)
        contents = {p.name: p.read_bytes() for p in copy.iterdir()}
        assert main(["--resume", str(copy)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert {p.name: p.read_bytes() for p in copy.iterdir()} == contents
    assert main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert main(["--resume", str(interrupted), "--seed", "1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    with pytest.raises(ValueError, match="`out` must be the same folder as resume"):
        Config(out=str(tmp_path / "elsewhere"), resume=str(interrupted))


def test_a_finished_run_is_not_resumed_but_one_without_its_report_is(ungated, tmp_path, monkeypatch, capsys):
    flags, folder = ungated
    assert main(["--resume", str(folder)]) == 2
    assert "which is finished" in capsys.readouterr().err

    def fail(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.report, "write", fail)
        assert main([*flags, "--out", str(tmp_path / "run")]) == 130
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert (tmp_path / "run" / "report.md").is_file()
    assert_same_end(tmp_path / "run", folder)
