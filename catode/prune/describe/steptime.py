"""Prices by measured time: what a training step on this device spends in every layer, as a function of its widths.

Forward and backward pass of each layer inside a residual block are timed on a small grid of the widths that can change.
Between the grid's points times are interpolated bilinearly, down to 0 at width 0; `MeasuredComplexity` evaluates them
at the expected widths. A measured table need not grow with the widths, because of noise and because devices run some
widths faster; isotonic regression along one axis, then along the other (which keeps what the first did), makes it
non-decreasing, so that no price is negative. On a GPU the time of a small layer is that of its launch, which overlaps
with others' work in a real step; the table does not include that.
"""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from catode import _checksums
from catode._validate import check_interval
from catode.prune.describe.costs import in_width, inference, out_width
from catode.prune.devices.timing import passing_ms
from catode.structures.complexity import Complexity, Term

FILE = "latency_table.csv"
FIELDS = ("layer", "inner", "outer", "measured_ms", "ms")
GRID = 4  # widths measured for each side that can change: a quarter, half, three quarters, all
ROUNDS = 5  # times that every point is measured, in turns


@dataclass(frozen=True)
class Table:
    """Step time of one layer over its widths.

    Args:
        layer: Path of the module.
        inner: Input widths measured, ascending; one number where that width is fixed (0 for a norm, which has none).
        outer: Output widths measured.
        measured: Times, milliseconds, shape (len(inner), len(outer)).
    """

    layer: str
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    measured: NDArray[np.float64]

    @property
    def ms(self) -> NDArray[np.float64]:
        """The times, non-decreasing along both axes."""
        from sklearn.isotonic import isotonic_regression  # half a second, for these prices alone

        smooth = np.maximum(self.measured, 0.0)
        for axis in (0, 1):
            smooth = np.apply_along_axis(isotonic_regression, axis, smooth)
        return smooth


class MeasuredComplexity(Complexity):
    """The complexity index J with measured step times in place of MACs; parameters are weighted as usual.

    J is ``(1 - beta) T / T_0 + beta P / P_0`` with ``T = sum over layers of theta_block * time(N_inner, N_outer)`` at the
    expected widths. Counts (`macs`, `params`) are unchanged. At a point of the grid the slope is that below it, the time
    which the next removal saves.

    Args:
        plain: The network's complexity polynomial.
        tables: Times of every layer in `timed_terms`, in that order.

    Attributes:
        removable_ms: T_0, step time of all layers in blocks together.
    """

    def __init__(self, plain: Complexity, tables: Sequence[Table]):
        super().__init__(plain.terms, plain.inventory)
        terms, none = timed_terms(plain), len(plain.inventory.widths)
        self._t_block = np.array([t.block for t in terms])
        self._t_site = np.array([[none if s is None else s for s in (t.inner, t.outer)] for t in terms]).T
        nodes, values = zip(*(_spread(*pair) for pair in zip(terms, tables, strict=True)), strict=True)
        self._nodes, self._values = np.stack(nodes, 1), np.stack(values)
        gate, times, _ = self._times(np.ones(self.size))
        self.removable_ms = float(gate @ times)
        if not self.removable_ms > 0.0:
            raise ValueError("`tables` must hold a positive time; got none above 0. Measure again.")

    def index(self, theta: ArrayLike, beta: float) -> float:
        check_interval("beta", beta, 0.0, 1.0)
        gate, times, _ = self._times(self._check(theta))
        return float((1.0 - beta) * (gate @ times) / self.removable_ms + beta * super().index(theta, 1.0))

    def gradient(self, theta: ArrayLike, beta: float) -> NDArray[np.float64]:
        check_interval("beta", beta, 0.0, 1.0)
        gate, times, slopes = self._times(self._check(theta))
        n = len(self.inventory.widths)
        layers = np.bincount(self._t_block, times, self.inventory.layers)
        sites = sum(np.bincount(self._t_site[axis], gate * slopes[axis], n + 1)[:n] for axis in (0, 1))
        gradient = np.concatenate([layers, sites[self.inventory.unit_site]]) / self.removable_ms
        return (1.0 - beta) * gradient + (beta * super().gradient(theta, 1.0) if beta else 0.0)

    def _times(self, theta: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """For every layer: its block's theta, its time at the expected widths, both (layers,), and the slopes, (2, layers)."""
        gate, width = self._factors(theta)
        x = width[self._t_site]
        cell = np.minimum((self._nodes[:, :, 1:] < x[:, :, None]).sum(2), GRID - 1)
        low, high = (np.take_along_axis(self._nodes, (cell + k)[:, :, None], 2)[:, :, 0] for k in (0, 1))
        at = (x - low) / (high - low)
        rows = np.arange(len(self._values))
        corner = [[self._values[rows, cell[0] + i, cell[1] + j] for j in (0, 1)] for i in (0, 1)]
        lower, upper = ((1.0 - at[1]) * corner[i][0] + at[1] * corner[i][1] for i in (0, 1))
        left, right = ((1.0 - at[0]) * corner[0][j] + at[0] * corner[1][j] for j in (0, 1))
        slopes = np.stack([upper - lower, right - left]) / (high - low)
        return gate[self._t_block], (1.0 - at[0]) * lower + at[0] * upper, slopes


def timed_terms(plain: Complexity) -> list[Term]:
    """One term for each layer of the removable part, whose sites say which of its widths can change.

    Raises:
        ValueError: if units are not whole channels of plain layers in branches, whose times these tables could tell.
    """
    odd = next((p for p in plain.inventory.places if p.site.parts or not p.block.removable), None)
    if odd is not None:
        kind = "is described by `parts`" if odd.site.parts else "lies in no branch"
        raise ValueError(
            f"step times (`step_times`, `cost` latency) must be of channels of plain layers in branches; site `{odd.site.name}` "
            f"{kind}. Price by MACs."
        )
    found: dict[str, Term] = {}
    for term in plain.terms:
        if term.block is not None:
            found.setdefault(term.name, term)
    return list(found.values())


def _spread(term: Term, table: Table) -> tuple[NDArray, NDArray]:
    """Nodes, shape (2, GRID + 1), and times on them, shape (GRID + 1, GRID + 1), of one table; 0 at width 0.

    A fixed width is a factor 1 in the polynomial, so its axis runs linearly from 0 to 1.
    """
    values, nodes = table.ms, []
    for axis, (site, widths) in enumerate(((term.inner, table.inner), (term.outer, table.outer))):
        if site is None:
            ramp = np.linspace(0.0, 1.0, GRID + 1)
            nodes.append(ramp)
            values = np.multiply.outer(ramp[1:], values[0]) if axis == 0 else np.multiply.outer(values[:, 0], ramp[1:])
        else:
            more = GRID - len(widths)  # a site with fewer units than that has nodes that are never reached
            nodes.append(np.concatenate([[0], widths, widths[-1] + 1 + np.arange(more)]))
            values = np.pad(values, [(0, more if a == axis else 0) for a in (0, 1)], mode="edge")
    return np.stack(nodes), np.pad(values, ((1, 0), (1, 0)))


def grid(width: int) -> tuple[int, ...]:
    """Widths at which a layer is measured."""
    return tuple(sorted({-(-width * k // GRID) for k in range(1, GRID + 1)}))


def measure(
    model: nn.Module,
    plain: Complexity,
    example: torch.Tensor,
    *,
    batch: int,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
) -> list[Table]:
    """Time forward and backward pass of every layer of the removable part over its widths, on the model's device.

    Args:
        model: The whole, ungated network.
        plain: Its complexity polynomial.
        example: One input batch on the device; its shape behind the first dimension is used.
        batch: Images in a step.
        amp: Type of automatic mixed precision in which steps are made; None for none.
        channels_last: Memory format of the activations.

    Returns:
        A table for each of `timed_terms`; layers that are alike share their times. Of the rounds, in which the points take
        turns, the least time counts, because other load only adds to it.
    """
    modules, shapes = dict(model.named_modules()), _input_shapes(model, example)
    cases: dict[tuple, tuple[nn.Module, list[float]]] = {}
    layers = []
    for term in timed_terms(plain):
        module = modules[term.name]
        inner, outer = _widths(module, term, plain)
        keys = [(_kind(module), shapes[term.name], i, o) for i, o in product(inner, outer)]
        for key in keys:
            cases.setdefault(key, (module, []))
        layers.append((term.name, inner, outer, keys))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.random.fork_rng([example.device] if example.device.type == "cuda" else []):
        for _ in range(ROUNDS):
            for (_, shape, i, o), (module, times) in cases.items():
                channels = i * getattr(module, "groups", 1) or o
                times.append(_step_ms(_resized(module, i, o), (batch, channels, *shape), example.device, amp, layout))
    least = {key: min(times) for key, (_, times) in cases.items()}
    return [
        Table(name, inner, outer, np.reshape([least[key] for key in keys], (len(inner), len(outer))))
        for name, inner, outer, keys in layers
    ]


def text(tables: Sequence[Table]) -> str:
    """Tables as CSV, one row for each point: what was measured and what is used."""
    file = io.StringIO(newline="")
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(FIELDS)
    for t in tables:
        for (i, inner), (o, outer) in product(enumerate(t.inner), enumerate(t.outer)):
            rows.writerow([t.layer, inner, outer, repr(float(t.measured[i, o])), repr(float(t.ms[i, o]))])
    return file.getvalue()


def read(path: Path, model: nn.Module, plain: Complexity) -> list[Table]:
    """The tables of a file that holds a `text`, exactly.

    Raises:
        ValueError: if the file is not there, damaged, or of another network.
    """
    modules = dict(model.named_modules())
    if path.is_file():
        with path.open("rb") as stream:
            _checksums.check(path, stream)
    try:
        with path.open(newline="") as file:
            found = {
                (r["layer"], int(r["inner"]), int(r["outer"])): float(r["measured_ms"]) for r in csv.DictReader(file)
            }
        tables = []
        for term in timed_terms(plain):
            inner, outer = _widths(modules[term.name], term, plain)
            times = np.array([[found.pop((term.name, i, o)) for o in outer] for i in inner])
            tables.append(Table(term.name, inner, outer, times))
        if found or not all(np.isfinite(t.measured).all() for t in tables):
            raise ValueError("it has other rows")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"`resume` must name a run with the {FILE} that it started with; got {str(path)!r} and {error}. Restore the file."
        ) from error
    return tables


def _widths(module: nn.Module, term: Term, plain: Complexity) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output widths at which a layer is measured."""
    return tuple(
        (full,) if site is None else grid(int(plain.inventory.widths[site]))
        for full, site in ((in_width(module), term.inner), (out_width(module), term.outer))
    )


def _kind(module: nn.Module) -> tuple:
    """Key of everything that a layer's time depends on beside its widths and its input."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    return (type(module), module.bias is not None, *(getattr(module, name, None) for name in names))


def _input_shapes(model: nn.Module, example: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of every layer's input behind batch and channels."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: shapes.__setitem__(name, tuple(args[0].shape[2:])))
        for name, module in model.named_modules()
    ]
    with inference(model):
        model(example)
    for hook in hooks:
        hook.remove()
    return shapes


def _resized(module: nn.Module, inner: int, outer: int) -> nn.Module:
    """A fresh layer like `module` of other widths."""
    if isinstance(module, nn.modules.conv._ConvNd):
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        more = {name: getattr(module, name) for name in names}
        return type(module)(inner * module.groups, outer, bias=module.bias is not None, **more)
    if isinstance(module, nn.Linear):
        return nn.Linear(inner, outer, bias=module.bias is not None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return type(module)(outer)
    return copy.deepcopy(module)


def _step_ms(
    layer: nn.Module, shape: tuple[int, ...], device: torch.device, amp: torch.dtype | None, layout: torch.memory_format
) -> float:
    """Time of one forward and backward pass through a layer in train mode, after one to warm up, milliseconds."""
    layer = layer.to(device, memory_format=layout).train()
    x = torch.randn(shape, device=device, dtype=amp or torch.float32)
    x = (x.contiguous(memory_format=layout) if x.dim() == 4 else x).requires_grad_()

    def work() -> None:
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            y = layer(x)
        y.backward(y.detach())

    return min([passing_ms(work, device) for _ in range(3)][1:])
