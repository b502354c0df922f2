"""What training tells about every structure: pooled means with confidence limits, gradient products, drift.

Numbers of structures are those of `catode.complexity`; arrays have shape (n,). Everything forgets exponentially, because
the network changes while it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.train.structure import Block


class Pool:
    """Exponentially weighted mean and variance of repeated observations of n quantities.

    Args:
        size: Number of quantities.
        window: Observations after which a weight has fallen to 1/e, one number or shape (n,).
    """

    def __init__(self, size: int, window: float | NDArray):
        self._forget = 1.0 - 1.0 / window
        self._w, self._w2, self._s, self._s2 = np.zeros((4, size))

    def state(self) -> torch.Tensor:
        """Everything remembered, shape (4, n)."""
        return torch.from_numpy(np.stack([self._w, self._w2, self._s, self._s2]))

    def restore(self, state: torch.Tensor) -> None:
        """Take up a `state`."""
        self._w, self._w2, self._s, self._s2 = state.numpy().copy()

    def add(self, values: NDArray, seen: NDArray[np.bool_]) -> None:
        """Take in one observation of each quantity in `seen`."""
        for total, value in ((self._w, 1.0), (self._s, values), (self._s2, np.square(values))):
            np.copyto(total, self._forget * total + value, where=seen)
        np.copyto(self._w2, self._forget**2 * self._w2 + 1.0, where=seen)

    @property
    def count(self) -> NDArray:
        """Effective number of observations, at most about twice the window."""
        return np.divide(self._w**2, self._w2, out=np.zeros_like(self._w), where=self._w2 > 0)

    @property
    def weight(self) -> NDArray:
        """Memory in observations: as many as were seen at first, the window in the end."""
        return self._w

    @property
    def mean(self) -> NDArray:
        """Weighted mean; 0 where nothing was seen."""
        return np.divide(self._s, self._w, out=np.zeros_like(self._w), where=self._w > 0)

    @property
    def variance(self) -> NDArray:
        """Variance of one observation; infinite below two effective observations."""
        count = self.count
        spread = np.divide(self._s2, self._w, out=np.zeros_like(self._w), where=self._w > 0) - self.mean**2
        enough = count > 1.5
        return np.where(enough, np.maximum(spread, 0.0) * count / np.maximum(count - 1.0, 0.5), np.inf)

    @property
    def error(self) -> NDArray:
        """Standard error of the mean, observations taken as independent; infinite where unknown."""
        return np.sqrt(self.variance / np.maximum(self.count, 1e-12))


class GradientProducts:
    """Unbiased squared gradient norms of every structure from products of *different* batches.

    ``g_t . g_{t+1}`` of two independent batches has mean |grad L|^2, while |g_t|^2 would contain the noise. ``w . g``
    gives the decay of the benefit.

    Args:
        size: Number of structures.
        window: Memory of the pools, in bursts of three steps.
    """

    def __init__(self, size: int, window: float):
        self.size = size
        self.gain, self.weight_gradient = Pool(size, window), Pool(size, window)
        self._parameters: list[nn.Parameter] = []
        self._owners: list[NDArray[np.int64]] = []
        self.begin()

    def attach(self, model: nn.Module, blocks: Sequence[tuple[int, Block]], units: Sequence[Sequence[NDArray]]) -> None:
        """Learn which weight belongs to which structures. The model must be plain at this moment.

        Args:
            model: The network.
            blocks: The blocks that are still there, with their layer's number.
            units: For each of them and each of its sites, the numbers of the units now present.
        """
        self._parameters, parts = [], []
        self.begin()
        for (number, block), present in zip(blocks, units, strict=True):
            roots = [
                (name, module) for name, module in model.get_submodule(block.name).named_modules(prefix=block.name)
            ]
            for name, module in roots:
                if any(name == f or name.startswith(f + ".") for f in block.fixed):
                    continue
                for key, parameter in sorted(module.named_parameters(recurse=False)):  # gates change the order
                    owners = np.full((3, *parameter.shape), self.size)
                    owners[0] = number
                    for site, numbers in zip(block.sites, present, strict=True):
                        tail = (1,) * (parameter.dim() - 1)
                        if name in site.producers:
                            owners[1] = numbers.reshape(-1, *tail)
                        if name in site.consumers and key == "weight":
                            owners[2] = numbers.reshape(1, -1, *tail[1:])
                    self._parameters.append(parameter)
                    parts.append(owners.reshape(3, -1))
        self._owners = list(np.concatenate(parts, axis=1)) if parts else []

    def begin(self) -> None:
        """Begin a burst of three steps in a row."""
        self._burst, self._weights = [], None

    def state(self) -> dict:
        """Everything remembered, the burst under way included."""
        return {
            "gain": self.gain.state(),
            "weight_gradient": self.weight_gradient.state(),
            "burst": [[torch.from_numpy(a) for a in part] for part in self._burst],
            "weights": None if self._weights is None else torch.from_numpy(self._weights),
        }

    def restore(self, state: dict) -> None:
        """Take up a `state`; the network must be attached as it was then."""
        self.gain.restore(state["gain"])
        self.weight_gradient.restore(state["weight_gradient"])
        self._burst = [tuple(a.numpy() for a in part) for part in state["burst"]]
        self._weights = None if state["weights"] is None else state["weights"].numpy()

    def add(self, draw: NDArray) -> None:
        """Take in the gradients of one step, after the optimizer's; call it on three steps in a row.

        Args:
            draw: Gate values of the step (their means over the batch, for gates of single examples), shape (n,). The
                gradient of a gated weight carries its gate, which is divided out.
        """
        if not self._parameters or any(p.grad is None for p in self._parameters):
            return
        on = draw > 0.5
        scale = np.where(on, draw, 1.0)
        gradient = torch.cat([p.grad.reshape(-1) for p in self._parameters]).double().cpu().numpy()
        if self._weights is not None:  # those that this gradient was taken at
            self.weight_gradient.add(self._sum(self._weights * gradient) / scale, on)
            self._weights = None
        self._burst.append((gradient, on, scale))
        if len(self._burst) == 1:
            self._weights = torch.cat([p.detach().reshape(-1) for p in self._parameters]).double().cpu().numpy()
        if len(self._burst) == 3:
            (g1, on1, s1), (g2, on2, s2), (g3, on3, s3) = self._burst
            products = self._sum(g1 * g2) / (s1 * s2) + self._sum(g2 * g3) / (s2 * s3) + self._sum(g1 * g3) / (s1 * s3)
            self.gain.add(products / 3.0, on1 & on2 & on3)
            self._burst = []

    def _sum(self, products: NDArray) -> NDArray:
        return sum(np.bincount(owner, products, self.size + 1) for owner in self._owners)[: self.size]
