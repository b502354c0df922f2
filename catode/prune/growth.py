"""Squared gradient norms of every structure, from the products of gradients of different batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.decisions.evidence import Pool
from catode.prune.transfer import at_once, exact, upload
from catode.structures.description import Block


class GradientProducts:
    """Unbiased squared gradient norms of every structure from products of *different* batches.

    ``g_t . g_{t+1}`` of two independent batches has mean |grad L|^2, while |g_t|^2 would contain the noise. ``w . g``
    gives the decay of the benefit.

    Args:
        size: Number of structures.
        window: Memory of the pools, in bursts of three steps.
        put: What to do with a function and the tensors of the device whose numbers it wants; see `catode.prune.transfer`.
    """

    def __init__(self, size: int, window: float, put: Callable[..., None] = at_once):
        self.size, self._put = size, put
        self.gain, self.weight_gradient = Pool(size, window), Pool(size, window)
        self._parameters: list[nn.Parameter] = []
        self._layers: list[tuple[int, slice]] = []
        self._axes: list[list[tuple[int, torch.Tensor]]] = []
        self.begin()

    def attach(self, model: nn.Module, blocks: Sequence[tuple[int, Block]], units: Sequence[Sequence[NDArray]]) -> None:
        """Learn which weight belongs to which structures. The model must be plain at this moment.

        Args:
            model: The network.
            blocks: The blocks that are still there, with their layer's number.
            units: For each of them and each of its sites, the numbers of the units now present.
        """
        self._parameters, self._layers, self._axes, start = [], [], [], 0
        self.begin()
        for (number, block), present in zip(blocks, units, strict=True):
            numbers = [upload(torch.from_numpy(a), next(model.parameters()).device) for a in present]
            for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
                if any(name == f or name.startswith(f + ".") for f in block.fixed):
                    continue
                for key, parameter in sorted(module.named_parameters(recurse=False)):  # gates change the order
                    axes = [(0, own) for site, own in zip(block.sites, numbers, strict=True) if name in site.producers]
                    if key == "weight":
                        axes += [
                            (1, own) for site, own in zip(block.sites, numbers, strict=True) if name in site.consumers
                        ]
                    self._parameters.append(parameter)
                    self._axes.append(axes)
            stop = sum(p.numel() for p in self._parameters)
            self._layers.append((number, slice(start, stop)))
            start = stop

    def begin(self) -> None:
        """Begin a burst of three steps."""
        self._burst: list[tuple[torch.Tensor, NDArray, NDArray]] = []
        self._weights: torch.Tensor | None = None

    def state(self) -> dict:
        """Everything remembered, the burst under way included."""
        return {
            "gain": self.gain.state(),
            "weight_gradient": self.weight_gradient.state(),
            "burst": [[gradient.cpu(), *map(torch.from_numpy, marks)] for gradient, *marks in self._burst],
            "weights": None if self._weights is None else self._weights.cpu(),
        }

    def restore(self, state: dict) -> None:
        """Take up a `state`; the network must be attached as it was then."""
        self.gain.restore(state["gain"])
        self.weight_gradient.restore(state["weight_gradient"])
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._burst = [(upload(g, device), *(mark.numpy() for mark in marks)) for g, *marks in state["burst"]]
        self._weights = None if state["weights"] is None else upload(state["weights"], device)

    def note_weights(self) -> None:
        """Remember the weights that the next step's gradient is taken at; call it after the optimizer's step."""
        if self._parameters:
            self._weights = torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def add(self, draw: NDArray) -> None:
        """Take in the gradients of one step, after the optimizer's; call it on three steps close to each other.

        Args:
            draw: Gate values of the step (their means over the batch, for gates of single examples), shape (n,). The
                gradient of a gated weight carries its gate, which is divided out.
        """
        if not self._parameters or any(p.grad is None for p in self._parameters):
            return
        on = draw > 0.5
        scale = np.where(on, draw, 1.0)
        gradient = torch.cat([p.grad.reshape(-1) for p in self._parameters])
        wide = exact(gradient.device)
        if self._weights is not None:
            take = partial(self._take, self.weight_gradient, on, 1.0, [scale])
            self._put(take, self._sum(self._weights.to(wide) * gradient.to(wide)))
            self._weights = None
        self._burst.append((gradient, on, scale))
        if len(self._burst) == 3:
            gradients, (on1, on2, on3), (s1, s2, s3) = zip(*self._burst, strict=True)
            g1, g2, g3 = (g.to(wide) for g in gradients)
            take = partial(self._take, self.gain, on1 & on2 & on3, 3.0)
            if all((s == 1.0).all() for s in (s1, s2, s3)):
                self._put(partial(take, [1.0]), self._sum(g1 * g2 + g2 * g3 + g1 * g3))
            else:
                scales = [s1 * s2, s2 * s3, s1 * s3]
                self._put(partial(take, scales), *map(self._sum, (g1 * g2, g2 * g3, g1 * g3)))
            self._burst = []

    def _take(
        self, pool: Pool, seen: NDArray[np.bool_], number: float, scales: Sequence[NDArray], *sums: NDArray
    ) -> None:
        """Pool the mean of `number` products; a gradient that overflowed tells nothing."""
        values = sum(part / scale for part, scale in zip(sums, scales, strict=True)) / number
        pool.add(values, seen & np.isfinite(values))

    def _sum(self, products: torch.Tensor) -> torch.Tensor:
        """Sums over the weights of each structure, shape (n,); in the same order every time."""
        sums = products.new_zeros(self.size)
        for number, weights in self._layers:
            sums[number] = products[weights].sum()
        parts = products.split([p.numel() for p in self._parameters])
        for part, parameter, axes in zip(parts, self._parameters, self._axes, strict=True):
            for axis, numbers in axes:
                other = [k for k in range(parameter.dim()) if k != axis]
                sums.index_add_(0, numbers, part.view(parameter.shape).sum(other) if other else part)
        return sums
