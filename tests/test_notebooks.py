"""The notebooks as they lie in git: stripped, of one format, importing what exists. `.ci/notebooks` runs them.

To strip them: python -m nbconvert --clear-output --inplace notebooks/*.ipynb
"""

from __future__ import annotations

import ast
import importlib
import itertools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def code(notebook):
    """The cells' Python, without the lines that are for IPython alone."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["\n".join(line for line in source.splitlines() if not line.startswith("%")) for source in sources]


def test_there_are_five_in_order_and_ci_runs_them():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]
    assert ".ci/notebooks" in (ROOT / ".ci" / "run").read_text()


def test_nothing_that_running_leaves_behind_is_stored(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_it_begins_with_a_title_and_explains_before_each_piece_of_code(notebook):
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")
    assert not any(pair == ("code", "code") for pair in itertools.pairwise(kinds))


def test_everything_imported_from_the_package_exists(notebook):
    found = 0
    for source in code(notebook):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "catode":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                    found += 1
    assert found
