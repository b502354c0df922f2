"""The house: imports only point down the floors, no folder and no file is too full, CONTRIBUTING.md knows every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import catode

ROOT = Path(catode.__file__).parent
CONTRIBUTING = ROOT.parent / "CONTRIBUTING.md"
FLOORS = {  # what stands higher may import what stands lower
    "_validate": 0,
    "_lazy": 0,
    "_output": 0,
    "_saved": 0,
    "_moved": 0,
    "structures": 1,
    "theory": 2,
    "records": 3,
    "decisions": 4,
    "prune": 5,
    "train": 6,
    "report": 7,
    "export": 7,
    "cli": 8,
}
ENTRANCES = ("__main__", "cli")  # modules that start programs: they may import any floor
LONGEST, FULLEST = 500, 15
FILES = sorted(ROOT.rglob("*.py"))


def module(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Imports(ast.NodeVisitor):
    """Modules that a file imports anywhere, but for those that only a type checker sees."""

    def __init__(self, path: Path):
        self.found: list[tuple[int, str]] = []
        self._package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
        self.visit(ast.parse(path.read_text()))

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        if getattr(test, "id", getattr(test, "attr", None)) != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        for other in node.orelse:
            self.visit(other)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, name.name) for name in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self._package.split(".")[: len(self._package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        self.found += [(node.lineno, f"{base}.{name.name}") for name in node.names]


def lazy_homes(path: Path) -> list[tuple[int, str]]:
    """Modules that a package imports when their names are asked for: texts of its `_HOMES`."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
            texts = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found += [(n.lineno, n.value) for n in texts if n.value.startswith("catode.")]
    return found


def rooms(name: str) -> str:
    """The top room of a module of the package, such as "theory"; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def upward(path: Path) -> list[str]:
    """Imports of a file that do not point down."""
    own = rooms(module(path))
    if not own or path.stem in ENTRANCES:  # the package's own __init__ offers names of all floors
        return []
    wrong = []
    for line, name in Imports(path).found + lazy_homes(path):
        if name.split(".")[0] != "catode":
            continue
        other = rooms(name)
        if other and other not in FLOORS:
            other = ""  # a name of the package itself, such as __version__
        if other and other != own and FLOORS[other] >= FLOORS[own]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_every_room_is_on_a_floor():
    there = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert there - {"__init__", "__main__", "__pycache__"} == set(FLOORS)


def test_imports_only_point_down():
    assert [line for path in FILES for line in upward(path)] == []


def test_what_is_imported_anywhere_in_a_file_is_seen(tmp_path, monkeypatch):
    """The test above would find an import that hides in a function or behind a condition."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "catode")
    path = tmp_path / "catode" / "theory" / "flow" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "from catode.structures import complexity\n"
        "from ..systems import box\n"
        "if TYPE_CHECKING:\n    from catode.train import Config\n"
        "else:\n    import catode.report.compare\n"
        "def late():\n    from catode import prune\n    from ...train import loop\n    import catode.records as records\n"
    )
    assert upward(path) == [
        f"theory/flow/new.py:{line} imports catode.{name}"
        for line, name in ((7, "report.compare"), (9, "prune"), (10, "train.loop"), (11, "records"))
    ]


@pytest.mark.parametrize("room", ["structures", "theory", "records", "decisions"])
def test_the_ground_floors_name_no_pytorch(room):
    files = [path for path in FILES if rooms(module(path)) == room]
    found = [(path.name, line) for path in files for line, name in Imports(path).found if name.split(".")[0] == "torch"]
    assert files and found == []


def test_no_folder_is_too_full():
    folders = {path.parent for path in FILES}
    full = {str(f.relative_to(ROOT)): n for f in folders if (n := len([*f.glob("*.py")])) > FULLEST}
    assert full == {}


def test_no_file_is_too_long():
    long = {module(path): n for path in FILES if (n := path.read_text().count("\n")) > LONGEST}
    assert long == {}


def tree() -> list[str]:
    """Paths in the picture of the tree in CONTRIBUTING.md, below `catode/`; a folder ends in a slash."""
    text = CONTRIBUTING.read_text()
    block = re.search(r"^```text\ncatode/\n(.*?)^```", text, flags=re.M | re.S)[1]
    paths, above = [], []
    for line in block.splitlines():
        depth, name = re.match(r"((?:    )+)(\S+)  ", line).groups()
        above = [*above[: len(depth) // 4 - 1], name]
        paths.append("".join(above))
    return paths


def test_every_room_of_the_picture_is_there_and_every_room_is_in_it():
    paths = tree()
    assert len(set(paths)) == len(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in paths if path.endswith("/") != (ROOT / path).is_dir()] == []
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in FILES if path.parent != ROOT}
    assert folders <= set(paths)
    assert {path.name for path in ROOT.glob("*.py")} - {"__init__.py"} <= set(paths)
    described = {path.rpartition("/")[0] for path in paths if path.endswith(".py")} - {""}
    for folder in described:  # where one module of a folder is told, all are
        own = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}/__init__.py"}
        assert own <= set(paths), sorted(own - set(paths))


def test_the_floors_of_the_table_are_those_of_the_code():
    rows = re.findall(r"^\| (\d) \| (.+?) \|", CONTRIBUTING.read_text(), flags=re.M)
    told = {room: int(floor) for floor, names in rows for room in re.findall(r"`(\w+)`", names)}
    assert told == FLOORS
