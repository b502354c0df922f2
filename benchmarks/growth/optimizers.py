"""Growth of benefits in training by several optimizers: estimates before and now, against the exact one at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn, optim

from benchmarks.common import markdown
from catode.decisions.evidence import Pool
from catode.decisions.schedule import ANSWER_EVERY
from catode.prune.gated.gates import Gates
from catode.prune.measure.growth import BURST, GradientProducts
from catode.prune.measure.owned import Owned
from catode.prune.measure.probes import Probe
from catode.prune.optimizers import Update, Updates
from catode.structures.description import Block
from catode.structures.inventory import Inventory
from catode.train.models import DenseResNet, build

EVERY, Z, PROBE = 8, 1.645, 12
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], optim.Optimizer], float | None]] = {
    "SGD": (lambda m: optim.SGD(m.parameters(), 0.1), None),
    "SGD, momentum .9": (lambda m: optim.SGD(m.parameters(), 0.01, momentum=0.9), None),
    "the same, weight decay 1e-2": (lambda m: optim.SGD(m.parameters(), 0.01, momentum=0.9, weight_decay=1e-2), None),
    "the same, clipped to .1": (lambda m: optim.SGD(m.parameters(), 0.01, momentum=0.9), 0.1),
    "Nesterov .9": (lambda m: optim.SGD(m.parameters(), 0.01, momentum=0.9, nesterov=True), None),
    "AdamW, weight decay 1e-2": (lambda m: optim.AdamW(m.parameters(), 3e-4), None),
    "RMSprop": (lambda m: optim.RMSprop(m.parameters(), 3e-4), None),
}
STATIONARY: dict[str, tuple[Callable[[nn.Module], optim.Optimizer], float | None]] = {
    "SGD, lr .1": (lambda m: optim.SGD(m.parameters(), 0.1, weight_decay=5e-4), None),
    "momentum .5, lr .1": (lambda m: optim.SGD(m.parameters(), 0.1, momentum=0.5, weight_decay=5e-4), None),
    "momentum .9, lr .02": (lambda m: optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=5e-3), None),
    "the same, clipped to .1": (lambda m: optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=5e-3), 0.1),
    "momentum .9, lr .004": (lambda m: optim.SGD(m.parameters(), 0.004, momentum=0.9, weight_decay=5e-3), None),
    "Nesterov .9, lr .02": (
        lambda m: optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=5e-3, nesterov=True),
        None,
    ),
    "momentum .99, lr .005": (lambda m: optim.SGD(m.parameters(), 0.005, momentum=0.99, weight_decay=5e-4), None),
    "AdamW, lr .002": (lambda m: optim.AdamW(m.parameters(), 2e-3), None),
    "NAdam, lr .002": (lambda m: optim.NAdam(m.parameters(), 2e-3), None),
    "RMSprop, lr .001": (lambda m: optim.RMSprop(m.parameters(), 1e-3), None),
}


@dataclass(frozen=True)
class Task:
    """A small network, its data and how long it is trained.

    Attributes:
        examples: Images of random numbers.
        inputs: Numbers of each.
        classes: Classes.
        batch: Examples in a batch.
        by_epochs: Whether batches go through the examples epoch by epoch; else every batch is drawn by itself.
        norms: Whether the network has batch norms.
        warm: Steps before anything is measured.
        window: Steps of a window.
    """

    examples: int
    inputs: int
    classes: int
    batch: int
    by_epochs: bool
    norms: bool
    warm: int
    window: int


FITTING = Task(1024, 16, 6, 32, True, True, 320, 480)
STANDING = Task(2048, 64, 10, 128, False, False, 800, 800)


class Before:
    """The estimate of version 0.2: bursts in which a gate was on three times, of gradients as they stand after the step."""

    def __init__(self, owned: Owned, epoch_steps: float):
        self.owned, self.epoch_steps, self.burst = owned, epoch_steps, []
        self.gain = Pool(owned.size, 1e9)

    def add(self, draw: NDArray) -> None:
        """Add the gradients of a step."""
        gradient = self.owned.flat({p: p.grad.detach() for p in self.owned.parameters})
        self.burst.append((gradient, draw > 0.5))
        if len(self.burst) < BURST:
            return
        (g1, g2, g3), on = zip(*self.burst, strict=True)
        g1, g2, g3 = (g.double() for g in (g1, g2, g3))
        product = self.owned.of_flat(g1 * g2 + g2 * g3 + g1 * g3).numpy() / BURST
        square = self.owned.of_flat(g1 * g1 + g2 * g2 + g3 * g3).numpy() / BURST
        self.gain.add(product + (square - product) / self.epoch_steps, np.all(on, axis=0))
        self.burst = []

    def upper(self) -> NDArray:
        """Upper limit."""
        return np.maximum(self.gain.mean, 0.0) + Z * self.gain.error


class Training:
    """A small network in training, the first branch of which is gated as a whole.

    Args:
        make: Makes the optimizer.
        clip: Norm that gradients are clipped to, or None.
        keep_prob: Keep probability of the branch.
        seed: Seed of everything.
        task: The network and its data.
    """

    def __init__(
        self,
        make: Callable[[nn.Module], optim.Optimizer],
        clip: float | None,
        keep_prob: float,
        seed: int,
        task: Task = FITTING,
    ):
        torch.manual_seed(seed)
        self.model = DenseResNet(task.inputs, task.classes, blocks=2, width=16, hidden=12)
        blocks = self.model.structures()
        if not task.norms:
            blocks = without_norms(self.model, blocks)
        self.clip, self.keep_prob, self.task = clip, keep_prob, task
        self.x = torch.randn(task.examples, task.inputs)
        hidden, noise = F.relu(self.x @ torch.randn(task.inputs, 24)), torch.randn(task.examples, task.classes)
        self.y = (hidden @ torch.randn(24, task.classes) + noise).argmax(1)
        self.optimizer = make(self.model)
        self.updates = Updates(self.optimizer)
        inventory = Inventory(blocks)
        kept = np.ones(inventory.size, dtype=bool)
        an_epoch = task.examples / task.batch if task.by_epochs else None
        self.products = GradientProducts(inventory.size, 1e9, epoch_steps=an_epoch, updates=self.updates)
        self.products.attach(self.model, inventory, kept, inventory.units)
        self.owned = Owned(self.model, inventory, kept, inventory.units)
        self.before = Before(self.owned, an_epoch or math.inf)
        self.gated = np.zeros(inventory.size, dtype=bool)
        self.gated[0], self.gated[inventory.units[0]] = True, True
        self.gates = Gates(self.model, inventory)
        self.gates.install([True, False], [None] * len(inventory.places))
        self.batches, self.done = self._batches(), 0

    def _batches(self) -> Iterator[torch.Tensor]:
        while not self.task.by_epochs:
            yield torch.randint(self.task.examples, (self.task.batch,))
        while True:
            yield from torch.randperm(self.task.examples).split(self.task.batch)

    def exact(self) -> NDArray:
        """G P G at the weights and the optimizer's state of this moment, G the gradient over all data with the gate on."""
        self.gates.set(None, torch.ones(len(self.gated)))
        gradients = torch.autograd.grad(F.cross_entropy(self.model(self.x), self.y), list(self.model.parameters()))
        self.updates.read()
        found = {}
        for p, g in zip(self.model.parameters(), gradients, strict=True):
            update: Update = self.updates.of(p)
            found[p] = update.scaled(g) * g * update.rate
        return self.owned.of_flat(self.owned.flat(found)).numpy()

    def steps(self, number: int, measure: bool) -> NDArray:
        """Train; returns the mean of the exact growth over the bursts, shape (n,)."""
        truth = []
        for _ in range(number):
            place, on = self.done % EVERY, float(torch.rand(()) < self.keep_prob)
            draw = np.where(self.gated, on, 1.0)
            if measure and place == 1:
                truth.append(self.exact())
            if place == 0:
                self.products.begin(measure and self.done // EVERY % ANSWER_EVERY == 0)
            if measure and place < BURST:
                self.products.listen(weights=place == 1)
            self.gates.set(None, torch.from_numpy(draw).float())
            rows = next(self.batches)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            if measure and place < BURST:
                self.before.add(draw)
            self.optimizer.step()
            if self.products.answerable:
                self.products.answer(draw, self.probe(rows[:PROBE]).response)
            self.products.add(draw)
            self.done += 1
        return np.mean(truth, axis=0) if truth else np.zeros(len(self.gated))

    def probe(self, rows: torch.Tensor) -> Probe:
        """A probe of some examples."""

        def loss(model: nn.Module) -> torch.Tensor:
            return F.cross_entropy(model(self.x[rows]), self.y[rows])

        return Probe(self.model, self.gates, loss, len(rows), torch.Generator())


def without_norms(model: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """Take the batch norms out of a network; returns its description without them."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)}
    for name in norms:
        model.set_submodule(name, nn.Identity())
    return [
        replace(
            block,
            output=block.sites[-1].consumers[0],
            sites=tuple(
                replace(s, producers=tuple(p for p in s.producers if p not in norms), normalised=False)
                for s in block.sites
            ),
        )
        for block in blocks
    ]


def measured(name: str, keep_prob: float, windows: int, seeds: int, task: Task) -> list[str]:
    """One row: bias, relative noise and how often the limit holds, before and now."""
    make, clip = (OPTIMIZERS | STATIONARY)[name]
    found = []
    for seed in range(seeds):
        training = Training(make, clip, keep_prob, seed, task)
        training.steps(task.warm, measure=False)
        for _ in range(windows):
            pools = training.products.pools
            pools.clear(np.ones(len(training.gated), dtype=bool))
            training.before.gain.clear(np.ones(len(training.gated), dtype=bool))
            truth = training.steps(task.window, measure=True)
            by_steps, known = pools.by_displacement(0.0)
            rows = (
                training.before.gain.mean, training.before.upper(), pools.gain.mean,
                pools.gain.mean + pools.reach.mean * pools.answer.mean, pools.upper(Z), np.where(known, by_steps, np.nan),
            )  # fmt: skip
            found.append(np.array([truth, *rows])[:, training.gated])
    truth, old, old_limit, bare, new, limit, steps = np.moveaxis(np.array(found), 1, 0)
    scale = truth.mean(0)
    plain = training.updates.family.law == 0.0

    def bias(values: NDArray) -> str:
        return f"{np.median((values / scale).mean(0)):.2f}" if np.isfinite(values).all() else "-"

    def noise(values: NDArray) -> str:
        return f"{np.median((values / truth).std(0)):.2f}" if np.isfinite(values).all() else "-"

    def held(values: NDArray) -> str:
        width = np.median(values / truth)
        return f"{np.mean(values >= truth):.0%}, {f'{width:.1f}' if np.isfinite(width) else 'unknown'}"

    before = [bias(old), noise(old), held(old_limit)] if plain else ["refused", "", ""]
    both = [bias(bare), bias(new), noise(new), bias(steps), noise(steps), held(limit)]
    return [name, f"{keep_prob:g}", *(before if task.by_epochs else []), *both]


def cost(name: str, repeats: int) -> list[str]:
    """Milliseconds of two cycles of eight steps that measuring adds, of ResNet-20, and copies of the weights that it holds."""
    make, _ = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = build("resnet20", in_channels=1, classes=10)
    inventory = Inventory(model.structures())
    optimizer, kept = make(model), np.ones(inventory.size, dtype=bool)
    products = GradientProducts(inventory.size, 100.0, epoch_steps=22.5, updates=Updates(optimizer))
    products.attach(model, inventory, kept, inventory.units)
    before, gates = Before(Owned(model, inventory, kept, inventory.units), 22.5), Gates(model, inventory)
    x, y, ones = torch.randn(64, 1, 8, 8), torch.randint(10, (64,)), np.ones(inventory.size)
    weights, spent = sum(p.numel() for p in products._owned.parameters), {"plain": [], "now": [], "before": []}
    most = 0
    for _ in range(repeats):
        for how, times in spent.items():
            began = time.perf_counter()
            for step in range(ANSWER_EVERY * EVERY):
                place = step % EVERY
                listens = how == "now" and place < BURST
                if how == "now" and place == 0:
                    products.begin(answering=step == 0)
                if listens:
                    products.listen(weights=place == 1)
                F.cross_entropy(model(x), y).backward()
                if listens:
                    most = max(most, held_numbers(products))
                optimizer.step()
                if products.answerable and listens:
                    probe = Probe(
                        model, gates, lambda m: F.cross_entropy(m(x[:PROBE]), y[:PROBE]), PROBE, torch.Generator()
                    )
                    products.answer(ones, probe.response)
                if listens:
                    most = max(most, held_numbers(products))
                    products.add(ones)
                elif how == "before" and place < BURST:
                    before.add(ones)
                optimizer.zero_grad()
            times.append(time.perf_counter() - began)
    plain, new, old = (1e3 * np.min(times) for times in spent.values())
    return [name, f"{plain:.0f}", f"{old - plain:.1f}", f"{new - plain:.1f}", f"{most / weights:.1f}"]


def held_numbers(products: GradientProducts) -> int:
    """Numbers that are held between steps."""
    kept = [gradient for gradient, _ in products.burst] + products.metric + products.moved
    for found in (products._arrived, products._second, products._weights, products._stood):
        kept += found.values()
    return sum(tensor.numel() for tensor in kept)


def by_optimizer(seeds: int, quick: bool) -> Sequence[str]:
    """Lines of the tables."""
    fitting, standing, windows = FITTING, STANDING, 2
    if quick:
        fitting, standing, windows = replace(FITTING, warm=16, window=64), replace(STANDING, warm=16, window=64), 1
    names, stationary = list(OPTIMIZERS)[: 2 if quick else None], list(STATIONARY)[: 2 if quick else None]
    rows = [measured(name, theta, windows, seeds, fitting) for name in names for theta in (1.0, 0.3)]
    near = [measured(name, 1.0, windows, seeds, standing) for name in stationary]
    now = (
        "products / exact",
        "with answer / exact",
        "noise",
        "displacement / exact",
        "noise",
        "limit",
    )
    costs = [
        cost(name, 3 if quick else 25) for name in ("SGD, momentum .9", "AdamW, weight decay 1e-2") if name in names
    ]
    return [
        f"In training, where the weights move: a branch of 12 units of a network on {fitting.examples} examples, batches of "
        f"{fitting.batch} by epochs, {windows} windows of {fitting.window} steps after {fitting.warm} steps, {seeds} seeds. "
        "Exact: G P G at the weights of each burst, G the gradient over all examples with the branch on, P what the optimizer "
        "makes of it. Medians over branch and units of the mean ratio, and of its standard deviation over windows and seeds; how "
        "often the upper limit at risk .05 is above the exact value, and its median over it. Displacement is net growth, below "
        "G P G where steps undo each other.",
        "",
        markdown(("optimizer", "theta", "before / exact", "noise", "limit", *now), rows),
        "",
        f"Near stationary weights: the same network without norms on {standing.examples} examples, batches of {standing.batch}, "
        f"each drawn by itself, constant learning rates, {windows} windows of {standing.window} steps after {standing.warm}, "
        f"{seeds} seeds. Products are taken at weights that have answered to the noise of the batch before; see docs/theory.md, "
        "section 8.",
        "",
        markdown(("optimizer", "theta", *now), near),
        "",
        "Cost with ResNet-20 and batches of 64 images of 8 x 8: milliseconds of sixteen steps (the least of 25 repeats), and what "
        "measuring adds to them; copies of the weights that it holds between two steps at most.",
        "",
        markdown(("optimizer", "sixteen steps", "before", "now", "copies now"), costs),
    ]


if __name__ == "__main__":
    print("\n".join(by_optimizer(1, True)))
