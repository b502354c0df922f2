"""What is done, what runs, what waits for what, and how long the rest takes, by the time measured so far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from benchmarks.common import markdown
from benchmarks.queue.book import Book
from benchmarks.queue.places import Places
from benchmarks.queue.rows import ROWS, Row
from catode.records import read_json, read_rows
from catode.train.settings.config import Config

IMAGES = {"cifar10": 50_000, "digits": 1_438}
"""Training images before any is held out."""
COSTS = {("cifar10", "resnet20"): 1.0, ("cifar10", "resnet56"): 3.1, ("digits", "resnet20"): 0.6}
"""Time of a training image in units of a ResNet-20's on CIFAR-10, for what was not measured yet: about their MACs, and more of
the digits, whose steps are short."""


def epochs(row: Row) -> int:
    """Epochs of each run of a row, as far as they are known before it."""
    if "epochs" in row.common:
        return row.common["epochs"]
    return Config.from_presets(dataset=row.common["dataset"], arch=row.common["arch"]).epochs


def seconds(row: Row, speed: Callable[[str, str], float | None]) -> float | None:
    """Seconds of one run; None if nothing like it was timed.

    Args:
        row: The row.
        speed: Seconds of a training image by data set and architecture.
    """
    common = row.common
    own = speed(common["dataset"], common["arch"])
    images = IMAGES[common["dataset"]] * (1 - common["validation_share"])
    return None if own is None else own * images * epochs(row)


def speeds(places: Places, book: Book) -> Callable[[str, str], float | None]:
    """Seconds of a training image, by the CPU time of finished runs, else by that of other networks, else by the trial.

    The wall time of a run would contain other work of the machine, and pauses.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for own in book.finished.values():
        images = own.result["training_images"] * len(own.result["validation_accuracy_history"])
        found.setdefault((own.config["dataset"], own.config["arch"]), []).append(
            own.result["cpu_seconds"] / own.env["threads"] / images
        )
    means = {key: sum(values) / len(values) for key, values in found.items()}
    base = next((mean / COSTS[key] for key, mean in means.items() if key in COSTS), None)
    if base is None and places.runs is not None:
        with suppress(FileNotFoundError, KeyError):
            way = read_json(places.trial)["way"]
            base = way["step_seconds"] / 128 if way["step_seconds"] else None

    def speed(dataset: str, arch: str) -> float | None:
        if (dataset, arch) in means:
            return means[dataset, arch]
        return None if base is None else base * COSTS[dataset, arch]

    return speed


def under_way(places: Places, run: str) -> tuple[dict[str, Any], dict[str, str]] | None:
    """config.json and the last row of metrics.csv of a run under way; None before its first epoch has ended."""
    if places.runs is None:
        return None
    for folder in (places.run(run), places.run(run) / "tuned", places.run(run) / "trained"):
        with suppress(FileNotFoundError, ValueError):
            if rows := read_rows(folder / "metrics.csv"):
                return read_json(folder / "config.json"), rows[-1]
    return None


def progress(places: Places, run: str) -> str | None:
    """Epochs and seconds of a run under way; None if it has not started."""
    if places.runs is None or not places.plan(run).exists():
        return None
    if (way := under_way(places, run)) is None:
        return "started"
    step, took = float(way[1]["step"]), float(way[1]["seconds"])
    return f"epoch {int(float(way[1]['epoch']))}, {1000 * took / step:.0f} ms a step"


def text(places: Places) -> str:
    """The state of the queue."""
    book = Book(places.records)
    speed = speeds(places, book)
    lines, total, unknown, tables = [], 0.0, 0, {}
    for row in sorted(ROWS.values(), key=lambda row: row.priority[0]):
        runs = [row.run(seed) for seed in row.seeds]
        left = [row.run(seed) for seed in row.left(book)]
        own = seconds(row, speed)
        if own is None:
            unknown += len(left)
        else:
            total += own * len(left)
            number, hours = tables.get(row.table, (0, 0.0))
            tables[row.table] = number + len(left), hours + own * len(left) / 3600
        failed = sum(run in book.failed for run in runs)
        running = {run: told for run in left if (told := progress(places, run))}
        blocked = [name for name in row.after if not book.all_ended(ROWS[name])]
        if row.reason(book) is not None:
            state = "needless"
        elif not left:
            state = f"done{f', {failed} failed' if failed else ''}"
        elif running:
            state = "; ".join(f"{run}: {told}" for run, told in running.items())
        elif blocked:
            state = f"waits for {blocked[0]}" + (f" and {len(blocked) - 1} more" if len(blocked) > 1 else "")
        else:
            state = "ready"
        hours = "" if own is None or not left else f"{own * len(left) / 3600:.1f}"
        lines.append([row.name, row.table, f"{sum(map(book.ended, runs))} of {len(runs)}", hours, state])
    ended = sum(book.ended(row.run(seed)) for row in ROWS.values() for seed in row.seeds)
    every = sum(len(row.seeds) for row in ROWS.values())
    end = [
        f"{ended} of {every} runs have ended; about {total / 3600:.1f} hours are left, one run at a time on an idle machine."
    ]
    end += [f"- {name}: {number} runs, {hours:.1f} hours" for name, (number, hours) in tables.items() if number]
    if unknown:
        end.append(f"{unknown} runs have no estimate, since nothing was timed yet: start the queue, or give --runs.")
    return "\n".join([markdown(["row", "table", "runs", "hours left", "state"], lines), "", *end])
