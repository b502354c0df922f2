"""Every command that README and docs name is run here with tiny settings, or stands in `NOT_RUN` with its reason.

Commands are taken from code blocks and from code within text and tables. All run in this process, on the digits, on made-up
images, or on the committed records.
"""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import re
import shlex
import shutil
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_paper_figures import folder as figure_runs  # noqa: F401  a fixture: runs of all groups, written by hand

from benchmarks.prunability.models import declare_operators
from catode.train import data
from catode.train.__main__ import main as train
from catode.train.models import ARCHITECTURES
from catode.train.models.sources import is_foreign
from catode.train.settings.config import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = ("python", "python3", "pip", "torchrun", "jupyter", "catode", ".ci/run", ".ci/notebooks")
NOT_RUN = {
    "python3 -m venv": "it makes the environment that these tests run in",
    "pip install": "it downloads",
    "jupyter": "it opens a browser; .ci/notebooks executes the notebooks",
    ".ci/": "it runs this very suite, or all notebooks, for minutes",
    "python -m pytest": "it is a part of this very suite",
    "torchrun": "it starts several processes, on several GPUs; tests/train/test_distributed.py has two on CPUs",
    "python -m tests.faults": "tests/test_faults.py runs a sample of it; all of it takes many minutes",
    "python -m benchmarks.queue run": "tests/benchmarks/test_queue.py makes some of its runs",
    "python -m benchmarks.queue latency": "tests/benchmarks/test_queue_tables.py times networks of records made by hand",
    "python -m benchmarks.rival": "torch-pruning is no part of the tests' environment",
    "python -m benchmarks.prunability.rival": "torch-pruning is no part of the tests' environment",
}
"""Beginnings of commands that are not run, each with its reason; their flags and files are looked up all the same."""

BARE = {
    "catode.export": "FOLDER --format torch-export",
    "catode.theory": "--from-run FOLDER",
    "catode.report": "FOLDER",
    "catode.report.compare": "FOLDER",
    "catode": "describe resnet14",
    "catode.report.describe": "resnet14",
    "benchmarks.cifar run": "dense",
    "benchmarks.loading": "--data-dir DIR",
}
"""What is added where a page only mentions a program that needs more."""

SCRIPTS = {"compare": "catode.report.compare", "describe": "catode.report.describe"}
"""Programs of the console script `catode` whose module has another name."""

IMAGES = 64
TINY = "--epochs 1 --warmup-epochs 0 --batch-size 8 --threads 1 --memory 10 --check-every 2"
HEAVY = ("benchmarks.anymodel", "benchmarks.gate_cost", "benchmarks.gate_versions")
"""Benchmarks of which one command is run, and the others with the slow tests."""

SMALL = {("benchmarks.prunability", "--list", "timm"): ["--only", "test_resnet"]}
"""What is added to a command whose first model is a large one."""

SMALLEST = {"cifar": "resnet14", "imagenet": "resnet18"}


# --- what the pages name ----------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[str]:
    """Commands of one page, in their order, abbreviations (such as "`RUN` is `python ...`") written out."""
    fences = re.findall(r"^( *)```(?:sh|bash|console)\n(.*?)^\1```", text, flags=re.M | re.S)
    lines = [line for _, block in fences for line in re.sub(r"\\\n", " ", block).splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    short = dict(re.findall(r"`([A-Z]+)` is `([^`]+)`", prose))
    found = []
    for piece in [part.strip() for line in lines for part in line.split("&&")] + spans:
        piece = re.sub(r"\s+#.*", "", piece.removeprefix("$ ").removeprefix(".venv/bin/")).replace("…", " ").strip()
        for name, full in short.items():
            piece = re.sub(rf"^{name} ", f"{full} ", piece)
        words = piece.split()
        if len(words) > 1 and words[0] in PROGRAMS:
            found.append(" ".join(words))
    return found


COMMANDS = sorted({command for page in PAGES for command in commands_of(page.read_text())})


def test_commands_are_found_in_blocks_tables_and_text_whatever_they_look_like():
    text = (
        "Use `python -m a --b\n1` or\n```sh\nx=1\npython -m b \\\n  --c  # why\npip install d && .venv/bin/python -m e f\n```\n"
        "| `pip` | `torchrun -m g` | `--flag` | `R --h` … |\nwhere `R` is `python -m i run`; ```python -m no```"
    )
    assert commands_of(text) == [
        "python -m b --c",
        "pip install d",
        "python -m e f",
        "python -m a --b 1",
        "torchrun -m g",
        "python -m i run --h",
        "python -m i run",
    ]


def test_every_page_with_commands_is_looked_at():
    assert len(COMMANDS) > 30
    for module in ("catode.train", "catode.theory", "catode.export", "paper_figures", "benchmarks.digits"):
        assert any(f"-m {module}" in command for command in COMMANDS), module


# --- what they run on ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Made-up data sets and finished runs, by the names that stand for them."""
    root = tmp_path_factory.mktemp("places")
    random = np.random.default_rng(0)
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, files, meta, key, names, classes in (
        ("cifar-10-batches-py", batches, "batches.meta", b"labels", b"label_names", 10),
        ("cifar-100-python", ["train", "test"], "meta", b"fine_labels", b"fine_label_names", 100),
    ):
        (root / name).mkdir()
        for file in files:
            images = random.integers(0, 256, (32, 3072), dtype=np.uint8)
            content = {b"data": images, key: random.integers(0, classes, 32).tolist()}
            (root / name / file).write_bytes(pickle.dumps(content))
        (root / name / meta).write_bytes(pickle.dumps({names: [f"c{i}".encode() for i in range(classes)]}))
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (root / "pictures" / split / kind).mkdir(parents=True)
            for i in range(16):
                picture = Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8))
                picture.save(root / "pictures" / split / kind / f"{i}.png")
    for name in ("pruned-s0", "dense-s0", "shadow/shadow-cifar10-s0"):
        shutil.copytree(ROOT / "benchmarks" / "records" / name, root / "records" / name)
    return {"cifar": root, "folder": root / "pictures", "runs": root / "runs", "records": root / "records"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """All data sets by their first images alone, no latencies, and results written elsewhere."""
    declare_operators()

    def first(*args, load=data.load, **kwargs):
        whole = load(*args, **kwargs)
        names = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
        return dataclasses.replace(
            whole, **{name: getattr(whole, name)[:IMAGES] for name in names if not hasattr(whole.train_images, "names")}
        )

    monkeypatch.setattr(data, "load", first)
    monkeypatch.setattr("catode.train.loop.result.latency_ms", lambda networks, example: [[1.0] * len(networks)] * 2)


@pytest.fixture
def finished(places, few, monkeypatch) -> Path:
    """A finished run on the digits, trained when it is first asked for."""
    out = places["runs"] / "finished"
    if not out.exists():
        assert train([*TINY.split(), "--epochs", "2", "--arch", "resnet14", "--out", str(out)]) == 0
    return out


# --- how they are run ---------------------------------------------------------------------------------------------------


def program(module: str):
    """The `main` of a module or package that is run by ``python -m``."""
    path = ROOT.joinpath(*module.split("."))
    return importlib.import_module(f"{module}.__main__" if (path / "__main__.py").exists() else module).main


def tiny(module: str, words: list[str], places: dict[str, Path], finished: Path, out: Path, figures: Path) -> list[str]:
    """The arguments of a command with its placeholders filled in, and with settings that take seconds."""
    dataset = next((words[i + 1] for i, word in enumerate(words) if word == "--dataset"), None)
    images = places["folder"] if dataset == "folder" or module == "benchmarks.loading" else places["cifar"]
    words = words or BARE.get(module, "").split()
    words = words if len(words) > 1 else words + BARE.get(f"{module} {' '.join(words)}", "").split()
    full = []
    for word, before in zip(words, ["", *words], strict=False):
        if word in ("FOLDER", "FOLDER...") or word.startswith("runs/"):
            stands = [out if before in ("--out", "--to") else cut_off(out) if before == "--resume" else finished]
        elif word == "DIR":
            stands = [images]
        elif word == "TREE":
            stands = [ROOT]
        elif word.startswith("benchmarks/records"):
            stands = sorted(ROOT.glob(word))
            assert stands, f"{word} is not there"
        else:
            stands = [out if before in ("--out", "--to") else word]
        full += map(str, stands)
    if module == "catode.train" and "--resume" not in full:
        arch = next((full[i + 1] for i, word in enumerate(full) if word == "--arch"), "resnet20")
        small = arch if is_foreign(arch) else SMALLEST[ARCHITECTURES[arch].stem]
        full += [*TINY.split(), "--arch", small, "--out", str(out)]
        full += ["--image-size", "32"] if "--image-size" in full else []
    elif module == "paper_figures":
        full += ["--runs", str(figures), "--out", str(out), "--records", str(places["records"])]
        full += [] if "--only" in full else ["--only", "basins"]
    elif module == "benchmarks.cifar":
        full += ["--quick"] if full[0] == "run" else []
        for flag, place in (("--data-dir", images), ("--out", out)) if full[0] == "run" else ():
            full += [] if flag in full else [flag, str(place)]
    elif module.startswith("benchmarks.") and module not in ("benchmarks.copies", "benchmarks.queue"):
        full += ["--quick"]
        full += ["--threads", "1"] if "--threads" in full else []  # two would wait for cores that other tests have
        full += SMALL.get((module, *words[:2]), [])
    return full


def cut_off(out: Path) -> Path:
    """The folder of a run that was cut off before its first checkpoint."""
    folder = out.parent / "cut-off"
    folder.mkdir()
    config = Config.from_presets(arch="resnet14", epochs=1, warmup_epochs=0.0, threads=1, out=str(folder))
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.csv").write_text("")
    return folder


def costly(command: str) -> bool:
    """Whether a command takes long even so, and is one of several of a benchmark, of which the first is always run.

    Those of `benchmarks.anymodel` do the same under ``--quick``, which takes the digits and writes no results.
    """
    words = command.split()
    heavy = words[:2] == ["python", "-m"] and words[2] in HEAVY
    return heavy and command != next(other for other in COMMANDS if other.startswith(" ".join(words[:3])))


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow if costly(c) else pytest.mark.smoke) for c in COMMANDS]
)
def test_every_command_of_the_pages_runs(command, places, finished, figure_runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    words = shlex.split(command)
    for begin in NOT_RUN:
        if command.startswith(begin):
            looked_up(words, capsys)
            return
    assert words[0] == "catode" or words[:2] == ["python", "-m"], f"{command} is neither run here nor listed in NOT_RUN"
    if words[0] == "catode":  # the console script
        home, _, name = PROJECT["scripts"]["catode"].partition(":")
        module, given = SCRIPTS.get(words[1], f"catode.{words[1]}"), words[2:]
        main = partial(through, getattr(importlib.import_module(home), name), words[1])
    else:
        module, given = words[2], words[3:]
        main = program(module)
    if "--help" in given:
        with pytest.raises(SystemExit) as left:
            main(given)
        assert not left.value.code and "usage:" in capsys.readouterr().out
        return
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    committed = results()
    status = main(tiny(module, given, places, finished, tmp_path / "out", figure_runs))
    said = capsys.readouterr()
    assert status in ((0, 3, None) if module == "catode.train" else (0, None)), (
        said.err
    )  # 3: so few steps decide nothing
    assert said.out.strip() and results() == committed


def results() -> dict[Path, int]:
    """The committed results, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").rglob("*")}


def through(script, name: str, arguments: list[str]) -> int | None:
    """Call the console script with the name of a program and its arguments."""
    return script([name, *arguments])


def looked_up(words: list[str], capsys) -> None:
    """What can be told of a command without running it: its files are there, and its flags are known."""
    if words[0] == "torchrun" or (words[:2] == ["python", "-m"] and words[2].startswith("benchmarks.")):
        at = next(i for i, word in enumerate(words) if re.match(r"(catode|benchmarks)\.", word))
        with pytest.raises(SystemExit) as left:
            program(words[at])(["--help"])
        helped = capsys.readouterr().out
        assert not left.value.code and all(word in helped for word in words[at:] if word.startswith("--"))
    for word, before in zip(words, ["", *words], strict=False):
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert extra[1] in PROJECT["optional-dependencies"]
        elif before == "-c" or "/" in word.rstrip("/") or (words[0] == "jupyter" and before == "lab"):
            name = word.split("::")[0].removeprefix(".venv/bin/")
            assert (
                any(part.strip("[]").isupper() for part in name.split("/"))
                or word.startswith(".venv/")
                or (ROOT / name).exists()
            ), word


def test_what_is_not_run_is_named_somewhere():
    used = {begin for begin in NOT_RUN if any(command.startswith(begin) for command in COMMANDS)}
    assert used >= set(NOT_RUN) - {"python -m benchmarks.rival", "python3 -m venv", "jupyter", ".ci/"}
