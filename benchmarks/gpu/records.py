"""Records of a benchmark that may be stopped at any moment: one JSON object a line, flushed to disk as it comes."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "records.jsonl"
BEGUN, PASSED, FAILED, SKIPPED, MEASURED, NOTED = "begun", "passed", "failed", "skipped", "measured", "noted"
ENDS = (PASSED, FAILED, SKIPPED, MEASURED)
"""What the last record of a unit says when the unit is over."""


@dataclass(frozen=True)
class Records:
    """The file of the records; several processes may add to it.

    Args:
        path: The file.
    """

    path: Path

    def add(self, part: str, name: str, status: str, **more: Any) -> None:
        """Add a record and flush it to disk.

        Args:
            part: Part of the benchmark.
            name: Its unit.
            status: One of the statuses above.
            **more: Anything else.
        """
        record = {"part": part, "name": name, "status": status, "at": round(time.time(), 2), **more}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records in order, but for a line that was cut off."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def mend(self) -> None:
        """End a line that was cut off, or the next record would be lost with it."""
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def last(self, part: str) -> dict[str, dict[str, Any]]:
        """The last record of every unit of a part, by its name."""
        return {one["name"]: one for one in self.read() if one.get("part") == part}
