"""Tables of rows that decide from the first step on."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import CONFIDENCE, markdown, spread
from benchmarks.queue.book import Book
from benchmarks.queue.returns import CONFIRMED, OPEN, RETURNED
from benchmarks.queue.rows import Row
from benchmarks.queue.tables.measures import paired
from catode.report.compare.scores import interval


def haste(book: Book, rows: Sequence[Row]) -> str:
    """Rules that decide from the first step on, by data set, and what came back in shadow runs."""
    parts = []
    for prefix in ("premature-cifar-", "premature-"):
        own = [r for r in rows if r.name.startswith(prefix) and (prefix != "premature-" or "cifar" not in r.name)]
        base = book.results(f"{prefix}derived")
        cells = []
        for row in own:
            runs = book.results(row.name)
            if not runs:
                continue
            both = paired(runs, base) if row.name != f"{prefix}derived" else []
            results = [r.result for r in runs.values()]
            cells.append(
                [
                    row.told,
                    spread([r.accuracy for r in runs.values()]),
                    spread(both, "{:+.2f}") if both else "",
                    spread([r["macs"] / r["macs_dense"] for r in results], "{:.1f}", 100),
                    "/".join(str(r["layers_kept"]) for r in results) + f" of {results[0]['layers_total']}",
                ]
            )
        if not cells:
            continue
        name = next(iter(r.task[0] for row in own for r in book.results(row.name).values()))
        epochs = next(iter(r.config["epochs"] for row in own for r in book.results(row.name).values()))
        header = [f"{name}, {epochs} epochs", "accuracy, %", "against derived, points", "MACs left, %", "layers"]
        parts.append(markdown(header, cells))
        back = [line for row in own for line in _returned(row, book)]
        if back:
            parts.append(
                "What became of the thetas of shadow runs, in which nothing is removed before its theta is 0, after they met a "
                "rule. *fixed t* looks at theta alone, *fixed t, benefit below price* at the upper limit of the benefit as well, "
                "as the derived condition does, and every run with a fixed tolerance. Last column: interval of Clopper and "
                "Pearson, open ones counted as returned in its upper end only, as if all were independent. They are not, neither "
                "in a run nor between rules, which are watched in the same runs."
            )
            header = [
                f"{name}: what a rule would have removed",
                "decisions",
                "went to 0",
                "came back",
                "open",
                "came back, by run",
                f"came back, %, {CONFIDENCE:.0%}",
            ]
            parts.append(markdown(header, back))
    return "\n\n".join(parts)


def _returned(row: Row, book: Book) -> list[list[str]]:
    """Lines of what came back in a row's shadow runs, added up over seeds."""
    own = [r.env["returns"] for r in book.results(row.name).values() if "returns" in r.env]
    lines = []
    for rule in own[0] if own else ():
        gone, back, left = (sum(one[rule][what] for one in own) for what in (CONFIRMED, RETURNED, OPEN))
        total = gone + back + left
        ends = f"{100 * interval(back, total)[0]:.1f} to {100 * interval(back + left, total)[1]:.1f}" if total else ""
        runs = "/".join(str(one[rule][RETURNED]) for one in own)
        lines.append([f"{row.told}: {rule}", *map(str, (total, gone, back, left)), runs, ends])
    return lines
