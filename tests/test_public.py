"""What a stranger meets: the package's names, the command `catode`, earlier import paths; and what loads PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import catode
from catode import _moved, cli

HEAVY = ("torch", "matplotlib", "sklearn", "numba", "sympy")


def loaded(code: str) -> tuple[str, set[str]]:
    """Standard error of a fresh process, and which of `HEAVY` it had loaded when it ended."""
    script = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print("\\nloaded", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stderr, set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "name", ["catode", "catode.structures", "catode.records", "catode.decisions", "catode.train", "catode.cli"]
)
def test_the_light_packages_load_nothing_heavy(name):
    assert loaded(f"import {name}") == ("", set())


def test_no_module_of_the_ground_floors_loads_pytorch():
    names = [
        f"catode.{folder}.{path.name.removesuffix('.py')}"
        for folder in ("structures", "decisions", "theory")
        for path in files("catode").joinpath(folder).iterdir()
        if path.name.endswith(".py") and not path.name.startswith("_")
    ]
    assert len(names) > 5
    assert "torch" not in loaded(f"import {', '.join(names)}")[1]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (["train", "--help"], ""),
        (["train", "--bogus"], "error: `--bogus` must be a known flag; got --bogus. See --help for all flags.\n"),
        (["train", "--nu", "-1", "--dry-run"], "error: `nu` must be >= 0; got nu=-1. Use 0 to train without gates.\n"),
        (
            ["train", "--device", "gpu"],
            "error: `device` must be cpu, cuda, cuda:N or mps; got device='gpu'. Use --device cpu.\n",
        ),
        (["export", "--help"], ""),
        (["export", "--bogus"], "error: `--bogus` must be a known flag; got --bogus. See --help for all flags.\n"),
        (["theory", "--help"], ""),
        (["--help"], ""),
        (
            ["trian"],
            "error: `command` must be one of train, describe, theory, export, report, compare; got 'trian'. Did you mean train?\n",
        ),
    ],
)
def test_help_and_wrong_arguments_are_answered_without_pytorch(line, error):
    assert loaded(f"from catode.cli import main; main({line!r})") == (error, set())


def test_the_names_of_the_package_are_loaded_when_asked_for():
    from catode.prune.pruner import Pruner
    from catode.train.loop.checkpoint import load

    assert catode.Pruner is Pruner and catode.load is load and callable(catode.describe)
    assert set(catode.__all__) == {"Pruner", "describe", "load", "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Prune'"):
        _ = catode.Prune


def test_types_are_shipped_and_the_command_is_installed():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["catode"]
    assert files("catode").joinpath("py.typed").is_file()
    module, _, name = project["project"]["scripts"]["catode"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_answers_to_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0 and "usage: " in capsys.readouterr().out


def test_the_command_says_what_it_can_do(capsys):
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {command} " in told for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"catode {catode.__version__}\n"
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "error: `command` must be given; got none. See catode --help.\n"
    assert cli.main(["train", "--zzz"]) == 2 and "`--zzz` must be a known flag" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), _moved.MOVED.items())
def test_an_earlier_import_path_says_where_the_module_is(old, new):
    parent, _, name = old.rpartition(".")
    for statement in (f"import {old}", f"from {parent} import {name}", f"from {old} import anything"):
        with pytest.raises(ModuleNotFoundError, match=f"^{old} is now {new}; import it from there"):
            exec(statement)
    importlib.import_module(new)


def test_what_went_elsewhere_than_its_module_is_named_and_there():
    for old, places in _moved.ALSO.items():
        with pytest.raises(ModuleNotFoundError) as caught:
            importlib.import_module(old)
        for name, place in places.items():
            assert hasattr(importlib.import_module(place), name)
            assert name in str(caught.value) and f"from {place}" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("catode.train.measure", "summary", "catode.decisions.limits.measure"),
        ("catode.train.decide", "inputs", "catode.theory.tolerance.measured.arguments"),
    ],
)
def test_what_has_another_name_now_is_named_and_there(old, name, new):
    with pytest.raises(ModuleNotFoundError, match=rf"^{old} is now [^\n]*; {name} is {new}$"):
        importlib.import_module(old)
    place, _, own = new.rpartition(".")
    assert callable(getattr(importlib.import_module(place), own))


def test_an_earlier_program_says_where_it_is():
    line = [sys.executable, "-m", "catode.train.compare"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode != 0 and "catode.train.compare is now catode.report.compare" in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_missing_modules_are_missing_as_ever():
    with pytest.raises(ModuleNotFoundError, match="^No module named 'catode.train.nothing'$"):
        importlib.import_module("catode.train.nothing")
    assert importlib.util.find_spec("catode.nothing") is None


def test_the_citation_is_of_this_version_and_of_the_paper():
    text = (Path(__file__).parents[1] / "CITATION.cff").read_text()
    assert f'version: "{catode.__version__}"' in text and "https://arxiv.org/abs/2411.09127" in text


THEORY = "--price 0.1 --gain 1 --rate-ratio 1 --noise 0.1"


@pytest.mark.parametrize("line", ["catode.cli --help", f"catode.cli theory {THEORY}", f"catode.theory {THEORY}"])
def test_output_that_is_closed_early_ends_a_program_without_a_word(line, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    reads, writes = os.pipe()
    os.close(reads)
    options = dict(stdout=writes, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    done = subprocess.run([sys.executable, "-m", *line.split()], **options)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("line", ["catode --help", "catode train --help", f"catode theory {THEORY}"])
@pytest.mark.parametrize("stream", [1, 2])
def test_a_program_that_is_started_without_an_output_runs_all_the_same(line, stream, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    code = f"import os, sys; os.close({stream}); os.execv(sys.executable, [sys.executable, '-m', *{line.split()!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and bool(done.stdout) == (stream == 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("line", ["catode --help", "catode --version"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_an_output_on_a_full_disk_is_one_line(line, buffered, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        options = dict(stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
        done = subprocess.run([sys.executable, "-m", *line.split()], **options)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device. Write it elsewhere.\n"


def test_a_picture_is_replaced_only_where_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("theory.png", "theory-2.png", "theory-3.png"):
        assert cli.main(["theory", *THEORY.split()]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"picture {name}"
    (tmp_path / "theory.png").write_text("mine")
    assert cli.main(["theory", *THEORY.split()]) == 0 and (tmp_path / "theory.png").read_text() == "mine"
    assert cli.main(["theory", *THEORY.split(), "--out", "theory.png"]) == 0
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
