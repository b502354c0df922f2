"""What the tables of the benchmarks say, from records and results made by hand."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import cifar, common, copies, digits, estimators, rival, sensitivity
from benchmarks.common import pool
from catode.decisions import shadow
from catode.prune.describe.costs import count
from catode.records import read_json, read_rows
from catode.report import compare
from catode.train import data, loop
from catode.train.data.images import assemble, pixel_fingerprint
from catode.train.models import build
from catode.train.settings.config import Config, ConfigError


def record(seed=0, accuracy=0.8, macs=40e6, **settings):
    settings = {"dataset": "cifar10", "data_dir": "d", "memory": 200, "check_every": 50} | settings
    config = json.loads(Config.from_presets(seed=seed, **settings).to_json())
    result = dict(
        test_accuracy=accuracy, macs=macs, macs_dense=40e6, params=1e5, layers_kept=9, layers_total=9, units_kept=100
    )
    result |= dict(units_total=336, decided_by_rule=1.0, latency_ms_128=1.0, latency_dense_ms_128=1.0, seconds=60.0)
    env = dict(processor="p", cores=2, torch="t", threads=1, python="3", pixels=next(iter(copies.KNOWN)))
    return cifar.Record(config, result | {"cpu_seconds": 60.0}, env, [])


def test_a_part_of_the_images_is_a_shorter_run_with_the_settings_of_one(tmp_path):
    """What follows from a run's length follows from that of the part; what was given stays."""
    config = Config.from_presets(dataset="digits", threads=1, check_every=20, out=str(tmp_path))
    whole = loop.prepare(config)
    part = common.subset(whole, 320)
    assert (part.steps_per_epoch, len(part.schedule), len(part.images.train_labels)) == (5, 5 * config.epochs, 320)
    for setup in (whole, part):
        assert setup.config.rate_ratio == pytest.approx(1.0 / (config.sink_share * setup.ode_time), rel=1e-12)
    assert part.config.derived == whole.config.derived and part.config.check_every == 20
    assert common.subset(whole, None) is whole


COMMANDS = common.commands()


def program(name):
    """The module whose ``main`` is the command ``python -m benchmarks.NAME``."""
    return importlib.import_module(f"benchmarks.{name}{'.__main__' if (common.HOME / name).is_dir() else ''}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_starts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        program(name).main()
    assert left.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out


def told(capsys, monkeypatch, module, line):
    """Exit status and standard error of a command that is guarded."""
    monkeypatch.setattr(sys, "argv", ["x", *line.split()])
    with pytest.raises(SystemExit) as left:
        common.guarded(program(module).main)
    said = capsys.readouterr()
    assert not said.out
    return left.value.code, said.err


RUN = "run dense --data-dir d --out o"


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        *((name, "--no-such-flag 1", "`") for name in COMMANDS if name != "cifar"),
        ("cifar", "", "`command` must be given"),
        ("cifar", "walk", "`command` must be one of"),
        ("cifar", f"{RUN} --no-such-flag", "`--no-such-flag` must be a known flag"),
        ("cifar", "run wide --data-dir d --out o", "`kind` must be one of"),
        ("cifar", f"{RUN} --epochs many", "`epochs` must be an integer; got epochs='many'. Write --epochs NUMBER."),
        (
            "cifar",
            f"{RUN} --set seed=1",
            "`set` must leave out seed, which has a flag of its own; got 'seed=1'. Use --seed.",
        ),
        ("cifar", f"{RUN} --set out=y", "Use --out."),
        ("cifar", f"{RUN} --set data-dir=y", "Use --data-dir."),
        ("cifar", f"{RUN} --set epochs=3", "Use --epochs."),
        ("cifar", f"{RUN} --set nu=3", "`set` must leave out nu, which this command sets itself"),
        ("cifar", f"{RUN} --set resume=y", "`set` must leave out resume"),
        ("rival", "--macs 0.5 --out o --set nu=1", "`set` must leave out nu"),
        ("rival", "--macs 1 --out o", "`macs` must lie in (0, 1)"),
        ("rival", "--out o", "`macs` must be given; got no --macs."),
        ("digits", "--set seed=1", "`set` must leave out seed"),
        ("digits", "--set threads=0", "`threads` must be"),
        ("target", "--set target_macs=0.5", "`set` must leave out target_macs"),
        ("end_to_end", "--set dataset=folder", "Use --dataset."),
        ("end_to_end", "--set nu=0", "`nu` must be above 0 here"),
        ("end_to_end", "--write digits", "`write` must not be the name of another benchmark's results"),
        ("sensitivity", "--write theory", "`write` must not be the name of another benchmark's results"),
        ("sensitivity", "--write gate_cost_resnet56", "of benchmarks.gate_cost"),
        ("sensitivity", "--write ../x", "`write` must be a plain name"),
        ("sensitivity", "--grid warmup_epochs=1,50", "`warmup_epochs` must be <"),
        ("vit", "--set seed=1", "`set` must be name=value of epochs, "),
        ("vit", "--set lr=fast", "`lr` must be a number; got 'lr=fast'. Write lr=NUMBER."),
        ("vit", "--seeds 0", "`seeds` must be at least 1; got 0. Leave it out."),
        ("gpt", "--seeds 0", "`seeds` must be at least 1; got 0. Leave it out."),
        ("gpt", "--set heads=many", "`heads` must be a number; got 'heads=many'. Write heads=NUMBER."),
    ],
)
def test_bad_input_is_one_line_and_status_2(module, line, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, error = told(capsys, monkeypatch, module, line)
    assert status == 2 and error.startswith("error: `") and expected in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_one_line_and_status_1(monkeypatch, capsys):
    def diverge(config, progress):
        raise loop.NotFinite("`loss` must stay finite; got nan.")

    monkeypatch.setattr(digits, "run", diverge)
    assert told(capsys, monkeypatch, "digits", "--seeds 0") == (1, "error: `loss` must stay finite; got nan.\n")


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("pruned", "", dict(arch="resnet20", nu=2.4, threads=None)),
        ("dense", "--set arch=resnet56 --threads 2", dict(arch="resnet56", nu=0.0, threads=2)),
        ("narrow", "--hidden-scale 0.4 --epochs 3", dict(arch="resnet20", nu=0.0, hidden_scale=0.4, epochs=3)),
        ("short", "--set threads=1 --threads 2", dict(arch="resnet14", nu=0.0, threads=1)),
    ],
)
def test_every_kind_of_network_is_trained_as_it_is_later_called(kind, more, expected, monkeypatch, tmp_path, capsys):
    configs = []

    def run(config, progress):
        configs.append(config)
        made = record()
        for name, content in (("config", json.loads(config.to_json())), ("result", made.result), ("env", made.env)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (tmp_path / "structures.csv").write_text("")
        (tmp_path / "metrics.csv").write_text("epoch,step\n1,10\n")
        return tmp_path

    monkeypatch.setattr(cifar, "run", run)
    monkeypatch.setattr(sys, "argv", ["x", "run", kind, "--data-dir", "d", "--out", "o", *more.split()])
    cifar.main()
    assert {name: getattr(configs[0], name) for name in expected} == expected
    assert cifar.read(tmp_path).kind == kind and capsys.readouterr().out.startswith(f"{kind} {expected['arch']}")


def rows(text, start):
    """Cells of the table whose header begins with a text."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {start}"))
    table = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_pairs_are_formed_at_equal_macs_and_against_the_dense_network():
    rival = dataclasses.replace(record(nu=0.0, macs=18.5e6, accuracy=0.79))
    rival.config["rival"] = "one shot (torch-pruning 1)"
    told = cifar.table(
        [
            *(record(seed, 0.80 + 0.02 * seed, 18e6) for seed in (0, 1)),
            *(record(seed, 0.90, nu=0.0) for seed in (0, 1)),
            record(0, 0.70, 18e6, nu=0.0, hidden_scale=0.46),
            record(0, 0.60, 9e6, nu=0.0, hidden_scale=0.2),
            record(0, 0.75, 18.2e6, alpha=0.0),
            record(0, 0.50, 18e6, epochs=9),
            rival,
            record(0, 0.72, 18.4e6, nu=0.0, arch="resnet14"),
        ]
    )
    pairs = {row[0].removeprefix("CIFAR-10, JPEG copy, "): row[1:] for row in rows(told, "difference")}
    none = "n = 1, no interval"
    assert pairs == {
        "pruned resnet20 - dense resnet20": ["20", "-9.00 [-21.71, +3.71], n = 2", "45.0 (45.0, 45.0)"],
        "pruned resnet20 - narrow resnet20 (hidden_scale=0.46)": ["20", f"+10.00, {none}", "100.0"],
        "pruned resnet20 - short resnet14": ["20", f"+8.00, {none}", "97.8"],
        "pruned resnet20 - Torch-Pruning resnet20": ["20", f"+1.00, {none}", "97.3"],
        "pruned resnet20 - pruned resnet20 (alpha=0)": ["20", f"+5.00, {none}", "98.9"],
        "pruned resnet20 (alpha=0) - dense resnet20": ["20", f"-15.00, {none}", "45.5"],
        "pruned resnet20 (alpha=0) - narrow resnet20 (hidden_scale=0.46)": ["20", f"+5.00, {none}", "101.1"],
        "pruned resnet20 (alpha=0) - short resnet14": ["20", f"+3.00, {none}", "98.9"],
        "pruned resnet20 (alpha=0) - Torch-Pruning resnet20": ["20", f"-4.00, {none}", "98.4"],
    }
    networks = {(row[1], row[2]): row for row in rows(told, "data")}
    assert networks["pruned resnet20", "20"][4] == "81.00 [68.29, 93.71], n = 2"
    assert networks["narrow resnet20 (hidden_scale=0.46)", "20"][6] == "45.0"


def test_images_in_class_folders_go_by_the_name_of_their_folder():
    found = [record(dataset="folder", data_dir=f"sets/{name}", nu=0.0) for name in ("birds", "fish")]
    found = [dataclasses.replace(one, env=one.env | {"pixels": None}) for one in found]
    assert [row[0] for row in rows(cifar.table(found), "data")] == ["birds, unknown copy", "fish, unknown copy"]


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.97, 0.55], "+0.76 [-1.91, +3.43], n = 2"),  # t = 12.706, sd 0.297: half-width 2.67
        ([1.0, 2.0, 3.0], "+2.00 [-0.48, +4.48], n = 3"),  # t = 4.303, sd 1
        ([-1, 0, -1, -2, -1], "-1.00 [-1.88, -0.12], n = 5"),  # t = 2.776, sd 0.707
        ([2.0, 2.0], "+2.00 [+2.00, +2.00], n = 2"),
        ([-1.89], "-1.89, n = 1, no interval"),
    ],
)
def test_an_interval_is_student_s_at_95_percent(values, told):
    assert common.spread(values, "{:+.2f}") == told
    assert common.spread([100 * v for v in values], "{:+.2f}", 0.01) == told


def test_single_runs_are_told_one_by_one():
    assert common.each([49.0, 41.4], "{:.1f}") == "45.2 (49.0, 41.4)" and common.each([7.25], "{:.1f}") == "7.2"


# --- copies of data sets --------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Two classes of images as PNG files, and what is in them: pixels (N, 3, H, W) and labels of both splits."""
    random, made = np.random.default_rng(0), []
    for split, number in (("train", 3), ("test", 2)):
        images = random.integers(0, 256, (2 * number, 3, 4, 5), dtype=np.uint8)
        made.append((images, np.repeat([0, 1], number)))
        for i, (image, label) in enumerate(zip(*made[-1], strict=True)):
            folder = tmp_path / "set" / split / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
    return tmp_path / "set", made


def in_memory(train, test, order=slice(None)):
    (x, y), (u, v) = train, test
    return assemble("any", (x[order], y[order]), (u, v), ("a", "b"))


def test_the_fingerprint_is_of_pixels_and_labels_wherever_they_lie(pictures):
    folder, (train, test) = pictures
    expected = pixel_fingerprint(in_memory(train, test))
    assert len(expected) == 64
    assert pixel_fingerprint(in_memory(train, test, [5, 0, 3, 1, 4, 2])) == expected  # order says nothing
    assert pixel_fingerprint(data.load("folder", folder)) == expected
    assert pixel_fingerprint(data.load("folder", folder, array_bytes=0)) == expected  # decoded from the disk
    for change in range(4):
        images, labels = (part.copy() for part in train)
        if change == 0:
            images[2, 1, 3, 4] ^= 1
        elif change == 1:
            labels[2] = 1 - labels[2]
        elif change == 2:
            images[2] = images[2, ::-1]  # red and blue change places
        else:
            images, labels = np.concatenate([images, images[:1]]), np.append(labels, labels[0])
        assert pixel_fingerprint(in_memory((images, labels), test)) != expected
    assert pixel_fingerprint(in_memory(test, train)) != expected


def test_the_fingerprint_is_the_hash_that_its_documentation_states():
    train, test = (np.array([[[[7, 8]]]], np.uint8), np.array([1])), (np.array([[[[9, 0]]]], np.uint8), np.array([0]))
    whole = hashlib.sha256()
    for pixels, label in ((b"\x07\x08", 1), (b"\x09\x00", 0)):
        whole.update(b"(1, 1, 1, 2)" + hashlib.sha256(bytes([label, 0, 0, 0, 0, 0, 0, 0]) + pixels).digest())
    assert pixel_fingerprint(in_memory(train, test)) == whole.hexdigest()


def test_every_committed_record_says_which_copy_of_its_data_it_was_made_with():
    records = [path.parent for path in (Path(copies.__file__).parent / "records").rglob("result.json")]
    assert len(records) > 20
    names = {}
    for folder in records:
        config, env = read_json(folder / "config.json"), read_json(folder / "env.json", dict(pixels=str))
        names.setdefault(config["dataset"], set()).add(copies.name_of(config, env))
    assert names == {"cifar10": {"CIFAR-10, JPEG copy"}, "folder": {"Tiny-ImageNet, subset"}, "digits": {"digits"}}


@pytest.mark.parametrize("page", sorted(common.RESULTS.rglob("*.md")), ids=lambda page: page.stem)
def test_every_table_with_a_known_copy_has_its_note_and_no_table_has_bare_names(page):
    text = page.read_text()
    assert not re.search(r"(?<![-\w])cifar10(?!\w)|tiny-imagenet|\bCIFAR-10(?!, JPEG copy)", text)
    for copy in copies.KNOWN.values():
        assert (copy.name in text) == (copy.note in text)
    assert "±" not in text or "standard error" in text


def test_copies_prints_the_name_and_puts_the_fingerprint_into_records_of_these_images(pictures, tmp_path, capsys):
    folder, _ = pictures
    for name, place in (("fits", "set"), ("other", "fish")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"dataset": "folder", "data_dir": place}))
        (tmp_path / name / "env.json").write_text('{"torch": "t"}')
    given = ["--dataset", "folder", "--data-dir", str(folder), "--records"]
    copies.main([*given, str(tmp_path / "fits")])
    pixels, name = capsys.readouterr().out.strip().split("  ")
    assert name == "set, unknown copy" and read_json(tmp_path / "fits" / "env.json") == {"torch": "t", "pixels": pixels}
    with pytest.raises(ValueError, match="`records` must be of set; got '.*other' of fish. Leave it out."):
        copies.main([*given, str(tmp_path / "fits"), str(tmp_path / "other")])
    assert read_json(tmp_path / "other" / "env.json") == {"torch": "t"}


def test_the_fingerprint_is_not_taken_of_very_many_images(pictures, monkeypatch):
    images = in_memory(*pictures[1])
    assert copies.fingerprint(images) == pixel_fingerprint(images)
    monkeypatch.setattr(copies, "MOST_IMAGES", 9)
    assert copies.fingerprint(images) is None


PLACES = [dict(kind="unit", block="b", site="s", index=index) for index in range(3)]
DECIDED, ENDED = 101, 140


def write_shadow_run(folder):
    """A shadow run of three structures; the first is decided at step 101 and confirmed at 140, the second at 150, left open."""
    folder.mkdir()
    made = record(shadow=True)
    (folder / "config.json").write_text(json.dumps(made.config | {"data_dir": "/secret/place/data"}))
    (folder / "result.json").write_text(json.dumps(made.result))
    (folder / "env.json").write_text(json.dumps(made.env))
    draws = np.random.default_rng(0)
    measured = []
    for step in range(200):
        for place in PLACES:
            fate = "committed" if step == 199 - place["index"] else "undecided"
            numbers = dict(
                zip(("gain", "drift", "noise", "benefit_upper", "price"), draws.uniform(1, 2, 5), strict=True)
            )
            measured.append(dict(step=step, **place, keep_prob=0.123456789 * step, **numbers, fate=fate))
    numbers = dict.fromkeys(shadow.NUMBERS, 0.0123456)
    lines = [
        dict(rule=shadow.DERIVED, **PLACES[0], step=DECIDED, **numbers, outcome="confirmed", outcome_step=ENDED),
        dict(rule=shadow.DERIVED, **PLACES[1], step=150, **numbers, outcome="undecided", outcome_step=""),
        dict(rule="fixed 0.5", **PLACES[2], step=20, **numbers, outcome="confirmed", outcome_step=180),
    ]
    for name, content in (("metrics.csv", [{"epoch": 1}]), ("structures.csv", measured), (shadow.FILE, lines)):
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(content[0]))
            writer.writeheader()
            writer.writerows(content)


@pytest.mark.parametrize(("limit", "whole"), [(20_000, True), (7_500, True), (3_000, False)])
def test_a_condensed_run_keeps_what_was_observed_and_no_path(tmp_path, limit, whole):
    write_shadow_run(tmp_path / "run")
    (tmp_path / "run" / "structure.json").write_text('{"blocks": {}}')
    cifar.condense(tmp_path / "run", tmp_path / "to", limit=limit)
    to = tmp_path / "to" / "run"
    assert (to / "structure.json").read_text() == '{"blocks":{}}\n'
    assert "/secret" not in (to / "config.json").read_text()
    assert read_json(to / "env.json")["pixels"] == next(iter(copies.KNOWN))
    assert sum(path.stat().st_size for path in to.iterdir()) <= limit
    kept, there = (read_rows(folder / "structures.csv") for folder in (to, tmp_path / "run"))
    spans = [
        [row for row in part if (row["index"] == "0" and DECIDED <= int(row["step"]) <= ENDED) or
         (row["index"] == "1" and int(row["step"]) >= 150)]
        for part in (kept, there)
    ]  # fmt: skip
    assert (spans[0] == spans[1]) is whole
    assert (len(kept) < len(there)) is (limit < 20_000)
    last = {row["index"]: row for row in kept}
    assert last["0"]["step"] == "199" and float(last["0"]["keep_prob"]) == pytest.approx(0.123456789 * 199)
    assert read_rows(to / shadow.FILE) == read_rows(tmp_path / "run" / shadow.FILE)
    record, run = compare.read(to), compare.read(tmp_path / "run")
    assert compare.assumptions([record]) == compare.assumptions([run]) and compare.rules([record]).keys()
    assert compare.assumptions([run])["gain"][0] == 2


def test_a_condensed_run_gets_the_fingerprint_of_its_images_if_they_are_there(tmp_path, capsys):
    made = record(dataset="digits", data_dir=None, nu=0.0)
    for name, where in (("there", None), ("gone", "/secret/place/data")):
        (tmp_path / name).mkdir()
        config = made.config | ({"dataset": "cifar10", "data_dir": where} if where else {})
        env = {name: value for name, value in made.env.items() if name != "pixels"}
        for file, content in (("config", config), ("result", made.result), ("env", env)):
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        for file in ("metrics.csv", "structures.csv"):
            (tmp_path / name / file).write_text("")
        cifar.condense(tmp_path / name, tmp_path / "to")
    pixels = read_json(tmp_path / "to" / "there" / "env.json")["pixels"]
    assert pixels == pixel_fingerprint(data.load("digits")) and "pixels" not in read_json(
        tmp_path / "to" / "gone" / "env.json"
    )
    assert capsys.readouterr().err.count("note: no fingerprint of the images") == 1


def test_what_became_of_decisions_is_told_with_the_name_of_the_copy(tmp_path, capsys):
    write_shadow_run(tmp_path / "run")
    cifar.main(["shadow", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    told = (tmp_path / "out" / "compare.md").read_text()
    assert capsys.readouterr().out == told and told.startswith("- CIFAR-10, JPEG copy: its images were")
    assert "| resnet20, CIFAR-10, JPEG copy |" in told and (tmp_path / "out" / "compare.png").exists()


@pytest.mark.parametrize(
    "fate", ["committed", "pruned_tolerance", "pruned_zero", "removed_out_of_time", "kept_out_of_time"]
)
def test_worth_of_layers_is_told_by_their_fates(fate):
    made = record()
    made.last.append(dict(kind="layer", step="5", fate=fate, benefit="3", price="2"))
    stayed, removed = cifar._decisions(made)[-2:]
    assert (stayed, removed) == {"committed": ("1.5", ""), "kept_out_of_time": ("1.5", "")}.get(
        fate, ("", "1.5") if fate.startswith("pruned") else ("", "")
    )


def test_the_sentence_of_a_knob_is_the_change_at_equal_other_settings():
    grid = {"nu": [1.0, 9.0], "beta": [0.0, 1.0]}
    found = []
    for point in sensitivity.points(grid, 1):
        macs = 80 - 5 * point["nu"] + 10 * point["beta"]
        result = dict(
            macs=macs, macs_dense=100, params=50, params_dense=100, layers_kept=9, units_kept=5, test_accuracy=0.9
        )
        found.append((point, result))
    told = sensitivity.table(grid, found)
    assert "- `nu` from 1 to 9: MACs -40.0 points (up in 0 of 2), parameters +0.0 points (up in 0 of 2)" in told
    assert "- `beta` from 0 to 1: MACs +10.0 points (up in 2 of 2)" in told


def test_values_that_are_no_numbers_are_named():
    grid = sensitivity.parse_grid(["arch=resnet14,resnet20", "tol=none,0.5"])
    assert grid == {"arch": ["resnet14", "resnet20"], "tol": [None, 0.5]}
    result = dict(macs=1, macs_dense=2, params=1, params_dense=2, layers_kept=9, units_kept=5, test_accuracy=0.9)
    told = sensitivity.table(grid, [(point, result) for point in sensitivity.points(grid, 1)])
    assert [row[:2] for row in rows(told, "arch")][:2] == [["resnet14", "derived"], ["resnet14", "0.5"]]
    assert "- `arch` from resnet14 to resnet20: MACs" in told and "- `tol` from derived to 0.5: MACs" in told
    assert sensitivity.shown("target_macs", None) == "none"


@pytest.mark.parametrize(
    "texts",
    [["nu=1"], ["nu"], ["alpha=0,2"], ["neu=1,2"], ["warmup-epochs=1,2"], ["nu=1,1.0"], ["nu=1,2", "nu=2,3"]]
    + [[f"{name}=1,2"] for name in sensitivity.OWN],
)
def test_wrong_grids_are_refused(texts):
    with pytest.raises(ConfigError, match="` must "):
        for point in sensitivity.points(sensitivity.parse_grid(texts), 1):
            sensitivity.plan(point, 40, Path("runs"))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Training on the first images of the digits alone, without timing."""

    def few(*args, load=loop.setup.data.load, **kwargs):
        whole = load(*args, **kwargs)
        names = [f"{split}_{what}" for split in ("train", "validation", "test") for what in ("images", "labels")]
        return dataclasses.replace(whole, **{name: getattr(whole, name)[:64] for name in names})

    monkeypatch.setattr(loop.setup.data, "load", few)
    monkeypatch.setattr(loop.result, "latency_ms", lambda networks, example: [[1.0] * len(networks)] * 2)


TINY = dict(dataset="digits", arch="resnet14", nu=0.0, epochs=2, batch_size=32, threads=1)


def test_finished_runs_are_left_alone_cut_off_ones_go_on_and_others_are_refused(tmp_path, small):
    config = Config.from_presets(**TINY, out=str(tmp_path / "a"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(config.to_json())
    (tmp_path / "a" / "metrics.csv").write_text("")  # cut off before its first checkpoint
    assert not pool.finished(config)
    folder = pool.complete(config)
    before = (folder / "result.json").stat().st_mtime_ns
    assert pool.finished(config) and pool.complete(config) == folder
    pool.train([config])
    assert (folder / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="with seed=0 in place of 1. Delete that folder or give another --runs."):
        pool.train([dataclasses.replace(config, seed=1)])


def test_probes_of_a_finished_run_are_compared_with_whole_batches(tmp_path, small):
    folder = pool.complete(Config.from_presets(**TINY, out=str(tmp_path / "run")))
    told = estimators.run_probes(folder, 0)
    assert "resnet14 on digits after 2 epochs" in told and "6 layers and 24 units, 12 batches of 32" in told
    found = {row[0]: row[1:] for row in rows(told, "structures, estimator")}
    assert {name.split(", probe ")[1] for name in found} == {"32", "16", "3"} and len(found) == 12
    for kind in ("layers", "units"):
        assert found[f"{kind}, paired, probe 32"][2] == "+0"  # it is what the others are compared with


def test_torch_pruning_meets_the_macs():
    pytest.importorskip("torch_pruning", reason="the rival's package is no part of the tests' environment")
    model, example = build("resnet14", in_channels=3, classes=10), torch.zeros(1, 3, 32, 32)
    share = count(rival.prune(model, example, 0.5), example).macs / count(model, example).macs
    assert 0.45 < share <= 0.5


def test_the_rival_leaves_a_record_and_goes_on_from_its_trained_half(tmp_path, small, monkeypatch, capsys):
    pytest.importorskip("torch_pruning", reason="the rival's package is no part of the tests' environment")
    out, common = tmp_path / "rival", {name: value for name, value in TINY.items() if name != "nu"}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="`macs` must be a share that"):
        patch.setattr(rival, "STEPS", 2)
        rival.compete(common, 0.01, 1, 0.05, out)
    trained = (out / "trained" / "result.json").stat().st_mtime_ns
    monkeypatch.setattr(rival, "STEPS", 40)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # cut off in the second half
        patch.setattr(loop.Trainer, "finish", cut_off)
        rival.compete(common, 0.5, 1, 0.05, out)
    assert list((out / "tuned").glob("checkpoint-*.pt"))
    rival.compete(common, 0.5, 1, 0.05, out)
    assert (out / "trained" / "result.json").stat().st_mtime_ns == trained
    made = cifar.read(out)
    assert made.kind == "rival" and made.variant.startswith("Torch-Pruning resnet14")
    assert (
        0.3 < made.result["macs"] / made.result["macs_dense"] <= 0.5
        and len(made.result["validation_accuracy_history"]) == 2
    )
    assert [float(row["epoch"]) for row in read_rows(out / "metrics.csv")] == [1, 2]
    assert made.variant in cifar.table([made]) and "% of the MACs" in capsys.readouterr().out
    assert read_json(out / "config.json")["tune_epochs"] == 1
    with pytest.raises(ConfigError, match="`out` must be a folder without a run"):
        rival.compete(common, 0.5, 1, 0.05, out)


def cut_off(trainer):
    trainer.save_state()
    raise KeyboardInterrupt


def test_without_torch_pruning_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    status, error = told(capsys, monkeypatch, "rival", f"--dataset digits --macs 0.5 --out {tmp_path / 'r'}")
    assert status == 2 and "`torch_pruning` must be installed" in error and "pip install torch-pruning" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_records_trained_on_different_images_are_not_compared():
    one = cifar.read(Path(cifar.__file__).parent / "records" / "dense-s0")
    other = dataclasses.replace(one, config=one.config | {"validation_share": 0.1, "seed": 1})
    assert one.config["validation_share"] == 0 and one.variant == other.variant == "dense resnet20"
    with pytest.raises(ValueError, match="`records` must have one validation_share for each task; got 0 and 0.1 for"):
        cifar.table([one, other])
