"""What each knob does: the digits over a grid of settings.

    python -m benchmarks.sensitivity [--grid NAME=VALUE,VALUE ...] [--seeds N] [--runs FOLDER] [--write NAME]

Without `--grid`: nu x alpha x beta. For premature pruning: ``--grid tol=none,0.05,0.5,0.9 --seeds 5``. Finished
runs in the folder are read, not made again; two train at a time, with one thread each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import guarded, machine, markdown, overrides, publish, read_json, spread
from catode._validate import check_int
from catode.train import run
from catode.train.config import Config, ConfigError

GRID = ("nu=1,3,9", "alpha=0.25,0.5,0.75", "beta=0,1")
SHOWN = {"macs": "MACs", "params": "parameters", "layers": "layers", "units": "units", "accuracy": "accuracy"}


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values by the name of the setting.

    Raises:
        ConfigError: if a text has another form, or a value is not admitted.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        for value in values.split(","):
            parsed = overrides([f"{name}={value}"])
            Config.from_presets(dataset="digits", **parsed)
            grid.setdefault(name, []).append(parsed[name])
        if len(grid[name]) < 2:
            raise ConfigError(f"`grid` must have two values or more; got {text!r}. Write {name}=1,2.")
    return grid


def points(grid: dict[str, list[Any]], seeds: int) -> list[dict[str, Any]]:
    """Every combination of the grid's values with every seed."""
    values = itertools.product(*grid.values(), range(seeds))
    return [dict(zip([*grid, "seed"], point, strict=True)) for point in values]


def train(point: dict[str, Any], epochs: int, runs: Path) -> Path:
    """One run, unless it is there already."""
    name = "-".join(f"{key}{value}" for key, value in point.items())
    folder = runs / f"{name}-e{epochs}"
    if not (folder / "result.json").exists():
        resume = {"resume": str(folder)} if (folder / "config.json").exists() else {}
        settings = {**point, "epochs": epochs, "threads": 1, "out": str(folder), **resume}
        run(Config.from_presets(dataset="digits", **settings), progress=False, with_report=False)
    return folder


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """What is shown of a run, shares in percent, keys `SHOWN`."""
    found = {name: 100 * result[name] / result[f"{name}_dense"] for name in ("macs", "params")}
    found |= {name: result[f"{name}_kept"] for name in ("layers", "units")}
    return found | {"accuracy": 100 * result["accuracy"]}


def table(grid: dict[str, list[Any]], found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Every point of the grid with mean and spread over the seeds, and one sentence for each knob."""
    groups: dict[tuple, list[dict[str, float]]] = {}
    for point, result in found:
        groups.setdefault(tuple(point[name] for name in grid), []).append(numbers(result))
    rows = []
    for point, group in groups.items():
        cells = [spread([g[name] for g in group], "{:.2f}" if name == "accuracy" else "{:.1f}") for name in SHOWN]
        rows.append([*("derived" if v is None else f"{v:g}" for v in point), *cells])
    header = [*grid, "MACs left, %", "parameters left, %", "layers", "units", "accuracy, %"]
    return "\n".join([markdown(header, rows), "", *sentences(grid, groups)])


def sentences(grid: dict[str, list[Any]], groups: dict[tuple, list[dict[str, float]]]) -> Iterable[str]:
    """What each knob does from its first to its last value, in the mean over all else and in how many of the pairs."""
    means = {point: {name: np.mean([g[name] for g in group]) for name in SHOWN} for point, group in groups.items()}
    for place, (name, values) in enumerate(grid.items()):
        first, last = values[0], values[-1]
        pairs = [(m, means[(*p[:place], last, *p[place + 1 :])]) for p, m in means.items() if p[place] == first]
        said = []
        for key, text in SHOWN.items():
            change = [float(b[key] - a[key]) for a, b in pairs]
            ups = sum(c > 0 for c in change)
            unit = "" if key in ("layers", "units") else " points"
            said.append(f"{text} {np.mean(change):+.1f}{unit} (up in {ups} of {len(change)})")
        ends = " to ".join("derived" if v is None else f"{v:g}" for v in (first, last))
        yield f"- `{name}` from {ends}: {', '.join(said)}."


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="append", metavar="NAME=VALUE,VALUE", help="a setting's values; repeatable")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each point (1)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (40)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sensitivity"), help="folder of the runs")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args()
    seeds, epochs = check_int("seeds", args.seeds, low=1), check_int("epochs", args.epochs, low=1)
    grid = parse_grid(args.grid or GRID)
    todo = points(grid, seeds)
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train, point, epochs, args.runs) for point in todo]
        for number, (point, future) in enumerate(zip(todo, futures, strict=True), start=1):
            folder = future.result()
            found.append((point, read_json(folder, "result.json")))
            print(f"{number} of {len(todo)}: {folder.name}", file=sys.stderr)
    env = read_json(folder, "env.json")
    title = f"Digits, ResNet-20, {epochs} epochs, final epoch, {seeds} seed(s), all else as preset; {machine(env)}."
    publish(args.write or "sensitivity", "\n".join([title, "", table(grid, found)]), bool(args.write))


if __name__ == "__main__":
    guarded(main)
