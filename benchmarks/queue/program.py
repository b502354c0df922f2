"""Which version of the package a run is trained with: the commit, and the hash of the tree of ``catode/`` in it.

Two commits with the same tree of ``catode/`` train the same network from the same settings, whatever else they changed.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "catode"
NONE = "none"


@dataclass(frozen=True)
class Program:
    """A version of the package.

    Attributes:
        commit: The commit of the whole clone.
        tree: Hash of the tree of the package in it.
    """

    commit: str
    tree: str


def program(root: Path = ROOT) -> Program:
    """The version of the package in a clone.

    Raises:
        ValueError: if it is no clone, or files of the package differ from its commit.
    """
    try:
        commit, tree = (_git(root, "rev-parse", f"HEAD{path}") for path in ("", f":{PACKAGE}"))
        changed = _git(root, "status", "--porcelain", "--", PACKAGE)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        raise ValueError(
            f"`commit` must be known, so runs are made in a clone; got none: {reason}. Clone the repository."
        ) from None
    if changed:
        raise ValueError(
            f"`commit` must hold the package as it is run; got changes in {changed.split()[-1]}. Commit them, or run in a clone "
            "of a commit."
        )
    return Program(commit, tree)


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()
