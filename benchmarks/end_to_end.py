"""What pruning while training saves of the training: the ungated and the pruned network side by side, epoch by epoch.

    python -m benchmarks.end_to_end [--dataset NAME] [--data-dir DIR] [--images N] [--set NAME=VALUE ...] [--write NAME]

One process trains both in turn, an epoch each, so that a drift of the machine falls on both alike; everything that an
epoch does is counted: measuring, checks, compaction, evaluation, the checkpoint. CPU time counts the work of all threads and is the
steadier clock where a machine is shared; on an accelerator only wall time tells anything.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._common import check_name, guarded, hardware, load, markdown, overrides, publish
from catode.train import loop
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

TIME_LIMIT, MACS_TARGET = 0.8, 0.5


@dataclass(frozen=True)
class Epochs:
    """What the epochs of one training took.

    Attributes:
        cpu: CPU seconds of each epoch.
        wall: Seconds of each epoch.
        rows: Its rows of metrics.csv.
    """

    cpu: list[float]
    wall: list[float]
    rows: list[dict]


def subset(setup: loop.Setup, number: int | None) -> loop.Setup:
    """The same run on the first images alone.

    Args:
        setup: A prepared run.
        number: Training images; a fifth as many test images. None: all.
    """
    if number is None or number >= len(setup.images.train_labels):
        return setup
    images, config = setup.images, setup.config
    images = dataclasses.replace(
        images,
        train_images=images.train_images[:number],
        train_labels=images.train_labels[:number],
        test_images=images.test_images[: number // 5],
        test_labels=images.test_labels[: number // 5],
    )
    steps = number // config.batch_size
    schedule = loop.learning_rates(config.schedule, config.lr, steps * config.epochs)
    return dataclasses.replace(setup, images=images, steps_per_epoch=steps, schedule=schedule)


def train(configs: Sequence[Config], images: int | None) -> list[Epochs]:
    """Train networks in turn, an epoch each."""
    for config in configs:
        Path(config.out).mkdir(parents=True)
    trainers = [loop.Trainer(subset(loop.prepare(c), images), Path(c.out), progress=False) for c in configs]
    found = [Epochs([], [], []) for _ in trainers]
    for _ in range(configs[0].epochs):
        for trainer, own in zip(trainers, found, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            own.rows.append(trainer.advance())
            own.cpu.append(time.process_time() - cpu)
            own.wall.append(time.perf_counter() - wall)
    for trainer in trainers:
        trainer.close()
    return found


def report(plain: Epochs, pruned: Epochs) -> tuple[str, dict[str, float]]:
    """A table of the epochs, and what they come to."""
    rows = []
    for number, (a, b) in enumerate(zip(plain.rows, pruned.rows, strict=True)):
        cpu, wall = pruned.cpu[number] / plain.cpu[number], pruned.wall[number] / plain.wall[number]
        rows.append(
            [
                number + 1,
                f"{b['macs'] / a['macs']:.3f}",
                f"{b['layers_kept']}/{a['layers_kept']}",
                f"{b['units_kept']}/{a['units_kept']}",
                b["undecided"],
                f"{plain.cpu[number]:.1f}",
                f"{cpu:.2f}",
                f"{wall:.2f}",
                f"{100 * a['test_accuracy']:.1f}",
                f"{100 * b['test_accuracy']:.1f}",
            ]
        )
    header = ["epoch", "MACs left", "layers", "units", "undecided", "CPU s, ungated", "CPU ratio", "wall ratio"]
    totals = {
        "macs": pruned.rows[-1]["macs"] / plain.rows[-1]["macs"],
        "mean macs": float(np.mean([b["macs"] / a["macs"] for a, b in zip(plain.rows, pruned.rows, strict=True)])),
        "cpu": sum(pruned.cpu) / sum(plain.cpu),
        "wall": sum(pruned.wall) / sum(plain.wall),
        "plain accuracy": plain.rows[-1]["test_accuracy"],
        "pruned accuracy": pruned.rows[-1]["test_accuracy"],
    }
    return markdown([*header, "accuracy %, ungated", "pruned"], rows), totals


def main() -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="digits, cifar10, cifar100 or folder")
    parser.add_argument("--data-dir", help="folder that holds the data")
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both networks")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args()
    name = check_name(args.write or "end_to_end", "end_to_end")
    began, before = time.perf_counter(), load()
    with tempfile.TemporaryDirectory() as folder:
        common = dict(dataset=args.dataset, data_dir=args.data_dir) | overrides(
            args.set, flags=("dataset", "data_dir"), fixed=("out",)
        )
        configs = [
            Config.from_presets(**common | {"out": f"{folder}/{name}"} | own)
            for name, own in (("ungated", {"nu": 0.0, "target_macs": None, "target_params": None}), ("pruned", {}))
        ]
        plain, pruned = train(configs, args.images)
    table, totals = report(plain, pruned)
    config = json.loads(configs[1].to_json())
    names = ["arch", "epochs", "batch_size", "nu", "alpha", "beta", "warmup_epochs", "sink_share", "layers_per_probe"]
    title = (
        f"{args.dataset}, {args.images or 'all'} images, "
        + ", ".join(f"{name} {config[name]}" for name in [*names, "amp"])
        + "; "
        f"{hardware(configs[1].device)}; {before} at the start, {load()} at the end; {time.perf_counter() - began:.0f} s"
    )
    verdicts = [
        f"- MACs left at the end {totals['macs']:.3f}, on average over the epochs {totals['mean macs']:.3f}",
        f"- {'yes' if totals['cpu'] <= TIME_LIMIT else 'NO'}: CPU time, pruned / ungated: {totals['cpu']:.3f} "
        f"(at most {TIME_LIMIT:g} where about {MACS_TARGET:.0%} of the MACs are left); wall time {totals['wall']:.3f}",
        f"- accuracy {100 * totals['plain accuracy']:.1f} % ungated, {100 * totals['pruned accuracy']:.1f} % pruned",
    ]
    publish(name, "\n".join([title + ".", "", table, "", *verdicts]), bool(args.write))


if __name__ == "__main__":
    guarded(main)
