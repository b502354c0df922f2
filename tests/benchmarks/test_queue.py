"""The queue of the results: laws of its rows, what is derived from records, and runs that are stopped and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from queue_records import DENSE_MACS, TREE, cells, write
from torch import nn

from benchmarks import rival
from benchmarks.common import training
from benchmarks.queue import derive, scheduler, shapes, status, tables, trial, worker
from benchmarks.queue.book import FAILED, Book
from benchmarks.queue.places import Places
from benchmarks.queue.program import ROOT, Program, program
from benchmarks.queue.rows import (
    CATODES,
    CHOOSING,
    DESIGN,
    DIGITS,
    LEVELS,
    NAMES,
    RIVAL_FIRST,
    RIVAL_NAMES,
    RIVALS,
    ROWS,
)
from benchmarks.rival import SCOPES, later_trainer
from catode.records import read_json, read_rows
from catode.structures.inventory import Inventory
from catode.train.loop import Trainer, prepare
from catode.train.models import build
from catode.train.settings.config import Config

# --- rows ---------------------------------------------------------------------------------------------------------------


def test_the_recipe_is_a_balanced_fraction_with_the_preset_first():
    assert len(DESIGN) == 8 and len({tuple(values.items()) for values in DESIGN}) == 8
    for one, other in combinations(LEVELS, 2):
        assert set(Counter((values[one], values[other]) for values in DESIGN).values()) == {2}, (one, other)
    preset = Config.from_presets(dataset="cifar10", data_dir="d")
    assert DESIGN[0] == {name: getattr(preset, name) for name in LEVELS}


def test_choices_have_seeds_of_their_own_and_the_rival_has_no_fewer_settings():
    assert len(CATODES) == len(RIVALS) == len(RIVAL_FIRST) and len(RIVAL_NAMES) == len(RIVALS) + 2
    for row in ROWS.values():
        assert (row.seeds == CHOOSING) == (row.table in ("recipe", "choices", "schedule")), row.name
        assert row.table in tables.TABLES and row.kind in worker.KINDS


def test_no_run_comes_before_what_it_waits_for():
    for row in ROWS.values():
        for name in row.after:
            assert max(ROWS[name].priority) <= min(row.priority[1:] or row.priority), (row.name, name)
    order = [task.run for task in scheduler.waiting(Book(Path("none")))]
    assert len(order) == len(set(order)) == sum(len(row.seeds) for row in ROWS.values())
    begins = [
        next(i for i, run in enumerate(order) if run.startswith(f"{name}-s"))
        for name in ("recipe-1", "dense", "pruned", "stage-shaped", "rival", "r56-half", "units-only")
    ]
    assert begins == sorted(begins)


def test_runs_are_chosen_by_names_of_runs_rows_and_tables(tmp_path):
    book = Book(tmp_path)
    for only, number in ((["headline"], 25), (["dense", "rival-s[01]"], 7), (["recipe", "recipe-1"], 8), (["none"], 0)):
        assert len(scheduler.waiting(book, only)) == number, only
    with pytest.raises(ValueError, match="`only` must match the name of a run, row or table; got 'a b'"):
        scheduler.make(Places(tmp_path, tmp_path), None, threads=1, jobs=1, only=["a", "b"])


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> list[Book]:
    """Records with one setting of the recipe and one of each choice ahead of the others, in turn."""
    found = []
    for best in range(len(DESIGN)):
        records = tmp_path_factory.mktemp("records")
        for i, name in enumerate(NAMES):
            write(records, name, 100, validation=0.9 if i == best else 0.5)
        for i in range(len(CATODES)):
            for name in ("pruned-choice", "rival-choice"):
                write(records, f"{name}-{i + 1}", 100, validation=0.9 if i == best else 0.5, macs=18e6)
        for name in ("pruned", "dense"):
            write(records, name, 0)
        found.append(Book(records))
    return found


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.kind not in ("shaped", "narrowed")], ids=lambda row: row.name
)
def test_every_row_has_settings_that_a_run_takes_whatever_is_chosen(row, books):
    for best, book in enumerate(books):
        values = row.given(book, row.seeds[0])
        if row.kind == "rival":
            share, before, after, rate, sparse, scope = (values.pop(key) for key in ("share", *RIVALS[0]))
            assert 0 < share < 1 and before + after == values["epochs"] and rate > 0 and sparse >= 0 and scope in SCOPES
            if row.name in RIVAL_NAMES[len(RIVALS) :]:  # the best of the others, but for what is ranked together
                best_one = RIVALS[best % len(RIVALS)]
                given_ = row.given(book, 100)
                assert scope != "all" and {key: given_[key] for key in best_one} == best_one | {"scope": scope}
        recipe = row.settings if row.table == "recipe" else DESIGN[best]
        dataset = {} if row.common["dataset"] == "digits" else {"data_dir": "d"}
        config = Config.from_presets(**values, **dataset, out="o")
        assert config.validation_share == 0.1
        if dataset:
            assert {name: getattr(config, name) for name in LEVELS} == {name: recipe[name] for name in LEVELS}


# --- what is derived ----------------------------------------------------------------------------------------------------


def test_within_a_tie_the_first_setting_is_taken_and_a_failed_one_has_lost(tmp_path):
    for number, validation in enumerate((0.84, 0.8478, 0.8482, 0.8499, 0.7, 0.7, 0.7), 1):
        write(tmp_path, f"recipe-{number}", 100, validation=validation)
    book = Book(tmp_path)
    assert not book.all_ended(ROWS["recipe-8"])
    Book(tmp_path).fail("recipe-8-s100", {"error": "`loss` must stay finite", "queue": {"family": "x", "tree": TREE}})
    book = Book(tmp_path)
    assert all(book.all_ended(ROWS[name]) for name in NAMES) and "recipe-8-s100" in book.failed
    assert derive.chosen(book, 0, rows=NAMES, settings=DESIGN) == DESIGN[2]
    assert derive.chosen(book, 0, rows=NAMES, settings=DESIGN, tie=0.0) == DESIGN[3]


def test_a_run_that_missed_its_target_is_not_chosen(tmp_path):
    write(tmp_path, "pruned-choice-1", 100, validation=0.8, macs=0.455 * DENSE_MACS)
    write(tmp_path, "pruned-choice-2", 100, validation=0.9, macs=0.47 * DENSE_MACS)
    names = ("pruned-choice-1", "pruned-choice-2")
    assert derive.chosen(Book(tmp_path), 0, rows=names, settings=CATODES) == CATODES[0]
    write(tmp_path, "rival-choice-1", 100, validation=0.9, macs=0.47 * DENSE_MACS)
    with pytest.raises(ValueError, match="`records` must hold a run to choose among rival-choice-1"):
        derive.chosen(Book(tmp_path), 0, rows=("rival-choice-1",), settings=RIVALS)


@pytest.mark.parametrize(("cpu", "epochs"), [(500.0, 20), (400.0, 25), (410.0, 24), (600.0, 20)])
def test_equal_time_gives_the_epochs_that_the_saved_time_pays_for(cpu, epochs, tmp_path):
    for seed in (0, 1):
        write(tmp_path, "dense", seed)
        write(tmp_path, "pruned", seed, cpu_seconds=cpu)
    own = derive.equal_time(Book(tmp_path), 0, row="pruned", dense="dense", seeds=(0, 1), epochs=20)
    assert own == {"epochs": epochs}


@pytest.mark.parametrize("cpu", [400.0, 500.0])
def test_equal_time_is_needless_where_it_pays_for_no_more_epochs(cpu, tmp_path):
    row, needless = ROWS["equal-time"], cpu == 500.0
    assert row.left(Book(tmp_path)) == [0, 1, 2] and row.reason(Book(tmp_path)) is None  # not known yet
    for name in row.after:
        for seed in ROWS[name].seeds:
            write(tmp_path, name, seed, **({"cpu_seconds": cpu} if name == "pruned" else {}))
    book = Book(tmp_path)
    assert row.left(book) == ([] if needless else [0, 1, 2]) and book.all_ended(row) == needless
    assert len(scheduler.waiting(book, ["equal-time"])) == (0 if needless else 3)
    write(tmp_path, "units-only", 0)
    text = tables.page(Book(tmp_path), "parts")
    assert ("Not run: equal-time, its time pays for no more than the 20 epochs of pruned" in text) == needless
    assert ("equal-time (0 of 3)" in text) != needless


def drawn(arch: str, rng: np.random.Generator) -> dict:
    """A random structure."""
    inventory = Inventory(build(arch, in_channels=3, classes=10).structures())
    share = rng.uniform(0.2, 1.0)
    return inventory.record(inventory.close(rng.random(inventory.size) < share + (1 - share) * rng.random()))


@examples(max_examples=6, deadline=None)
@given(st.integers(0, 10_000))
def test_the_stage_shaped_network_has_the_mean_depths_and_meets_the_mean_macs(seed):
    """Of six draws: each counts the operations of up to a hundred networks."""
    rng = np.random.default_rng(seed)
    kept = [drawn("resnet14", rng) for _ in range(3)]
    goal = float(np.mean([shapes.macs("resnet14", blocks, (3, 32, 32), 10) for blocks in kept]))
    depths, wide = shapes.means(kept)
    made = shapes.stage_shaped("resnet14", kept, goal)
    for stage, names in shapes.stages(made).items():
        stays = [made[name]["kept"] for name in names]
        assert sum(stays) == (round(depths[stage]) if stage in wide else 0) and stays == sorted(stays, reverse=True)
        assert len({len(units) for name in names if made[name]["kept"] for units in made[name]["sites"].values()}) <= 1
    reachable = [
        shapes.macs(
            "resnet14",
            shapes.shaped(
                made,
                {s: sum(made[n]["kept"] for n in names) for s, names in shapes.stages(made).items()},
                {s: width for s, width in zip(shapes.stages(made), widths, strict=True)},
            ),
            (3, 32, 32),
            10,
        )
        for widths in ((1, 1, 1), (16, 32, 64))
    ]
    if reachable[0] <= goal <= reachable[1] and len(wide) == 3 and min(wide.values()) >= 4:
        # one unit more in one stage is the resolution
        assert abs(shapes.macs("resnet14", made, (3, 32, 32), 10) - goal) <= 0.04 * shapes.macs(
            "resnet14", whole("resnet14"), (3, 32, 32), 10
        )


def whole(arch: str) -> dict:
    inventory = Inventory(build(arch, in_channels=3, classes=10).structures())
    return inventory.record(np.ones(inventory.size, dtype=bool))


def test_a_network_that_is_stage_shaped_is_its_own_stage_shape():
    own = shapes.shaped(whole("resnet20"), {1: 2, 2: 3, 3: 1}, {1: 9, 2: 20, 3: 31})
    assert shapes.stage_shaped("resnet20", [own] * 5, shapes.macs("resnet20", own, (3, 32, 32), 10)) == own


def test_a_restricted_network_is_drawn_anew_for_its_own_widths():
    torch.manual_seed(0)
    blocks = shapes.shaped(whole("resnet14"), {1: 2, 2: 2, 3: 1}, {1: 4, 2: 32, 3: 64})
    model = shapes.restricted(build("resnet14", in_channels=3, classes=10), blocks)
    conv = model.get_submodule("layer1.0.conv1")
    assert conv.out_channels == 4 and isinstance(model.get_submodule("layer3.1"), nn.Identity)
    weights = torch.cat([model.get_submodule(f"layer1.{i}.conv1").weight.flatten() for i in (0, 1)])
    assert float(weights.detach().std()) == pytest.approx(
        (2 / (9 * 4)) ** 0.5, rel=0.1
    )  # of the full width it would be half


# --- versions -----------------------------------------------------------------------------------------------------------


def git(root, *words):
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_version_is_the_tree_of_the_package_and_has_no_changes(tmp_path):
    with pytest.raises(ValueError, match="`commit` must be known"):
        program(tmp_path)
    (tmp_path / "catode").mkdir()
    for name in ("catode/a.py", "other.py"):
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    first = program(tmp_path)
    (tmp_path / "other.py").write_text("2\n")
    assert program(tmp_path) == first
    git(tmp_path, "commit", "-qam", "b")
    second = program(tmp_path)
    assert second.tree == first.tree and second.commit != first.commit
    (tmp_path / "catode" / "a.py").write_text("2\n")
    with pytest.raises(ValueError, match="`commit` must hold the package as it is run; got changes in catode/a.py"):
        program(tmp_path)
    git(tmp_path, "commit", "-qam", "c")
    assert program(tmp_path).tree != first.tree


def test_versions_are_not_mixed(tmp_path):
    write(tmp_path / "a", "dense", 0)
    book = Book(tmp_path / "a")
    family = ROWS["dense"].family
    book.check(family, Program("d" * 40, TREE))
    book.check(ROWS["pruned"].family, Program("d" * 40, "b" * 40))  # pruned rows may have another
    with pytest.raises(ValueError, match="`commit` must have the package of the other dense rows and rivals"):
        book.check(family, Program("d" * 40, "b" * 40))
    write(tmp_path / "a", "dense", 1, tree="b" * 40)
    with pytest.raises(ValueError, match="`records` of one row must be of one version of the package"):
        tables.page(Book(tmp_path / "a"), "headline")


def test_precisions_and_copies_are_not_mixed(tmp_path):
    write(tmp_path / "a", "dense", 0)
    write(tmp_path / "a", "pruned", 0, amp="off")
    with pytest.raises(ValueError, match="`records` must have one precision"):
        tables.page(Book(tmp_path / "a"), "headline")
    write(tmp_path / "b", "dense", 0)
    write(tmp_path / "b", "pruned", 0, env={"pixels": "f" * 64})
    with pytest.raises(ValueError, match="must be of one copy of cifar10"):
        tables.page(Book(tmp_path / "b"), "headline")


def test_the_fastest_way_is_by_all_jobs_together_and_in_the_settled_precision():
    one, two = trial.Way("bf16", True, 1, 0.15), trial.Way("off", False, 2, 0.1)
    assert trial.best([one, two], None, 2) == one  # two runs at a time with one thread each
    assert trial.best([one, two], 1, 2) == two
    assert trial.best([one, two], None, 2, "off") == two
    assert {(way.amp, way.channels_last) for way in trial.ways(3, 8)} == {
        (a, b) for a in ("off", "bf16") for b in (True, False)
    }
    assert {way.threads for way in trial.ways(3, 8)} == {3} and {way.threads for way in trial.ways(None, 8)} == {1, 8}


def test_the_state_tells_what_waits_and_how_long_it_takes(tmp_path):
    told = status.text(Places(None, tmp_path))
    assert "0 of 139 runs have ended" in told and "139 runs have no estimate" in told
    assert "waits for recipe-1 and 7 more" in told
    write(tmp_path / "records" / "queue", "recipe-1", 100, cpu_seconds=900.0)
    rows = {row[0]: row for row in cells(status.text(Places(None, tmp_path)), "row")}
    assert rows["recipe-1"][2:] == ["1 of 1", "", "done"] and rows["recipe-2"][2:] == ["0 of 1", "0.2", "ready"]
    assert rows["dense"][3] == "1.2" and float(rows["r56-dense"][3]) == pytest.approx(0.25 * 1.5 * 3.1, abs=0.1)


# --- making runs --------------------------------------------------------------------------------------------------------


def shaped_run(folder: Path, **more) -> Path:
    """A tiny network of a given structure, trained from scratch."""
    config = Config.from_presets(
        dataset="digits", arch="resnet14", nu=0.0, epochs=3, batch_size=16, threads=1, ema=0.9, out=str(folder), **more
    )
    blocks = shapes.shaped(whole("resnet14"), {1: 2, 2: 1, 3: 1}, {1: 5, 2: 9, 3: 20})

    def change(model, setup):
        torch.manual_seed(0)
        return shapes.restricted(model, blocks)

    return training.complete(config, change=change, quick=True)


def test_a_network_of_given_widths_that_is_cut_off_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole_run = shaped_run(tmp_path / "whole")
    advance, epochs = Trainer.advance, []

    def once(trainer):
        epochs.append(advance(trainer))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "advance", once)
        shaped_run(tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    cut = shaped_run(tmp_path / "cut")
    states = [torch.load(folder / "model.pt") for folder in (whole_run, cut)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [
        [{k: v for k, v in row.items() if k not in ("seconds", "wait_share")} for row in read_rows(f / "metrics.csv")]
        for f in (whole_run, cut)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert states[0]["layer1.0.conv1.weight"].shape[0] == 5
    assert shaped_run(tmp_path / "cut") == cut  # finished: nothing is done


def test_sparse_training_has_no_weight_decay_from_half_on_also_after_a_stop(tmp_path, monkeypatch):
    """Torch-Pruning is stood in for; what is looked at is when its regularisation comes, and with which weight decay."""
    steps, advance = [], Trainer.advance

    class Fake:
        def __init__(self, model, example, scope, reg):
            self.given = scope, reg

        def regularize(self, model):
            steps.append((self.given, {group["weight_decay"] for group in trainers[-1].optimizer.param_groups}))

    class Watched(rival.sparse_trainer("hidden", 0.01)):
        def update(self):
            trainers.append(self)
            number = len(steps)
            done = super().update()
            if len(steps) == number:
                steps.append((None, {group["weight_decay"] for group in self.optimizer.param_groups}))
            return done

    def run(name, stop=None):
        def until(trainer):
            row = advance(trainer)
            if row["epoch"] == stop:
                raise KeyboardInterrupt
            return row

        common = dict(dataset="digits", arch="resnet14", nu=0.0, epochs=4, batch_size=16, threads=1, weight_decay=1e-3)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "advance", until)
            config = Config.from_presets(**common, out=str(tmp_path / name))
            return training.complete(config, kind=Watched, quick=True)

    trainers = []
    monkeypatch.setattr(rival, "group_norm_pruner", Fake)
    whole = run("whole")
    half = len(steps) // 2
    expected = [(None, {1e-3})] * half + [(("hidden", 0.01), {0.0})] * half
    assert half > 4 and steps == expected
    for stop in (1, 3):  # in the first half, and in the second
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            run(f"cut-{stop}", stop)
        cut = run(f"cut-{stop}")
        assert steps == expected
        one, other = (torch.load(folder / "model.pt", weights_only=True) for folder in (whole, cut))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rival_s_second_half_goes_on_with_the_batches_of_later_epochs(tmp_path):
    config = Config.from_presets(dataset="digits", arch="resnet14", nu=0.0, epochs=3, batch_size=64, seed=3)
    for name in ("plain", "later"):
        (tmp_path / name).mkdir()
    own = Trainer(prepare(config), tmp_path / "plain", False).batches
    later = later_trainer(2)(prepare(config), tmp_path / "later", False).batches
    for epoch, start in ((0, 0), (1, 5)):
        ours, theirs = (list(b.epoch(e, 3, start=start)) for b, e in ((later, epoch), (own, epoch + 2)))
        assert len(ours) == len(own) - start and torch.equal(ours[0][0], theirs[0][0])
        assert all(torch.equal(a[1], b[1]) for a, b in zip(ours, theirs, strict=True))
        assert not torch.equal(ours[0][1], next(own.epoch(epoch, 3, start=start))[1])


def test_a_shaped_run_leaves_a_record_of_the_whole_network_s_costs(tmp_path):
    blocks = shapes.shaped(whole("resnet14"), {1: 1, 2: 1, 3: 2}, {1: 5, 2: 9, 3: 20})
    plan = {
        "run": "stage-shaped-s0",
        "row": "stage-shaped",
        "kind": "shaped",
        "family": "x",
        "seed": 0,
        "commit": "c",
        "tree": "t",
    }
    plan |= {
        "way": {"amp": "off", "channels_last": True, "threads": 1},
        "settings": {**DIGITS, "nu": 0.0, "blocks": blocks},
    }
    places = Places(tmp_path / "runs", tmp_path / "to")
    worker.train(plan, places, None, True)
    worker.train(plan, places, None, True)  # once more, as after a kill before the record was complete
    record = Book(places.records).finished["stage-shaped-s0"]
    assert record.result["macs"] == shapes.macs("resnet14", blocks, (1, 8, 8), 10)
    assert record.result["macs_dense"] == shapes.macs("resnet14", whole("resnet14"), (1, 8, 8), 10)
    assert (record.result["layers_kept"], record.result["units_kept"]) == (4, 5 + 9 + 40)
    assert Book(places.records).structure("stage-shaped-s0")["blocks"] == blocks
    assert record.env["queue"]["tree"] == "t" and "settings" not in record.env["queue"]
    assert sum(file.stat().st_size for file in (places.records / "stage-shaped-s0").iterdir()) < 200 * 1024


def test_a_narrowed_run_is_narrower_everywhere_and_its_record_holds_the_widths(tmp_path):
    size = shapes.narrowed("resnet14", 0.45, (1, 8, 8), 10)
    plan = {
        "run": "narrowed-s0",
        "row": "narrowed",
        "kind": "narrowed",
        "family": "x",
        "seed": 0,
        "commit": "c",
        "tree": "t",
    }
    plan["way"] = {"amp": "off", "channels_last": True, "threads": 1}
    plan["settings"] = {**DIGITS, "arch": "resnet14", "nu": 0.0, **size}
    places = Places(tmp_path / "runs", tmp_path / "to")
    for _ in range(2):  # once more, as after a kill before the record was complete
        worker.train(plan, places, None, True)
    record = Book(places.records).finished["narrowed-s0"]
    dense = shapes.macs("resnet14", whole("resnet14"), (1, 8, 8), 10)
    assert record.result["macs_dense"] == dense
    assert record.result["macs"] == pytest.approx(0.45 * dense, rel=0.03)
    assert record.env["widths"]["conv1"] == [11, 1] and record.env["widths"]["layer3.1.conv2"][0] == 44


QUEUE = """
import runpy
from benchmarks.queue import scheduler
scheduler.NICE = 1
runpy.run_module("benchmarks.queue", run_name="__main__")
"""


def queue(places: Places, *more: str) -> subprocess.Popen:
    """A queue in processes of its own, one run at a time, smallest sizes; hardly behind others, or other tests would stop it."""
    words = [
        sys.executable,
        "-c",
        QUEUE,
        "run",
        "--runs",
        str(places.runs),
        "--to",
        str(places.to),
        "--quick",
    ]
    words += ["--threads", "1", "--jobs", "1", *more]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals and process groups are those of POSIX")
def test_a_queue_is_paused_killed_and_goes_on(tmp_path, monkeypatch):
    assert scheduler.NICE >= 10  # of the processes below it is 1
    monkeypatch.setattr(scheduler.os, "nice", lambda by: None)
    monkeypatch.setattr(scheduler.os, "setsid", lambda *own: None)
    places = Places(tmp_path / "runs", tmp_path / "to")
    first = queue(places, "--only", "premature-dense")
    try:
        until(lambda: (places.records / "premature-dense-s0" / "result.json").exists())
        group = int(places.pid.read_text())
        assert group == first.pid == os.getpgid(first.pid) and os.getpriority(os.PRIO_PROCESS, group) >= 1
        os.killpg(group, signal.SIGSTOP)
        state = Path(f"/proc/{group}/stat")
        if state.exists():
            until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        os.killpg(group, signal.SIGCONT)
        with pytest.raises(ValueError, match=r"must be a folder that no other process uses[^\n]*$"):
            scheduler.make(places, None, threads=1, jobs=1, only=["premature-dense"], quick=True)
    finally:
        first.terminate()
    _, told = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM and "go on with the same command" in told
    assert not places.pid.exists()
    done = {path.name for path in places.records.iterdir() if (path / "result.json").exists()}
    assert 1 <= len(done) < 5
    before = (places.records / "premature-dense-s0" / "result.json").stat().st_mtime_ns
    again = queue(places, "--only", "premature-dense-s[01]")
    _, told = again.communicate(timeout=300)
    assert again.returncode == 0 and "0 are left" in told
    assert {"premature-dense-s0", "premature-dense-s1"} <= {path.name for path in places.records.iterdir()}
    assert (places.records / "premature-dense-s0" / "result.json").stat().st_mtime_ns == before
    assert "dense" in (places.results / "haste.md").read_text()


FAKE = """
import json, pathlib, sys
plan = json.loads(pathlib.Path(sys.argv[1]).read_text())
with open(pathlib.Path(sys.argv[1]).parent / "order.txt", "a") as file:
    file.write(plan["run"] + chr(10))
status = {"premature-derived-s1": 1, "premature-derived-s2": 2, "premature-derived-s3": 9}.get(plan["run"], 0)
folder = pathlib.Path(sys.argv[3]) / "records" / "queue" / plan["run"]
if status < 2:
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text(json.dumps({"error": "e", "seed": plan["seed"], "queue": plan}))
print("error: `x` must be y; got z.", file=sys.stderr)
sys.exit(status)
"""


def test_runs_that_end_in_other_ways_are_told_and_not_repeated_for_ever(tmp_path, monkeypatch, capsys):
    """Statuses: 0 and 1 have ended; 2 is refused at once; any other is tried three times."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(scheduler, "WORKER", (str(tmp_path / "fake.py"),))
    monkeypatch.setattr(scheduler.trial, "measure", lambda threads, quick: [trial.Way("off", True, 1, 0.1)])
    monkeypatch.setattr(scheduler, "POLL", 0.02)
    assert scheduler.NICE >= 10  # of the processes below it is 1
    monkeypatch.setattr(scheduler.os, "nice", lambda by: None)
    monkeypatch.setattr(scheduler.os, "setsid", lambda *own: None)
    places = Places(tmp_path / "runs", tmp_path / "to")
    common = dict(threads=1, jobs=1, only=["premature-derived"], quick=True)
    assert scheduler.make(places, None, **common) == 0
    order = [f"premature-derived-s{i}" for i in (0, 1, 2, 3, 3, 3, 4)]
    assert (places.runs / "order.txt").read_text().split() == order
    told = capsys.readouterr().err
    assert "not made: premature-derived-s2: `x` must be y; got z." in told and "2 are left" in told
    assert "failed, its loss was not finite: premature-derived-s1" in told
    (places.runs / "order.txt").unlink()
    with pytest.raises(ValueError, match="`x` must be y; got z."):  # nothing could be made
        scheduler.make(places, None, **common)
    monkeypatch.setattr(scheduler, "Program", lambda *own: Program("d" * 40, "other"))
    with pytest.raises(ValueError, match="`commit` must have the package of the other premature pruning"):
        scheduler.make(places, None, **common)
    assert (places.records / "premature-derived-s1" / FAILED).exists()


def test_runs_that_wait_for_others_are_told(tmp_path, capsys):
    places = Places(tmp_path / "runs", tmp_path / "to")
    own = scheduler.Scheduler(
        places, "d", trial.Way("bf16", True, 1, 0.1), Program("c" * 40, TREE), jobs=1, only=["pruned"]
    )
    assert own.work() == 0
    told = capsys.readouterr().err
    assert "5 runs wait for others that were not made, the first for recipe-1" in told and "5 are left" in told


def test_a_run_goes_on_with_the_version_and_settings_that_it_began_with(tmp_path):
    places = Places(tmp_path / "runs", tmp_path / "to")
    places.runs.mkdir()
    own, way = Program("c" * 40, TREE), trial.Way("bf16", True, 1, 0.1)
    task = scheduler.Task(ROWS["premature-dense"], 0)
    first = scheduler.Scheduler(places, None, way, own, jobs=1)
    file = first._planned(Book(places.records), task)
    before = file.read_bytes()
    assert read_json(file)["settings"]["nu"] == 0.0 and read_json(file)["settings"]["amp"] == "off"
    later = scheduler.Scheduler(places, None, replace(way, threads=2), Program("d" * 40, TREE), jobs=1)
    assert later._planned(Book(places.records), task).read_bytes() == before
    other = scheduler.Scheduler(places, None, way, Program("d" * 40, "b" * 40), jobs=1)
    with pytest.raises(ValueError, match="`commit` must have the package that the run was started with"):
        other._planned(Book(places.records), task)
    with pytest.raises(ValueError, match="`data_dir` must be given for CIFAR-10"):
        first._planned(Book(places.records), scheduler.Task(ROWS["recipe-1"], 100))


def test_the_precision_of_finished_runs_is_kept(tmp_path):
    places = Places(tmp_path / "runs", tmp_path / "to")
    write(places.records, "recipe-1", 100)
    places.runs.mkdir()
    places.trial.write_text(json.dumps({"way": trial.Way("off", True, 1, 0.1).content()}))
    with pytest.raises(ValueError, match="`amp` must be that of the other runs, bf16; got off"):
        scheduler.chosen_way(places, Book(places.records), 1, 1, False, True)


def test_the_precision_of_runs_under_way_is_kept(tmp_path, monkeypatch):
    places = Places(tmp_path / "runs", tmp_path / "to")
    places.runs.mkdir()
    plan = {"way": trial.Way("bf16", True, 1, 0.2).content(), "settings": {"dataset": "cifar10"}}
    places.plan("recipe-1-s100").write_text(json.dumps(plan))
    timed = [trial.Way("off", True, 1, 0.1), trial.Way("bf16", True, 1, 0.2)]
    monkeypatch.setattr(scheduler.trial, "measure", lambda threads, quick: timed)
    assert scheduler.chosen_way(places, Book(places.records), 1, 1, True, False).amp == "bf16"


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def condense(folder, to):
        (to / folder.name).mkdir(parents=True)
        (to / folder.name / "result.json").write_text("{}")
        raise OSError("the disk is full")

    monkeypatch.setattr(worker.cifar, "condense", condense)
    with pytest.raises(OSError, match="the disk is full"):
        worker.condensed(tmp_path / "dense-s0", tmp_path / "records")
    assert not Book(tmp_path / "records").finished


def test_a_run_of_the_queue_has_the_settings_of_its_plan_and_the_way_of_its_machine():
    plan = {
        "seed": 3,
        "way": {"amp": "bf16", "channels_last": False, "threads": 2},
        "settings": {"dataset": "cifar10", "lr": 0.2},
    }
    own = worker.settings(plan, "d", False)
    assert own == {
        "dataset": "cifar10",
        "lr": 0.2,
        "seed": 3,
        "amp": "bf16",
        "layout": "channels-first",
        "threads": 2,
        "data_dir": "d",
    }
    digits = worker.settings(plan | {"settings": {**DIGITS}}, "d", False)
    assert digits["amp"] == "off" and "data_dir" not in digits
