"""README's commands are the ones that CI runs, its links lead somewhere, and its defaults are the code's."""

import re
import shlex
from pathlib import Path

import catode
from catode.train.config import Config

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


def test_relative_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links


def test_paths_named_in_the_text_exist():
    named = set(re.findall(r"`((?:catode|docs|benchmarks)/[\w/.]+)`", README))
    assert named and all((ROOT / name).exists() for name in named), named


def test_the_default_folder_is_the_one_the_readme_names():
    assert f"`{Config.from_presets().out}`" in README and re.fullmatch(r"\d+\.\d+\.\d+", catode.__version__)
