"""A fixed sample of changes to the pure modules: their direct tests notice each, or it is explained why they cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mutation
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.smoke
def test_a_sample_of_mutants_is_noticed():
    command = [sys.executable, "-m", "tests.mutation", "--sample=30", "--seed=0", "--jobs=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    total = 30 + len(mutation.NAMED)
    assert done.stdout.startswith(f"{total} mutants: ") and " 0 survived;" in done.stdout


def test_every_explanation_is_of_a_mutant_that_exists_and_says_something():
    reasons = json.loads(mutation.EXPLAINED.read_text())
    keys = [mutant.key for module in mutation.TESTS for mutant in mutation.mutants(module)]
    assert len(keys) == len(set(keys)) and reasons.keys() <= set(keys)
    assert all(len(reason) > 20 and "\n" not in reason for reason in reasons.values())


def test_every_pure_module_is_in_the_list_and_every_test_exists():
    folders = ("catode/decisions", "catode/structures")
    files = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob("*.py")}
    listed = {f"{name.replace('.', '/')}.py" for name in mutation.TESTS}
    assert {name for name in files if not name.endswith("__init__.py")} <= listed
    assert all((ROOT / test).is_file() for tests in mutation.TESTS.values() for test in tests)


@pytest.mark.parametrize("module", ["catode.decisions.rules", "catode.structures.inventory"])
def test_a_mutant_differs_in_one_place(module):
    for mutant in mutation.mutants(module):
        lines = mutant.diff().splitlines()
        assert lines and all(line[0] in "+-" for line in lines)
        assert mutant.source != mutant.original and compile(mutant.source, module, "exec")


def test_the_sample_is_that_of_its_seed(capsys):
    """In another process as in this one."""

    def listed(seed):
        assert mutation.main(["--list", "--sample=5", f"--seed={seed}"]) == 0
        return capsys.readouterr().out

    command = [sys.executable, "-m", "tests.mutation", "--list", "--sample=5", "--seed=1"]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed(1) == other != listed(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forks")
def test_a_change_that_no_test_looks_at_survives():
    text = (ROOT / "catode/structures/description.py").read_text()
    harmless = mutation.Mutant("catode.structures.description", 1, "", text + "\nUNUSED = 1\n", text)
    harmful = mutation.Mutant("catode.structures.description", 1, "", text.replace("self.offset + ", ""), text)
    code = (
        "import sys; from tests import mutation as m; m.prepare(); "
        "print([end for _, end in m.run([m.Mutant(*map(eval, sys.argv[1:]))], 1, 60)])"
    )
    for mutant, end in ((harmless, mutation.SURVIVED), (harmful, mutation.KILLED)):
        values = [mutant.module, mutant.line, mutant.key, mutant.source, mutant.original]
        command = [sys.executable, "-c", code, *map(repr, values)]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == f"['{end}']\n"
