"""A resumed run gives the same results, bit for bit."""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import write_folder

from catode import cli
from catode.report.report import write as write_report
from catode.train import loop, models
from catode.train.__main__ import main
from catode.train.loop import checkpoint, lock
from catode.train.loop.checkpoint import states
from catode.train.loop.contents import FIELDS
from catode.train.loop.tables import TABLES
from catode.train.settings.commandline import parse
from catode.train.settings.config import Config, ConfigError
from catode.train.stop import Stop, Stopped

# units and layers go, dead channels stay, every state of a pruner is passed through
FLAGS = ["--arch=resnet14", "--hidden-scale=0.5", "--batch-size=256", "--nu=20", "--epochs=6", "--warmup-epochs=1.4"]
FLAGS += ["--memory=10", "--measure-every=1", "--layers-per-probe=3", "--check-every=3", "--threads=1"]
FLAGS += ["--width-multiple=8", "--checkpoint-every=2"]


def end(folder: Path) -> tuple:
    """Everything of a finished run that must not depend on an interruption."""
    result = json.loads((folder / "result.json").read_text())
    result = {k: v for k, v in result.items() if "seconds" not in k and "latency" not in k}
    metrics = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in metrics:
        del row["seconds"], row["wait_share"]
    weights = torch.load(folder / "model.pt", weights_only=True)
    return result, metrics, (folder / "structures.csv").read_text(), (folder / "structure.json").read_text(), weights


def assert_same_end(a: Path, b: Path) -> None:
    *others, weights = end(a)
    *expected, expected_weights = end(b)
    assert others == expected and weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[k], expected_weights[k]) for k in weights)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Neither latencies nor pictures are of interest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catode.train.loop.result.latency_ms", lambda *args: [[1.0], [1.0]])
        patch.setattr("catode.report.report.write", lambda folder: None)
        yield


def run_whole(flags, folder):
    assert main([*flags, "--out", str(folder)]) == 0
    return flags, folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Flags and folder of a run without interruption; units were removed, dead channels kept."""
    flags, folder = run_whole(FLAGS, tmp_path_factory.mktemp("whole") / "pruned")
    result = json.loads((folder / "result.json").read_text())
    assert result["macs_executed"] > result["macs"] and result["units_kept"] < result["units_total"]
    return flags, folder


@pytest.fixture(scope="module")
def ungated(tmp_path_factory):
    return run_whole(
        [*FLAGS, "--nu=0", "--epochs=2", "--warmup-epochs=0"], tmp_path_factory.mktemp("whole") / "ungated"
    )


def cut_off(monkeypatch, flags, folder, step):
    """Run until `step`, as far as an interrupt lets it."""
    before = loop.Trainer.show if "--nu=0" in flags else loop.Trainer.prune

    def interrupt(self, *args):
        if self.step >= step:
            raise KeyboardInterrupt
        return before(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, before.__name__, interrupt)
        assert main([*flags, "--out", str(folder)]) == 130


@pytest.mark.parametrize("step", [1, 13, 18, 29])
def test_a_resumed_run_ends_as_the_whole_one(pruned, step, tmp_path, monkeypatch, capsys):
    flags, expected = pruned
    cut_off(monkeypatch, flags, tmp_path / "run", step)
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert_same_end(tmp_path / "run", expected)
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint") or name == "lock"]


RECIPES = {
    "EMA": ["--ema=0.9"],
    "EMA without gates": ["--ema=0.9", "--nu=0", "--warmup-epochs=0", "--epochs=3"],
    "EMA, Nesterov, smoothed labels, another split": [
        "--ema=0.5",
        "--nesterov",
        "--label-smoothing=0.1",
        "--split-seed=3",
    ],
    "all training images": ["--validation-share=0"],
    "AdamW": ["--optimizer=adamw", "--lr=0.01"],
    "AdamW without gates, in halves": ["--optimizer=adamw", "--nu=0", "--warmup-epochs=0", "--epochs=3", "--amp=bf16"],
    "clipping": ["--clip-grad=0.3"],
    "AdamW, clipping, EMA": ["--optimizer=adamw", "--lr=0.01", "--clip-grad=0.3", "--ema=0.9"],
    "accumulation": ["--accumulate=2", "--per-example-gates"],
    "accumulation, AdamW, clipping": ["--accumulate=4", "--optimizer=adamw", "--lr=0.01", "--clip-grad=0.3"],
    "many validation images": ["--validation-share=0.4"],
}


SLOW = ("all training images", "AdamW", "clipping", "accumulation, AdamW, clipping", "many validation images")
"""Of which another recipe has the same part."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES])
def test_a_run_of_another_recipe_goes_on_bit_by_bit(name, tmp_path, monkeypatch):
    flags = [*FLAGS, *RECIPES[name]]
    _, expected = run_whole(flags, tmp_path / "whole")
    for step in (7, 14) if "--nu=0" not in flags else (7,):
        folder = tmp_path / f"run{step}"
        cut_off(monkeypatch, flags, folder, step)
        assert main(["--resume", str(folder), "--threads", "1"]) == 0
        assert_same_end(folder, expected)


def test_a_run_whose_settings_are_null_where_they_follow_from_others_goes_on(pruned, tmp_path, monkeypatch):
    """As config.json had them before 0.2."""
    flags, expected = pruned
    cut_off(monkeypatch, flags, tmp_path / "run", 13)
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    derived = config.pop("derived")
    assert "rate_ratio" in derived and None not in [config[name] for name in derived]
    file.write_text(json.dumps(config | dict.fromkeys(derived)))
    (tmp_path / "run" / "checksums.json").unlink()
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert_same_end(tmp_path / "run", expected)


def test_a_resumed_ungated_run_ends_as_the_whole_one(ungated, tmp_path, monkeypatch):
    flags, expected = ungated
    cut_off(monkeypatch, flags, tmp_path / "run", 5)
    assert [path.name for path in checkpoint.states(tmp_path / "run")] == ["checkpoint-4.pt", "checkpoint-2.pt"]
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1", "--checkpoint-every=1"]) == 0
    assert_same_end(tmp_path / "run", expected)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 9), (signal.SIGINT, 14)])
def test_a_signal_stops_the_run_after_its_step(pruned, number, step, tmp_path, monkeypatch, capsys):
    flags, expected = pruned
    before = loop.Trainer.prune

    def ask(self, *args):
        if self.step == step:
            signal.raise_signal(number)
        return before(self, *args)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "prune", ask)
        assert main([*flags, "--out", str(tmp_path / "run")]) == 128 + number
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    found = re.search(r"stopped after step (\d+); continue with --resume ", capsys.readouterr().err)
    assert checkpoint.states(tmp_path / "run")[0].name == f"checkpoint-{found[1]}.pt"
    assert int(found[1]) in (step, step + 1)
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert_same_end(tmp_path / "run", expected)


SIGNALLED = [  # where a signal comes, and what is said of how to go on
    ("catode.train.settings.presets.resolve", "stopped before the run began; give the same command again"),
    ("catode.train.loop.setup.data.load", "stopped before the run began; give the same command again"),
    ("catode.train.loop.trainer.make_pruner", "{said}; give the same command again"),
    ("catode.train.loop.trainer.environments", "{said}; continue with --resume {folder}"),
    ("catode.report.report.write", "{said}; continue with --resume {folder}"),
    ("catode.train.loop.lock.drop", "{said}; the run in {folder} is finished"),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("place", "says"), SIGNALLED)
def test_a_signal_outside_the_steps_is_one_line(place, says, number, ungated, tmp_path, monkeypatch, capsys):
    flags, expected = ungated
    folder, handlers = tmp_path / "run", (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *args, **kwargs: signal.raise_signal(number))
        assert main([*flags, "--out", str(folder)]) == 128 + number
    said = "stopped" if number == signal.SIGTERM else "interrupted"
    told = [line for line in capsys.readouterr().err.splitlines() if line and "step/s" not in line]
    assert told == [says.format(said=said, folder=folder)]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    if "finished" not in says:
        assert (
            main(["--resume", str(folder), "--threads=1"] if "resume" in says else [*flags, "--out", str(folder)]) == 0
        )
    assert_same_end(folder, expected)


def test_a_second_signal_does_not_wait(tmp_path):
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    with stop.heeded():
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(Stopped, match="at once") as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.number == signal.SIGINT and signal.getsignal(signal.SIGTERM) == before


def test_signals_are_left_alone_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)

    def heed():
        with Stop().heeded():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(heed).result() == before


OTHER_SETTINGS = [
    ["--target-macs=0.5", "--per-example-gates", "--mixup=0.2", "--round-to=4", "--read-every=3"],
    ["--estimator=straight-through", "--layer-estimator=curvature", "--amp=bf16", "--momentum=0", "--nu=3"],
]


@pytest.mark.parametrize("settings", OTHER_SETTINGS, ids=lambda settings: settings[0])
def test_a_resumed_run_of_other_settings_ends_as_the_whole_one(settings, tmp_path, monkeypatch):
    flags, expected = run_whole([*FLAGS, "--epochs=3", "--warmup-epochs=0.6", *settings], tmp_path / "whole")
    cut_off(monkeypatch, flags, tmp_path / "run", 9)
    assert checkpoint.states(tmp_path / "run")[0].name == "checkpoint-7.pt"
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert_same_end(tmp_path / "run", expected)


@pytest.fixture(scope="module")
def cut_off_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, FLAGS, folder, 18)
    return folder


@pytest.fixture
def interrupted(cut_off_run, tmp_path):
    return shutil.copytree(cut_off_run, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def zero(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(512) + content[middle + 512 :])


def rewrite(path):
    path.write_bytes(b"nonsense")


def empty(path):
    path.write_bytes(b"")


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", "nonsense")


def change(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def other_tool(path):
    torch.save(models.build("resnet14", in_channels=1, classes=10).state_dict(), path)


def tensor(path):
    torch.save(torch.zeros(3), path)


def code(path):
    torch.save({"format": checkpoint.FORMAT, "step": Path("x")}, path)


def legacy(path):
    torch.save({"format": checkpoint.FORMAT}, path, _use_new_zipfile_serialization=False)


def incomplete(path):
    torch.save({"format": checkpoint.FORMAT, "step": 1}, path)


def other_run(path):
    change(path, config={**torch.load(path, weights_only=True)["config"], "seed": 7, "nu": 3.0})


DAMAGES = [
    (truncate, "it is truncated, or not a file of torch.save"),
    (zero, "checksum of"),
    (rewrite, "it is truncated, or not a file of torch.save"),
    (empty, "it is truncated, or not a file of torch.save"),
    (other_zip, "it cannot be read (RuntimeError: "),
    (legacy, "it is truncated, or not a file of torch.save"),
    (lambda path: change(path, format=0), "it is in format 0, this version of catode reads format"),
    (other_tool, "it is not a checkpoint of catode"),
    (tensor, "it is not a checkpoint of catode"),
    (code, "it holds more than tensors, numbers and text"),
    (incomplete, "it lacks epochs_done, time"),
    (other_run, "it is of a run with another nu, seed"),
    (lambda path: change(path, lengths=[10**6, 0]), "metrics.csv is shorter than it was then"),
    (lambda path: change(path, lengths=None), "its lengths must be two counts"),
    (
        lambda path: change(path, lengths=[0, 0], checksums=[0, 0]),
        "the tables it goes on with have 0 epochs instead of 3",
    ),
    (lambda path: change(path, lengths=[0, 0]), "metrics.csv is damaged, its first 0 bytes"),
    (lambda path: change(path, step=-1), "its step must be a count"),
    (lambda path: change(path, step=16), "its step 16 does not follow from 3 epochs of 5 steps"),
    (lambda path: change(path, epochs_done=2), "its step 17 does not follow from 2 epochs of 5 steps"),
    (lambda path: change(path, history=[0.1]), "its history has 1 epochs instead of 3"),
    (lambda path: change(path, time=float("nan")), "its time must be a time"),
    (lambda path: change(path, model={}), "it must hold a pruner, and nothing else of the two"),
    (lambda path: shutil.copy(states(path.parent)[1], path), "it is of step 15"),
    *((partial(change, **{name: "x"}), f"its {name} must be ") for name in FIELDS if name != "images"),
]


def inside(change):
    """A damage that changes what a checkpoint holds, in place."""

    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def other_burst(state):
    state["pruner"]["pruner"]["products"]["burst"] = [[torch.zeros(3), state["pruner"]["pruner"]["kept"], 1.0]]


def swapped_weights(state):
    model = state["pruner"]["model"]
    name = next(name for name in model if name.endswith(".weight"))
    model[name] = model[name].flatten()


def buffer_of(state):
    return next(iter(state["optimizer"].values()))["momentum_buffer"]


UNFIT = [  # whole checkpoints of the run that it cannot take up, and what is said
    (lambda state: state["pruner"].update(model={}), "(RuntimeError: Error(s) in loading state_dict"),
    (lambda state: state["pruner"].update(pruner={}), "(ValueError: `state` must be a state_dict of this version's"),
    (lambda state: state["pruner"]["pruner"].update(fate=3), "something else at pruner.fate"),
    (lambda state: state["pruner"]["pruner"].update(draws=[]), "something else at pruner.draws"),
    (lambda state: state["pruner"]["pruner"].update(done=3), "its pruner is at step 3"),
    (other_burst, "something else at pruner.products.burst"),
    (swapped_weights, "something else at model."),
    (lambda state: buffer_of(state).fill_(float("nan")), "its optimizer's momentum_buffer of "),
    (
        lambda state: state["optimizer"].update(x={"momentum_buffer": torch.zeros(2)}),
        "its optimizer's state of x is of an",
    ),
    (lambda state: next(iter(state["optimizer"].values())).update(step=torch.ones(())), "its optimizer's state of "),
    (lambda state: state.update(scaler={"scale": 2.0}), "its scaler must hold"),
    (lambda state: state["rng"].update(cpu=torch.zeros(7, dtype=torch.uint8)), "(RuntimeError: "),
]


@pytest.mark.parametrize(("spoil", "reason"), UNFIT, ids=lambda value: None if callable(value) else value[:30])
def test_a_checkpoint_that_cannot_be_taken_up_gives_way_to_the_one_before_it(spoil, reason, interrupted, capsys):
    newest, before = checkpoint.states(interrupted)
    inside(spoil)(newest)
    setup = loop.prepare(parse(["--resume", str(interrupted)]))
    assert before.name == f"checkpoint-{setup.state['step']}.pt" and newest.exists()
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {newest.name} is skipped: the run cannot take it up (") and reason in warning
    assert len(warning.splitlines()) == 1


def test_wrong_contents_of_the_newest_checkpoint_cost_only_the_steps_since_the_one_before(interrupted, pruned):
    inside(other_burst)(states(interrupted)[0])
    assert main(["--resume", str(interrupted), "--threads", "1"]) == 0
    assert_same_end(interrupted, pruned[1])


@pytest.mark.parametrize("damage", [lambda env: env, lambda env: {**env, "threads": None}, lambda env: "{"])
def test_another_number_of_threads_is_told_and_the_run_goes_on(damage, interrupted, pruned, capsys):
    file = interrupted / "env.json"
    before = json.loads(file.read_text())
    env = damage(before)
    if env != before:
        file.write_text(env if isinstance(env, str) else json.dumps(env))
    try:
        assert main(["--resume", str(interrupted), "--threads", "2"]) == 0
    finally:
        torch.set_num_threads(1)
    notes = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("note: ")]
    expected = "note: the run had 1 CPU threads and goes on with 2: "
    assert [note[: len(expected)] for note in notes] == ([expected] if isinstance(env, dict) and env["threads"] else [])
    assert json.loads(file.read_text())["threads"] == 2
    found, whole = (json.loads((folder / "result.json").read_text()) for folder in (interrupted, pruned[1]))
    assert len(found["validation_accuracy_history"]) == 6
    assert found["validation_accuracy_history"][:3] == whole["validation_accuracy_history"][:3], (
        "of the epochs before, bit by bit"
    )


def test_a_run_without_a_checkpoint_that_fits_is_refused_in_one_line(interrupted, capsys):
    kept = states(interrupted)
    for path in kept:
        inside(other_burst)(path)
    assert main(["--resume", str(interrupted), "--threads", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: `resume` must name a run with a valid checkpoint; got ") and told.count("\n") == 1
    assert all(path.name in told for path in kept) and states(interrupted) == kept


def test_a_dry_run_in_config_json_does_not_stop_a_resumed_run(interrupted, pruned):
    config = json.loads((interrupted / "config.json").read_text())
    (interrupted / "config.json").write_text(json.dumps(config | {"dry_run": True}))
    (interrupted / "checksums.json").unlink()
    assert main(["--resume", str(interrupted), "--threads", "1"]) == 0
    assert_same_end(interrupted, pruned[1])


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=lambda value: None if callable(value) else value[:20])
def test_a_bad_checkpoint_gives_way_to_the_one_before_it(damage, reason, interrupted, capsys):
    newest, before = checkpoint.states(interrupted)
    damage(newest)
    bytes_then = newest.read_bytes()
    setup = loop.prepare(parse(["--resume", str(interrupted)]))
    assert before.name == f"checkpoint-{setup.state['step']}.pt"
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {newest.name} is skipped: ") and reason in warning
    assert len(warning.splitlines()) == 1 and newest.read_bytes() == bytes_then


def test_a_folder_or_link_named_like_a_checkpoint_is_none(interrupted):
    found = checkpoint.states(interrupted)
    (interrupted / "checkpoint-99.pt").mkdir()
    (interrupted / "checkpoint-100.pt").symlink_to(interrupted / "nowhere")
    (interrupted / "checkpoint-.pt").touch()
    assert checkpoint.states(interrupted) == found


def test_a_checkpoint_holds_what_a_resume_asks_for(interrupted):
    state, _ = checkpoint.load_state(interrupted)
    assert state.keys() == {*FIELDS, "format"}
    assert len(state["sums"]["losses"]) == state["step"] - 5 * state["epochs_done"] > 0


@given(steps=st.lists(st.integers(0, 30), max_size=6), last=st.integers(0, 30), keep=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_law_the_last_checkpoints_are_kept(tmp_path_factory, steps, last, keep):
    folder = tmp_path_factory.mktemp("kept")
    for step in steps:
        (folder / f"checkpoint-{step}.pt").touch()
    (folder / f"checkpoint-{last}.pt.part").touch()
    checkpoint.save_state(folder, {"step": last}, keep)
    kept = sorted({step for step in steps if step < last} | {last}, reverse=True)[:keep]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"checkpoint-{step}.pt" for step in kept)
    assert checkpoint.load_state(folder)[0]["step"] == last
    checkpoint.drop_states(folder)
    assert not list(folder.iterdir())


@given(position=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_law_a_flipped_bit_never_passes_unseen(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flipped")
    state = {"lengths": [1, 2], "optimizer": {"a": torch.arange(50.0)}, "text": ["undecided"] * 3}
    checkpoint.save_state(folder, {**state, "step": 1})
    checkpoint.save_state(folder, {**state, "step": 2})
    newest = folder / "checkpoint-2.pt"
    content = bytearray(newest.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1 << bit
    newest.write_bytes(content)
    found, _ = checkpoint.load_state(folder)
    assert torch.equal(found["optimizer"]["a"], state["optimizer"]["a"]) and found["step"] in (1, 2)


def test_a_fallback_ends_as_the_whole_run(interrupted, pruned):
    truncate(checkpoint.states(interrupted)[0])
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


def other_images(folder):
    for path in folder.glob("checkpoint*"):
        change(path, images=1)


def changed(name, place, content):
    """Damage a byte of a table, within what the oldest checkpoint of the run saw."""

    def damage(folder):
        length = min(torch.load(path, weights_only=True)["lengths"][TABLES.index(name)] for path in states(folder))
        table = bytearray((folder / name).read_bytes())
        table[int(place * length)] = content
        (folder / name).write_bytes(table)

    return damage


def half_config(folder):
    truncate_to = (folder / "config.json").read_text()[:60]
    (folder / "config.json").write_text(truncate_to)


def in_place_of_config(content):
    def spoil(folder):
        (folder / "config.json").unlink()
        if content is None:
            (folder / "config.json").symlink_to(folder.parent)
        else:
            (folder / "config.json").write_bytes(content)

    return spoil


REFUSED = [
    (nothing_left, "which has epochs in metrics.csv but neither"),
    (all_damaged, "must name a run with a valid checkpoint"),
    (other_seed, "it is of a run with another seed"),
    (short_table, "metrics.csv is shorter than it was then"),
    (lost_table, "structures.csv is shorter than it was then"),
    (changed("metrics.csv", 0.9, ord("x")), "metrics.csv is damaged, its first"),
    (changed("metrics.csv", 0.0, 0xFF), "metrics.csv is damaged, its first"),
    (changed("structures.csv", 0.5, 0), "structures.csv is damaged, its first"),
    (other_images, "`data_dir` must hold the images that the run began with; got others"),
    (half_config, "`config.json` must be valid JSON"),
    (in_place_of_config(b"[" * 100_000), "config.json"),
    (in_place_of_config(b"[1, 2]"), "got list"),
    (in_place_of_config(b"null"), "got NoneType"),
    (in_place_of_config(b'{"arch": "\xff"}'), "`config.json` must be a text that can be read"),
    (in_place_of_config(b'{"seed": ' + b"9" * 5000 + b"}"), "`config.json` must be valid JSON"),
    (in_place_of_config(b'{"seed": "x"}'), "`seed` must be "),
    (in_place_of_config(None), "Is a directory"),
]


def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(interrupted, tmp_path, capsys):
    for number, (spoil, message) in enumerate(REFUSED):
        copy = tmp_path / str(number)
        shutil.copytree(interrupted, copy)
        (copy / "checksums.json").unlink()  # which would name the file, but not what is wrong in it
        spoil(copy)
        contents = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
        assert main(["--resume", str(copy)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert str(copy) in error or "`data_dir`" in error
        assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == contents
    assert main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert main(["--resume", str(interrupted), "--seed", "1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    with pytest.raises(ValueError, match="`out` must be the same folder as resume"):
        Config(out=str(tmp_path / "elsewhere"), resume=str(interrupted))


def test_a_finished_run_is_not_resumed_but_one_without_its_report_is(ungated, tmp_path, monkeypatch, capsys):
    flags, folder = ungated
    names = sorted(os.listdir(folder))
    assert main(["--resume", str(folder)]) == 2
    assert "which is finished" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == names and "lock" not in names

    def fail(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("catode.report.report.write", fail)
        assert main([*flags, "--out", str(tmp_path / "run")]) == 130
    monkeypatch.setattr("catode.report.report.write", lambda folder: (folder / "report.md").write_text("written"))
    assert main(["--resume", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert (tmp_path / "run" / "report.md").read_text() == "written"
    assert_same_end(tmp_path / "run", folder)


def test_a_table_damaged_behind_the_older_checkpoint_costs_the_newer_one(pruned, tmp_path, monkeypatch, capsys):
    flags, expected = pruned
    folder = tmp_path / "run"
    cut_off(monkeypatch, flags, folder, 11)
    newest, before = states(folder)
    (length, _), (earlier, _) = (torch.load(path, weights_only=True)["lengths"] for path in (newest, before))
    assert earlier < length
    table = bytearray((folder / "metrics.csv").read_bytes())
    table[length - 1] ^= 1
    (folder / "metrics.csv").write_bytes(table)
    assert main(["--resume", str(folder), "--threads", "1"]) == 0
    assert f"warning: {newest.name} is skipped: metrics.csv is damaged" in capsys.readouterr().err
    assert_same_end(folder, expected)


@pytest.mark.parametrize(
    "error", [ValueError("metrics.csv must hold numbers"), OSError(28, "No space left on device"), IndexError()]
)
def test_a_failing_report_never_costs_the_run(error, ungated, tmp_path, monkeypatch, capsys):
    flags, expected = ungated
    folder = tmp_path / "run"

    def fail(folder):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("catode.report.report.write", fail)
        assert main([*flags, "--out", str(folder)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line and "step/s" not in line]
    reason = (str(error) or "IndexError").rstrip(".")
    hint = f"Make it again with catode report {folder}"
    assert told == [f"warning: the run is finished, but its report failed: {reason}. {hint}"]
    assert not states(folder) and not (folder / "report.md").exists()
    assert_same_end(folder, expected)


def test_a_report_is_made_again(ungated, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(ungated[1], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("catode.report.report.write", write_report)
        assert cli.main(["report", str(folder)]) == 0
        assert capsys.readouterr().out == f"report {folder / 'report.md'}\n" and (folder / "report.md").exists()
        (folder / "metrics.csv").write_text("nonsense")
        assert cli.main(["report", str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {folder / 'metrics.csv'} must be as the run wrote it")
        (folder / "checksums.json").unlink()
        assert cli.main(["report", str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {folder / 'metrics.csv'} must have the column")


@pytest.mark.skipif(sys.platform == "win32", reason="no limit for the size of files")
@pytest.mark.parametrize(("limit", "file"), [(100_000, "checkpoint-9.pt"), (200, "structures.csv")])
def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on(pruned, limit, file, tmp_path, monkeypatch, capfd):
    import resource

    flags, expected = pruned
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    before, train = loop.Trainer.prune, loop.train

    def fill(self, *args):
        if self.step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        return before(self, *args)

    def emptied(setup, **given):
        try:
            return train(setup, **given, progress=False)  # standard error may be a file too
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "prune", fill)
        patch.setattr(loop, "train", emptied)
        assert main([*flags, "--out", str(folder)]) == 1
    told = capfd.readouterr().err
    assert f"File too large: '{folder / file}'. Fix that, then continue with --resume {folder}" in told
    assert "Traceback" not in told and not list(folder.glob("*.part"))
    assert main(["--resume", str(folder), "--threads", "1"]) == 0
    assert_same_end(folder, expected)


# Killed for real: a process that has imported everything forks one child a run, which is killed or kills itself.

SERVER = """
import importlib, json, os, signal, sys, traceback
import torch._dynamo  # or every child would import it with its first optimizer
from catode.report import report
from catode.train import data, loop
from catode.train.__main__ import main

loop.result.latency_ms = lambda *args: [[1.0], [1.0]]
report.write = lambda folder: None
data.load("digits")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(place, count, how):
    "Let the count-th call of a function be the last: before it, after it, half through a file, or paused to be killed."
    module, _, names = place.partition(":")
    owner = importlib.import_module(module)
    *parents, name = names.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    call, calls = getattr(owner, name), []
    def armed(*args, **kwargs):
        calls.append(None)
        if len(calls) != count:
            return call(*args, **kwargs)
        if how == "half":
            call(args[0], lambda file: (args[1](file), file.truncate(file.tell() // 2), die()))
        if how == "after":
            call(*args, **kwargs)
        if how == "pause":
            signal.pause()
        die()
    setattr(owner, name, armed)

for line in sys.stdin:
    arguments, armed = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            if armed:
                arm(*armed)
            status = main(arguments)
        except BaseException:
            traceback.print_exc()
            status = 70
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


def start(server, arguments, armed=None):
    """Begin a run in a process of its own; returns its number."""
    server.stdin.write(json.dumps([arguments, armed]) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def status(server):
    """Wait for the end of the run that was begun last."""
    return int(server.stdout.readline())


def going_on(folder):
    """Arguments that start a run or resume it."""
    return (
        ["--resume", str(folder), "--threads=1"]
        if (folder / "config.json").exists()
        else [*FLAGS, "--out", str(folder)]
    )


KILLS = [  # where, at which call and how; and the newest checkpoint that is there then, where that is certain
    ("catode.prune.pruner:Pruner.step", 2, "before", ""),
    ("catode.train.loop.checkpoint:_write_part", 7, "half", "checkpoint-2.pt"),
    ("catode.train.loop.checkpoint:_write_part", 6, "after", "checkpoint-2.pt"),
    ("catode.train.loop.checkpoint:_flush_folder", 1, "before", "checkpoint-4.pt"),
    ("catode.train.loop:CsvTable.add", 1, "after", "checkpoint-4.pt"),
    ("os:fsync", 11, "pause", "checkpoint-4.pt"),
    ("catode.prune.gated.cut:Change.follow", 2, "before", None),
    ("catode.prune.gated.gates:Gates.install", 2, "before", None),
    ("catode.prune.gated.network:Network.cut", 1, "after", None),
    ("catode.prune.pruner:Pruner.step", 4, "after", None),
    ("catode.train.loop:Trainer.result", 1, "after", "checkpoint-30.pt"),
    ("pathlib:Path.unlink", 1, "after", "checkpoint-30.pt"),
]


def test_kills_wherever_it_hurts_and_resumes(server, pruned, tmp_path, capsys):
    folder = tmp_path / "run"
    for place, count, how, newest in KILLS:
        process = start(server, going_on(folder), [place, count, how])
        if how == "pause":
            while not (folder / "checkpoint-5.pt.part").exists():
                time.sleep(0.001)
            assert main(["--resume", str(folder)]) == 2
            held = f"no other process uses; got resume={str(folder)!r}, locked by process {process} "
            assert held in capsys.readouterr().err
            os.kill(process, signal.SIGKILL)
        assert status(server) == -signal.SIGKILL, place
        found = [path.name for path in checkpoint.states(folder)]
        assert newest is None or found[:1] == ([newest] if newest else []), place
    assert main(going_on(folder)) == 0
    assert_same_end(folder, pruned[1])


def test_a_run_of_adamw_clipped_in_parts_is_killed_and_ends_as_the_whole_one(server, tmp_path):
    flags = [*FLAGS, "--nu=5", "--optimizer=adamw", "--lr=0.01", "--clip-grad=0.3", "--accumulate=2"]
    start(server, [*flags, "--out", str(tmp_path / "whole")])
    assert status(server) == 0
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["units_kept"] < result["units_total"]
    folder = tmp_path / "run"
    for place, count, how in (
        ("torch.optim:AdamW.step", 13, "after"),
        ("catode.prune.gated.cut:Change.follow", 4, "before"),
        ("catode.train.loop.checkpoint:_write_part", 5, "half"),
    ):
        going = ["--resume", str(folder), "--threads=1"] if folder.exists() else [*flags, "--out", str(folder)]
        start(server, going, [place, count, how])
        assert status(server) == -signal.SIGKILL, place
    start(server, ["--resume", str(folder), "--threads=1"])
    assert status(server) == 0
    assert_same_end(folder, tmp_path / "whole")


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_twenty_kills_at_random_moments(server, pruned, tmp_path):
    chance, runs = random.Random(0), 0
    begun = time.monotonic()
    start(server, going_on(tmp_path / "timed"))
    assert status(server) == 0
    seconds = time.monotonic() - begun
    kills = {"anywhere": 0, "writing": 0, "compaction": 0}
    while sum(kills.values()) < 20:
        folder = tmp_path / str(runs)
        old = {(part.name, part.stat().st_mtime_ns) for part in folder.glob("checkpoint-*.part")}
        kind, appearances = min(kills, key=kills.get), chance.randint(1, 4)
        inside = ("catode.prune.gated.cut:Change.follow", chance.randint(1, 3), "before")
        process = start(server, going_on(folder), inside if kind == "compaction" else None)
        if kind == "anywhere":
            limit = time.monotonic() + chance.uniform(0.0, seconds)
            while alive(process) and time.monotonic() < limit:
                time.sleep(0.001)
        while kind == "writing" and alive(process) and appearances:
            with contextlib.suppress(FileNotFoundError):  # moved into place meanwhile
                new = {(part.name, part.stat().st_mtime_ns) for part in folder.glob("checkpoint-*.part")} - old
                appearances -= bool(new)
                old |= new
        if kind != "compaction":
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ended = status(server)
        assert ended in (0, -signal.SIGKILL)
        kills[kind] += ended != 0
        if (folder / "result.json").exists() and not checkpoint.states(folder):
            assert_same_end(folder, pruned[1])
            runs += 1
    folder = tmp_path / str(runs)
    start(server, going_on(folder))
    assert status(server) == 0
    assert_same_end(folder, pruned[1])


def test_one_folder_is_begun_once(tmp_path):
    setups = [loop.prepare(parse([*FLAGS, "--out", str(tmp_path / "run")])) for _ in range(2)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(setups[0].config.to_json())  # by the first of the two
    with pytest.raises(ConfigError, match="must be a folder without a run"):
        loop.train(setups[1])
    with pytest.raises(ConfigError, match="`resume` must be a folder that can be written; got resume="):
        lock.hold(tmp_path / "nowhere", "resume")


def test_a_file_system_without_locks_costs_a_note(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    lock.hold(tmp_path).close()
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path} is on a file system without locks; do not start a second run there."
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no signal tells of a worker's end")
@pytest.mark.parametrize("place", ["prune", "update", "read"])
def test_a_worker_killed_while_nobody_waits_for_it_is_one_line_and_the_run_goes_on(
    place, tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "images", per_class=12)
    folder, before, calls = tmp_path / "run", getattr(loop.Trainer, place), []
    flags = ["--dataset=folder", f"--data-dir={tmp_path / 'images'}", "--arch=resnet14", "--hidden-scale=0.25"]
    flags += ["--image-size=8", "--batch-size=4", "--array-gib=0", "--workers=1", "--threads=1", "--epochs=3"]
    flags += ["--checkpoint-every=1", "--warmup-epochs=0.5"]

    def killed(self, *args):
        calls.append(place)
        for worker in multiprocessing.active_children() if len(calls) > 2 else ():
            os.kill(worker.pid, signal.SIGKILL)
            limit = time.monotonic() + 10.0
            while time.monotonic() < limit:  # as long as a probe may take
                time.sleep(0.01)
        return before(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, place, killed)
        assert main([*flags, "--out", str(folder)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(
        "error: `workers` must be processes that stay alive; got workers=1 and: "
    )
    assert told[0].endswith(f"Then continue with --resume {folder}")
    assert main(["--resume", str(folder), "--threads=1"]) == 0


def test_torch_load_is_never_called_unsafely():
    root = Path(__file__).parents[2]
    found = 0
    for file in (f for part in ("catode", "benchmarks") for f in (root / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "torch.hub.load_state_dict_from_url",
            ):
                assert "weights_only=True" in map(ast.unparse, node.keywords), where
                found += 1
            if (
                isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch"
            ):  # it would hide from the above
                assert not {alias.name for alias in node.names} & {"load", "load_state_dict_from_url"}, where
    assert found


def test_a_class_of_another_name_is_named_at_resume(tmp_path, capsys):
    write_folder(tmp_path / "data")
    flags = [
        "--dataset=folder",
        f"--data-dir={tmp_path / 'data'}",
        "--arch=resnet14",
        "--hidden-scale=0.25",
        "--epochs=2",
    ]
    flags += ["--warmup-epochs=0", "--batch-size=2", "--threads=1", "--memory=10", "--check-every=2"]
    folder = tmp_path / "a run's folder"
    config = parse([*flags, f"--out={folder}"])
    trainer = loop.Trainer(loop.prepare(config), folder_made(folder), progress=False)
    trainer.advance()
    trainer.close()
    for split in (path for path in (tmp_path / "data").iterdir() if path.is_dir()):
        first = min(path for path in split.iterdir() if path.is_dir())
        first.rename(first.with_name(f"{first.name}2"))
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 2
    assert f"got the class '{first.name}2' instead of '{first.name}'. Restore them" in capsys.readouterr().err


def folder_made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_folder_with_spaces_is_named_as_a_shell_reads_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run's folder"
    monkeypatch.setattr(loop.Trainer, "prune", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main([*FLAGS, f"--out={folder}"]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(said.partition("continue with ")[2]) == ["--resume", str(folder)]


def test_memory_that_is_lacking_costs_one_line(tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        raise MemoryError("Unable to allocate 131. TiB")

    monkeypatch.setattr(loop.setup.data, "load", load)
    assert main([*FLAGS, f"--out={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err == (
        "error: not enough memory: Unable to allocate 131. TiB. Fix that, then give the same command again\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_limit_beyond_all_numbers_is_no_limit(tmp_path):
    write_folder(tmp_path / "data")
    flags = ["--dataset=folder", f"--data-dir={tmp_path / 'data'}", "--batch-size=2", "--epochs=1", "--warmup-epochs=0"]
    setup = loop.prepare(parse([*flags, "--array-gib=1e308", f"--out={tmp_path / 'run'}"]))
    assert torch.is_tensor(setup.images.train_images)


def test_a_signal_within_the_summary_says_that_the_run_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("catode.train.__main__.summary", lambda _: signal.raise_signal(signal.SIGTERM))
    assert main([*FLAGS, "--epochs=2", f"--out={tmp_path / 'run'}"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; the run in {tmp_path / 'run'} is finished"
