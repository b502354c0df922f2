"""One run of the queue in a process of its own: train it, or go on with it, and condense it.

The queue starts it: ``python -m benchmarks.queue.worker PLAN --to DIR [--data-dir DIR] [--quick]``, PLAN being the file that the
queue wrote. Exit status: 0 finished, 1 the loss was not finite, 2 bad input, 128 + number of the signal that stopped it, after
the step at hand and with a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import cifar, rival
from benchmarks.common import QUICK, training
from benchmarks.queue import nats, returns, shapes
from benchmarks.queue.book import Book
from benchmarks.queue.places import Places
from catode import _checksums
from catode.prune.describe.costs import count
from catode.prune.devices.timing import latency_ms
from catode.records import read_json
from catode.train import loop
from catode.train.loop import checkpoint
from catode.train.settings.config import Config
from catode.train.settings.training import LAYOUTS
from catode.train.stop import Stopped, terminated

PART = ".part"
ORPHAN = 5.0
"""Seconds between looks whether the queue still lives."""


def plain(values: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """Train with `catode.train`; returns what differs in result.json."""
    training.complete(Config.from_presets(**values, out=str(folder)), quick=quick)
    return {}


def shaped(values: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """Train a network of a given structure from scratch."""
    values = dict(values)
    blocks = values.pop("blocks")

    def change(model: nn.Module, setup: loop.Setup) -> nn.Module:
        torch.manual_seed(setup.config.seed)
        return shapes.restricted(model, blocks)

    training.complete(Config.from_presets(**values, out=str(folder)), change=change, quick=quick)
    structure = checkpoint.read_structure(folder)
    checkpoint.write_text(folder / "structure.json", json.dumps(structure | {"blocks": blocks}, indent=1) + "\n")
    checkpoint.seal(folder, "structure.json")
    dense, model = checkpoint.fresh(structure), checkpoint.load(folder)
    example = torch.zeros(1, *structure["image_shape"])
    return beside(dense, model, example) | {
        "layers_kept": sum(block["kept"] for block in blocks.values()),
        "layers_total": len(blocks),
        "units_kept": sum(len(units) for block in blocks.values() for units in block["sites"].values()),
    }


def beside(dense: nn.Module, own: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """Entries of result.json that set a network beside the whole one."""
    whole, latencies = count(dense, example), latency_ms([dense, own], example)
    return {
        "macs_dense": whole.macs,
        "params_dense": whole.params,
        "units_total": sum(site.width for block in dense.structures() for site in block.sites),
        **dict(zip(("latency_dense_ms", "latency_ms"), latencies[0], strict=True)),
        **dict(zip(("latency_dense_ms_128", "latency_ms_128"), latencies[1], strict=True)),
    }


def narrowed(values: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """Train a network with all widths narrowed from scratch; its env.json gets the widths of its convolutions."""
    values = dict(values)
    size = {name: values.pop(name) for name in ("width", "hidden")}

    def change(model: nn.Module, setup: loop.Setup) -> nn.Module:
        torch.manual_seed(setup.config.seed)
        return shapes.narrow(
            setup.config.arch, **size, in_channels=setup.example.shape[1], classes=len(setup.images.classes)
        )

    training.complete(Config.from_presets(**values, out=str(folder)), change=change, quick=quick)
    structure = checkpoint.read_structure(folder)
    dense, example = checkpoint.fresh(structure), torch.zeros(1, *structure["image_shape"])
    own = shapes.narrow(structure["arch"], **size, in_channels=example.shape[1], classes=len(structure["classes"]))
    _amend(folder / "env.json", {"widths": rival.widths(own)})
    return beside(dense, own, example)


def against(values: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """Train, prune with Torch-Pruning, and fine-tune."""
    values = dict(values)
    share, before, after, rate, sparse, scope = (
        values.pop(name) for name in ("share", "train_epochs", "tune_epochs", "tune_rate", "sparse", "scope")
    )
    if not (folder / "result.json").exists():
        lr = rate * Config.from_presets(**values).lr
        rival.compete(values | {"epochs": before + after}, share, after, lr, folder, sparse, scope, quick)
    return {}


KINDS: dict[str, Callable[[dict[str, Any], Path, bool], dict[str, Any]]] = {
    "plain": plain,
    "shaped": shaped,
    "narrowed": narrowed,
    "rival": against,
}


def settings(plan: dict[str, Any], data_dir: str | None, quick: bool) -> dict[str, Any]:
    """The settings of a planned run on this machine."""
    values, way = dict(plan["settings"]), plan["way"]
    values["threads"] = way["threads"]
    values.setdefault("layout", LAYOUTS[0] if way["channels_last"] else LAYOUTS[1])
    values.setdefault("amp", way["amp"])
    values |= {"seed": plan["seed"]}
    if quick:
        return values | QUICK | {"dataset": "digits"} | _quick_epochs(values)
    return values | ({"data_dir": data_dir} if values["dataset"] != "digits" else {})


def _quick_epochs(values: dict[str, Any]) -> dict[str, int]:
    return {"train_epochs": 1, "tune_epochs": 1} if "train_epochs" in values else {}


def train(plan: dict[str, Any], places: Places, data_dir: str | None, quick: bool) -> None:
    """Train the planned run, or go on with it, and write its record.

    Raises:
        NotFinite: if its loss is not finite.
        ValueError: for bad input.
    """
    folder = places.run(plan["run"])
    values = settings(plan, data_dir, quick)
    changes = KINDS[plan["kind"]](values, folder, quick)
    more = {name: value for name, value in plan.items() if name != "settings"}
    _amend(folder / "result.json", changes)
    back = {"returns": returns.counted(folder)} if values.get("shadow") else {}
    worth = {"nats": nats.course(folder)} if plan["kind"] == "plain" and values.get("nu") != 0 else {}
    _amend(folder / "env.json", {"queue": more, "commit": plan["commit"], **back, **worth})
    print(f"{plan['run']}: {condensed(folder, places.records) / 1024:.0f} KiB")


def condensed(folder: Path, records: Path) -> int:
    """Write a run's record, whole or not at all; returns its bytes."""
    part = records / PART
    size = cifar.condense(folder, part)
    if (records / folder.name).exists():
        shutil.rmtree(records / folder.name)
    (part / folder.name).rename(records / folder.name)
    with suppress(OSError):  # another run's record is being written there
        part.rmdir()
    return size


def _amend(path: Path, changes: dict[str, Any]) -> None:
    """Add to a JSON file of a finished run; its checksum follows."""
    if changes:
        checkpoint.write_text(path, json.dumps(read_json(path) | changes, indent=2) + "\n")
        if (path.parent / _checksums.FILE).exists():
            checkpoint.seal(path.parent, path.name)


def _end_with(parent: int) -> None:
    """Stop this process, as SIGTERM does, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(ORPHAN)
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    plan, places = read_json(args.plan), Places(args.plan.parent, args.to)
    try:
        with terminated():
            train(plan, places, args.data_dir, args.quick)
    except loop.NotFinite as error:
        Book(places.records).fail(plan["run"], {"error": str(error), "seed": plan["seed"], "queue": plan})
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
