"""Tables and the picture of the queue's rows, from records alone; rows without a finished run are named as not run.

`recipe`, `choices` and `schedule` show validation accuracy, by which was chosen, and never that on test images. All others show
test accuracy at the final epoch, and differences paired by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import copies
from benchmarks.common import machine
from benchmarks.queue.book import Book
from benchmarks.queue.rows import ROWS, Row
from benchmarks.queue.tables import choices, compared, haste, picture

PICTURE = "headline.png"
TABLES = {
    "recipe": "The dense recipe: eight settings, chosen by validation accuracy.",
    "choices": "Settings of catode and of Torch-Pruning, chosen by validation accuracy: of catode the first within 0.2 points of "
    "the highest, of Torch-Pruning the highest.",
    "headline": "ResNet-20 at 45 % of the MACs against its rivals. Of catode seven settings were tried on validation images, "
    "of Torch-Pruning nine; the others have none of their own. With option A shortcuts Torch-Pruning can take from the residual "
    "stream the channels of the first stage alone.",
    "parts": "What each part of catode is worth, and the structure apart from the training.",
    "resnet56": "ResNet-56; one seed, so no interval is claimed.",
    "schedule": "Half the MACs of a ResNet-56 in short trainings, by schedules of the decisions: validation accuracy, one seed, so "
    "no interval is claimed.",
    "haste": "Deciding from the first step on, at a high learning rate.",
}
BODIES = {"recipe": choices.recipe, "choices": choices.choices, "schedule": choices.schedules, "haste": haste.haste}
"""What shows a table that is no comparison of rows."""


def check(book: Book, rows: Sequence[Row]) -> None:
    """Make sure that the records of a table may stand in one.

    Raises:
        ValueError: if runs of one row were trained with different versions of the package, or runs on files in different
            precisions or on different copies of the images.
    """
    for row in rows:
        runs = book.results(row.name).values()
        trees = {own.env["queue"]["tree"]: own.env["commit"] for own in runs}
        if len(trees) > 1:
            raise ValueError(
                f"`records` of one row must be of one version of the package; got {' and '.join(c[:12] for c in trees.values())} "
                f"in {row.name}. Make the row anew."
            )
    book.precision()
    named = {(own.config["dataset"], own.env.get("pixels")) for row in rows for own in book.results(row.name).values()}
    for dataset in {name for name, _ in named}:
        if sum(name == dataset for name, _ in named) > 1:
            raise ValueError(
                f"`records` of one table must be of one copy of {dataset}; got several. Remove the others."
            )


def page(book: Book, table: str) -> str | None:
    """One table as Markdown; None if no row of it has a finished run.

    Raises:
        ValueError: if its records must not be mixed.
    """
    own = [row for row in ROWS.values() if row.table == table]
    rows = [ROWS[name] for name in compared.BORROWED.get(table, ())] + own
    if not any(book.results(row.name) for row in own):
        return None
    check(book, rows)
    runs = [record for row in rows for record in book.results(row.name).values()]
    names = sorted({record.task[0] for record in runs})
    body = BODIES.get(table, compared.compared)(book, rows)
    lines = [f"{TABLES[table]} {', '.join(names)}. Protocol: [benchmarks/protocol.md](../protocol.md).", ""]
    lines += [*copies.notes(names), ""] if copies.notes(names) else []
    lines += [body, ""]
    missing = [
        f"{row.name} ({len(row.seeds) - len(left)} of {len(row.seeds)})" for row in own if (left := row.left(book))
    ]
    failed = [run for run in book.failed if any(run in map(row.run, row.seeds) for row in own)]
    lines += (
        [f"Not run yet: {', '.join(missing)}. Command: `python -m benchmarks.queue run --only NAME`.", ""]
        if missing
        else []
    )
    lines += [f"Not run: {row.name}, {reason}.\n" for row in own if (reason := row.reason(book))]
    lines += [f"Ended by a loss that was not finite, and not repeated: {', '.join(failed)}.", ""] if failed else []
    lines += sorted({f"{machine(r.env)}; amp {r.config['amp']}; commit {r.env['commit'][:12]}" for r in runs})
    return "\n".join(lines)


def write(book: Book, folder: Path) -> list[Path]:
    """Write every table that has a finished run, and the picture; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for table in TABLES:
        text = page(book, table)
        if text is not None:
            files.append(folder / f"{table}.md")
            files[-1].write_text(text + "\n")
    shown = [row for row in ROWS.values() if row.table in picture.TABLES]
    if any(book.results(row.name) for row in shown):
        check(book, shown)
        picture.draw(book, folder / PICTURE)
        files.append(folder / PICTURE)
    return files
