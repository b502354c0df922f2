"""Bias and noise of the benefit estimators against exact enumeration.

    python -m benchmarks.estimators [--draws 220] [--resnet] [--quick] [--write]
    python -m benchmarks.estimators --run FOLDER [--write]

A fully-connected residual network with 2 layers and 8 units has 1,024 gate patterns. It is trained on the digits with
its gates drawn at theta; early and late in that training the loss of every pattern gives the exact benefits L0 - L1.
The reference is the mean over the whole training set cut into batches of the training's size, train-mode batch norm,
which is what training minimises; a row shows what the whole set as one batch would give instead.

With --resnet, a second part trains the ResNet-20 of the main job and compares probes of several sizes there (the
reference: paired differences over the whole batch, unbiased): a probe is normalised by its own examples, and few
examples give noisy statistics. With --run, that comparison alone, on the network of a finished run.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import spearmanr
from torch import nn

from benchmarks import copies
from benchmarks.cifar import read
from benchmarks.common import QUICK_IMAGES, add_quick, guarded, hardware, markdown, publish
from catode.prune.gated.gates import Gates
from catode.prune.measure.probes import Probe, batch_statistics_only, curvature_corrected, straight_through
from catode.structures.inventory import Inventory
from catode.train import data, load
from catode.train.loop import learning_rates, make_optimizer
from catode.train.models import DenseResNet, build
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

BLOCKS, HIDDEN, WIDTH = 2, 4, 16
PAIRED = "paired, layers: {}"
TOGETHER = 1, 2  # layers whose paired difference one probe takes
POOLED = 200  # observations in the last column, the pruner's default memory

Batch = tuple[torch.Tensor, torch.Tensor]


class Bench:
    """A small gated network in training, and its exact and estimated benefits.

    Args:
        images: Training images, shape (N, features).
        labels: Their classes, shape (N,).
        batch: Batch size.
        theta: Keep probability of every gate.
        seed: Seed of weights, batches and draws.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int, theta: float, seed: int):
        torch.manual_seed(seed)
        self.images, self.labels, self.theta = images, labels, theta
        self.model = DenseResNet(images.shape[1], int(labels.max()) + 1, BLOCKS, WIDTH, HIDDEN)
        blocks = self.model.structures()
        self.size, self.layers = BLOCKS * (1 + HIDDEN), BLOCKS
        self.gates = Gates(self.model, Inventory(blocks))
        units = torch.arange(BLOCKS, self.size).split(HIDDEN)
        self.gates.install([True] * BLOCKS, list(units))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=self.generator)
        self.batches: list[Batch] = [(images[i], labels[i]) for i in order.split(batch) if len(i) == batch]

    def train(self, epochs: int, decreasing: bool) -> None:
        """Train with gates drawn at theta, one draw a step."""
        self.model.train()
        steps = epochs * len(self.batches)
        size = len(self.batches[0][1])
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.05 * (1.0 - step / steps if decreasing else 1.0)
            chosen = torch.randint(len(self.labels), (size,), generator=self.generator)
            self._set(self.draw())
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.images[chosen]), self.labels[chosen]).backward()
            self.optimizer.step()

    def draw(self) -> torch.Tensor:
        """Gate values at theta, shape (n,)."""
        return torch.bernoulli(torch.full((self.size,), self.theta), generator=self.generator)

    def losses(self, batches: list[Batch]) -> NDArray:
        """Mean loss of every gate pattern over the batches, shape (2,) * n, entry 1 where a gate is open."""
        patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=self.size)))
        own = self.gates.draw  # changed in place by every step, so vmap's tensors must not stay there

        def loss(pattern: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.gates.draw = pattern
            return F.cross_entropy(self.model(x), y)

        with torch.no_grad(), batch_statistics_only(self.model):
            over_patterns = torch.func.vmap(loss, in_dims=(0, None, None), chunk_size=128)
            found = np.mean([over_patterns(patterns, x, y).double().numpy() for x, y in batches], axis=0)
        self.gates.draw = own
        self._set(torch.ones(self.size))
        return found.reshape((2,) * self.size)

    def accuracy(self) -> float:
        """Training accuracy with all gates open."""
        self._set(torch.ones(self.size))
        with torch.no_grad(), batch_statistics_only(self.model):
            return float(np.mean([float((self.model(x).argmax(1) == y).float().mean()) for x, y in self.batches]))

    def derivative(self, batch: Batch, draw: torch.Tensor) -> NDArray:
        """dL/dxi at a draw, as the training step's backward pass delivers it."""
        self._set(draw)
        with batch_statistics_only(self.model):
            (found,) = torch.autograd.grad(F.cross_entropy(self.model(batch[0]), batch[1]), self.gates.draw)
        return found.numpy()

    def probe(self, batch: Batch, draw: torch.Tensor) -> Probe:
        """A probe on the batch."""
        self._set(draw)
        return _probe(self.model, self.gates, batch, self.generator)

    def empirical(self, batch: Batch, draw: torch.Tensor) -> NDArray:
        """The shortcut that the curvature estimator must not take: squared derivatives at the data's own labels."""
        self._set(draw)
        self.gates.rows = draw.expand(len(batch[1]), -1).clone().requires_grad_()
        with batch_statistics_only(self.model):
            loss = F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum")
        (per_example,) = torch.autograd.grad(loss, self.gates.rows)
        self.gates.rows = None
        return per_example.square().mean(0).numpy()

    def _set(self, draw: torch.Tensor) -> None:
        self.gates.set(torch.full((self.size,), self.theta), draw.clone())


def _probe(model: nn.Module, gates: Gates, batch: Batch, generator: torch.Generator) -> Probe:
    """A probe of the mean cross-entropy of a batch."""
    return Probe(model, gates, lambda model: F.cross_entropy(model(batch[0]), batch[1]), len(batch[1]), generator)


def exact(losses: NDArray, theta: float) -> NDArray:
    """Benefits L0 - L1 by enumeration, the other gates open with probability theta, shape (n,)."""
    benefits = []
    for gate in range(losses.ndim):
        difference = losses.take(0, gate) - losses.take(1, gate)
        for _ in range(losses.ndim - 1):
            difference = (1.0 - theta) * difference[0] + theta * difference[1]
        benefits.append(float(difference))
    return np.array(benefits)


@dataclass(frozen=True)
class Estimator:
    """One way to estimate benefits from a batch.

    Args:
        name: Name in the table.
        passes: Cost beyond the training step, in forward passes over the batch (a backward pass counts as two).
        benefits: From network, batch and draw to estimated benefits, shape (n,).
    """

    name: str
    passes: float
    benefits: Callable[[Bench, Batch, torch.Tensor], NDArray]


def _straight(bench: Bench, batch: Batch, draw: torch.Tensor) -> NDArray:
    return -straight_through(bench.derivative(batch, draw), draw.numpy())


def _corrected(share: float) -> Callable[[Bench, Batch, torch.Tensor], NDArray]:
    def benefits(bench: Bench, batch: Batch, draw: torch.Tensor) -> NDArray:
        derivative = bench.derivative(batch, draw)
        curvature = bench.probe(_part(batch, share), draw).curvature().numpy()
        return -curvature_corrected(derivative, draw.numpy(), curvature)

    return benefits


def _empirical(bench: Bench, batch: Batch, draw: torch.Tensor) -> NDArray:
    return -curvature_corrected(bench.derivative(batch, draw), draw.numpy(), bench.empirical(batch, draw))


def _paired(share: float) -> Callable[[Bench, Batch, torch.Tensor], NDArray]:
    return lambda bench, batch, draw: bench.probe(_part(batch, share), draw).paired(range(bench.size)).numpy()


def _part(batch: Batch, share: float) -> Batch:
    size = max(2, int(share * len(batch[1])))
    return batch[0][:size], batch[1][:size]


def estimators(gates: int) -> list[Estimator]:
    """The estimators compared; the probes of a tenth of the batch are the pruner's default."""
    return [
        Estimator("straight-through", 0.0, _straight),
        Estimator("curvature", 3.0, _corrected(1.0)),
        Estimator("curvature, sampled, probe 1/10", 0.3, _corrected(0.1)),
        Estimator("curvature, data's labels (shortcut)", 3.0, _empirical),
        Estimator("paired", 1.0 + gates, _paired(1.0)),
        Estimator("paired, probe 1/10", 0.1 * (1 + gates), _paired(0.1)),
    ]


def observe(bench: Bench, draws: int) -> dict[str, NDArray]:
    """Estimates of every estimator on the same batches and draws, each of shape (draws, n)."""
    made = {estimator.name: [] for estimator in estimators(bench.size)}
    for i in range(draws):
        batch, draw = bench.batches[i % len(bench.batches)], bench.draw()
        for estimator in estimators(bench.size):
            made[estimator.name].append(estimator.benefits(bench, batch, draw))
    return {name: np.array(values) for name, values in made.items()}


def compare(bench: Bench, draws: int) -> str:
    """The table at the network's present weights."""
    truth = exact(bench.losses(bench.batches), bench.theta)
    whole = exact(bench.losses([(bench.images, bench.labels)]), bench.theta)
    layers = np.arange(bench.size) < bench.layers
    price = np.where(layers, np.median(truth[layers]), np.median(truth[~layers]))

    def columns(mean: NDArray, std: NDArray | None) -> list[str]:
        cells = []
        for kind in (~layers, layers):
            scale = np.abs(truth[kind]).mean()
            bias = mean[kind] - truth[kind]
            error = 0.0 if std is None else np.sqrt((std[kind] ** 2).sum()) / kind.sum() / np.sqrt(draws) / scale
            cells.append(f"{100 * bias.mean() / scale:+.0f}" + (f" ± {100 * error:.0f}" if std is not None else ""))
            cells.append(f"{100 * np.sqrt(np.square(bias).mean()) / scale:.0f}")
            cells.append("" if std is None else f"{100 * np.sqrt(np.square(std[kind]).mean()) / scale:.0f}")
        kept, should = mean > price, truth > price
        # a tie, the structure that is the median itself, is no mistake
        apart = np.abs(truth - price) > 1e-6 * np.abs(price)
        cells.append(f"{spearmanr(mean, truth).statistic:.2f}")
        cells.append(f"{(kept & ~should & apart).sum()} / {(~kept & should & apart).sum()}")
        if std is None:
            return [*cells, ""]
        margin = np.where(should, 1.0, -1.0) * (mean - price) / np.maximum(std, 1e-30) * np.sqrt(POOLED)
        return [*cells, f"{ndtr(-margin)[apart].sum():.1f}"]

    observed = observe(bench, draws)
    rows = [["whole set as one batch, exact", "", *columns(whole, None)]]
    for estimator in estimators(bench.size):
        values = observed[estimator.name]
        rows.append([estimator.name, f"{estimator.passes:g}", *columns(values.mean(0), values.std(0, ddof=1))])
    header = [
        "estimator",
        "extra passes",
        "units: bias %",
        "rms bias %",
        "one-draw std %",
        "layers: bias %",
        "rms bias %",
        "one-draw std %",
        "Spearman",
        "wrongly kept / removed",
        f"expected wrong, {POOLED} pooled",
    ]
    mean, median = np.abs(truth[~layers]).mean(), np.median(truth[~layers])
    return "\n".join(
        [
            f"Exact benefits, nats: units mean {mean:.3g}, median {median:.3g}, range {truth[~layers].min():.3g} to "
            f"{truth[~layers].max():.3g}; layers {', '.join(f'{b:.3g}' for b in truth[layers])}.",
            "",
            markdown(header, rows),
        ]
    )


# --- probes on the main job's network --------------------------------------------------------------------------------


def resnet_probes(epochs: int, length: int, seed: int, **sample: int) -> str:
    """Benefits of a ResNet-20 on the digits by probes of several sizes, early in a run.

    Args:
        epochs: Epochs to train before measuring.
        length: Epochs of the whole schedule.
        seed: Seed of everything.
        sample: `batches` and `units` of `probes`.
    """
    config = Config.from_presets(dataset="digits")
    source = data.load("digits")
    torch.manual_seed(seed)
    model = build("resnet20", in_channels=1, classes=len(source.classes)).to(memory_format=torch.channels_last).train()
    stream = _stream(source, config)
    optimizer = make_optimizer(model, config)
    rates = iter(learning_rates(config.schedule, config.lr, length * len(stream)))
    for epoch in range(epochs):
        for x, y in stream.epoch(epoch, seed):
            for group in optimizer.param_groups:
                group["lr"] = next(rates)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    title = f"ResNet-20 on the digits after {epochs} of {length} epochs (loss {loss.item():.2g})"
    return probes(title, model, stream.epoch(length, seed), config, seed, **sample)


def run_probes(folder: Path, seed: int, **sample: int) -> str:
    """The same for the network of a finished run, on its own training images."""
    model, record = load(folder), read(folder)
    names = ("dataset", "arch", "batch_size", "augment", "data_dir", "image_size", "validation_share", "split_seed")
    config = Config.from_presets(**{name: record.config[name] for name in names if name in record.config})
    source = data.load(
        config.dataset,
        config.data_dir,
        image_size=config.image_size,
        validation_share=config.validation_share,
        split_seed=config.split_seed,
    )
    model = model.to(memory_format=torch.channels_last).train()
    stream = _stream(source, config)
    name = copies.name(config.dataset, config.data_dir, copies.fingerprint(source))
    title = f"{config.arch} on {name} after {record.config['epochs']} epochs (accuracy {record.accuracy:.1f} %)"
    stream = stream.epoch(record.config["epochs"], seed)
    return "\n\n".join([probes(title, model, stream, config, seed, **sample), *copies.notes([name])])


def _stream(source: data.ImageData, config: Config) -> data.Batches:
    return data.Batches(
        source.train_images,
        source.train_labels,
        config.batch_size,
        source.mean,
        source.std,
        augment=config.augment,
        channels_last=True,
    )


def probes(
    title: str,
    model: nn.Module,
    stream: Iterable[tuple],
    config: Config,
    seed: int,
    *,
    batches=12,
    units=24,
) -> str:
    """Benefits by probes of several sizes, all gates open, against those of whole batches.

    Args:
        title: Name of the network.
        model: The network, in training mode.
        stream: Batches of images and labels.
        config: Gives the size of a batch and of the preset's probe.
        seed: Seed of the sample and of the probes.
        batches: Batches to measure on.
        units: Number of units in the sample, chosen at random; every layer is measured.
    """
    blocks = model.structures()
    inventory = Inventory(blocks)
    ones = torch.ones(inventory.size)
    gates = Gates(model, inventory)
    gates.install([True] * inventory.layers, [torch.from_numpy(units) for units in inventory.units])
    sample = np.random.default_rng(seed).choice(np.arange(len(blocks), len(ones)), units, replace=False)
    kinds = {"layers": np.arange(len(blocks)), "units": np.sort(sample)}
    generator, found = torch.Generator().manual_seed(seed), {}
    whole = config.batch_size
    sizes = sorted(
        {m for m in (whole, 32, 16, max(2, whole // 10), config.probe_size) if m and m <= whole}, reverse=True
    )
    known = list(itertools.islice(stream, 6 * batches))
    for x, y in known[:batches]:
        gates.set(ones, ones.clone())
        with batch_statistics_only(model):
            (derivative,) = torch.autograd.grad(F.cross_entropy(model(x), y), gates.draw)
        for size in sizes:
            probe = _probe(model, gates, (x[:size], y[:size]), generator)
            corrected = -curvature_corrected(derivative, ones, probe.curvature()).numpy()
            for kind, chosen in kinds.items():
                found.setdefault((kind, "paired", size), []).append(probe.paired(chosen.tolist()).numpy())
                found.setdefault((kind, "curvature", size), []).append(corrected[chosen])
    rows = []
    for (kind, name, size), values in sorted(found.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2])):
        exact_ = np.mean(found[kind, "paired", sizes[0]], axis=0)
        mean, std = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
        scale = np.abs(exact_).mean()
        rows.append(
            [
                f"{kind}, {name}, probe {size}",
                f"{np.median(mean):.2g}",
                f"{np.median(exact_):.2g}",
                f"{100 * (mean - exact_).mean() / scale:+.0f}",
                f"{100 * np.sqrt(np.square(std).mean()) / scale:.0f}",
                f"{spearmanr(mean, exact_).statistic:.2f}",
            ]
        )
    header = ["structures, estimator, examples", "median", "exact median", "bias %", "one-draw std %", "Spearman"]
    title = f"### {title}: {len(blocks)} layers and {units} units, {batches} batches of {whole}, nats"
    return f"{title}\n\n{markdown(header, rows)}\n\n{worth(model, gates, known[batches:] or known, generator)}"


def worth(model: nn.Module, gates: Gates, batches: Sequence[Batch], generator: torch.Generator) -> str:
    """What probes tell for their time, as the pruner takes them: the curvature of all units, paired differences of layers.

    Args:
        model: The gated network, in training mode; its gates are open.
        gates: Its gates.
        batches: Batches to measure on.
        generator: Source of the probes' random vectors.
    """
    layers, seconds = len(gates.blocks), defaultdict(list)
    found: dict[tuple[str, int], list[NDArray]] = defaultdict(list)
    sizes = [size for size in (8, 12, 16, 24, 32) if size <= len(batches[0][1])]

    def timed(name: str, size: int, measure: Callable[[], torch.Tensor]) -> NDArray:
        mark = time.process_time()
        values = measure().numpy()
        seconds[name, size].append(time.process_time() - mark)
        return values

    for x, y in batches:
        for size in sizes:
            probe = _probe(model, gates, (x[:size], y[:size]), generator)
            curved = timed("curvature, all units", size, partial(probe.curvature, False))[layers:]
            found["curvature, all units", size].append(curved)
            for together in TOGETHER:
                groups = [list(range(layers))[i : i + together] for i in range(0, layers - together + 1, together)]
                name = PAIRED.format(together)
                own = [timed(name, size, partial(probe.paired, group)) for group in groups]
                found[name, size].append(np.concatenate(own))
    rows, first, counts = [], {}, {PAIRED.format(n): n for n in TOGETHER}
    for (name, size), values in sorted(found.items()):
        count = counts.get(name, 1)
        power = np.var(values, axis=0, ddof=1)
        milliseconds = 1e3 * float(np.median(seconds[name, size]))
        # probes of the first size that tell as much, of the median structure: some have very rare large values
        told = float(np.median(first.setdefault(name, power) / np.maximum(power, 1e-30)))
        rows.append([name, size, f"{milliseconds:.1f}", f"{told:.1f}", f"{100 * told * count / milliseconds:.1f}"])
    header = [
        "probe",
        "examples",
        "CPU ms",
        f"effective observations (of {sizes[0]} examples)",
        "the same per 100 ms, all its structures",
    ]
    return f"Noise and time of single probes, {len(batches)} batches:\n\n{markdown(header, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.estimators", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=220, help="batches and draws per estimate (220)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (64)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the late measurement (40); the early one: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resnet", action="store_true", help="also compare probe sizes on ResNet-20 (minutes)")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="only compare probe sizes, on the network of this finished run (minutes)",
    )
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/estimators.md, or that of the run"
    )
    add_quick(parser)
    args = parser.parse_args(argv)
    if args.draws < 2 or args.epochs < 2:
        raise ValueError(f"`draws` and `epochs` must be >= 2; got {args.draws} and {args.epochs}.")
    sample = {}
    if args.quick:
        args.draws, args.epochs, args.batch, sample = 2, 2, 16, {"batches": 2, "units": 2}
    torch.set_num_threads(1)
    began = time.perf_counter()
    if args.run is not None:
        text = run_probes(args.run, args.seed, **sample)
        name = "estimators_" + json.loads((args.run / "config.json").read_text())["arch"]
        publish(name, f"{text}\n\n{hardware()}; {time.perf_counter() - began:.0f} s.", args.write)
        return
    source = data.load("digits")
    images = source.train_images.float() / 255.0
    images = ((images - images.mean()) / images.std()).flatten(1)
    parts = []
    for theta in (1.0, 0.8):
        number = QUICK_IMAGES if args.quick else None
        bench = Bench(images[:number], source.train_labels[:number], args.batch, theta, args.seed)
        for name, epochs in (("early", 1), ("late", args.epochs - 1)):
            bench.train(epochs, decreasing=name == "late")
            done = 1 if name == "early" else args.epochs
            plural = "s" if done > 1 else ""
            parts += [
                f"### theta = {theta:g}, {name}: after {done} epoch{plural}, training accuracy {bench.accuracy():.1%}",
                "",
                compare(bench, args.draws),
                "",
            ]
    if args.resnet:
        length = Config.from_presets(dataset="digits").epochs
        for epochs in (1,) if args.quick else (5, length // 2):
            parts += [resnet_probes(epochs, length, args.seed, **sample), ""]
    lines = [
        f"Benefit estimators against enumeration of {2**bench.size:,} gate patterns: DenseResNet, {BLOCKS} layers of "
        f"{HIDDEN} units on a stream of {WIDTH}, digits, batch {args.batch}, n = {args.draws} draws, seed {args.seed}; "
        f"{hardware()}; {time.perf_counter() - began:.0f} s.",
        "",
        "In percent of the mean exact benefit of the kind: mean bias (± its standard error), root mean square of the "
        "structures' biases (noise of n draws included), standard deviation of one draw. Extra passes: forward passes "
        "over the batch beyond the training step, a backward pass counting as two. Wrongly kept / removed: by the "
        "estimate's mean at a price equal to the kind's median exact benefit; the last column adds the noise of "
        f"{POOLED} pooled draws.",
        "",
        *parts,
    ]
    publish("estimators", "\n".join(lines).rstrip(), args.write)


if __name__ == "__main__":
    guarded(main)
