"""Paths as users write them and as their disks allow: ~ for the home folder, folders that cannot be written."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest
import torch
from test_data import write_folder

from catode import cli
from catode.train import loop, models
from catode.train.__main__ import main
from catode.train.loop import checkpoint
from catode.train.settings.config import Config, ConfigError

QUICK = ["--arch=resnet14", "--hidden-scale=0.25", "--nu=0", "--epochs=1", "--batch-size=256", "--threads=1"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, which is not the working directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(loop.result, "latency_ms", lambda *_: [[1.0], [1.0]])
    yield tmp_path / "home"
    assert not os.listdir(tmp_path / "elsewhere"), "nothing is written beside"


def test_a_tilde_is_the_home_folder_in_every_path(home, monkeypatch, capsys):
    torch.manual_seed(1)
    network = models.build("resnet14", in_channels=3, classes=2, hidden_scale=0.25)
    torch.save(network.state_dict(), home / "initial.pt")
    write_folder(home / "images", per_class=6)
    flags = [*QUICK, "--epochs=2", "--batch-size=4", "--dataset=folder", "--data-dir=~/images", "--image-size=8"]
    save = loop.Trainer.save_state
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "save_state", lambda self: [save(self), (_ for _ in ()).throw(KeyboardInterrupt)])
        assert main([*flags, "--init=~/initial.pt", "--out=~/runs/a", "--workers=0"]) == 130
    assert json.loads((home / "runs/a/config.json").read_text())["out"] == str(home / "runs" / "a")
    assert capsys.readouterr().err.rstrip().endswith(f"continue with --resume {home / 'runs' / 'a'}")
    assert main(["--resume=~/runs/a", "--threads=1"]) == 0
    assert main([*flags, "--seed=1", "--out=~/runs/b", "--workers=0"]) == 0
    assert cli.main(["report", "~/runs/a"]) == 0
    assert cli.main(["compare", "~/runs/a", "~/runs/b", "--out=~/table"]) == 0
    assert cli.main(["export", "~/runs/a", "--format=torch-export", "--out=~/a.pt2"]) == 0
    numbers = ["--benefit=-1", "--price=1", "--gain=0.1", "--rate_ratio=1", "--noise=0.1"]
    assert cli.main(["theory", *(n.replace("_", "-") for n in numbers), "--out=~/picture.png"]) == 0
    assert {"runs", "table", "a.pt2", "picture.png"} <= set(os.listdir(home))
    assert Config(out="~/x").out == str(home / "x") and Config(out=Path("~/x")).out == str(home / "x")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (["train", *QUICK, "--out=~nobody-of-this-name/x"], "out"),
        (["train", *QUICK, "--init=~nobody-of-this-name/x"], "init"),
        (["train", "--resume=~nobody-of-this-name/x"], "resume"),
        (["report", "~nobody-of-this-name/x"], "folder"),
        (["compare", "~nobody-of-this-name/x"], "folders"),
        (["compare", "x", "--out=~nobody-of-this-name/x"], "out"),
        (["export", "~nobody-of-this-name/x", "--latency"], "folder"),
        (["export", "x", "--format=onnx", "--out=~nobody-of-this-name/x.onnx"], "out"),
        (["theory", "--from-run=~nobody-of-this-name/x"], "from_run"),
        (["theory", "--out=~nobody-of-this-name/x.png"], "out"),
    ],
    ids=str,
)
def test_the_home_of_nobody_is_one_line(program, name, home, capsys):
    assert cli.main(program) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        f"error: `{name}` must be a path whose home folder is known; got {name}='~nobody-of-this-name/x"
    )
    assert told.count("\n") == 1


# Folders that cannot be written


def in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "runs" / "a"


def in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path / "file"


def read_only(tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed").chmod(0o555)
    if os.access(tmp_path / "fixed", os.W_OK):
        pytest.skip("this user may write everywhere")
    return tmp_path / "fixed" / "a"


def system(tmp_path):
    if not Path("/proc/1").is_dir() or Path("/proc").stat().st_dev == Path("/").stat().st_dev:
        pytest.skip("no /proc")
    return Path("/proc/catode-run")  # refuses root too, and not before the folder is made


@pytest.mark.parametrize("place", [in_place_of_a_folder, in_place_of_the_folder, read_only, system])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_folder_that_cannot_be_written_is_one_line(place, dry, tmp_path, capsys):
    out = place(tmp_path)
    status = main([*QUICK, f"--out={out}", *dry])
    told = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line]
    if dry and place is system:
        assert status in (0, 2)  # what is only found by writing is not found by a dry run
        return
    assert (status in (1, 2) and len(told) == 1 and str(out) in told[0]) or (
        place is in_place_of_a_folder and len(told) == 1
    )
    assert told[0].startswith("error: ") and "--resume" not in told[0]
    assert not (tmp_path / "fixed" / "a").exists()


def run_into_it(pipe, folder, flags):
    """A run whose folder cannot be written after its first checkpoint; as another user where this one may everywhere."""
    save = loop.Trainer.save_state

    def fix(self):
        save(self)
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)

    loop.Trainer.save_state = fix
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = main([*flags, f"--out={folder}"])
    pipe.send((status, told.getvalue()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_folder_that_becomes_read_only_costs_a_line_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(loop.result, "latency_ms", lambda *_: [[1.0], [1.0]])
    monkeypatch.setattr("catode.report.report.write", lambda _: None)
    with tempfile.TemporaryDirectory() as base:  # which every user may enter
        os.chmod(base, 0o755)
        folder, flags = Path(base, "run"), [*QUICK, "--epochs=3"]
        assert main([*flags, f"--out={base}/whole"]) == 0
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe()
        process = fork.Process(target=run_into_it, args=(there, folder, flags))
        process.start()
        status, told = here.recv()
        process.join()
        lines = [line for line in told.replace("\r", "\n").splitlines() if line and "step/s" not in line]
        assert status == 1 and len(lines) == 1 and lines[0].startswith("error: [Errno 13] Permission denied: "), told
        assert lines[0].endswith(f". Fix that, then continue with --resume {folder}") and checkpoint.states(folder)
        folder.chmod(0o755)
        assert main([f"--resume={folder}", "--threads=1"]) == 0
        one, other = (torch.load(Path(base, name, "model.pt"), weights_only=True) for name in ("run", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_path_of_no_text_is_refused():
    for bad in ("", 3):
        with pytest.raises(ConfigError, match=r"^`out` must be a non-empty text"):
            Config(out=bad)
