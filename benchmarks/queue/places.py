"""Where the queue keeps its things: folders of runs, which stay on one machine, and of records and results, which are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
"""``benchmarks/`` of this clone."""


@dataclass(frozen=True)
class Places:
    """The folders of a queue.

    Attributes:
        runs: Of the runs; None where only records are looked at.
        to: With ``records/queue`` and ``results``, such as the ``benchmarks`` of this clone or another.
    """

    runs: Path | None
    to: Path = HOME

    @property
    def records(self) -> Path:
        return self.to / "records" / "queue"

    @property
    def results(self) -> Path:
        return self.to / "results"

    @property
    def pid(self) -> Path:
        """File with the process group of the queue that uses these runs."""
        return self.runs / "queue.pid"

    @property
    def trial(self) -> Path:
        return self.runs / "trial.json"

    def run(self, name: str) -> Path:
        return self.runs / name

    def plan(self, name: str) -> Path:
        """What a run was started with."""
        return self.runs / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.runs / f"{name}.log"
