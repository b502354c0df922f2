"""Settings that depend on finished runs: the recipe, what was chosen, networks of the shape that pruning found.

Every function takes the book and the run's seed and returns settings. Only validation accuracy is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cifar import Record
from benchmarks.queue import shapes
from benchmarks.queue.book import Book

TIE = 0.2
"""Points of validation accuracy within which two settings are alike: the earlier one of the list is taken."""
NEAR = 0.01
"""Share of the dense MACs by which a run may end above its target and still be chosen."""


def validation(record: Record) -> float:
    """Validation accuracy at the final epoch, percent."""
    return 100 * record.result["validation_accuracy"]


def best(book: Book, rows: Sequence[str], admitted=lambda record: True, tie: float = TIE) -> Record:
    """The finished run of the rows with the highest validation accuracy; of those within `tie` of it, that of the first row.

    Args:
        book: The records.
        rows: Rows with one seed each, the cheapest and simplest first.
        admitted: Which runs take part.
        tie: Points within which two are alike.

    Raises:
        ValueError: if none is.
    """
    runs = [own for row in rows for own in book.results(row).values() if admitted(own)]
    if not runs:
        raise ValueError(f"`records` must hold a run to choose among {rows[0]} to {rows[-1]}; got none that may be.")
    highest = max(map(validation, runs))
    return next(own for own in runs if validation(own) >= highest - tie)


def near_target(record: Record) -> bool:
    """Whether a run met the MACs it was asked for, or has fewer."""
    goal = record.config.get("target_macs") or record.config.get("share")
    return goal is None or record.result["macs"] <= (goal + NEAR) * record.result["macs_dense"]


def chosen(
    book: Book, seed: int, *, rows: Sequence[str], settings: Sequence[Mapping[str, Any]], tie: float = TIE
) -> dict[str, Any]:
    """Of the settings, one for each row, those of the best row, among the runs that met their target."""
    return dict(settings[rows.index(best(book, rows, near_target, tie).env["queue"]["row"])])


def fixed(book: Book, seed: int, **settings: Any) -> dict[str, Any]:
    """The given settings, after all that was chosen."""
    return settings


def stage_shaped(book: Book, seed: int, *, row: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A network with the mean depth and widths, stage by stage, of a row's runs, and with their mean MACs.

    The seed plays no part: all runs of the row that is derived have this one network.
    """
    runs = {s: own for s, own in book.results(row).items() if s in seeds}
    if not runs:
        raise ValueError(f"`records` must hold a finished run of the row {row}; got none. Look at its logs.")
    found = [book.structure(f"{row}-s{s}") for s in runs]
    macs = sum(own.result["macs"] for own in runs.values()) / len(runs)
    kept, first = [own["blocks"] for own in found], found[0]
    return {"blocks": shapes.stage_shaped(first["arch"], kept, macs, first["image_shape"], len(first["classes"]))}


def narrowed(book: Book, seed: int, *, arch: str, share: float) -> dict[str, Any]:
    """A network with all widths narrowed to a share of the MACs; neither book nor seed plays a part."""
    return shapes.narrowed(arch, share)


def found(book: Book, seed: int, *, row: str) -> dict[str, Any]:
    """The very structure that a row's run of the same seed found."""
    return {"blocks": book.structure(f"{row}-s{seed}")["blocks"]}


def equal_time(book: Book, seed: int, *, row: str, dense: str, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    """As many epochs as take the dense row's CPU time, by the means of both rows; never fewer than they have."""
    times = [
        sum(own.result["cpu_seconds"] for own in runs.values()) / len(runs)
        for runs in ({s: own for s, own in book.results(name).items() if s in seeds} for name in (dense, row))
    ]
    return {"epochs": max(epochs, math.floor(epochs * times[0] / times[1]))}


def no_time_left(book: Book, *, row: str, dense: str, seeds: Sequence[int], epochs: int) -> str | None:
    """Why there is no run of equal time: it would have no more epochs than the row has."""
    longer = equal_time(book, 0, row=row, dense=dense, seeds=seeds, epochs=epochs)["epochs"]
    return (
        None if longer > epochs else f"its time pays for no more than the {epochs} epochs of {row}, so it is that row"
    )
