"""Norms of the blocks' weights, which the theorems take as bounded, and the Lipschitz assumption held against measurements.

Source: docs/mathematics.md section 4.1: ``|grad L1| <= eta`` and ``|b(w)| <= kappa |w|`` with ``kappa <= eta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.decisions.limits import Limits
from catode.prune.describe.protocol import branch
from catode.structures.description import Block


@dataclass(eq=False)
class Bounds:
    """Largest values seen at the checks of a run, of every layer.

    Args:
        layers: Number of layers.

    Attributes:
        norm: Norm of the weights of the block's branch, shape (layers,).
        violation: Benefit's lower limit over the norm times the upper limit of the gradient's norm, shape (layers,). Above 1,
            the benefit is larger than gradients as they are now could make it on the way from 0 weights.
    """

    layers: InitVar[int]
    norm: NDArray = field(init=False)
    violation: NDArray = field(init=False)

    def __post_init__(self, layers: int) -> None:
        self.norm, self.violation = np.zeros(layers), np.zeros(layers)

    def see(self, model: nn.Module, blocks: Sequence[Block], kept: NDArray[np.bool_], limits: Limits) -> None:
        """Take a check into account.

        Args:
            model: The network.
            blocks: Its description.
            kept: Structures in the network, shape (n,).
            limits: Measured quantities.
        """
        number = len(blocks)
        now, found = norms(model, blocks, with_branch(model, blocks, kept)), np.zeros(number)
        standing = np.flatnonzero(with_branch(model, blocks, kept))
        if not len(standing):
            return
        found[standing] = torch.stack(now).double().cpu().numpy()
        self.norm = np.maximum(self.norm, found)
        gain, benefit = limits.gain[:number], limits.benefit_lower[:number]
        known = (found > 0) & np.isfinite(gain) & (gain > 0) & np.isfinite(benefit)
        ratio = np.divide(
            np.maximum(benefit, 0.0), found * np.sqrt(np.where(known, gain, 1.0)), where=known, out=np.zeros(number)
        )
        self.violation = np.maximum(self.violation, ratio)


def with_branch(model: nn.Module, blocks: Sequence[Block], kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Blocks in the network whose branch has parameters, shape (layers,)."""
    return np.array([bool(kept[n]) and bool(branch(model, block)) for n, block in enumerate(blocks)], dtype=bool)


@torch.no_grad()
def norms(model: nn.Module, blocks: Sequence[Block], kept: NDArray[np.bool_]) -> list[torch.Tensor]:
    """Norm of the weights of every branch in the network, shape () each, on its device.

    Args:
        model: The network.
        blocks: Its description.
        kept: Structures in the network, shape (n,); blocks with a branch alone.
    """
    parts = [list(branch(model, block).values()) for number, block in enumerate(blocks) if kept[number]]
    return [torch.stack(torch._foreach_norm([p.float() for p in part])).norm() for part in parts]


@torch.no_grad()
def project(model: nn.Module, blocks: Sequence[Block], kept: NDArray[np.bool_], most: float) -> None:
    """Scale the weights of every branch whose norm exceeds a bound down to it; does not wait for the device.

    Args:
        model: The network; changed in place.
        blocks: Its description.
        kept: Structures in the network, shape (n,).
        most: The bound.
    """
    for number, block in enumerate(blocks):
        if kept[number] and (part := list(branch(model, block).values())):
            (norm,) = norms(model, [block], np.ones(1, dtype=bool))
            torch._foreach_mul_(part, (most / norm.clamp_min(1e-30)).clamp_max(1.0).to(part[0]))
