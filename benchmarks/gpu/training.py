"""ResNet-56 on CIFAR-10: dense, at half of the MACs, and stage-shaped, at the same time, each in a process of its own.

The process of one run is ``python -m benchmarks.gpu.training NAME ..``; at SIGTERM it writes a checkpoint and leaves. A run's
files for a later call are packed into one archive, NAME.tar, whenever it has a new checkpoint.

Stage-shaped: a network trained from scratch whose depth and width in each stage are the means of a network that was pruned, as
`--shape` names it by a structure.json. Without one, all hidden widths are narrowed by one factor to half of the MACs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.records import FAILED, MEASURED, NOTED, Records
from benchmarks.gpu.units import Place

PART = "training"
NAMES = {"dense": dict(nu=0.0), "half": dict(target_macs=0.5), "stage-shaped": dict(nu=0.0)}
SMOKE: dict[str, Any] = dict(arch="resnet14", batch_size=32, memory=10, check_every=2, warmup_epochs=0.2)
SHARE = 0.5  # of the dense network's MACs
STOPPED = 75  # exit status of a run that can go on
GRACE, SMOKE_GRACE = 25.0, 6.0  # seconds that a run gets for its checkpoint, or its result, when time is out
LEAST = 45.0  # seconds for which it is worth to begin
PACKED = ("config.json", "env.json", "metrics.csv", "structures.csv", "checksums.json", "structure.json", "result.json")


# --- the process of one run -----------------------------------------------------------------------------------------


def settings(name: str, place: Place, data_dir: Path, folder: Path, epochs: int):
    """Configuration of a run."""
    from catode.train.settings.config import Config

    given = dict(dataset="cifar10", arch="resnet56", epochs=epochs, threads=2, checkpoint_every=200)
    given |= SMOKE | {"threads": 1} if place.smoke else {}
    given |= NAMES[name] | dict(device=place.device, data_dir=str(data_dir), out=str(folder))
    return Config.from_presets(**given)


def stage_means(structure: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Blocks that stay in each stage, and mean width of their sites, rounded.

    Args:
        structure: Content of a structure.json.
    """
    stages: dict[str, list[list[int]]] = {}
    for block, entry in structure["blocks"].items():
        own = stages.setdefault(block.split(".")[0], [])
        if entry["kept"]:
            own.append([len(units) for units in entry["sites"].values()])
    return {
        stage: (len(widths), max(1, round(float(np.mean(widths)))) if widths else 0) for stage, widths in stages.items()
    }


def shaped(model, shape: dict[str, tuple[int, int]]):
    """A network with fewer blocks and narrower sites in each stage, newly initialised; changed in place.

    Args:
        model: A whole `catode.train.models.ResNet`.
        shape: Blocks and width of every stage; the first blocks stay, as they hold the change of shape.
    """
    from torch import nn

    from catode.prune.gated.cut import restrict
    from catode.structures.inventory import Inventory

    inventory = Inventory(model.structures())
    kept = np.ones(inventory.size, dtype=bool)
    for layer, block in enumerate(inventory.blocks):
        stage, number = block.name.split(".")
        kept[layer] = int(number) < shape[stage][0]
    for place in inventory.places:
        kept[place.units[shape[place.block.name.split(".")[0]][1] :]] = False
    restrict(model, inventory.blocks, inventory.record(inventory.close(kept)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model


def narrowing(build, share: float, steps: int = 12) -> float:
    """Factor on all hidden widths that leaves a share of the MACs.

    Args:
        build: Makes the network, given the factor.
        share: The share.
        steps: Of the bisection.
    """
    import torch

    from catode.prune.describe.costs import count

    example = torch.zeros(1, 3, 32, 32)
    whole = count(build(1.0), example).macs
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if count(build(middle), example).macs > share * whole else (middle, high)
    return low


def shape_builds(shape: Path | None, arch: str) -> str:
    """Let the trainer build the stage-shaped network in place of the whole one, in this process; returns what it is."""
    from catode.train.loop import setup, trainer
    from catode.train.loop.layout import memory_format
    from catode.train.models import resnets

    plain = setup.build_model
    if shape is None:
        factor = narrowing(lambda f: resnets.build(arch, in_channels=3, classes=10, hidden_scale=max(f, 1e-3)), SHARE)
        what = f"no record gives widths: all hidden widths times {factor:.3f}, {SHARE:.0%} of the MACs"

        def build(config, images):
            model = resnets.build(arch, in_channels=3, classes=len(images.classes), hidden_scale=factor)
            return model.to(config.device, memory_format=memory_format(config))
    else:
        means = stage_means(json.loads(shape.read_text()))
        own = ", ".join(f"{stage}: {blocks} blocks of width {width}" for stage, (blocks, width) in means.items())
        what = f"stage means of {shape.parent.name}: {own}"

        def build(config, images):
            return shaped(plain(config, images), means)

    setup.build_model = trainer.build_model = build
    return what


def main(argv: Sequence[str] | None = None) -> int:
    """Train one network, or go on with it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    import torch

    from benchmarks.gpu.records import FILE
    from catode.train import loop
    from catode.train.settings.config import Config
    from catode.train.stop import Stopped

    place, records = Place(args.device, args.smoke), Records(args.out / FILE)
    config = settings(args.name, place, args.data_dir, args.folder, args.epochs)
    if args.name == "stage-shaped":
        torch.manual_seed(config.seed)
        records.add(PART, args.name, NOTED, what=shape_builds(args.shape, config.arch))
    if (args.folder / "config.json").exists():
        text, here = (args.folder / "config.json").read_text(), str(args.folder)
        config = Config.from_json(text, resume=here, out=here, data_dir=str(args.data_dir), device=args.device)
    try:
        loop.run(config, progress=False)
    except Stopped:
        return STOPPED
    return 0


# --- all of them, from the benchmark's own process ------------------------------------------------------------------


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = {int(re.sub(r"\D", "", p.stem)): p for p in folder.glob("checkpoint-*.pt")}
    return found[max(found)] if found else None


def pack(folder: Path, archive: Path) -> bool:
    """Write what a later call needs of a run into an archive, which is replaced as a whole.

    Args:
        folder: The run's folder; its newest checkpoint alone is taken, and its tables, which may be longer by then.
        archive: The archive.

    Returns:
        Whether it was written; not if the checkpoint was deleted meanwhile.
    """
    checkpoint, content = newest(folder), io.BytesIO()
    try:
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
            for path in (*([checkpoint] if checkpoint else []), *(folder / name for name in PACKED)):
                if path.exists():
                    data = path.read_bytes()
                    info = tarfile.TarInfo(path.name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    except FileNotFoundError:
        return False
    part = archive.with_suffix(".part")
    part.write_bytes(content.getvalue())
    os.replace(part, archive)
    return True


def left(records: Records) -> list[str]:
    """Names of the runs that have not finished."""
    done = {one["name"] for one in records.read() if one["part"] == PART and one["status"] == MEASURED}
    return [name for name in NAMES if name not in done]


@dataclass
class Run:
    """One run as the benchmark's process sees it.

    Args:
        name: A key of `NAMES`.
        folder: Its folder.
        archive: Where it is packed.
        process: Its process.
        epochs: Epochs that were recorded.
        packed: The state that was packed last.
    """

    name: str
    folder: Path
    archive: Path
    process: subprocess.Popen | None = None
    epochs: int = 0
    packed: tuple = field(default=())

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / "result.json").exists() and newest(self.folder) is None

    def unpack(self) -> None:
        """Take up what an earlier call packed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.archive.exists():
            with tarfile.open(self.archive) as tar:
                tar.extractall(self.folder, filter="data")

    def follow(self, records: Records) -> None:
        """Record new epochs, and pack a new checkpoint."""
        rows = _rows(self.folder / "metrics.csv")
        for row in rows[self.epochs :]:
            names = ("step", "lr", "loss", "train_accuracy", "validation_accuracy", "macs", "undecided", "seconds")
            numbers = {name: float(row[name]) for name in names if row.get(name)}
            records.add(PART, self.name, NOTED, epoch=int(row["epoch"]), numbers=numbers)
        self.epochs = max(self.epochs, len(rows))
        checkpoint = newest(self.folder)
        state = (checkpoint and checkpoint.name, self.finished)
        if state != self.packed and any(state) and pack(self.folder, self.archive):
            self.packed = state


def _rows(path: Path) -> list[dict[str, str]]:
    """Complete rows of a table that is being written."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    lines = [line.rstrip("\r\n").split(",") for line in lines if line.endswith("\n")]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]


def train_all(
    place: Place,
    records: Records,
    data_dir: Path,
    work: Path,
    until: float,
    *,
    epochs: int,
    shape: Path | None,
    log: Any,
) -> None:
    """Train all networks at the same time until all have ended, or time is out.

    Args:
        place: Where.
        records: The records.
        data_dir: Folder of the images.
        work: Folder for the runs' folders.
        until: `time.time()` at which all must have left.
        epochs: Epochs of each run.
        shape: A structure.json for the stage-shaped network; None for none.
        log: File for what the processes print.
    """
    runs = [Run(n, work / n, records.path.parent / f"{n}.tar") for n in left(records)]
    for run in runs:
        run.unpack()
        run.epochs = len(_rows(run.folder / "metrics.csv"))
    for run in [run for run in runs if run.finished]:  # the earlier call was cut off before it said so
        runs.remove(run)
        _record_result(run, records)
    for run in runs:
        command = [sys.executable, "-m", "benchmarks.gpu.training", run.name, "--folder", str(run.folder)]
        command += ["--data-dir", str(data_dir), "--device", place.device, "--epochs", str(epochs)]
        command += ["--out", str(records.path.parent), *(["--shape", str(shape)] if shape else [])]
        command += ["--smoke"] if place.smoke else []
        run.process = subprocess.Popen(command, stdout=log, stderr=log)
    stopping, grace = False, SMOKE_GRACE if place.smoke else GRACE
    while any(run.process.poll() is None for run in runs) and time.time() < until:
        if not stopping and time.time() > until - grace:
            stopping = True
            for run in runs:
                if run.process.poll() is None:
                    run.process.terminate()
        for run in runs:
            run.follow(records)
        time.sleep(0.5)
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        run.follow(records)
        if run.finished:
            _record_result(run, records)
        elif run.process.returncode not in (STOPPED, -9, -15):
            lines = _tail(Path(log.name))
            records.add(PART, run.name, FAILED, error=[f"exit status {run.process.returncode}", *lines])


def _record_result(run: Run, records: Records) -> None:
    result = json.loads((run.folder / "result.json").read_text())
    names = (
        "test_accuracy",
        "validation_accuracy",
        "macs",
        "macs_dense",
        "params",
        "seconds",
        "decided_by_rule",
    )
    numbers = {name: result[name] for name in (*names, "latency_ms_128", "latency_dense_ms_128")}
    records.add(PART, run.name, MEASURED, epochs=run.epochs, numbers=numbers)


def _tail(path: Path, lines: int = 6) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:]


if __name__ == "__main__":
    sys.exit(main())
