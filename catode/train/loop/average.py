"""Exponential moving average of a network's weights while it is trained and cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from catode.prune.gated.network import Cut


class Average:
    """Moving average of the weights of a network without its gates, in a plain copy that is cut as the network is.

    After step n, counted from 1, ``average <- d average + (1 - d) weights`` with ``d = min(decay, n / (n + 9))``, so that
    the initial weights are soon forgotten. Floating-point buffers, the running statistics of batch norms, are averaged like
    weights; other buffers are copied. While gates are in place the statistics are those under random gates, in the average
    as in the network itself.

    Args:
        model: The plain network, before any gate is installed.
        decay: Limit of d, in (0, 1).

    Attributes:
        model: The averaged copy, without gates.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self._live, self._decay = copy.deepcopy(model), model, decay
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(self, cut: Cut) -> None:
        """Follow a cut of the network (`catode.prune.pruner.Pruner.on_cut`)."""
        cut.apply(self.model)
        self._pairs = []  # parameters and buffers are new objects

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step.

        Args:
            step: Its number, from 1.
        """
        decay = self._share(step)
        wide = [pair for pair in self._matched() if pair[0].is_floating_point()]
        averages, lives = zip(*wide, strict=True)
        torch._foreach_lerp_(averages, lives, 1.0 - decay)
        for average, live in self._matched():
            if not average.is_floating_point():
                average.copy_(live)

    def _share(self, step: int) -> float:
        """Share of the average that a step leaves of what it was."""
        return min(self._decay, step / (step + 9))

    def older(self, step: int, now: int) -> float:
        """Share of the average after step `now` that is of the weights after `step` and before."""
        return math.prod(map(self._share, range(step + 1, now + 1)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside this context, and no others; not for training."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for average, live in self._matched():
            average.data, live.data = live.data, average.data

    def _matched(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor of the average with that of the network."""
        if not self._pairs:
            live = _tensors(self._live)
            self._pairs = [(tensor, live[name]) for name, tensor in _tensors(self.model).items()]
        return self._pairs


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, the objects themselves."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
