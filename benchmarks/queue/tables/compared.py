"""Tables of rows against each other: test accuracy with intervals, costs, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.cifar import Record
from benchmarks.common import CONFIDENCE, each, markdown, spread
from benchmarks.queue import latency
from benchmarks.queue.book import Book
from benchmarks.queue.rows import ROWS, Row
from benchmarks.queue.tables.choices import without
from benchmarks.queue.tables.measures import EQUAL, paired, share, training_macs, verdict

BASES = {"headline": "pruned", "parts": "pruned", "resnet56": "r56-half"}
"""The row that every other one of a table is subtracted from."""
BORROWED = {"parts": ("pruned", "dense")}
"""Rows of other tables that a table shows as well."""
HEADER = (
    "network",
    "accuracy, %",
    "without EMA",
    "while training, %",
    "MACs, M",
    "MACs, %",
    "parameters, k",
    "latency",
    "training MACs",
    "CPU minutes",
    "training time",
    "decided by rule, %",
)


def compared(book: Book, rows: Sequence[Row]) -> str:
    """Every row with a finished run, and the differences of one row and all others."""
    table = rows[-1].table
    timed = latency.read(book.records)
    if not any(row.run(seed) in timed["runs"] for row in rows for seed in row.seeds):
        timed = {"runs": {}}
    dense = next(row for row in rows if row.told == "dense")
    reference = list(book.results(dense.name).values())
    lines = [*_told(reference, timed), "", markdown(HEADER, _cells(book, rows, dense, timed["runs"]))]
    lines += _worth(book, rows) if table == "resnet56" else []
    pairs = _pairs(book, ROWS[BASES[table]], rows)
    if pairs:
        several = f" {len(pairs)} differences are looked at, and none is corrected for that." if len(pairs) > 1 else ""
        lines += [
            "",
            f"Differences of accuracy, paired by seed, with {CONFIDENCE:.0%} t-interval.{several} The interval covers seeds "
            "alone: all rows share their test images, and how these were chosen is not in it. Nothing is claimed "
            f"where the MACs differ by more than {100 * EQUAL:g} points of the dense network's, or before all runs of both rows "
            f"have ended.{_told_apart(book, rows)}",
            "",
            markdown(["difference", "accuracy, points", "the first is", "MACs, ratio"], pairs),
        ]
    return "\n".join(lines)


def _told(reference: Sequence[Record], timed: dict[str, Any]) -> list[str]:
    where = "as each run measured it at its end, beside other runs"
    if timed["runs"]:
        load = " and ".join(timed["load"])
        where = f"all in one sitting, channels last, in turn with the whole network ({timed['machine']}, {load})"
    noise = "".join(
        f" Runs of the dense row, all the same work, differ by {100 * (max(own) / min(own) - 1):.0f} % ({name})."
        for name, own in _by_machine(reference).items()
        if len(own) > 1
    )
    return [
        f"Test accuracy at the final epoch; mean and {CONFIDENCE:.0%} t-interval over n seeds. All else: mean (and each seed's "
        "value). While training: accuracy on the augmented batches of the last epoch, weights not averaged. Latency: a forward "
        f"pass of 128 images, fp32, one thread, in units of the whole network's, {where}. Training "
        "MACs: of the forward passes on all training images, dead channels included, in units of the dense row's; not counted is "
        "measuring, of 8 images beside every second batch of 64 while anything is undecided. Training time: "
        "ratio of the rows' mean CPU times, measuring included, of runs on the same kind of machine, which did other work, too, "
        f"and of how many if not of all; CPU minutes are of any machine.{noise}"
    ]


def _cells(book: Book, rows: Sequence[Row], dense: Row, timed: dict[str, list[float]]) -> list[list[str]]:
    reference = book.results(dense.name).values()
    cells = []
    for row in rows:
        runs = book.results(row.name)
        if not runs:
            continue
        results = [r.result for r in runs.values()]
        pairs = [[r["latency_dense_ms_128"], r["latency_ms_128"]] for r in results]
        if timed:  # one that was not there has no number that could stand beside the others
            pairs = [timed[run] for run in map(row.run, runs) if run in timed]
        minutes = [r["cpu_seconds"] / 60 for r in results]
        cells.append(
            [
                row.told,
                spread([own.accuracy for own in runs.values()]),
                _mean([without(r, "test") for r in results]),
                f"{100 * np.mean([float(book.epochs(row.run(s))[-1]['train_accuracy']) for s in runs]):.2f}",
                each([r["macs"] / 1e6 for r in results]),
                each([100 * r["macs"] / r["macs_dense"] for r in results], "{:.1f}"),
                each([r["params"] / 1e3 for r in results], "{:.0f}"),
                each([own / whole for whole, own in pairs]) if pairs else "",
                each([training_macs(book.epochs(row.run(s)), own) / dense.common["epochs"] for s, own in runs.items()]),
                each(minutes, "{:.0f}"),
                _time_ratio(runs.values(), reference),
                each([100 * r["decided_by_rule"] for r in results], "{:.0f}")
                if results[0]["decided_by_rule"] is not None
                else "",
            ]
        )
    return cells


def _told_apart(book: Book, rows: Sequence[Row]) -> str:
    """Runs of one seed that were made on different processors."""
    own = book.results(BASES[rows[-1].table])
    apart = [
        row.run(seed)
        for row in rows
        for seed, record in book.results(row.name).items()
        if seed in own and record.env["processor"] != own[seed].env["processor"]
    ]
    return f" On another processor than the run that they are paired with: {', '.join(apart)}." if apart else ""


def _by_machine(runs: Iterable[Record]) -> dict[str, list[float]]:
    """Seconds of CPU time of runs, by processor."""
    found: dict[str, list[float]] = {}
    for one in runs:
        found.setdefault(one.env["processor"], []).append(one.result["cpu_seconds"])
    return found


def _time_ratio(runs: Iterable[Record], reference: Iterable[Record]) -> str:
    """Mean CPU time in units of the reference's, over the processors that both had; empty without one."""
    own, other = _by_machine(runs), _by_machine(reference)
    ratios = {name: np.mean(own[name]) / np.mean(other[name]) for name in own if name in other}
    if not ratios:
        return ""
    count, every = sum(len(own[name]) for name in ratios), sum(map(len, own.values()))
    ratio = np.average(list(ratios.values()), weights=[len(own[name]) for name in ratios])
    return f"{ratio:.2f}" + (f" ({count} of {every} runs)" if count < every else "")


def _mean(values: Sequence[str]) -> str:
    return f"{np.mean([float(value) for value in values]):.2f}" if all(values) else ""


def _pairs(book: Book, base: Row, rows: Sequence[Row]) -> list[list[str]]:
    own, pairs = book.results(base.name), []
    for row in rows:
        runs = book.results(row.name)
        both = paired(own, runs) if row.name != base.name else []
        if not both:
            continue
        ended = book.all_ended(base) and book.all_ended(row)
        pairs.append(
            [
                f"{base.told} - {row.told}",
                spread(both, "{:+.2f}"),
                verdict(both, (share(own), share(runs))) if ended else "not ended",
                each([own[s].result["macs"] / other.result["macs"] for s, other in runs.items() if s in own]),
            ]
        )
    return pairs


def _worth(book: Book, rows: Sequence[Row]) -> list[str]:
    """Lines on what structures were worth and what they cost in the course of each run with gates."""
    cells = []
    for row in rows:
        for seed, own in book.results(row.name).items():
            epochs = book.epochs(row.run(seed))
            losses = {int(line["step"]): float(line["loss"]) for line in epochs}
            for one in own.env.get("nats", ()):
                ended = min(step for step in losses if step >= one["step"])
                cells.append(
                    [
                        row.told,
                        f"{one['step'] * own.config['epochs'] / max(losses):.1f}",
                        f"{losses[ended]:.3f}",
                        f"{one['number']} {one['kind']}s",
                        f"{one['benefit']:.3f}",
                        f"{one['price']:.3f}",
                        f"{100 * one['below'] / one['number']:.0f}",
                    ]
                )
    if not cells:
        return []
    header = ["network", "epoch", "training loss", "undecided", "benefits", "prices", "benefit below price, %"]
    told = (
        "What structures were worth and what they cost while they were undecided: sums over them, in nats of the training loss, "
        "which is that of the epoch, smoothed labels and gates included. A benefit is what the loss would rise by if that one "
        "structure went."
    )
    return ["", told, "", markdown(header, cells)]
