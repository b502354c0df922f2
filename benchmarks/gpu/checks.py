"""Correctness on a device: gates, probes, growth, cuts, mixed precision, streams, NCCL.

The same functions are the tests of tests/test_gpu.py: on a CPU in every run of the suite, on CUDA with ``-m cuda``.
References are the CPU in float64, or the same computation done plainly on the device. Where TF32 would hide an error it is
off; the error with it is recorded beside.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.units import Finding, Place, unit
from catode.prune import selfcheck
from catode.prune.checking import PruningWarning
from catode.prune.devices.distributed import Group
from catode.prune.devices.precision import tf32
from catode.prune.gated.cut import restrict
from catode.prune.gated.gates import Gates
from catode.prune.measure.growth import GradientProducts
from catode.prune.measure.probes import Probe
from catode.prune.optimizers import Updates
from catode.prune.pruner import Pruner
from catode.structures.inventory import Inventory
from catode.train import models
from catode.train.loop.average import Average
from catode.train.models import DenseResNet

SAME = 1e-5  # relative difference of the same kernels in another order, or of double precision with parts in single
SINGLE = 0.02  # of a gradient in fp32 through ReLUs, which flip near 0, against float64; 2e-3 on a CPU
ADAPTIVE = 0.3  # the same after steps of AdamW, which divides by its square; 5e-2 on a CPU
HALF = {torch.bfloat16: 0.3, torch.float16: 0.1}  # of a gradient in half precision; 6e-2 in bfloat16 on a CPU
FEW = 12  # steps after which runs in double precision are still the same to rounding; in fp32 a ReLU that flips decides
EXACT_ESTIMATORS = dict(estimator="straight-through", layer_estimator="paired")  # these draw no random vectors


# --- parts of the checks --------------------------------------------------------------------------------------------


def network(place: Place, arch: str = "resnet20") -> nn.Module:
    """A network with random weights and norms that are not at their start, on the CPU."""
    torch.manual_seed(0)
    own = ("resnet14", 0.25) if place.smoke else (arch, 1.0)
    model = models.build(own[0], in_channels=3, classes=10, hidden_scale=own[1])
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
    return model.train()


def batch(place: Place, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    number, size = (6, 8) if place.smoke else (64, 32)
    x = torch.randn(number, 3, size, size, generator=generator)
    return x, torch.randint(10, (number,), generator=generator)


def to_device(place: Place, model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Copies on the device, channels-last."""
    own = copy.deepcopy(model).to(place.device, memory_format=torch.channels_last)
    return own, x.to(place.device).contiguous(memory_format=torch.channels_last)


def difference(found: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """Norm of the difference relative to that of what is expected; infinite where something is not finite."""
    one, other = (torch.as_tensor(t).detach().cpu().double().flatten() for t in (found, expected))
    value = float((one - other).norm() / other.norm().clamp_min(1e-300))
    return value if np.isfinite(value) else float("inf")


def gated(model: nn.Module, draw: torch.Tensor | None = None) -> Gates:
    """Gates of everything in a model, at a draw, or open."""
    inventory = Inventory(model.structures())
    gates = Gates(model, inventory)
    gates.install([True] * inventory.layers, [torch.from_numpy(units) for units in inventory.units])
    values = torch.ones(inventory.size) if draw is None else draw
    gates.set(values.to(gates.draw.device), values.to(gates.draw.device))
    return gates


def random_draw(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """Gate values 0 and 1 at random, most of them 1; shape (n,), float32, on the CPU."""
    size = Inventory(model.structures()).size
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.8).float()


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients of a model in one vector."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def passed(numbers: dict[str, Any], **limits: float) -> Finding:
    """A finding that has passed if every number named is at most its limit."""
    ok = all(numbers[name] <= limit for name, limit in limits.items())
    return Finding(ok, {**numbers, "limits": limits})


# --- gates, probes, growth ------------------------------------------------------------------------------------------


@unit("checks", "open gates change nothing", 40)
def open_gates(place: Place) -> Finding:
    """Outputs and gradients with all gates open against those of the plain network, in train mode."""
    model, (x, y) = network(place), batch(place)
    plain, x = to_device(place, model, x)
    y, other = y.to(place.device), copy.deepcopy(plain)
    gated(other)
    outputs = []
    with tf32(False):
        for net in (plain, other):
            outputs.append(net(x))
            F.cross_entropy(outputs[-1], y).backward()
    numbers = {"outputs": difference(*reversed(outputs)), "gradients": difference(gradients(other), gradients(plain))}
    return passed(numbers, outputs=SAME, gradients=SINGLE)


@unit("checks", "derivative in the gates", 40)
def gate_derivative(place: Place) -> Finding:
    """dL/dxi at a random draw against the CPU in float64: in double, in fp32 without and with TF32, and under autocast."""
    model, (x, y) = network(place), batch(place)
    draw = random_draw(model)

    def derivative(net: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        gates = gated(net, draw)
        kind = x.device.type
        with torch.autocast(kind, dtype, enabled=True) if dtype else nullcontext():
            loss = F.cross_entropy(
                net(x).to(torch.float64 if x.dtype == torch.float64 else torch.float32), y.to(x.device)
            )
        loss.backward()
        gates.remove()
        return gates.draw.grad

    expected = derivative(copy.deepcopy(model).double(), x.double())
    numbers = {"double": difference(derivative(*to_device(place, copy.deepcopy(model).double(), x.double())), expected)}
    for name, allowed in (("fp32", False), ("tf32", True)):
        with tf32(allowed):
            numbers[name] = difference(derivative(*to_device(place, model, x)), expected)
    limits = {"double": SAME, "fp32": SINGLE}
    for dtype in (torch.bfloat16, *([torch.float16] if place.cuda else [])):
        name = str(dtype).removeprefix("torch.")
        numbers[name], limits[name] = difference(derivative(*to_device(place, model, x), dtype), expected), HALF[dtype]
    return passed(numbers, **limits)


class _FixedProbe(Probe):
    """A probe whose random vectors are the same on every device."""

    def _normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(5)).to(like)


@unit("checks", "probes", 60)
def probes(place: Place) -> Finding:
    """Curvature and paired differences of a probe against the CPU in float64: in double, in fp32 without and with TF32."""
    model, (x, y) = network(place), batch(place)
    draw = random_draw(model)
    layers = len(model.structures())
    structures = [0, layers - 1, layers, layers + 1]

    def probe(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        y_here, gates = y.to(x.device), gated(net, draw)
        own = _FixedProbe(net, gates, lambda net: F.cross_entropy(net(x), y_here), len(x), torch.Generator(x.device))
        found = [own.curvature(True), own.curvature(False)[layers:], own.paired(structures)]
        gates.remove()
        return found

    expected = probe(wide := copy.deepcopy(model).double(), x.double())
    numbers, limits = {}, {}
    for suffix, net, allowed, limit in (
        (", double", wide, False, SAME),
        ("", model, False, SINGLE),
        (", tf32", model, True, None),
    ):
        with tf32(allowed):
            found = probe(*to_device(place, net, x.to(next(net.parameters()).dtype)))
        for name, one, other in zip(("curvature", "units' curvature", "paired"), found, expected, strict=True):
            numbers[name + suffix] = difference(one, other)
            limits |= {name + suffix: limit} if limit else {}
    numbers["largest error of a paired difference with tf32, nats"] = float(
        (found[2].cpu().double() - expected[2].double()).abs().max()
    )
    return passed(numbers, **limits)


@unit("checks", "growth of the benefits", 60)
def growth(place: Place) -> Finding:
    """Products of gradients, displacement and decay of six steps against the CPU in float64, with SGD and AdamW."""
    numbers = {}
    for name in ("SGD", "AdamW"):
        model = network(place)

        def sums(net: nn.Module, x: torch.Tensor, y: torch.Tensor, name: str = name) -> list[np.ndarray]:
            more = {"momentum": 0.9} if name == "SGD" else {}
            optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-4, weight_decay=0.05, **more)
            inventory, found = Inventory(net.structures()), []
            put = lambda take, *tensors: found.extend(t.detach().cpu().double().numpy() for t in tensors)  # noqa: E731
            products = GradientProducts(inventory.size, 20.0, put, 300.0, Updates(optimizer))
            products.attach(net, inventory, np.ones(inventory.size, dtype=bool), list(inventory.units))
            products.followed = 10**6
            for step in range(6):
                if step >= 2:
                    products.begin() if step == 2 else None
                    products.listen(weights=step >= 3)
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                products.add(np.ones(inventory.size))
            return found

        x, y = (part[:16] for part in batch(place))
        expected = sums(copy.deepcopy(model).double(), x.double(), y)
        for suffix, dtype in (("", torch.float32), (", double", torch.float64)):
            with tf32(False):
                own, there = to_device(place, copy.deepcopy(model).to(dtype), x.to(dtype))
                found = sums(own, there, y.to(place.device))
            numbers[name + suffix] = max(difference(a, b) for a, b in zip(found, expected, strict=True))
        numbers[f"{name}, sums compared"] = len(found)
    return passed(numbers, **{"SGD": SINGLE, "AdamW": ADAPTIVE, "SGD, double": SAME, "AdamW, double": 100 * SAME})


# --- cuts -----------------------------------------------------------------------------------------------------------


@unit("checks", "cut against gated", 60)
def cuts(place: Place) -> Finding:
    """A network with random gates at 0 against the one that is cut, fp32, and the self-check in double precision."""
    model, (x, _) = network(place), batch(place)
    own, x = to_device(place, model, x)
    checked = selfcheck.check(own, x[:1])
    inventory = Inventory(own.structures())
    kept = inventory.close(random_draw(model).numpy() > 0.5)
    small = restrict(copy.deepcopy(own), own.structures(), inventory.record(kept))
    gated(own, torch.from_numpy(kept.astype(np.float32)))
    numbers = {"double": checked.difference, "notes": list(checked.notes)}
    for allowed in (False, True):
        for mode in ("train", "eval"):
            with tf32(allowed), torch.no_grad():
                one, other = (getattr(copy.deepcopy(net), mode)()(x) for net in (small, own))
            numbers[f"{mode}{', tf32' if allowed else ''}"] = difference(one, other)
    numbers["unchecked"] = float(any("not checked" in note for note in checked.notes))
    layout = all(p.is_contiguous(memory_format=torch.channels_last) for p in small.parameters() if p.dim() == 4)
    numbers["not channels-last"] = float(not layout)
    limits = {"double": selfcheck.EXACT, "train": SINGLE, "eval": SINGLE, "unchecked": 0, "not channels-last": 0}
    return passed(numbers, **limits)


@dataclass
class Run:
    """A small network in training under a pruner, and what it left."""

    model: nn.Module
    pruner: Pruner
    thetas: np.ndarray
    skipped: int
    average: Average
    optimizer: torch.optim.Optimizer

    @property
    def removed(self) -> int:
        return int((~self.pruner.kept).sum())


def trained(
    device: str,
    steps: int,
    *,
    call: Callable[[nn.Module], Callable] = lambda model: model,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    group: Group | None = None,
    double: bool = False,
    dense: bool = False,
    every: Callable[[int], object] = lambda step: nullcontext(),
    **settings: Any,
) -> Run:
    """Train a small network with pruning; the same batches and draws on every device.

    Args:
        device: The device.
        steps: Optimizer steps.
        call: Makes what is called in training of the model, such as what ``torch.compile`` returns.
        dtype: Type of automatic mixed precision; None for none.
        scaler: Scaler of the loss.
        group: Processes.
        double: Weights and images in double precision.
        dense: A fully-connected network in place of a convolutional one.
        every: A context for each step.
        **settings: Of the pruner.
    """
    torch.manual_seed(0)
    if dense:
        model, shape = DenseResNet(192, 10, blocks=2, width=16, hidden=12), (3, 8, 8)
    else:
        model, shape = models.build("resnet14", in_channels=3, classes=10, hidden_scale=0.5), (3, 8, 8)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 32, *shape, generator=generator)
    y = (x.mean((2, 3, 4)) * 40).long().clamp(-4, 4) + 4
    wide = torch.float64 if double else torch.float32
    model = model.to(device, wide, memory_format=torch.channels_last).train()
    x, y = x.to(device, wide), y.to(device)
    average = Average(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    given = dict(nu=12.0, steps=10**4, memory=10, check_every=10, read_every=5, rate_ratio=0.2, initial_keep_prob=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        pruner = Pruner(model, x[0, :1], optimizer=optimizer, group=group, **{**given, **settings})
    pruner.on_cut(average.cut)
    called, thetas, skipped = call(model), [], 0
    kind = torch.device(device).type
    for step in range(steps):
        with every(step):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, dtype) if dtype else nullcontext():
                loss = F.cross_entropy(called(x[step % 16]).to(wide), y[step % 16])
            scale, before = 1.0, 1.0
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scale = before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
            pruner.group.join(model.parameters(), loss, checksum=1, step=step)
            average.update(step + 1)
            skipped += scaler is not None and scaler.get_scale() < before
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PruningWarning)
                pruner.step(grad_scale=scale)
            thetas.append(pruner.keep_prob.copy())
    return Run(model, pruner, np.array(thetas), skipped, average, optimizer)


def apart(one: Run, other: Run) -> float:
    """Largest difference of two runs' thetas in their first `FEW` steps."""
    return float(np.abs(one.thetas[:FEW] - other.thetas[:FEW]).max())


def sound(run: Run) -> dict[str, float]:
    """What must hold of any run: 0 where it does."""
    model, pruner = run.model, run.pruner
    counted = pruner.complexity.params(pruner.kept.astype(float))
    buffers = [s.get("momentum_buffer") for s in run.optimizer.state.values()]
    shapes = [p.shape for group in run.optimizer.param_groups for p in group["params"] if p in run.optimizer.state]
    own = [tensor.shape for tensor in model.state_dict().values()]
    return {
        "parameters not as counted": abs(sum(p.numel() for p in model.parameters()) - round(counted)),
        "optimizer state of other shapes": float([b.shape for b in buffers if b is not None] != shapes),
        "average of other shapes": float([t.shape for t in run.average.model.state_dict().values()] != own),
        "weights not finite": float(not all(t.isfinite().all() for t in model.state_dict().values())),
        "thetas not finite": float(not np.isfinite(run.thetas).all()),
    }


@unit("checks", "pruning", 60)
def pruning(place: Place) -> Finding:
    """A run until structures are removed, with deferred reads; first thetas against those of the CPU, in double precision."""
    steps = 60 if place.smoke else 150
    with tf32(False):
        run = trained(place.device, steps, **EXACT_ESTIMATORS)
        few, expected = (trained(where, FEW, double=True, **EXACT_ESTIMATORS) for where in (place.device, "cpu"))
    other = trained(place.device, steps)
    numbers = {"thetas": apart(few, expected), "moved": float((expected.thetas < 0.9).any())}
    numbers |= {"thetas, fp32": apart(run, expected), "removed": run.removed, "removed with curvature": other.removed}
    for one in (run, other):
        one.pruner.finish()
    whole = {
        f"{name}{more}": value
        for one, more in ((run, ""), (other, ", curvature"))
        for name, value in sound(one).items()
    }
    found = passed(numbers | whole, thetas=1e-3, **dict.fromkeys(whole, 0.0))
    return Finding(found.passed and run.removed > 0 and numbers["moved"] > 0, found.numbers)


# --- mixed precision ------------------------------------------------------------------------------------------------


@unit("checks", "bf16", 40)
def bf16(place: Place) -> Finding:
    """A run under bf16 autocast."""
    run = trained(place.device, 40 if place.smoke else 100, dtype=torch.bfloat16)
    run.pruner.finish()
    state_of = sound(run)
    found = passed({"removed": run.removed, **state_of}, **dict.fromkeys(state_of, 0.0))
    return Finding(found.passed and (run.thetas < 0.9).any().item(), found.numbers)


@unit("checks", "fp16 with a gradient scaler", 60)
def fp16(place: Place) -> Finding:
    """A run under fp16 autocast whose loss scale is too high at first: skipped steps leave no trace in time and thetas."""
    scaler = torch.amp.GradScaler(torch.device(place.device).type, init_scale=2.0**40, growth_interval=10**6)
    run = trained(place.device, 100, dtype=torch.float16, scaler=scaler, dense=place.smoke)
    state, per_step = run.pruner.state, 0.05 / (1 - 0.9)
    numbers = {"skipped": run.skipped, "scale at the end": scaler.get_scale(), "removed": run.removed}
    numbers["time of skipped steps"] = abs(state.time / per_step - (state.done - run.skipped))
    run.pruner.finish()
    state_of = sound(run)
    found = passed(numbers | state_of, **dict.fromkeys(state_of, 0.0), **{"time of skipped steps": 1e-6})
    return Finding(found.passed and run.skipped > 0 and bool((run.thetas < 0.9).any()), found.numbers)


# --- streams, waiting, memory ---------------------------------------------------------------------------------------


@unit("checks", "a stream of its own", 40, needs_cuda=True)
def stream(place: Place) -> Finding:
    """Thetas of a run on a stream that is not the default one."""
    with tf32(False):
        expected = trained(place.device, FEW, double=True, **EXACT_ESTIMATORS)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run = trained(place.device, FEW, double=True, **EXACT_ESTIMATORS)
        side.synchronize()
    numbers = {"thetas": apart(run, expected)}
    return passed(numbers, thetas=1e-3)


@unit("checks", "the host waits only to read", 40, needs_cuda=True)
def waits(place: Place) -> Finding:
    """Synchronisations of the host in the steps between readings, as CUDA's debug mode tells them; there should be none."""
    told: list[list[str]] = []

    @contextmanager
    def watched(step: int) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        told.append([f"{one.filename}:{one.lineno}" for one in found if "synchroniz" in str(one.message)])

    trained(place.device, 30, every=watched, check_every=10**4)
    # the first step checks the loss and finds out its kind; every fifth reads
    between = [line for number, lines in enumerate(told, 1) if number > 4 and number % 5 for line in lines]
    reading = [len(lines) for number, lines in enumerate(told, 1) if number > 4 and number % 5 == 0]
    numbers = {"between readings": len(between), "in a reading": max(reading), "where": sorted(set(between))[:5]}
    return passed(numbers, **{"between readings": 0})


@unit("checks", "memory stays", 40, needs_cuda=True)
def memory(place: Place) -> Finding:
    """Memory in use after many steps against after few, with all measurements and no removal."""
    used = {}

    @contextmanager
    def noted(step: int) -> Iterator[None]:
        yield
        if step in (29, 109):
            torch.cuda.synchronize()
            used[step] = torch.cuda.memory_allocated()

    trained(place.device, 110, every=noted, check_every=10**4)
    return passed({"growth, bytes": used[109] - used[29], "in use, bytes": used[109]}, **{"growth, bytes": 2**20})


# --- several processes ----------------------------------------------------------------------------------------------


class _Never(int):
    """1, but equal to no number: a `Group` of this size communicates although it is alone."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@unit("checks", "process group of one", 60)
def process_group(place: Place) -> Finding:
    """Every collective operation of a run over NCCL (gloo on a CPU) with one process: thetas are those without a group."""
    if not dist.is_available():
        raise RuntimeError("PyTorch was built without torch.distributed")
    with tf32(False):
        expected = trained(place.device, FEW, double=True, **EXACT_ESTIMATORS)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine without network may not know its own name
        backend = "cpu:gloo,cuda:nccl" if place.cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            alone = Group(0, _Never(1), 0)
            run = trained(place.device, FEW, group=alone, double=True, **EXACT_ESTIMATORS)
            alone.settle(run.model)
            sums = alone.sum(torch.arange(5.0, device=place.device)).tolist()
            things = alone.gather({"a": 1})
        finally:
            dist.destroy_process_group()
    numbers = {"thetas": apart(run, expected), "backend": backend}
    found = passed(numbers, thetas=1e-3)
    return Finding(found.passed and sums == [0, 1, 2, 3, 4] and things == [{"a": 1}], found.numbers)
