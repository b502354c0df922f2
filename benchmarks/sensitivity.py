"""What each knob does: the digits over a grid of settings.

    python -m benchmarks.sensitivity [--grid NAME=VALUE,VALUE ...] [--seeds N] [--runs FOLDER] [--quick] [--write NAME]

Without `--grid`: nu x alpha x beta. For premature pruning: ``--grid tol=none,0.05,0.5,0.9 --seeds 5``. Finished
runs in the folder are reused, and interrupted runs are resumed; two train at a time, with one thread each.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    CONFIDENCE,
    NEVER,
    QUICK,
    add_quick,
    check_name,
    each,
    guarded,
    machine,
    markdown,
    overrides,
    pool,
    publish,
    spread,
)
from catode._validate import check_int
from catode.records import read_json, read_result
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config, ConfigError, settings

GRID = ("nu=1,3,9", "alpha=0.25,0.5,0.75", "beta=0,1")
OWN = ("dataset", "data_dir", "seed", "epochs", "threads", "out", *NEVER)  # set by the command
SHOWN = {"macs": "MACs", "params": "parameters", "layers": "layers", "units": "units", "accuracy": "accuracy"}


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values by the name of the setting.

    Raises:
        ConfigError: if a string has another form, names no setting or one that the command sets itself, or a value is not
            admitted or given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in settings():
            raise ConfigError(
                f"`grid` must be NAME=VALUE,VALUE with a setting's name, spelt with _; got {text!r}. "
                "See python -m catode.train --help."
            )
        if name in OWN:
            raise ConfigError(f"`grid` must leave out {name}, which this command sets itself; got {text!r}. Remove it.")
        for value in values.split(","):
            (parsed,) = overrides([f"{name}={value}"]).values()
            if parsed in grid.setdefault(name, []):
                raise ConfigError(f"`grid` must have different values; got {name}={value} twice. Remove one.")
            grid[name].append(parsed)
    for name, values in grid.items():
        if len(values) < 2:
            raise ConfigError(f"`grid` must have two values or more; got {name}={shown(name, values[0])}. Add another.")
    return grid


def points(grid: dict[str, list[Any]], seeds: int) -> list[dict[str, Any]]:
    """Every combination of the grid's values with every seed."""
    values = itertools.product(*grid.values(), range(seeds))
    return [dict(zip([*grid, "seed"], point, strict=True)) for point in values]


def plan(point: dict[str, Any], epochs: int, runs: Path, quick: bool = False) -> Config:
    """The run of one point.

    Raises:
        ConfigError: if the point's settings do not go together.
    """
    name = "-".join(f"{key}{value}" for key, value in point.items())
    out = str(runs / f"{name}-e{epochs}")
    own = {"dataset": "digits", "epochs": epochs, "threads": 1, "out": out}
    return Config.from_presets(**point | own | ({k: v for k, v in QUICK.items() if k not in point} if quick else {}))


def shown(name: str, value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "derived" if name == "tol" else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """Numbers shown of a run, shares in percent, keys `SHOWN`."""
    found = {name: 100 * result[name] / result[f"{name}_dense"] for name in ("macs", "params")}
    found |= {name: result[f"{name}_kept"] for name in ("layers", "units")}
    return found | {"accuracy": 100 * result["test_accuracy"]}


def table(grid: dict[str, list[Any]], found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Every point of the grid, the mean over seeds with its interval where there are several, and one sentence for each knob."""
    groups: dict[tuple, list[dict[str, float]]] = {}
    for point, result in found:
        groups.setdefault(tuple(point[name] for name in grid), []).append(numbers(result))
    rows = []
    for point, group in groups.items():
        show = spread if len(group) > 1 else each
        cells = [show([g[name] for g in group], "{:.2f}" if name == "accuracy" else "{:.1f}") for name in SHOWN]
        rows.append([*map(shown, grid, point), *cells])
    header = [*grid, "MACs left, %", "parameters left, %", "layers", "units", "accuracy, %"]
    return "\n".join([markdown(header, rows), "", *sentences(grid, groups)])


def sentences(grid: dict[str, list[Any]], groups: dict[tuple, list[dict[str, float]]]) -> Iterable[str]:
    """What each knob does from its first to its last value, paired by seed, in the mean and in how many of the pairs."""
    for place, (name, values) in enumerate(grid.items()):
        first, last = values[0], values[-1]
        pairs = [
            pair
            for point, group in groups.items()
            if point[place] == first
            for pair in zip(group, groups[(*point[:place], last, *point[place + 1 :])], strict=True)
        ]
        said = []
        for key, text in SHOWN.items():
            change = [float(b[key] - a[key]) for a, b in pairs]
            ups = sum(c > 0 for c in change)
            unit = "" if key in ("layers", "units") else " points"
            said.append(f"{text} {np.mean(change):+.1f}{unit} (up in {ups} of {len(change)})")
        ends = " to ".join(shown(name, value) for value in (first, last))
        yield f"- `{name}` from {ends}: {', '.join(said)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="append", metavar="NAME=VALUE,VALUE", help="a setting's values; repeatable")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each point (1)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (40)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sensitivity"), help="folder of the runs")
    add_quick(parser)
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args(argv)
    seeds, epochs = check_int("seeds", args.seeds, low=1), check_int("epochs", args.epochs, low=1)
    name = check_name(args.write or "sensitivity", "sensitivity")
    grid = parse_grid(args.grid or GRID)
    if args.quick:  # two values of the first knob, the first of the others
        grid, seeds, epochs = {name: values[: 1 if i else 2] for i, (name, values) in enumerate(grid.items())}, 1, 1
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary) if args.quick else args.runs
        planned = [(point, plan(point, epochs, runs, args.quick)) for point in points(grid, seeds)]
        processes = 1 if args.quick else min(2, os.cpu_count() or 1)
        pool.train((config for _, config in planned), processes=processes, quick=args.quick)
        found = [(point, read_result(Path(config.out))) for point, config in planned]
        env = read_json(Path(planned[-1][1].out) / "env.json")
    arch = "" if "arch" in grid else f", {planned[-1][1].arch}"
    intervals = ", no intervals" if seeds == 1 else f"s, mean and {CONFIDENCE:.0%} t-interval"
    title = (
        f"Digits{arch}, {epochs} epochs, final epoch, n = {seeds} seed{intervals}, all else as preset; {machine(env)}."
    )
    publish(name, "\n".join([title, "", table(grid, found)]), bool(args.write))


if __name__ == "__main__":
    guarded(main)
