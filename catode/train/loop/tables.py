"""The tables of a run: CSV files written row by row, cut to its checkpoint when it is resumed, and the sums for their rows."""

from __future__ import annotations

import csv
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

METRIC_FIELDS = [  # of metrics.csv; without validation images, those of `VALIDATION_FIELDS` are left out
    "epoch",
    "step",
    "time",
    "lr",
    "loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "expected_complexity",
    "macs",
    "params",
    "layers_kept",
    "units_kept",
    "undecided",
    "seconds",
    "wait_share",
]
VALIDATION_FIELDS = ("validation_loss", "validation_accuracy")
TABLES = ("metrics.csv", "structures.csv")


def checksum(path: Path, length: int) -> int:
    """CRC-32 of the first bytes of a file."""
    value = 0
    with path.open("rb") as file:
        while length > 0 and (content := file.read(min(length, 1 << 20))):
            value = zlib.crc32(content, value)
            length -= len(content)
    return value


class CsvTable:
    """A CSV file written row by row.

    Args:
        folder: Its folder; None for a process that writes no files.
        name: File name.
        fields: Names of the columns.
        length: Bytes of the existing file to keep and append to; None for a new file.
        checksum: CRC-32 of these bytes.
    """

    def __init__(self, folder: Path | None, name: str, fields, length: int | None = None, checksum: int = 0):
        path = Path(os.devnull) if folder is None else folder / name
        self._file = path.open("wb" if length is None else "r+b")
        self._text = io.StringIO(newline="")  # what is to be written next
        self._writer = csv.DictWriter(self._text, fields)
        self.checksum = checksum
        if length is None:
            self._writer.writeheader()
            self._write()
        else:
            self._file.truncate(length)
            self._file.seek(length)

    def length(self) -> int:
        """Length of the file in bytes, after flushing it to disk."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def add(self, rows: list[dict]) -> None:
        with self._named():
            self._writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
            )
            self._write()
            self._file.flush()

    def _write(self) -> None:
        content = self._text.getvalue().encode()
        self._text.seek(0)
        self._text.truncate()
        self._file.write(content)
        self.checksum = zlib.crc32(content, self.checksum)

    def close(self) -> None:
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Add the file's name to an OSError: errors of open files lack it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None


@dataclass
class Sums:
    """Sums over the steps of an epoch so far, for its row in metrics.csv.

    Attributes:
        right: Correct predictions, a count on the device.
        losses: Loss of each step, on the device.
        waited: Seconds spent waiting for batches.
        seconds: Seconds spent on steps, including waiting.
    """

    right: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    waited: float = 0.0
    seconds: float = 0.0

    def state(self) -> dict:
        """The sums for a checkpoint."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0)
        return {"right": self.right.cpu(), "losses": losses.cpu(), "waited": self.waited, "seconds": self.seconds}

    @classmethod
    def of(cls, state: dict, device: str) -> Sums:
        """The sums from a checkpoint's `state`."""
        tensors = {"right": state["right"].to(device, copy=True), "losses": list(state["losses"].to(device).unbind())}
        return cls(**{**state, **tensors})
