"""Squared gradient norms of every structure, from the products of gradients of different batches.

Source: docs/mathematics.md section 5; the correction for batches of one epoch is derived in docs/theory.md section 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode._saved import UNSAVED
from catode.decisions.evidence import Pool
from catode.prune.describe.protocol import slices
from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import at_once, exact, upload
from catode.structures.inventory import Inventory

BURST = 3  # steps whose gradients are multiplied with each other


@dataclass(eq=False)
class GradientProducts:
    """Squared gradient norms of every structure, from below and from above.

    ``g_t . g_{t+1}`` of two independent batches has mean |G|^2, G the gradient over all images, while |g_t|^2 would contain
    the noise. Batches of one epoch are drawn without replacement, so they are not independent: with nb batches an epoch
    their product p has mean ``|G|^2 - tr S / (nb - 1)``, tr S the variance of one that is due to its images. Since |g_t|^2
    has mean ``|G|^2 + tr S``, ``p + (mean |g|^2 - p) / nb`` has mean |G|^2 again. Where a batch's gradient varies for other
    reasons too (augmentation, gates), that is too much: |G|^2 lies between the two. ``w . g`` gives the decay of the benefit.

    Args:
        size: Number of structures.
        window: Memory of the pools, in bursts of three steps.
        put: Takes a function and the device tensors whose values it needs; see `catode.prune.devices.transfer`.
        epoch_steps: Batches in an epoch, images / batch size; None for batches that are drawn independently.

    Attributes:
        gain: Pool of the squared gradient norms from above, nats/time: the corrected products.
        gain_below: The same from below: the products as they are.
        weight_gradient: Pool of the products of weights and their gradients, nats.
    """

    size: int = field(metadata=UNSAVED)
    window: InitVar[float]
    put: Callable[..., None] = field(metadata=UNSAVED, default=at_once)
    epoch_steps: float | None = field(metadata=UNSAVED, default=None)
    gain: Pool = field(init=False)
    gain_below: Pool = field(init=False)
    weight_gradient: Pool = field(init=False)
    burst: list[tuple[torch.Tensor, NDArray, NDArray]] = field(init=False)  # gradient, which gates are on, their values
    group: Group = field(metadata=UNSAVED, default_factory=Group)
    _arrived: dict[nn.Parameter, torch.Tensor] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _weights: dict[nn.Parameter, torch.Tensor] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(metadata=UNSAVED, init=False, default_factory=list)
    _parameters: list[nn.Parameter] = field(metadata=UNSAVED, init=False, default_factory=list)
    _layers: list[tuple[int, slice]] = field(metadata=UNSAVED, init=False, default_factory=list)
    _axes: list[list[tuple[int, torch.Tensor]]] = field(metadata=UNSAVED, init=False, default_factory=list)

    def __post_init__(self, window: float) -> None:
        self.gain, self.gain_below, self.weight_gradient = (Pool(self.size, window) for _ in range(3))
        self.begin()

    def attach(
        self, model: nn.Module, inventory: Inventory, kept: NDArray[np.bool_], present: Sequence[NDArray[np.int64]]
    ) -> None:
        """Map the weights to the structures. The model must be plain at this moment.

        Args:
            model: The network.
            inventory: Numbering of its structures.
            kept: Structures in the network, shape (n,).
            present: Numbers of the units physically present at each site.
        """
        self._parameters, self._layers, self._axes, start = [], [], [], 0
        self.ignore()
        self.begin()
        device, units = next(model.parameters()).device, {}
        for place in inventory.standing(kept):
            for part in slices(model, place.site):
                numbers = upload(torch.from_numpy(np.repeat(present[place.number], part.each)), device)
                units.setdefault(part.tensor, []).append((part.dim, numbers))
        for layer, block in enumerate(inventory.blocks):
            if not kept[layer]:
                continue
            for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
                if any(name == f or name.startswith(f + ".") for f in block.fixed):
                    continue
                for key, parameter in sorted(module.named_parameters(recurse=False)):
                    self._parameters.append(parameter)
                    self._axes.append(units.get(f"{name}.{key}", []))
            stop = sum(p.numel() for p in self._parameters)
            self._layers.append((layer, slice(start, stop)))
            start = stop

    def begin(self) -> None:
        """Start a new burst of three steps."""
        self.burst = []

    def to_device(self) -> None:
        """Move a restored burst to the device of the attached weights.

        Raises:
            ValueError: if it is of other weights.
        """
        length = sum(p.numel() for p in self._parameters)
        vectors = [gradient for gradient, _, _ in self.burst]
        if any(len(vector) != length for vector in vectors):
            raise ValueError(
                f"`state` must hold gradients of the network's {length} weights; got {', '.join(str(len(v)) for v in vectors)}. "
                "Restore it from the run."
            )
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self.burst = [(upload(gradient, device), on, scale) for gradient, on, scale in self.burst]

    def listen(self, weights: bool) -> None:
        """Note the gradients of the step to come as its backward passes leave them, before anyone changes them.

        Args:
            weights: Whether the weights that they are taken at are noted, too.
        """
        for parameter in self._parameters:
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, weights)))

    def _take_gradient(self, weights: bool, parameter: nn.Parameter) -> None:
        self._arrived[parameter] = parameter.grad.detach().clone()
        if weights:
            self._weights[parameter] = parameter.detach().clone()

    def ignore(self) -> None:
        """End what `listen` began."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._arrived, self._weights = [], {}, {}

    def add(self, draw: NDArray, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Add the gradients noted; call it on three steps close to each other.

        Args:
            draw: Gate values of the step (their means over the batch, for gates of single examples), shape (n,). The
                gradient of a gated weight carries its gate, which is divided out.
            grad_scale: Factor that the loss was multiplied with before ``backward()``.
        """
        arrived, weights = self._arrived, self._weights
        self.ignore()
        if not arrived:
            return
        on = draw > 0.5
        scale = np.where(on, draw, 1.0)
        gradient = self.group.mean(self._flat(arrived) / grad_scale)
        wide = exact(gradient.device)
        if weights:
            take = partial(self._pool_weights, on, scale)
            self.put(take, self._sum(self._flat(weights).to(wide) * gradient.to(wide)))
        self.burst.append((gradient, on, scale))
        if len(self.burst) == BURST:
            gradients, ons, scales = zip(*self.burst, strict=True)
            self._multiply([gradient.to(wide) for gradient in gradients], np.all(ons, axis=0), scales)
            self.burst = []

    def _flat(self, found: dict[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """All entries in order; 0 for parameters that are frozen or had no gradient."""
        parts = [found[p] if p in found else torch.zeros_like(p.detach()) for p in self._parameters]
        return torch.cat([part.reshape(-1) for part in parts])

    def _multiply(self, gradients: Sequence[torch.Tensor], on: NDArray[np.bool_], scales: Sequence[NDArray]) -> None:
        """Pool the mean product of a burst's gradients, and their mean square."""
        (g1, g2, g3), (s1, s2, s3) = gradients, scales
        plain = all((s == 1.0).all() for s in scales)
        pairs = (
            [(g1 * g2 + g2 * g3 + g1 * g3, 1.0)]
            if plain
            else [(g1 * g2, s1 * s2), (g2 * g3, s2 * s3), (g1 * g3, s1 * s3)]
        )
        squares = []
        if self.epoch_steps is not None:
            squares = (
                [(g1 * g1 + g2 * g2 + g3 * g3, 1.0)]
                if plain
                else [(g1 * g1, s1 * s1), (g2 * g2, s2 * s2), (g3 * g3, s3 * s3)]
            )
        parts = pairs + squares
        take = partial(self._pool_products, on, [scale for _, scale in parts], len(pairs))
        self.put(take, *(self._sum(product) for product, _ in parts))

    def _pool_products(
        self, on: NDArray[np.bool_], scales: Sequence[NDArray | float], pairs: int, *sums: NDArray
    ) -> None:
        """Pool the mean product, and the mean product corrected for batches of one epoch."""
        parts = [part / scale for part, scale in zip(sums, scales, strict=True)]
        product = corrected = sum(parts[:pairs]) / BURST
        if self.epoch_steps is not None:
            corrected = product + (sum(parts[pairs:]) / BURST - product) / max(self.epoch_steps, 1.0)
        for pool, values in ((self.gain_below, product), (self.gain, corrected)):
            self._pool(pool, on, values)

    def _pool_weights(self, on: NDArray[np.bool_], scale: NDArray, sums: NDArray) -> None:
        """Pool the product of weights and gradient."""
        self._pool(self.weight_gradient, on, sums / scale)

    @staticmethod
    def _pool(pool: Pool, seen: NDArray[np.bool_], values: NDArray) -> None:
        """Pool the finite values; a gradient that overflowed is skipped."""
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
