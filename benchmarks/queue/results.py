"""Tables and the picture of the queue's rows, from records alone; rows without a finished run are named as not run.

`recipe`, `choices` and `schedule` show validation accuracy, by which was chosen, and never that on test images. All others show
test accuracy at the final epoch, and differences paired by seed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import binomtest

from benchmarks import copies
from benchmarks.cifar import Record
from benchmarks.common import CONFIDENCE, each, machine, markdown, mean_interval, spread
from benchmarks.queue import derive
from benchmarks.queue.book import Book
from benchmarks.queue.returns import CONFIRMED, OPEN, RETURNED
from benchmarks.queue.rows import CATODE_NAMES, NAMES, RIVAL_NAMES, ROWS, Row
from catode.records import read_rows
from catode.structures.fates import REMOVED

PICTURE = "headline.png"
TABLES = {
    "recipe": "The dense recipe: eight settings, chosen by validation accuracy.",
    "choices": "Settings of catode and of Torch-Pruning, as many each, chosen by validation accuracy.",
    "headline": "ResNet-20 at 45 % of the MACs against its rivals.",
    "parts": "What each part of catode is worth, and the structure apart from the training.",
    "resnet56": "ResNet-56; one seed, so no interval is claimed.",
    "schedule": "Half the MACs of a ResNet-56 in short trainings, by schedules of the decisions: validation accuracy, one seed, so "
    "no interval is claimed.",
    "haste": "Deciding from the first step on, at a high learning rate.",
}
BASES = {"headline": "pruned", "parts": "pruned", "resnet56": "r56-half"}
"""The row that every other one of a table is subtracted from."""
BORROWED = {"parts": ("pruned", "dense")}
"""Rows of other tables that a table shows as well."""


EQUAL = 0.02
"""Difference of MACs, in units of the dense network's, up to which two rows have equal MACs."""


def training_macs(records: Path, run: str, record: Record) -> float:
    """MACs of the forward passes on all training images over the run, in units of one epoch of the dense network.

    Within an epoch in which something was removed they are taken as the mean of before and after. Measuring is not counted.
    """
    sizes = [float(row["macs"]) for row in read_rows(records / run / "metrics.csv")]
    if record.kind == "pruned":
        before = [record.result["macs_dense"], *sizes[:-1]]
        sizes = [(a + b) / 2 for a, b in zip(before, sizes, strict=True)]
    return sum(sizes) / record.result["macs_dense"]


def verdict(differences: Sequence[float], shares: tuple[float, float] = (1.0, 1.0)) -> str:
    """What the interval of paired differences allows to say.

    Args:
        differences: Of accuracy, points.
        shares: Mean MACs of both rows, in units of the dense network's.
    """
    _, low, high = mean_interval(differences)
    if len(differences) < 2:
        return "no interval"
    said = "above" if low > 0 else "below" if high < 0 else "undecided"
    return said if abs(shares[0] - shares[1]) <= EQUAL else f"{said}, at other MACs"


def share(runs: dict[int, Record]) -> float:
    """Mean MACs of a row's runs in units of the dense network's."""
    return sum(r.result["macs"] / r.result["macs_dense"] for r in runs.values()) / len(runs)


def paired(first: dict[int, Record], second: dict[int, Record]) -> list[float]:
    """Differences of test accuracy, points, of the seeds that both rows have."""
    return [own.accuracy - second[seed].accuracy for seed, own in first.items() if seed in second]


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
    rows = [ROWS[name] for name in BORROWED.get(table, ())] + own
    if not any(book.results(row.name) for row in own):
        return None
    check(book, rows)
    runs = [record for row in rows for record in book.results(row.name).values()]
    names = sorted({record.task[0] for record in runs})
    body = {"recipe": _recipe, "choices": _choices, "schedule": _schedules, "haste": _haste}.get(table, _compared)(
        book, table, rows
    )
    lines = [f"{TABLES[table]} {', '.join(names)}. Protocol: [benchmarks/protocol.md](../protocol.md).", ""]
    lines += [*copies.notes(names), ""] if copies.notes(names) else []
    lines += [body, ""]
    missing = [
        f"{row.name} ({len(book.results(row.name))} of {len(row.seeds)})"
        for row in own
        if len(book.results(row.name)) < len(row.seeds)
    ]
    failed = [run for run in book.failed if any(run in map(row.run, row.seeds) for row in own)]
    lines += (
        [f"Not run yet: {', '.join(missing)}. Command: `python -m benchmarks.queue run --only NAME`.", ""]
        if missing
        else []
    )
    lines += [f"Ended by a loss that was not finite, and not repeated: {', '.join(failed)}.", ""] if failed else []
    lines += sorted({f"{machine(r.env)}; amp {r.config['amp']}; commit {r.env['commit'][:12]}" for r in runs})
    return "\n".join(lines)


def _recipe(book: Book, table: str, rows: Sequence[Row]) -> str:
    taken = _taken(book, NAMES)
    return markdown(
        ["setting", "seed", "validation accuracy, %", "loss", "CPU minutes", "taken"],
        [_validated(row, record, taken) for row in rows for record in book.results(row.name).values()],
    )


def _choices(book: Book, table: str, rows: Sequence[Row]) -> str:
    parts = []
    for title, names in (("catode", CATODE_NAMES), ("Torch-Pruning", RIVAL_NAMES)):
        taken = _taken(book, names)
        cells = [
            [*_validated(ROWS[name], record, taken), f"{100 * record.result['macs'] / record.result['macs_dense']:.1f}"]
            for name in names
            for record in book.results(name).values()
        ]
        if cells:
            header = [title, "seed", "validation accuracy, %", "loss", "CPU minutes", "taken", "MACs, %"]
            parts.append(markdown(header, cells))
    return "\n\n".join(parts)


def _taken(book: Book, names: Sequence[str]) -> str | None:
    """Name of the row that is chosen, once all have ended."""
    if not all(book.all_ended(ROWS[name]) for name in names):
        return None
    try:
        return derive.best(book, names, derive.near_target).env["queue"]["row"]
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


def _schedules(book: Book, table: str, rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        for seed, own in book.results(row.name).items():
            half, last = removals(own, int(read_rows(book.records / row.run(seed) / "metrics.csv")[-1]["step"]))
            decided = own.result["decided_by_rule"]
            cells.append(
                [
                    row.told,
                    f"{derive.validation(own):.2f}",
                    f"{100 * own.result['macs'] / own.result['macs_dense']:.1f}",
                    f"{own.result['layers_kept']} of {own.result['layers_total']}",
                    half,
                    last,
                    "" if decided is None else f"{100 * decided:.0f}",
                    f"{own.result['cpu_seconds'] / 60:.0f}",
                ]
            )
    header = ["network", "validation accuracy, %", "MACs, %", "layers", "half of it gone, epoch", "last removal, epoch"]
    return markdown([*header, "decided by rule, %", "CPU minutes"], cells)


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


def _compared(book: Book, table: str, rows: Sequence[Row]) -> str:
    dense = next((r for r in rows if r.told == "dense"), None)
    reference = book.results(dense.name) if dense else {}
    cells = []
    for row in rows:
        runs = book.results(row.name)
        if not runs:
            continue
        results, epochs = [r.result for r in runs.values()], dense.common["epochs"] if dense else 1
        times = [
            own.result["cpu_seconds"] / reference[seed].result["cpu_seconds"]
            for seed, own in runs.items()
            if seed in reference
        ]
        cells.append(
            [
                row.told,
                spread([own.accuracy for own in runs.values()]),
                each([r["macs"] / 1e6 for r in results]),
                each([100 * r["macs"] / r["macs_dense"] for r in results], "{:.1f}"),
                each([r["params"] / 1e3 for r in results], "{:.0f}"),
                each([r["latency_ms_128"] / r["latency_dense_ms_128"] for r in results]),
                each([training_macs(book.records, row.run(s), own) / epochs for s, own in runs.items()]),
                each(times) if times else "",
                each([100 * r["decided_by_rule"] for r in results], "{:.0f}") if results[0]["decided_by_rule"] else "",
            ]
        )
    header = [
        "network",
        "accuracy, %",
        "MACs, M",
        "MACs, %",
        "parameters, k",
        "latency",
        "training MACs",
        "training time",
    ]
    lines = [
        f"Test accuracy at the final epoch; mean and {CONFIDENCE:.0%} t-interval over n seeds. All else: mean (and each seed's "
        "value). Latency: a forward pass of 128 images, against the whole network's in the same process, on a machine that does "
        "other work, too. Training MACs: of all forward passes, in units of the dense row's; measuring not counted. Training time: "
        "CPU time in units of the dense run's of the same seed, measuring included.",
        "",
        markdown([*header, "decided by rule, %"], cells),
    ]
    lines += _worth(book, rows) if table == "resnet56" else []
    base = book.results(BASES[table])
    pairs = [
        [
            f"{ROWS[BASES[table]].told} - {row.told}",
            spread(both, "{:+.2f}"),
            verdict(both, (share(base), share(book.results(row.name)))),
            each(
                [base[s].result["macs"] / own.result["macs"] for s, own in book.results(row.name).items() if s in base]
            ),
        ]
        for row in rows
        if row.name != BASES[table] and (both := paired(base, book.results(row.name)))
    ]
    if pairs:
        lines += [
            "",
            markdown(["difference, paired by seed", "accuracy, points", "the first is", "MACs, ratio"], pairs),
        ]
    return "\n".join(lines)


def _worth(book: Book, rows: Sequence[Row]) -> list[str]:
    """Lines on what structures were worth and what they cost in the course of each run with gates."""
    cells = []
    for row in rows:
        for seed, own in book.results(row.name).items():
            epochs = read_rows(book.records / row.run(seed) / "metrics.csv")
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


def _haste(book: Book, table: str, rows: Sequence[Row]) -> str:
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
                f"rule. Last column: {CONFIDENCE:.0%} interval of Clopper and Pearson for the share that came back of those "
                "that ended, as if they were independent."
            )
            header = [
                f"{name}: what a rule would have removed",
                "decisions",
                "went to 0",
                "came back",
                "open",
                "came back, %",
            ]
            parts.append(markdown(header, back))
    return "\n\n".join(parts)


def _returned(row: Row, book: Book) -> list[list[str]]:
    """Lines of what came back in a row's shadow runs, added up over seeds."""
    own = [r.env["returns"] for r in book.results(row.name).values() if "returns" in r.env]
    lines = []
    for rule in own[0] if own else ():
        sums = [sum(one[rule][what] for one in own) for what in (CONFIRMED, RETURNED, OPEN)]
        ended = binomtest(sums[1], max(1, sums[0] + sums[1])).proportion_ci(CONFIDENCE, "exact")
        told = f"{100 * ended.low:.1f} to {100 * ended.high:.1f}" if sums[0] + sums[1] else ""
        lines.append([f"{row.told}: {rule}", *map(str, (sum(sums), *sums)), told])
    return lines


def draw(book: Book, path: Path) -> list[str]:
    """Accuracy against MACs with error bars, of the headline's rows and the parts'; returns the rows that are missing."""
    from catode.theory.plotting import PALETTE, house_style, new_figure

    rows = [row for row in ROWS.values() if row.table in ("headline", "parts")]
    shown = [row for row in rows if book.results(row.name)]
    missing = [row.told for row in rows if row not in shown]
    check(book, rows)
    figure = new_figure(7.2, 4.8)
    names = sorted({r.task[0] for row in shown for r in book.results(row.name).values()})
    epochs = sorted({r.config["epochs"] for row in shown for r in book.results(row.name).values()})
    beside = _set_apart({row.name: 100 * share(book.results(row.name)) for row in shown})
    colors, marks = [c for n, c in PALETTE.items() if n != "black"], "osD^vP*Xh<>"
    with house_style():
        axes = figure.subplots()
        for i, row in enumerate(shown):
            runs = book.results(row.name).values()
            mean, low, high = mean_interval([r.accuracy for r in runs])
            look = dict(
                color=PALETTE["black"] if row.told == "dense" else colors[i % len(colors)], marker=marks[i % len(marks)]
            )
            bars = None if len(runs) < 2 else [[mean - low], [high - mean]]
            axes.errorbar(
                beside[row.name], mean, bars, capsize=3, linestyle="none", label=f"{row.told}, n = {len(runs)}", **look
            )
        told = "MACs, % of the dense network's; where they are equal, set apart sideways"
        told += (
            "".join(f"\n{line}" for line in textwrap.wrap(f"not run yet: {', '.join(missing)}", 120)) if missing else ""
        )
        axes.set_xlabel(told, fontsize=8)
        axes.set_ylabel("test accuracy, %")
        title = (
            f"ResNet-20, {', '.join(names)}, {' to '.join(map(str, epochs))} epochs: mean and {CONFIDENCE:.0%} interval"
        )
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
        figure.savefig(path)
    return missing


def _set_apart(shares: dict[str, float], gap: float = 0.9, equal: float = 100 * EQUAL) -> dict[str, float]:
    """Places of rows by their MACs, %, with those of equal MACs moved sideways until none covers another."""
    places: dict[str, float] = {}
    for name, own in shares.items():
        alike = sorted((o for o, there in shares.items() if abs(there - own) <= equal), key=shares.get)
        places[name] = own + gap * (alike.index(name) - (len(alike) - 1) / 2)
    return places


def write(book: Book, folder: Path) -> list[Path]:
    """Write every table that has a finished run, and the picture; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for table in TABLES:
        text = page(book, table)
        if text is not None:
            files.append(folder / f"{table}.md")
            files[-1].write_text(text + "\n")
    if any(book.results(row.name) for row in ROWS.values() if row.table == "headline"):
        draw(book, folder / PICTURE)
        files.append(folder / PICTURE)
    return files
