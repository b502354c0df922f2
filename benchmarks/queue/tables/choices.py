"""Tables of what was chosen or tried on validation images alone: the recipe, settings of catode and of its rival, schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cifar import Record
from benchmarks.common import markdown
from benchmarks.queue import derive
from benchmarks.queue.book import Book
from benchmarks.queue.rows import CATODE_NAMES, NAMES, RIVAL_NAMES, ROWS, Row
from catode.structures.fates import REMOVED


def recipe(book: Book, rows: Sequence[Row]) -> str:
    """The settings of the dense recipe, and which is taken."""
    taken = _taken(book, NAMES)
    header = ["setting", "seed", "validation accuracy, %", "loss", "CPU minutes", "taken"]
    cells = [_validated(row, record, taken) for row in rows for record in book.results(row.name).values()]
    return "\n\n".join([markdown(header, cells), *_luck(book)])


def choices(book: Book, rows: Sequence[Row]) -> str:
    """The settings of catode and of its rival, and which of each are taken."""
    parts = []
    for title, names, tie in (("catode", CATODE_NAMES, derive.TIE), ("Torch-Pruning", RIVAL_NAMES, 0.0)):
        taken = _taken(book, names, tie)
        cells = [
            [*_validated(ROWS[name], record, taken), f"{100 * record.result['macs'] / record.result['macs_dense']:.1f}"]
            for name in names
            for record in book.results(name).values()
        ]
        if cells:
            header = [title, "seed", "validation accuracy, %", "loss", "CPU minutes", "taken", "MACs, %"]
            parts.append(markdown(header, cells))
    return "\n\n".join([*parts, *_luck(book)])


def _luck(book: Book) -> list[str]:
    """How far seeds alone move the validation accuracy of one setting."""
    found = [derive.validation(record) for record in book.results("dense").values()]
    if len(found) < 2:
        return []
    told = ", ".join(f"{value:.2f}" for value in found)
    return [
        f"One seed each, so differences of a few tenths may be luck: the dense network of the recipe comes to validation "
        f"accuracies of {told} from its seeds in the headline. What is taken is the rule's choice, no more."
    ]


def schedules(book: Book, rows: Sequence[Row]) -> str:
    """Schedules of the decisions in short trainings, with the epochs of their removals."""
    cells = []
    for row in rows:
        for seed, own in book.results(row.name).items():
            half, last = removals(own, int(book.epochs(row.run(seed))[-1]["step"]))
            decided = own.result["decided_by_rule"]
            cells.append(
                [
                    row.told,
                    f"{derive.validation(own):.2f}",
                    without(own.result, "validation"),
                    f"{100 * own.result['macs'] / own.result['macs_dense']:.1f}",
                    f"{own.result['layers_kept']} of {own.result['layers_total']}",
                    half,
                    last,
                    "" if decided is None else f"{100 * decided:.0f}",
                    f"{own.result['cpu_seconds'] / 60:.0f}",
                ]
            )
    header = [
        "network",
        "validation accuracy, %",
        "without EMA",
        "MACs, %",
        "layers",
        "half of it gone, epoch",
        "last removal, epoch",
    ]
    return (
        "The average (EMA) still holds batch statistics of before the last removals where these come late; without it they are of "
        "the cut network.\n\n" + markdown([*header, "decided by rule, %", "CPU minutes"], cells)
    )


def without(result: Mapping[str, Any], images: str) -> str:
    """Accuracy without averaged weights, percent; empty where there was no average."""
    value = result.get(f"{images}_accuracy_without_ema")
    return "" if value is None else f"{100 * value:.2f}"


def removals(record: Record, steps: int) -> tuple[str, str]:
    """Epochs after which half of all structures that went were gone, and the last one; empty if none went.

    Args:
        record: Of the run.
        steps: Its length, steps.
    """
    gone = sorted(int(line["step"]) for line in record.last if line["fate"] in REMOVED)
    middle, last = (
        (f"{gone[i] * record.config['epochs'] / steps:.2f}" for i in ((len(gone) - 1) // 2, -1)) if gone else ("", "")
    )
    return middle, last


def _taken(book: Book, names: Sequence[str], tie: float = derive.TIE) -> str | None:
    """Name of the row that is chosen, once all have ended."""
    if not all(book.all_ended(ROWS[name]) for name in names):
        return None
    try:
        return derive.best(book, names, derive.near_target, tie).env["queue"]["row"]
    except ValueError:
        return None


def _validated(row: Row, record: Record, taken: str | None) -> list[str]:
    return [
        row.told,
        str(record.config["seed"]),
        f"{derive.validation(record):.2f}",
        f"{record.result['validation_loss']:.3f}",
        f"{record.result['cpu_seconds'] / 60:.0f}",
        "yes" if row.name == taken else "",
    ]
