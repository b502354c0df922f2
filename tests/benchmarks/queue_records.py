"""Records of the queue made by hand, and rows of its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks import copies
from benchmarks.queue.rows import RIVALS, ROWS
from catode.train.settings.config import Config

DENSE_MACS, TREE = 40_000_000, "a" * 40


def write(records: Path, row: str, seed: int = 0, *, accuracy=0.8, validation=0.8, macs=DENSE_MACS, tree=TREE, **more):
    """A finished run's record of a row, made by hand."""
    own = ROWS[row]
    folder = records / own.run(seed)
    folder.mkdir(parents=True)
    plain = {name: value for name, value in {**own.common, **own.settings}.items() if name not in RIVALS[0]}
    share = plain.pop("share", None)
    place = {} if plain["dataset"] == "digits" else {"data_dir": "d", "amp": "bf16"}
    config = json.loads(Config.from_presets(**plain, seed=seed, **place).to_json())
    if share is not None:
        config |= {"rival": "one shot (torch-pruning 1)", "share": share}
    result = dict(test_accuracy=accuracy, validation_accuracy=validation, validation_loss=0.5, macs=macs)
    result |= dict(macs_dense=DENSE_MACS, params=1e5, layers_kept=9, layers_total=9, units_kept=100, units_total=336)
    result |= dict(
        latency_ms_128=1.0, latency_dense_ms_128=2.0, seconds=600.0, cpu_seconds=500.0, training_images=45000
    )
    result |= dict(decided_by_rule=1.0 if own.kind == "plain" and config["nu"] else None)
    env = dict(
        processor="p", cores=2, torch="t", threads=1, python="3", pixels=next(iter(copies.KNOWN)), commit="c" * 40
    )
    env["queue"] = {"row": row, "family": own.family, "tree": tree, "commit": "c" * 40}
    epochs = config["epochs"]
    for name in [name for name in more if name in result or name == "test_accuracy_without_ema"]:
        result[name] = more.pop(name)
    env |= more.pop("env", {})
    result["validation_accuracy_history"] = [validation] * epochs
    for name, content in (("config", config), ("result", result), ("env", env)):
        (folder / f"{name}.json").write_text(json.dumps(content | (more if name == "config" else {})))
    (folder / "structures.csv").write_text("")
    sizes = np.linspace(DENSE_MACS, macs, epochs) if own.kind == "plain" else [macs] * epochs
    lines = [
        f"{i + 1},{(i + 1) * 351},{size:.0f},{30 * (i + 1)},1,{0.9 * (i + 1) / epochs}" for i, size in enumerate(sizes)
    ]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,macs,seconds,loss,train_accuracy", *lines]) + "\n")
    return folder


def cells(text: str, begin: str) -> list[list[str]]:
    """Rows of the first table of a page whose header begins with a text."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {begin}"))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def columns(text: str) -> dict[str, dict[str, str]]:
    """Cells of the table of networks, by the network and the name of the column."""
    header = next(line for line in text.splitlines() if line.startswith("| network"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cells(text, "network")}
