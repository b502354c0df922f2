"""AdamW and a small vision transformer on the digits: half its MACs, against its dense twins; how far benefits grow.

    python -m benchmarks.vit [--seeds 5] [--jobs 1] [--validation] [--set NAME=VALUE ...] [--quick] [--write]

Each seed is trained twice, with the pruner and, paired, without: same weights at the start, same batches, same steps. One
table is of what is left and its accuracy, the other of how often the pooled benefit of a structure grew from one check to a
later one by more than measured growth permits.

The default settings were chosen on validation images: from five settings with one seed each, then the share of the steps after
which all is decided, and alpha, with seeds 10 to 13. The test images were read by the five seeds of the written table. Before that
they were read by the same seeds with `--set decide=0.5`, which had lost 0.61 [-0.35, 1.57] points of accuracy, and with these
settings by a version whose growth was too low where weights move: 0.72 [-0.41, 1.86].
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import nn

from benchmarks.common import (
    CONFIDENCE,
    add_quick,
    hardware,
    load,
    markdown,
    mean_interval,
    publish,
    spread,
)
from benchmarks.vit.model import DigitsViT
from catode.prune.pruner import Pruner
from catode.records import structure_key
from catode.structures import fates
from catode.train import data
from catode.train.settings.commandline import CommandLine

MOST_LOSS, NEAR = 1.5, 0.02
"""Points of accuracy that may be lost, and distance from the target, of the statements under the table."""
MEMORIES = (0.25, 1.0, 3.0)
"""Lengths of the intervals over which benefits are compared, in memories of the pools."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs: Epochs.
        batch_size: Images in a batch.
        lr: Largest learning rate, after a linear warm-up; it then falls to 0 like a cosine.
        weight_decay: AdamW's.
        warmup: Share of the steps over which the learning rate rises.
        wait: Share of the steps before any theta moves.
        decide: Share of the steps after which everything is decided.
        nu: Nats that the whole network may cost until the first check sets it.
        memory: Steps over which measurements are pooled; 0 for the pruner's default.
        probe_size: Examples in a probe.
        layers_per_probe: Layers whose paired difference one probe takes.
        measure_every: Steps between probes.
        target: Share of the MACs to end at.
        alpha: Layers (1) against units (0) in the price.
        shift: Whether images are moved by at most one pixel along each axis.
        images: Training images; 0 for all.
        depth: Pairs of attention and MLP.
        width: Channels of a token.
    """

    epochs: int = 150
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    wait: float = 0.1
    decide: float = 0.35
    nu: float = 1.0
    memory: int = 0
    probe_size: int = 32
    layers_per_probe: int = 2
    measure_every: int = 1
    target: float = 0.5
    alpha: float = 0.8
    shift: int = 1
    images: int = 0
    depth: int = 4
    width: int = 48


QUICK = Recipe(epochs=2, batch_size=16, images=128, depth=1, width=16, memory=10, probe_size=8)


@dataclass
class Trained:
    """What became of one training.

    Attributes:
        seed: Its seed.
        accuracy: Share of the held-out images classified rightly at the final epoch.
        seconds: Duration of the training.
        steps: Training steps.
        macs: Share of the MACs left, as the pruner counts them.
        whole_macs: The same with attention's products of activations.
        params: Share of the parameters left.
        kept: Attention branches, MLP branches and hidden units left, each with all there were.
        decisions: Gated structures of each fate.
        decided_by_rule: Share of them that a measurement decided.
        rows: Rows of all checks.
        warnings: What the pruner said.
        risk: Its risk.
    """

    seed: int
    accuracy: float
    seconds: float
    steps: int
    macs: float = 1.0
    whole_macs: float = 1.0
    params: float = 1.0
    kept: tuple[tuple[int, int], ...] = ()
    decisions: dict[str, int] = field(default_factory=dict)
    decided_by_rule: float = math.nan
    rows: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    risk: float = math.nan


def train(recipe: Recipe, validation: bool, job: tuple[int, bool]) -> Trained:
    """Train one network.

    Args:
        recipe: How.
        validation: Whether a quarter of the training images is held out and tested on in place of the test images.
        job: Seed, and whether it is pruned.
    """
    torch.set_num_threads(1)
    seed, pruned = job
    images = data.load("digits", validation_share=0.25 if validation else 0.0)
    held = images.validation_images, images.validation_labels
    if not validation:
        held = images.test_images, images.test_labels
    number = recipe.images or len(images.train_images)
    batches = data.Batches(
        images.train_images[:number],
        images.train_labels[:number],
        recipe.batch_size,
        images.mean,
        images.std,
        augment="shift" if recipe.shift else "none",
    )
    torch.manual_seed(seed)
    model = DigitsViT(recipe.width, recipe.depth)
    products = model.product_macs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, steps, recipe.warmup))
    pruner, rows = None, []
    if pruned:
        pruner = Pruner(
            model,
            torch.zeros(2, 1, 8, 8),
            optimizer=optimizer,
            nu=recipe.nu,
            alpha=recipe.alpha,
            steps=round(recipe.decide * steps),
            warmup=round(recipe.wait * steps),
            target_macs=recipe.target,
            epoch_steps=number / recipe.batch_size,
            memory=recipe.memory or None,
            probe_size=recipe.probe_size,
            layers_per_probe=recipe.layers_per_probe,
            measure_every=recipe.measure_every,
            seed=seed,
        )
    began = time.perf_counter()
    model.train()
    for epoch in range(recipe.epochs):
        for x, y in batches.epoch(epoch, seed):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if pruner is not None and (check := pruner.step()) is not None:
                rows += [row | {"seed": seed} for row in check.rows]
    if pruner is not None:
        model = pruner.finish()
    found = Trained(seed, accuracy(model, *held, images), time.perf_counter() - began, steps)
    if pruner is None:
        return found
    whole = pruner.complexity.macs(np.ones(pruner.complexity.size))
    counts, attention = pruner.counts(), np.array([not block.sites for block in pruner.inventory.blocks])
    layers = pruner.kept[pruner.is_layer]
    units = ~pruner.is_layer
    found.macs = counts.macs / whole
    found.whole_macs = (counts.macs + model.product_macs()) / (whole + products)
    found.params = counts.params / pruner.complexity.params(np.ones(pruner.complexity.size))
    found.kept = tuple(
        (int(part.sum()), len(part)) for part in (layers[attention], layers[~attention], pruner.kept[units])
    )
    found.decisions, found.decided_by_rule = pruner.decisions(), pruner.decided_by_rule
    found.rows, found.warnings, found.risk = rows, pruner.warnings, pruner.settings.risk
    return found


def factor(steps: int, warmup: float, step: int) -> float:
    """Learning rate over the largest at a step."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / (steps - rise)))


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, of: data.ImageData) -> float:
    """Share of images that a model classifies rightly."""
    model.eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (of.mean, of.std))
    return float((model((images / 255.0 - mean) / std).argmax(1) == labels).float().mean())


# --- growth of benefits -------------------------------------------------------------------------------------------------


def exceeded(rows: Iterable[dict], memories: float, risk: float) -> dict[str, NDArray]:
    """How the pooled benefits grew from one check to a later one, against what was measured at the first.

    In theory a benefit b grows by b' <= q theta - a b + delta, q the gain, a the decay and delta the drift, and wanders by its
    diffusion. A pool follows it with its memory, so that the pooled benefit grows as much with the pooled theta.

    Args:
        rows: Rows of the checks of a run; those that follow each other in a structure's trace are compared.
        memories: Least length of an interval, in memories of the pool at its start. Intervals of a structure do not overlap.
        risk: Risk of the limits in the rows.

    Returns:
        Of every interval: whether the growth `exceeded` the bound by more than `z` standard errors of the two pools' difference;
        the same for the `gain` alone, and with the `diffusion` of the benefit; `layer`: whether it is one; `growth`, `bound`
        and `error` in nats.
    """
    traces: dict[tuple, list[dict]] = {}
    for row in rows:
        traces.setdefault((row.get("seed"), *structure_key(row)), []).append(row)
    z, found = float(ndtri(1.0 - risk)), []
    for trace in traces.values():
        trace = [row for row in trace if _measured(row)]
        if len(trace) < 2:
            continue
        passed, first = _passed(trace), 0
        for last in range(1, len(trace)):
            start, end = trace[first], trace[last]
            span = end["time"] - start["time"]
            if span < memories * start["memory"] * (1 - 1e-9):
                continue
            errors = [(row["benefit_upper"] - row["benefit"]) / z for row in (start, end)]
            # the later pool is the earlier one times the overlap, and what came since
            overlap = math.exp(-span / start["memory"])
            variance = errors[0] ** 2 * (1.0 - 2.0 * overlap) + errors[1] ** 2
            error = math.sqrt(max(variance, 0.0))
            gain = start["gain"] * (passed[last] - passed[first])
            bound = gain + span * (start["drift"] - start["decay"] * max(start["benefit_lower"], 0.0))
            wander = start["benefit_noise"] * math.sqrt(span)
            found.append((end["benefit"] - start["benefit"], bound, error, gain, wander, start["kind"] == "layer"))
            first = last
    growth, bound, error, gain, wander, layer = np.array(found, dtype=float).reshape(-1, 6).T
    return {
        "growth": growth,
        "bound": bound,
        "error": error,
        "layer": layer > 0,
        "gain": growth > gain + z * error,
        "exceeded": growth > bound + z * error,
        "diffusion": growth > bound + z * np.hypot(error, wander),
    }


def _measured(row: dict) -> bool:
    names = ("benefit", "benefit_upper", "benefit_lower", "gain", "drift", "decay", "benefit_noise", "memory", "time")
    return all(math.isfinite(row[name]) for name in names) and row["memory"] > 0.0


def _passed(trace: Sequence[dict]) -> NDArray:
    """Integral over time of theta as the pool of the benefit weighs it, at every row of a structure's trace."""
    pooled, total = trace[0]["keep_prob"], [0.0]
    for before, row in itertools.pairwise(trace):
        span = row["time"] - before["time"]
        new = pooled + (row["keep_prob"] - pooled) * -math.expm1(-span / row["memory"])
        total.append(total[-1] + 0.5 * (pooled + new) * span)
        pooled = new
    return np.array(total)


def growth_table(runs: Sequence[Trained]) -> str:
    """The second table."""
    rows = []
    for memories in MEMORIES:
        parts = [exceeded(run.rows, memories, run.risk) for run in runs]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for kind, where in (("layers", whole["layer"]), ("units", ~whole["layer"])):
            if not where.any():
                continue
            cells = [f"{whole[name][where].mean():.1%}" for name in ("gain", "exceeded", "diffusion")]
            bound = np.maximum(whole["bound"][where], 1e-12)
            grew = f"{(whole['growth'][where] > float(ndtri(1 - runs[0].risk)) * whole['error'][where]).mean():.1%}"
            ratios = [f"{np.median(whole[name][where] / bound):.3f}" for name in ("growth", "error")]
            largest = f"{np.quantile(whole['growth'][where] / bound, 0.99):.2f}"
            rows.append([f"{kind}, {memories:g}", int(where.sum()), grew, *cells, *ratios, largest])
    header = (
        "kind, least interval in memories", "intervals", "above 0", "above the gain", "above gain and drift",
        "above these and diffusion", "growth / bound, median", "standard error / bound, median", "growth / bound, 99 %",
    )  # fmt: skip
    return markdown(header, rows)


# --- report -------------------------------------------------------------------------------------------------------------

HEADER = (
    "seed", "accuracy, %", "dense, %", "difference, points", "MACs", "with attention's products", "parameters",
    "attention", "MLP", "units", "decided by rule", "by tolerance", "seconds / dense",
)  # fmt: skip


def row(pruned: Trained, dense: Trained) -> list[str]:
    """One line of the first table."""
    return [
        str(pruned.seed),
        f"{100 * pruned.accuracy:.2f}",
        f"{100 * dense.accuracy:.2f}",
        f"{100 * (pruned.accuracy - dense.accuracy):+.2f}",
        f"{pruned.macs:.1%}",
        f"{pruned.whole_macs:.1%}",
        f"{pruned.params:.1%}",
        *(f"{left} of {whole}" for left, whole in pruned.kept),
        f"{pruned.decided_by_rule:.1%}",
        str(pruned.decisions.get(fates.PRUNED_TOLERANCE, 0)),
        f"{pruned.seconds:.0f} / {dense.seconds:.0f}",
    ]


def report(pairs: Sequence[tuple[Trained, Trained]], recipe: Recipe, validation: bool, notes: str) -> str:
    """Both tables with what they say, as Markdown."""
    differences = [100 * (pruned.accuracy - dense.accuracy) for pruned, dense in pairs]
    low = mean_interval(differences)[1]
    off = max(abs(pruned.macs - recipe.target) for pruned, _ in pairs)
    settings = ", ".join(f"{f.name}={getattr(recipe, f.name):g}" for f in dataclasses.fields(recipe))
    said = sorted({line for pruned, _ in pairs for line in pruned.warnings})
    met = {
        f"lower end of the {CONFIDENCE:.0%} interval of the difference above -{MOST_LOSS} points; it is {low:+.2f}": low
        > -MOST_LOSS,
        f"every run within {100 * NEAR:.0f} points of the MACs asked for; the worst is off by {100 * off:.2f}": off
        <= NEAR,
    }
    risk = pairs[0][0].risk
    return "\n".join(
        [
            f"A vision transformer on the digits (patches of 2 x 2, {recipe.depth} attention and {recipe.depth} MLP branches of "
            f"width {recipe.width}, attention gated as a whole, MLPs and their hidden units), AdamW, against the same network "
            f"without pruner: same seed, same batches, same {pairs[0][0].steps:,} steps. {notes}; accuracy on the "
            f"{'validation' if validation else 'test'} images at the final epoch; {hardware()}; {load()}.",
            "",
            f"Settings: {settings}.",
            "",
            markdown(HEADER, [row(*pair) for pair in pairs]),
            "",
            *(f"- {'yes' if value else 'NO'}: {what}" for what, value in met.items()),
            "",
            f"Mean [{CONFIDENCE:.0%} t-interval] over seeds. Difference of accuracy in points, pruned minus dense, paired by seed: "
            f"{spread(differences, '{:+.2f}')}. Accuracy, %: {spread([p.accuracy for p, _ in pairs], factor=100)}; dense: "
            f"{spread([d.accuracy for _, d in pairs], factor=100)}. MACs, %: {spread([p.macs for p, _ in pairs], '{:.1f}', 100)}. "
            "MACs are those of linear, convolutional and norm layers; the column beside has attention's products of activations "
            "as well, which the pruner does not count.",
            "",
            *(["The pruner said:", "", *(f"- {line}" for line in said), ""] if said else []),
            "Growth of the pooled benefits of undecided structures between two checks, against b' <= q theta - a b + delta with "
            f"the limits that were measured at the first (risk {risk:g}): share of intervals in which it was larger by more than "
            f"{ndtri(1 - risk):.3f} standard errors of the difference of the two pools, {risk:.0%} at a benefit that grows "
            "exactly as fast as the bound permits. The column before them is the same for a bound of 0, the last of them adds "
            "the diffusion of the benefit to the error.",
            "",
            growth_table([pruned for pruned, _ in pairs]),
        ]
    )


def changed(pairs: Sequence[str], recipe: Recipe) -> Recipe:
    """A recipe with values from strings ``name=value``.

    Raises:
        ValueError: for a name that is none, or a value that is no number.
    """
    given: dict[str, Any] = {}
    kinds = {f.name: type(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in kinds:
            raise ValueError(f"`set` must be name=value of {', '.join(kinds)}; got {pair!r}. See --help.")
        try:
            given[name] = kinds[name](text)
        except ValueError:
            raise ValueError(f"`{name}` must be a number; got {pair!r}. Write {name}=NUMBER.") from None
    return dataclasses.replace(recipe, **given)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.vit", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (5)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    parser.add_argument("--validation", action="store_true", help="hold out validation images, to choose settings by")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/vit.md")
    add_quick(parser)
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1; got {getattr(args, name)}. Leave it out.")
    recipe, seeds = changed(args.set, QUICK if args.quick else Recipe()), 1 if args.quick else args.seeds
    jobs = [(seed, pruned) for seed in range(args.first, args.first + seeds) for pruned in (True, False)]
    torch.set_num_threads(1)
    one, runs = partial(train, recipe, args.validation), []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for done in map(one, jobs) if args.jobs == 1 else pool.map(one, jobs):
            runs.append(done)
            print(f"seed {done.seed}: accuracy {done.accuracy:.4f}, MACs {done.macs:.3f}", file=sys.stderr, flush=True)
    publish(
        "vit",
        report(list(zip(runs[::2], runs[1::2], strict=True)), recipe, args.validation, f"n = {seeds}"),
        args.write,
    )
