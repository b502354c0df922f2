"""Bias and noise of the growth of benefits that the pruner measures, against the truth, and what measuring it costs.

    python -m benchmarks.growth [--after 1,3,10,30] [--epochs-measured 30] [--seeds 4] [--quick] [--write]
    python -m benchmarks.growth --decisions benchmarks/records/growth [--write]

The ungated ResNet-20 of the main job is trained on the digits by the preset's schedule. After some of its epochs the weights
are frozen, and batches of many more epochs are drawn as training draws them. The truth of each structure is the product of
the mean gradients of *different* epochs, which are independent. Beside it: products of batches of one epoch, as they are and
corrected (`catode.prune.measure.growth`).

A second table is of training itself, where the weights move, by several optimizers: see `benchmarks.growth.optimizers`.

With --decisions it compares shadow runs before the correction with runs after it, from the same seeds: nothing is removed
in either before its theta is 0, so that thetas move alike and the decisions alone differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from benchmarks.common import QUICK, QUICK_IMAGES, add_quick, hardware, machine, markdown, publish, subset
from benchmarks.growth.optimizers import by_optimizer
from catode.prune.measure.growth import BURST, GradientProducts
from catode.prune.measure.probes import batch_statistics_only
from catode.records import read_json, read_structures, structure_key
from catode.report import compare
from catode.structures.inventory import Inventory
from catode.train import data, loop
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

KINDS = ("layers", "units")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--after", default="1,3,10,30", help="epochs of training after which to measure (1,3,10,30)")
    parser.add_argument("--epochs-measured", type=int, default=30, help="epochs of batches at each of them (30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=4, help="seeds of every row about optimizers (4)")
    parser.add_argument(
        "--decisions", type=Path, metavar="FOLDER", help="compare the records before-s* and after-s* there"
    )
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/growth.md, or growth_decisions.md"
    )
    add_quick(parser)
    args = parser.parse_args(argv)
    if args.decisions is not None:
        publish("growth_decisions", decisions(args.decisions), args.write)
        return
    after = [int(word) for word in args.after.split(",")] if args.after.replace(",", "").isdecimal() else []
    if not after or min(after) < 1 or args.epochs_measured < BURST:
        raise ValueError(
            f"`after` must be epochs such as 1,3 and `epochs_measured` at least {BURST}; got after={args.after!r}, "
            f"epochs_measured={args.epochs_measured}. Leave them out."
        )
    given = {}
    if args.quick:
        given, after, args.epochs_measured, args.seeds = QUICK, [1], BURST, 1
    torch.set_num_threads(1)
    began = time.perf_counter()
    config = Config.from_presets(dataset="digits", nu=0.0, seed=args.seed, **given)
    setup = subset(loop.prepare(config), QUICK_IMAGES if args.quick else None)
    rows = []
    for epoch, model in trained(setup, after):
        rows += [[epoch, *row] for row in measured(model, setup, args.epochs_measured)]
    header = ("after epochs", "kind", "structures", "nb", "as they are / truth", "corrected / truth", "signal to noise")
    lines = [
        f"Squared gradient norms of {config.arch} on the digits, batches of {config.batch_size} drawn as in training "
        f"(nb an epoch), {args.epochs_measured} epochs of them at fixed weights, seed {args.seed}; {hardware()}; "
        f"{time.perf_counter() - began:.0f} s.",
        "",
        "Median over the structures of the mean product over the truth, [quartiles]; signal to noise: median of "
        "|G|^2 / tr S, S the covariance of a batch's gradient. Without correction the expected ratio is "
        "1 - (tr S / |G|^2) / (nb - 1); a negative one means that the product of two batches of one epoch is negative.",
        "",
        markdown(header, rows),
        "",
        *by_optimizer(args.seeds, args.quick),
    ]
    publish("growth", "\n".join(lines), args.write)


def trained(setup: loop.Setup, after: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
    """The network after each of some epochs of its training."""
    model, config = setup.model, setup.config
    optimizer, step = loop.make_optimizer(model, config), 0
    batches = stream(setup)
    for epoch in range(max(after)):
        model.train()
        for x, y in batches.epoch(epoch, config.seed):
            for group in optimizer.param_groups:
                group["lr"] = float(setup.schedule[step])
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
        if epoch + 1 in after:
            yield epoch + 1, model


def measured(model: nn.Module, setup: loop.Setup, epochs: int) -> list[list[str]]:
    """Rows of the table for a network at fixed weights, one a kind of structure."""
    inventory = Inventory(model.structures())
    kept, batches = np.ones(inventory.size, dtype=bool), stream(setup)
    count = len(setup.images.train_labels) / setup.config.batch_size

    def products(epoch_steps: float | None = None) -> GradientProducts:
        found = GradientProducts(inventory.size, 1e12, epoch_steps=epoch_steps)
        found.attach(model, inventory, kept, inventory.units)
        return found

    both, truth, squares = products(count), products(), products()
    ones = np.ones(inventory.size)
    with batch_statistics_only(model):
        for epoch in range(epochs):
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for x, y in batches.epoch(10**6 + epoch, setup.config.seed):
                model.zero_grad()
                both.listen(weights=False)
                F.cross_entropy(model(x), y).backward()
                both.add(ones)
                for total, parameter in zip(sums, model.parameters(), strict=True):
                    total += parameter.grad
                own = [p.grad.clone() for p in model.parameters()]
                for _ in range(BURST):
                    give(squares, model, own)
            both.begin()
            give(truth, model, [total / len(batches) for total in sums])
    exact = truth.pools.gain.mean
    noise = squares.pools.gain.mean - exact
    rows = []
    for kind, where in zip(KINDS, (inventory.is_layer, ~inventory.is_layer), strict=True):
        where = where & (exact > 0)
        ratios = [ratio(found.mean[where] / exact[where]) for found in (both.pools.gain_below, both.pools.gain)]
        rows.append([kind, int(where.sum()), f"{count:.1f}", *ratios, f"{np.median(exact[where] / noise[where]):.3f}"])
    return rows


def give(products: GradientProducts, model: nn.Module, gradients: Sequence[torch.Tensor]) -> None:
    """Let gradients arrive as those of a step."""
    model.zero_grad()
    products.listen(weights=False)
    sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True)).backward()
    products.add(np.ones(products.size))


def decisions(folder: Path) -> str:
    """What the correction changed in shadow runs, as text.

    Args:
        folder: With records ``before-s<seed>`` and ``after-s<seed>`` of the same seeds.

    Raises:
        ValueError: if there are none, or not of the same seeds.
    """
    pairs = [(path, path.with_name(path.name.replace("before", "after"))) for path in sorted(folder.glob("before-s*"))]
    if not pairs:
        raise ValueError(
            f"`decisions` must be a folder with records before-s*; got {str(folder)!r} without. See --help."
        )
    rows = []
    for name, own in (("before", [b for b, _ in pairs]), ("after", [a for _, a in pairs])):
        runs = compare.read_all(own)
        score, half = (compare.rules(runs)[rule] for rule in ("derived", "fixed 0.5"))
        drift = compare.assumptions(runs)
        held = ", ".join(f"{drift[bound][1]} of {drift[bound][0]}" for bound in ("gain", "drift"))
        sunk = f"{half.regrets} of {half.decisions}"
        rows.append(
            [name, score.decisions, score.regrets, f"{score.recall:.0%}", f"{np.median(score.leads):.0f}", held, sunk]
        )
    changes = np.concatenate([_changes(*pair) for pair in pairs])
    larger = (changes[:, 1] > 0).mean()
    header = ("products", "decisions", "regrets", "recall", "lead", "gain, drift exceeded", "back from theta <= 1/2")
    lines = [
        f"Shadow runs on the digits, preset, seeds of {len(pairs)} pairs, {hardware_of(pairs[0][1])}: decisions by the derived "
        "tolerance with products of gradients as they are (before) and corrected for batches of one epoch (after).",
        "",
        markdown(header, rows),
        "",
        f"At {len(changes):,} recorded checks of structures whose upper benefit limit was below the price, the upper limit of the "
        f"gain rose by a factor of {np.median(changes[:, 0]):.2f} in the median. The tolerance rose at {larger:.0%} of them and "
        "fell at the others: it is no monotone function of the gain. A gain that is larger than the true one is a bound "
        "too, and the comparison system with it decides sooner, so that less of the benefit's noise counts.",
    ]
    return "\n".join(lines)


def _changes(before: Path, after: Path) -> NDArray:
    """Gain after over before, and growth of the tolerance, of the rows that both have, shape (rows, 2)."""
    found = []
    for folder in (before, after):
        header, rows = read_structures(folder, ("step", "gain", "tolerance", "benefit_upper", "price"))
        named = [dict(zip(header, row, strict=True)) for row in rows]
        found.append({(row["step"], *structure_key(row)): row for row in named})
    changes = []
    for key in found[0].keys() & found[1].keys():
        one, other = (
            [float(rows[key][name]) for name in ("gain", "tolerance", "benefit_upper", "price")] for rows in found
        )
        if np.isfinite([*one, *other]).all() and other[2] < other[3] and one[0] > 0:
            changes.append((other[0] / one[0], other[1] - one[1]))
    return np.array(changes)


def hardware_of(folder: Path) -> str:
    """The machine that a record names."""
    return machine(read_json(folder / "env.json"))


def ratio(values: NDArray) -> str:
    """Median with quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def stream(setup: loop.Setup) -> data.Batches:
    """Batches as training draws them."""
    images, config = setup.images, setup.config
    return data.Batches(
        images.train_images,
        images.train_labels,
        config.batch_size,
        images.mean,
        images.std,
        augment=config.augment,
        channels_last=config.channels_last,
    )
