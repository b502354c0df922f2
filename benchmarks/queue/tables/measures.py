"""What a table shows of a row's runs: training MACs, pairs, verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch

from benchmarks.cifar import Record
from benchmarks.common import mean_interval
from catode.prune.describe.costs import describe
from catode.structures.complexity import Complexity
from catode.structures.fates import REMOVED
from catode.train.models import build

EQUAL = 0.02
"""Difference of MACs, in units of the dense network's, up to which two rows have equal MACs."""


def training_macs(epochs: Sequence[Mapping[str, str]], record: Record) -> float:
    """MACs of the forward passes on all training images over the run, in units of one epoch of the dense network.

    Dead channels, which keep widths at a multiple of `width_multiple` while training, are counted; measuring is not.

    Args:
        epochs: Rows of the run's metrics.csv.
        record: The run.
    """
    if record.kind != "pruned":
        return sum(float(row["macs"]) for row in epochs) / record.result["macs_dense"]
    steps = int(epochs[-1]["step"])
    course = executed(record)
    ends = [step for step, _ in course[1:]] + [steps]
    done = sum(macs * (end - step) for (step, macs), end in zip(course, ends, strict=True))
    return done / record.result["macs_dense"] / (steps / record.config["epochs"])


def executed(record: Record) -> list[tuple[int, float]]:
    """Steps after which the MACs of a forward pass change, from 0 on, and the MACs from there on, dead channels included."""
    config, sizes = record.config, {}
    cost = _complexity(config["arch"])
    layers = {place.block.name: place.layer for place in cost.inventory.places}
    sites = {place.site.name: place for place in cost.inventory.places}
    gone = sorted((int(row["step"]), i) for i, row in enumerate(record.last) if row["fate"] in REMOVED)
    left, standing = Counter({name: place.site.width for name, place in sites.items()}), set(layers.values())
    sizes[0] = _macs(cost, left, standing, config["width_multiple"])
    for step in sorted({step for step, _ in gone}):
        for row in (record.last[i] for at, i in gone if at == step):
            if row["kind"] == "layer":
                standing.discard(layers[row["block"]])
            else:
                left[row["site"]] -= 1
        sizes[step] = _macs(cost, left, standing, config["width_multiple"])
    return sorted(sizes.items())


def _macs(cost: Complexity, left: Counter, standing: set[int], multiple: int) -> float:
    """MACs with so many units at each site in the blocks that stand, rounded up to a multiple."""
    kept = np.zeros(cost.inventory.size, dtype=bool)
    for place in cost.inventory.places:
        if place.layer in standing and left[place.site.name] > 0:
            kept[place.layer] = True
            kept[place.units[: -(-left[place.site.name] // multiple) * multiple]] = True
    return cost.macs(cost.inventory.close(kept).astype(float))


@cache
def _complexity(arch: str) -> Complexity:
    """MACs of a network for CIFAR-10 as a polynomial."""
    model = build(arch, in_channels=3, classes=10)
    return describe(model, model.structures(), torch.zeros(1, 3, 32, 32))


def verdict(differences: Sequence[float], shares: tuple[float, float] = (1.0, 1.0)) -> str:
    """What the interval of paired differences allows to say; nothing where the MACs differ, as the protocol has it.

    Args:
        differences: Of accuracy, points.
        shares: Mean MACs of both rows, in units of the dense network's.
    """
    if abs(shares[0] - shares[1]) > EQUAL:
        return "other MACs"
    if len(differences) < 2:
        return "no interval"
    _, low, high = mean_interval(differences)
    return "above" if low > 0 else "below" if high < 0 else "undecided"


def share(runs: dict[int, Record]) -> float:
    """Mean MACs of a row's runs in units of the dense network's."""
    return sum(r.result["macs"] / r.result["macs_dense"] for r in runs.values()) / len(runs)


def paired(first: dict[int, Record], second: dict[int, Record]) -> list[float]:
    """Differences of test accuracy, points, of the seeds that both rows have."""
    return [own.accuracy - second[seed].accuracy for seed, own in first.items() if seed in second]
