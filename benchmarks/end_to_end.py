"""What pruning saves during training: the ungated network, the pruned one, and the steps of the latter alone, side by side.

    python -m benchmarks.end_to_end [--dataset NAME] [--data-dir DIR] [--images N] [--set NAME=VALUE ...] [--quick] [--write NAME]

One process trains all three in turn, an epoch each, so that a drift of the machine affects all alike; everything that an
epoch does is counted: measuring, checks, compaction, evaluation, the checkpoint. The third is trained without gates and cut
where the second one was, after the same steps: what the second takes beyond its time is the price of deciding. CPU time counts
the work of all threads and is the steadier clock where a machine is shared; on an accelerator only wall time is meaningful.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks import copies
from benchmarks.common import (
    QUICK,
    QUICK_IMAGES,
    add_quick,
    check_name,
    guarded,
    hardware,
    load,
    markdown,
    overrides,
    publish,
    subset,
)
from catode.prune.describe.costs import count
from catode.prune.gated.network import Cut
from catode.train import loop
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

TIME_LIMIT, MACS_TARGET = 0.8, 0.5
DENSE = {"nu": 0.0, "target_macs": None, "target_params": None}
TRAINING_LIMIT = 0.7  # of the ungated network's training MACs
DECIDING_LIMIT = 1.1  # of the time that the compacted steps alone take


@dataclass(frozen=True)
class Epochs:
    """Times of the epochs of one training.

    Attributes:
        cpu: CPU seconds of each epoch.
        wall: Seconds of each epoch.
        rows: Its rows of metrics.csv.
        executed: MACs of a forward pass at the end of each epoch, dead channels included.
    """

    cpu: list[float]
    wall: list[float]
    rows: list[dict]
    executed: list[int]


class Alone(loop.Trainer):
    """Trains without gates a network that loses the same as another one, after the same steps."""

    def __init__(self, setup: loop.Setup, folder: Path, pruned: loop.Trainer):
        super().__init__(setup, folder, False)
        self.cuts: list[tuple[int, Cut]] = []
        pruned.pruner.on_cut(lambda cut: self.cuts.append((pruned.step, cut)))

    def update(self):
        done = super().update()
        while self.cuts and self.cuts[0][0] <= self.step + 1:
            cut = self.cuts.pop(0)[1]
            cut.apply(self.model).follow(self.optimizer)
            if self.average:
                self.average.cut(cut)
        return done

    def save(self, *given) -> None:
        """Write nothing: the structure is not that of a run."""


def train(configs: Sequence[Config], images: int | None) -> tuple[list[Epochs], str]:
    """Train a network plainly, with pruning, and as `Alone`, in turn, an epoch each; returns also the name of the data.

    Args:
        configs: Of the three.
        images: Train on so many images; None for all.
    """
    for config in configs:
        Path(config.out).mkdir(parents=True)
    setups = [loop.prepare(config) for config in configs]
    first = configs[0]
    data = copies.name(first.dataset, first.data_dir, copies.fingerprint(setups[0].images))
    places = [(subset(s, images), Path(s.config.out)) for s in setups]
    trainers = [loop.Trainer(*place, progress=False) for place in places[:2]]
    trainers.append(Alone(*places[2], trainers[1]))
    found = [Epochs([], [], [], []) for _ in trainers]
    for _ in range(configs[0].epochs):
        for trainer, own in zip(trainers, found, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            own.rows.append(trainer.advance())
            own.cpu.append(time.process_time() - cpu)
            own.wall.append(time.perf_counter() - wall)
            last = trainer.executed  # known once the last epoch is over, when the network has lost its dead channels
            own.executed.append(count(trainer.model, trainer.setup.example).macs if last is None else last)
    for trainer in trainers:
        trainer.close()
    return found, data


def report(plain: Epochs, pruned: Epochs, alone: Epochs) -> tuple[str, dict[str, float]]:
    """A table of the epochs, and their totals."""
    rows = []
    for number, (a, b) in enumerate(zip(plain.rows, pruned.rows, strict=True)):
        cpu, wall = pruned.cpu[number] / plain.cpu[number], pruned.wall[number] / plain.wall[number]
        deciding = pruned.cpu[number] / alone.cpu[number]
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
                f"{deciding:.2f}",
                f"{100 * a['validation_accuracy']:.1f}",
                f"{100 * b['validation_accuracy']:.1f}",
            ]
        )
    header = ["epoch", "MACs left", "layers", "units", "undecided", "CPU s, ungated", "CPU ratio", "wall ratio"]
    header.append("CPU, pruned/its steps alone")
    executed = [plain.rows[0]["macs"], *pruned.executed]
    totals = {
        "macs": pruned.rows[-1]["macs"] / plain.rows[-1]["macs"],
        "mean macs": float(np.mean([b["macs"] / a["macs"] for a, b in zip(plain.rows, pruned.rows, strict=True)])),
        "training macs": sum((a + b) / 2 for a, b in pairwise(executed)) / len(plain.rows) / executed[0],
        "cpu": sum(pruned.cpu) / sum(plain.cpu),
        "wall": sum(pruned.wall) / sum(plain.wall),
        "deciding": sum(pruned.cpu) / sum(alone.cpu),
        "plain accuracy": plain.rows[-1]["validation_accuracy"],
        "pruned accuracy": pruned.rows[-1]["validation_accuracy"],
    }
    return markdown([*header, "validation accuracy %, ungated", "pruned"], rows), totals


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="digits, cifar10, cifar100 or folder")
    parser.add_argument("--data-dir", help="folder that holds the data")
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both networks")
    add_quick(parser)
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args(argv)
    name = check_name(args.write or "end_to_end", "end_to_end")
    began, before = time.perf_counter(), load()
    with tempfile.TemporaryDirectory() as folder:
        common = dict(dataset=args.dataset, data_dir=args.data_dir) | overrides(
            args.set, flags=("dataset", "data_dir"), fixed=("out",)
        )
        images = args.images
        if args.quick:
            common, images = common | QUICK, QUICK_IMAGES
        configs = [
            Config.from_presets(**common | {"out": f"{folder}/{name}"} | own)
            for name, own in (("ungated", DENSE), ("pruned", {}), ("alone", DENSE))
        ]
        if configs[1].nu == 0:
            raise ValueError("`nu` must be above 0 here, or nothing is pruned; got 0. Leave it out.")
        (plain, pruned, alone), data = train(configs, images)
    table, totals = report(plain, pruned, alone)
    config = json.loads(configs[1].to_json())
    names = [
        "arch",
        "epochs",
        "batch_size",
        "nu",
        "alpha",
        "beta",
        "warmup_epochs",
        "sink_share",
        "layers_per_probe",
        "width_multiple",
    ]
    title = (
        f"{data}, {images or 'all'} images, " + ", ".join(f"{name} {config[name]}" for name in [*names, "amp"]) + "; "
        f"{hardware(configs[1].device)}; {before} at the start, {load()} at the end; {time.perf_counter() - began:.0f} s"
    )
    verdicts = [
        f"- MACs left at the end {totals['macs']:.3f}, on average over the epochs {totals['mean macs']:.3f}",
        f"- {'yes' if totals['training macs'] <= TRAINING_LIMIT else 'NO'}: training MACs, of the forward passes on training "
        f"images, dead channels included: {totals['training macs']:.3f} of the ungated network's (at most {TRAINING_LIMIT:g})",
        f"- {'yes' if totals['cpu'] <= TIME_LIMIT else 'NO'}: CPU time, pruned / ungated: {totals['cpu']:.3f} "
        f"(at most {TIME_LIMIT:g} where about {MACS_TARGET:.0%} of the MACs are left); wall time {totals['wall']:.3f}",
        f"- {'yes' if totals['deciding'] <= DECIDING_LIMIT else 'NO'}: CPU time, pruned / its compacted steps alone: "
        f"{totals['deciding']:.3f} (at most {DECIDING_LIMIT:g})",
        f"- accuracy {100 * totals['plain accuracy']:.1f} % ungated, {100 * totals['pruned accuracy']:.1f} % pruned",
    ]
    noted = [note + "\n" for note in copies.notes([data])]
    publish(name, "\n".join([title + ".", "", *noted, table, "", *verdicts]), bool(args.write))


if __name__ == "__main__":
    guarded(main)
