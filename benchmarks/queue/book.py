"""What is done: the records of finished runs, and of those whose loss was not finite, by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cifar import Record, read
from benchmarks.queue.program import Program
from catode.records import read_json, read_rows

if TYPE_CHECKING:
    from benchmarks.queue.rows import Row

FAILED = "failed.json"
FOLDER = "queue"
"""Folder of the queue's records, in ``benchmarks/records``."""


class Book:
    """Records in a folder; read anew for every book.

    Args:
        records: Folder with one folder for each run. It need not exist.
    """

    def __init__(self, records: Path):
        self.records = records
        self._epochs: dict[str, list[dict[str, str]]] = {}

    @cached_property
    def finished(self) -> Mapping[str, Record]:
        """Records of finished runs, by the name of the run."""
        return {path.parent.name: read(path.parent) for path in sorted(self.records.glob("*/result.json"))}

    @cached_property
    def failed(self) -> Mapping[str, dict[str, Any]]:
        """Runs whose loss was not finite, by name: what is in `FAILED`."""
        return {path.parent.name: read_json(path) for path in sorted(self.records.glob(f"*/{FAILED}"))}

    def ended(self, run: str) -> bool:
        """Whether a run is finished, or failed for good."""
        return run in self.finished or run in self.failed

    def all_ended(self, row: Row) -> bool:
        """Whether all runs of a row have ended, or need not be made."""
        return not row.left(self)

    def results(self, row: str) -> dict[int, Record]:
        """Finished runs of a row, by seed."""
        found = {own.config["seed"]: own for own in self.finished.values() if own.env["queue"]["row"] == row}
        return dict(sorted(found.items()))

    def epochs(self, run: str) -> list[dict[str, str]]:
        """metrics.csv of a finished run: what it measured in each epoch."""
        if run not in self._epochs:
            self._epochs[run] = read_rows(self.records / run / "metrics.csv")
        return self._epochs[run]

    def structure(self, run: str) -> dict[str, Any]:
        """structure.json of a finished run.

        Raises:
            FileNotFoundError: if there is none, as of a run that failed.
        """
        return read_json(self.records / run / "structure.json")

    def programs(self, family: str) -> dict[str, str]:
        """Trees of the package that runs of a family were trained with, each with the commit of one of them."""
        own = [e["queue"] for e in (*(r.env for r in self.finished.values()), *self.failed.values())]
        return {one["tree"]: one["commit"] for one in own if one["family"] == family}

    def check(self, family: str, program: Program) -> None:
        """Make sure that runs of a family were all trained with one version of the package.

        Raises:
            ValueError: if not.
        """
        for tree, commit in self.programs(family).items():
            if tree != program.tree:
                raise ValueError(
                    f"`commit` must have the package of the other {family}; got {program.commit[:12]} whose catode/ differs from "
                    f"that of {commit[:12]}. Run them in a clone of that commit."
                )

    def precision(self) -> str | None:
        """Setting `amp` of the finished runs on images in files; None before the first."""
        found = {own.config["amp"] for own in self.finished.values() if own.config["dataset"] != "digits"}
        if len(found) > 1:
            raise ValueError(
                f"`records` must have one precision; got amp {' and '.join(sorted(found))} in {self.records}. Remove one."
            )
        return found.pop() if found else None

    def fail(self, run: str, content: Mapping[str, Any]) -> None:
        """Note that a run's loss was not finite."""
        folder = self.records / run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).write_text(json.dumps(content, indent=2) + "\n")
