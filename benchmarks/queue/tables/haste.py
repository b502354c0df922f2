"""Tables of rows that decide from the first step on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.common import CONFIDENCE, markdown, mean_interval, spread
from benchmarks.queue.book import Book
from benchmarks.queue.returns import OWN
from benchmarks.queue.rows import Row
from benchmarks.queue.tables.measures import EQUAL, paired, share, verdict
from catode.report.compare.scores import interval

TOLD = (
    "What became of the thetas that a rule would have removed, in shadow runs, in which nothing is removed before its theta is "
    "0. *--tol t* is the condition of a run with that fixed tolerance, watched in the same runs: theta at or below t, and the "
    "upper limit of the benefit below the price. Decisions fall at checks, outcomes at any step. Foreseen: of the thetas that "
    "reached 0, those that were decided before; lead: steps from decision to theta = 0, median, mean over runs. Open: neither, for "
    f"a part since their block went. Came back, %: {CONFIDENCE:.0%} interval of Clopper and Pearson as "
    "if all were independent, open ones counted in its upper end alone. They are not independent, neither in a run nor between "
    "rules. So the last column pairs by run: share of decisions that came back minus that of the run's own condition, with "
    f"{CONFIDENCE:.0%} t-interval. *more*: this interval lies above 0, and those of Clopper and Pearson are apart."
)


def haste(book: Book, rows: Sequence[Row]) -> str:
    """Rules that decide from the first step on, by data set, and what came back in shadow runs."""
    parts = []
    for prefix in ("premature-cifar-", "premature-"):
        own = [r for r in rows if r.name.startswith(prefix) and (prefix != "premature-" or "cifar" not in r.name)]
        shown = [row for row in own if book.results(row.name)]
        if not shown:
            continue
        record = next(iter(book.results(shown[0].name).values()))
        name = record.task[0]
        base = next(row for row in own if row.name == f"{prefix}derived")
        cells = [_compared(book, base, row) for row in shown if not row.settings.get("shadow")]
        if cells:
            header = ["accuracy, %", "derived minus this, points", "derived is", "MACs left, %", "layers"]
            parts += [markdown([f"{name}, {record.config['epochs']} epochs", *header], cells)]
        back = [line for row in shown for line in _returned(book, row)]
        if back:
            header = ["decisions", "foreseen, %", "lead", "went to 0", "open", "came back, by run", "came back, %"]
            parts += [TOLD, markdown([f"{name}: rule", *header, "more than its own condition, points"], back)]
    if parts:
        parts.insert(
            0,
            f"Differences of accuracy are paired by seed, with {CONFIDENCE:.0%} t-interval, and claim nothing where the MACs left "
            f"differ by more than {100 * EQUAL:g} points.",
        )
    return "\n\n".join(parts)


def _compared(book: Book, base: Row, row: Row) -> list[str]:
    """A line of accuracy and size, and the difference of the derived tolerance and this row."""
    runs, own = book.results(row.name), book.results(base.name)
    both = paired(own, runs) if row is not base else []
    ended = book.all_ended(base) and book.all_ended(row)
    said = verdict(both, (share(own), share(runs))) if both and ended else "not ended" if row is not base else ""
    results = [r.result for r in runs.values()]
    return [
        row.told,
        spread([r.accuracy for r in runs.values()]),
        spread(both, "{:+.2f}") if both else "",
        said,
        spread([r["macs"] / r["macs_dense"] for r in results], "{:.1f}", 100),
        "/".join(str(r["layers_kept"]) for r in results) + f" of {results[0]['layers_total']}",
    ]


def _returned(book: Book, row: Row) -> list[list[str]]:
    """Lines of what came back in a row's shadow runs, added up over seeds, and by how much more than by the runs' own condition."""
    runs = [r.env["returns"] for r in book.results(row.name).values() if "returns" in r.env]
    lines = []
    for rule in [name for name in runs[0] if all(name in run for run in runs)] if runs else ():
        own = [run[rule] for run in runs]
        total, gone, back, left, zeros, foreseen = (
            sum(one[what] for one in own)
            for what in ("decisions", "confirmed", "returned", "open", "zeros", "foreseen")
        )
        low, high = _ends(back, left, total)
        leads = [one["lead"] for one in own if one["lead"] is not None]
        lines.append(
            [
                f"{row.told}: {rule}",
                str(total),
                f"{100 * foreseen / zeros:.0f}" if zeros else "",
                f"{np.mean(leads):.0f}" if leads else "",
                str(gone),
                str(left),
                ", ".join(f"{one['returned']}/{one['decisions']}" for one in own),
                f"{low:.1f} to {high:.1f}" if total else "",
                _more(runs, rule),
            ]
        )
    return lines


def _ends(back: int, left: int, total: int) -> tuple[float, float]:
    """Interval of the share that came back, %."""
    return 100 * interval(back, total)[0], 100 * interval(back + left, total)[1]


def _more(runs: Sequence[dict], rule: str) -> str:
    """By how much larger a share came back than of the runs' own decisions, and whether that is shown."""
    pairs = [(run[rule], run[OWN]) for run in runs]
    if rule == OWN or not all(one["decisions"] for pair in pairs for one in pair):
        return ""
    if not any(one["returned"] for pair in pairs for one in pair):
        return "none came back in either"
    apart = [100 * (a["returned"] / a["decisions"] - b["returned"] / b["decisions"]) for a, b in pairs]
    sums = [[sum(pair[i][what] for pair in pairs) for what in ("returned", "open", "decisions")] for i in (0, 1)]
    shown = len(apart) > 1 and mean_interval(apart)[1] > 0 and _ends(*sums[0])[0] > _ends(*sums[1])[1]
    return f"{spread(apart, '{:+.2f}')}: {'more' if shown else 'not shown'}"
