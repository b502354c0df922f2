"""The README's picture: accuracy against MACs, and what the differences at equal MACs are."""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks.common import CONFIDENCE, mean_interval
from benchmarks.queue.book import Book
from benchmarks.queue.rows import ROWS
from benchmarks.queue.tables.compared import BASES
from benchmarks.queue.tables.measures import EQUAL, paired, share

TABLES = ("headline", "parts")
"""Tables whose rows it shows."""
APART = 1.6
"""Distance of rows of equal MACs in the picture, percent."""


def draw(book: Book, path: Path) -> list[str]:
    """On the left every row, at its MACs, those of equal MACs side by side; on the right differences of catode and these.

    They are paired by seed.

    Args:
        book: The records; `benchmarks.queue.tables.check` must have admitted them.
        path: File of the picture.

    Returns:
        The rows that are missing.
    """
    from catode.theory.plotting import PALETTE, house_style, new_figure

    rows = [row for row in ROWS.values() if row.table in TABLES]
    shown = [row for row in rows if book.results(row.name)]
    missing = [row.told for row in rows if row not in shown and row.left(book)]
    colors = [color for name, color in PALETTE.items() if name not in ("black", "yellow")]
    looks = {
        row.name: dict(
            color=PALETTE["black"] if row.told == "dense" else colors[i % len(colors)], marker="osD^vP*Xh<>"[i % 11]
        )
        for i, row in enumerate(shown)
    }
    base = ROWS[BASES[TABLES[0]]]
    own = book.results(base.name)
    equal = [row for row in shown if own and abs(share(own) - share(book.results(row.name))) <= EQUAL]
    pairs = [
        (row, both)
        for row in equal
        if row is not base
        and book.all_ended(base)
        and book.all_ended(row)
        and (both := paired(own, book.results(row.name)))
    ]
    runs = [record for row in shown for record in book.results(row.name).values()]
    names = ", ".join(sorted({record.task[0] for record in runs}))
    epochs = " to ".join(map(str, sorted({record.config["epochs"] for record in runs})))
    figure = new_figure(10.5, 4.8)
    with house_style():
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        for row in shown:
            own = book.results(row.name)
            mean, low, high = mean_interval([record.accuracy for record in own.values()])
            bars = [[mean - low], [high - mean]] if len(own) > 1 and book.all_ended(row) else None
            label = f"{row.told}, n = {len(own)}"
            aside = APART * (equal.index(row) - (len(equal) - 1) / 2) if row in equal else 0.0
            left.errorbar(
                100 * share(own) + aside, mean, bars, capsize=3, linestyle="none", label=label, **looks[row.name]
            )
        told = "MACs, % of the dense network's; the same ones are drawn side by side"
        if missing:
            told += "".join(f"\n{line}" for line in textwrap.wrap(f"not run yet: {', '.join(missing)}", 80))
        left.set_xlabel(told)
        left.set_ylabel("test accuracy, %")
        left.set_title(
            f"ResNet-20, {names}, {epochs} epochs\nmean and {CONFIDENCE:.0%} interval over seeds", fontsize=10
        )
        left.legend(fontsize=8)
        right.axvline(0.0, color=PALETTE["black"], linewidth=1)
        for place, (row, both) in enumerate(pairs):
            mean, low, high = mean_interval(both)
            bars = [[mean - low], [high - mean]] if len(both) > 1 else None
            right.errorbar(mean, -place, xerr=bars, capsize=3, linestyle="none", **looks[row.name])
        right.set_yticks(
            [-place for place in range(len(pairs))], [f"{row.told}\nn = {len(both)}" for row, both in pairs]
        )
        right.set_ylim(-max(1, len(pairs)) + 0.5, 0.5)
        right.set_xlabel(f"points of accuracy that {base.told} is above")
        right.set_title(
            "The same MACs: differences paired by seed,\n" + f"mean and {CONFIDENCE:.0%} interval", fontsize=10
        )
        if not pairs:
            right.text(
                0.5, 0.5, "no row of equal MACs yet", transform=right.transAxes, ha="center", color=PALETTE["grey"]
            )
        figure.savefig(path)
    return missing
