"""README's commands are the ones that CI runs, its links lead somewhere, and its defaults are the code's."""

import importlib
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest

import catode
from benchmarks import cifar
from catode.decisions import shadow
from catode.prune.checking import ROW_FIELDS
from catode.train import loop
from catode.train.settings.config import Config
from paper_figures import __main__ as figures
from paper_figures.runs import RECORDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands():
    return re.findall(r"^ *(python3 -m venv .*)$", README, flags=re.M)


def test_there_are_two_setup_commands_and_ci_runs_the_second():
    first, second = commands()
    assert first.endswith("-m catode.train --derive-tol") and second.endswith("-m pytest -n 2")
    assert second in (ROOT / ".ci" / "run").read_text()


def test_the_commands_name_files_and_extras_that_exist():
    for command in commands():
        words = shlex.split(command)
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    assert "test =" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_relative_links_lead_to_files_and_their_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        headings = (
            [
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower())
                for line in file.read_text().splitlines()
                if line[:1] == "#"
            ]
            if heading
            else []
        )
        assert not heading or heading in [text.replace(" ", "-") for text in headings], link


def test_paths_named_in_the_text_exist():
    named = set(re.findall(r"`((?:catode|docs|benchmarks)/[\w/.]+)`", README))
    assert named and all((ROOT / name).exists() for name in named), named


def test_the_default_folder_is_the_one_the_readme_names():
    assert f"`{Config.from_presets().out}`" in README and re.fullmatch(r"\d+\.\d+\.\d+", catode.__version__)


# --- claims: each with what shows it and the command that makes that --------------------------------------------------


def claims():
    """Claims of README and docs/evidence.md: what is said, what shows it and what makes that; links from the root."""
    found = []
    for page in (ROOT / "README.md", ROOT / "docs" / "evidence.md"):
        table = page.read_text().split("| claim |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
        for line in table:
            said, shown, made = (cell.strip() for cell in line.strip("|").split(" | "))
            found.append([said, re.sub(r"(?<=\]\()[^)]+", partial(from_root, page), shown), made])
    return found


def from_root(page, link):
    return os.path.relpath(page.parent / link[0], ROOT)


def shown_by(cell):
    """Links of a cell, and all that is written in them: of a picture, its section in the index beside it."""
    links, text = re.findall(r"\]\(([^)]+)\)", cell), ""
    for link in links:
        file = ROOT / link
        if file.suffix == ".md":
            text += file.read_text()
        elif (index := file.parent / figures.INDEX).exists():
            text += index.read_text().split(f"<!-- {file.stem} -->", 1)[1].split("<!-- ", 1)[0]
    return links, text


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: re.sub(r"\W+", "-", claim[0])[:40])
def test_every_claim_has_what_shows_it_and_the_command_that_makes_it(claim, monkeypatch, capsys):
    said, shown, made = claim
    links, text = shown_by(shown)
    assert links and all((ROOT / link).exists() for link in links)
    for number in re.findall(r"\*\*(.+?)\*\*", said):
        if number[0].isdigit() or number[0] in "+-":
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text), f"{number} is not in {links}"
    (command,) = re.findall(r"`([^`]+)`", made)
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    module, given = words[2], words[3:]
    if module == "pytest":
        assert all((ROOT / file.split("::")[0]).exists() for file in given if not file.startswith("-"))
        return
    monkeypatch.setattr(sys, "argv", [module, *(word for word in given[:1] if not word.startswith("-")), "--help"])
    program = importlib.import_module(f"{module}.__main__" if (ROOT / module / "__main__.py").exists() else module)
    with pytest.raises(SystemExit):
        program.main()
    helped = capsys.readouterr().out
    assert all(flag in helped for flag in given if flag.startswith("--"))
    if module == "paper_figures":
        assert given[0] == "--only" and f"docs/figures/{given[1]}.png" in links


def test_the_columns_in_the_conventions_are_those_of_the_files():
    text = (ROOT / "docs" / "conventions.md").read_text()
    for file, names in (
        ("metrics.csv", loop.METRIC_FIELDS),
        ("structures.csv", ROW_FIELDS),
        ("shadow.csv", shadow.FIELDS),
    ):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {file}")]
        assert row.split("structure: " if file == "structures.csv" else ": ", 1)[1].rstrip(" |").split(", ") == list(
            names
        )


def test_every_figure_is_part_of_a_claim():
    text = " ".join(cell for claim in claims() for cell in claim)
    assert not [name for name in figures.FIGURES if f"docs/figures/{name}.png" not in text]


def test_the_table_of_cifar_is_that_of_the_committed_records():
    made = cifar.table([cifar.read(path.parent) for path in sorted(RECORDS.glob("*/result.json"))])
    ours = [re.sub(" +", " ", line) for line in README.splitlines()]
    first = made.split("| difference")[0]
    rows = [re.sub(" +", " ", line) for line in first.splitlines() if line.startswith(("| cifar", "| tiny"))]
    assert rows and not [row for row in rows if row not in ours]
