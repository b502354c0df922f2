"""Small records of the runs, and their table."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import copies
from benchmarks.anymodel.rows import ROWS, SHARE
from benchmarks.common import machine, markdown
from catode.prune.describe.costs import describe
from catode.prune.describe.protect import described
from catode.records import read_json, read_result
from catode.report.describe import parts
from catode.structures.fates import MEANINGS
from catode.train.loop import checkpoint

PARTS = "parts.csv"
FIELDS = ("name", "kind", "kept", "total", "macs")
HEADER = (
    "network",
    "run",
    "test accuracy",
    "MACs, M",
    "parameters, M",
    "branches",
    "channels and hidden units",
    "heads",
    "decided by rule",
    "CPU minutes",
)


def record(folder: Path, records: Path, pixels: str | None = None) -> int:
    """Write a run's record: settings, machine, result, metrics, and what is left of every branch and width.

    Args:
        folder: The finished run.
        records: Folder of the records; the run gets a folder of its own name there.
        pixels: Fingerprint of its images, at their own size.

    Returns:
        Bytes written.
    """
    structure, to = checkpoint.read_structure(folder), records / folder.name
    config = read_json(folder / "config.json") | {"out": folder.name}
    if config["data_dir"] is not None:
        config["data_dir"] = Path(config["data_dir"]).name
    env = read_json(folder / "env.json") | ({} if pixels is None else {"pixels": pixels})
    files = {"config": config, "result": read_result(folder), "env": env}
    contents = {f"{name}.json": (json.dumps(values, indent=2) + "\n").encode() for name, values in files.items()}
    contents["metrics.csv.gz"] = gzip.compress((folder / "metrics.csv").read_bytes(), mtime=0)
    text = io.StringIO()
    table = csv.DictWriter(text, FIELDS, lineterminator="\n")
    table.writeheader()
    table.writerows(_left(structure))
    contents[PARTS] = text.getvalue().encode()
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name, content in contents.items():
        (to / name).write_bytes(content)
    return sum(map(len, contents.values()))


def _left(structure: dict[str, Any]) -> list[dict[str, Any]]:
    """What is left of every branch and width, in the order of the network."""
    model, example = checkpoint.fresh(structure), torch.zeros(1, *structure["image_shape"])
    blocks = described(model, example, structure.get("keep", ()))
    kept = {}
    for name, block in structure["blocks"].items():
        kept[name] = int(block["kept"])
        kept |= {site: len(units) for site, units in block["sites"].items()}
    found = parts(model, blocks, describe(model, blocks, example))
    return [
        dict(name=part.name, kind=part.kind, kept=kept[part.name], total=part.units or 1, macs=f"{part.macs:.4g}")
        for part in found
    ]


def read(records: Path) -> dict[str, dict[str, Any]]:
    """The records there are, by name of the run: config, result, env, and the rows of `PARTS`."""
    found = {}
    for row in ROWS:
        for kind in ("half", "dense"):
            folder = records / f"{row.name}-{kind}"
            if folder.is_dir():
                found[folder.name] = {name: read_json(folder / f"{name}.json") for name in ("config", "result", "env")}
                with (folder / PARTS).open(newline="") as file:
                    found[folder.name]["parts"] = list(csv.DictReader(file))
    return found


def _of(rows: list[dict[str, str]], kind: str) -> str:
    """Kept of all, as text."""
    own = [row for row in rows if row["kind"] == kind]
    return f"{sum(int(r['kept']) for r in own):,} of {sum(int(r['total']) for r in own):,}" if own else "-"


def cells(name: str, run: dict[str, Any]) -> list[str]:
    """One line of the table."""
    config, result = run["config"], run["result"]
    pruned = config["nu"] > 0
    return [
        f"`{config['arch']}`",
        f"to {SHARE:.0%}" if pruned else "dense",
        f"{result['test_accuracy']:.1%}",
        f"{result['macs'] / 1e6:.2f}",
        f"{result['params'] / 1e6:.2f}",
        *(_of(run["parts"], kind) for kind in ("branch", "width", "heads")),
        f"{result['decided_by_rule']:.1%}" if pruned else "-",
        f"{result['cpu_seconds'] / 60:.0f}",
    ]


def text(records: Path) -> str:
    """The table of the records there are, with what its runs were."""
    runs = read(records)
    if not runs:
        raise ValueError(f"`records` must hold a finished run; got {records}. Train one, with --runs and --data-dir.")
    first = next(iter(runs.values()))
    name = copies.name_of(first["config"], first["env"])
    lines = [
        f"{name}, one seed, final epoch, the first images of the training set alone; {machine(first['env'])}.",
        "Each network is trained with the same settings with `target_macs` and without gates.",
        "",
        markdown(HEADER, [cells(name, run) for name, run in runs.items()]),
        "",
    ]
    for row in ROWS:
        half, dense = (runs.get(f"{row.name}-{kind}") for kind in ("half", "dense"))
        if half is not None:
            lines.append(f"- {row.name}: {_sentence(half, dense)}")
    missing = [f"{row.name}-{kind}" for row in ROWS for kind in ("half", "dense") if f"{row.name}-{kind}" not in runs]
    if missing:
        lines.append(f"- not run yet: {', '.join(missing)}")
    lines += copies.notes([name])
    return "\n".join(lines)


def _sentence(half: dict[str, Any], dense: dict[str, Any] | None) -> str:
    """Settings, fates and the distance from the dense twin."""
    config, result = half["config"], half["result"]
    height, width = _size(config)
    parts = [
        f"{result['training_images']:,} training and {result['test_images']:,} test images of {height} x {width} pixels",
        f"{config['epochs']} epochs in batches of {config['batch_size']}, {config['optimizer']} with lr {config['lr']:g}",
    ]
    fates = ", ".join(f"{count:,} {MEANINGS[fate]}" for fate, count in result["decisions"].items())
    parts.append(f"fates: {fates}")
    if dense is not None:
        gap = 100 * (result["test_accuracy"] - dense["result"]["test_accuracy"])
        n = result["test_images"]
        error = 100 * float(np.sqrt(2 * 0.25 / n))
        parts.append(
            f"test accuracy {gap:+.1f} points against the dense twin (one seed; of {n:,} images alone the standard error of such a "
            f"difference is up to {error:.1f})"
        )
    return "; ".join(parts)


def _size(config: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a run's images."""
    side = config["image_size"] or (8 if config["dataset"] == "digits" else 32)
    return side, side
