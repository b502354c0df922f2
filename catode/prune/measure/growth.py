"""How fast an optimizer's steps make the benefit of every structure grow, from the gradients of training itself.

Source: docs/mathematics.md section 5; docs/theory.md section 8.
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
from catode.decisions.growth import GrowthPools
from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import at_once, upload
from catode.prune.measure.metric import Metric
from catode.prune.measure.owned import Owned, Sums
from catode.prune.optimizers import Update, Updates
from catode.structures.inventory import Inventory

Weights = dict[nn.Parameter, torch.Tensor]
Response = Callable[[Sequence[nn.Parameter], Weights, Weights], Sequence[torch.Tensor]]

BURST = 3  # steps whose gradients are multiplied with each other
SETTLED = 3.0  # memories of the momentum after which what it holds is of the gates that were followed


@dataclass(eq=False)
class GradientProducts:
    """Growth of every structure's benefit: by products of gradients, from below and above, and by displacement.

    With P what the optimizer makes of a gradient (`Metric`), ``g_t P g_{t+1}`` of two independent batches has mean
    ``G P G``, G the gradient over all images, while ``g_t P g_t`` would contain the noise. Batches of one epoch are drawn
    without replacement, so they are not independent: with nb batches an epoch their product p has mean
    ``G P G - tr PS / (nb - 1)``, S the covariance of one that is due to its images. Since ``g P g`` has mean
    ``G P G + tr PS``, ``p + (mean g P g - p) / nb`` has mean ``G P G`` again. Where a batch's gradient varies for other
    reasons too (augmentation, gates), that is too much: the truth lies between the two.

    Batches that follow each other are not at the same weights: a step by ``-s`` moves them between two gradients, and its
    own gradient's part of s, ``moved``, takes ``g_t P H moved`` off the product with the next one, H the Hessian: near
    stationary weights that is a large part of ``G P G``, or more. A probe takes H times `moved` as the difference of two gradients
    of a part of another batch, and what it finds is added to the mean product.

    The displacement of a step beyond what its own batch causes is the optimizer's mean of past gradients, so that
    ``g P mean`` is the growth by displacement, without a copy of the weights. Where an optimizer's steps are not known
    it is ``-g . change of weights / ODE time``, the own batch included: that is too much.

    Args:
        size: Number of structures.
        window: Memory of the pools, in bursts of three steps.
        put: Takes a function and the device tensors whose values it needs; see `catode.prune.devices.transfer`.
        epoch_steps: Batches in an epoch, images / batch size; None for batches that are drawn independently.
        updates: What the optimizer does with gradients; None for nothing (P = 1).

    Attributes:
        pools: What was found.
        burst: Gradients, flat, and the gates' values of the burst's steps.
        metric: P of the burst, from the optimizer's state before its first step.
        answering: Whether the burst is to end with a probe of the gradients' answer.
        moved: What its first step's own gradient moved the optimizer's parameters by, downwards, flat; none before that step.
        unit: The ODE time of that step.
        share: Share of the gradients in the optimizer's mean in which each structure was on, shape (n,).
        followed: Steps since that is followed.
    """

    size: int = field(metadata=UNSAVED)
    window: InitVar[float]
    put: Callable[..., None] = field(metadata=UNSAVED, default=at_once)
    epoch_steps: float | None = field(metadata=UNSAVED, default=None)
    updates: Updates | None = field(metadata=UNSAVED, default=None)
    pools: GrowthPools = field(init=False)
    burst: list[tuple[torch.Tensor, NDArray]] = field(init=False)
    metric: list[torch.Tensor] = field(init=False)
    answering: bool = field(init=False)
    moved: list[torch.Tensor] = field(init=False)
    unit: float = field(init=False)
    share: NDArray = field(init=False)
    followed: int = field(init=False, default=0)
    group: Group = field(metadata=UNSAVED, default_factory=Group)
    _owned: Owned | None = field(metadata=UNSAVED, init=False, default=None)
    _arrived: dict[nn.Parameter, torch.Tensor] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _before: dict[nn.Parameter, Update] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _second: dict[nn.Parameter, torch.Tensor] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _weights: dict[nn.Parameter, torch.Tensor] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _sums: dict[str, dict[int, Sums]] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _stood: dict[nn.Parameter, torch.Tensor] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _versions: dict[nn.Parameter, int] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _learning: dict[nn.Parameter, bool] = field(metadata=UNSAVED, init=False, default_factory=dict)
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(metadata=UNSAVED, init=False, default_factory=list)
    _steps: list[torch.utils.hooks.RemovableHandle] = field(metadata=UNSAVED, init=False, default_factory=list)

    def __post_init__(self, window: float) -> None:
        known = self.updates is None or self.updates.family is not None
        law, moving = (self.updates.law, True) if self.updates else (0.0, False)
        self.pools = GrowthPools(self.size, window, law, known, moving)
        self.share = np.ones(self.size)
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
        self.ignore()
        self.begin()
        self._owned = Owned(model, inventory, kept, present)

    def begin(self, answering: bool = False) -> None:
        """Start a new burst of three steps.

        Args:
            answering: Whether it is to end with a probe of the gradients' answer.
        """
        self.burst, self.metric, self.moved, self.unit = [], [], [], 0.0
        self.answering = answering and self.updates is not None and self.pools.products_known
        self._watch_optimizer()

    def _watch_optimizer(self) -> None:
        """Note what the answer is taken from at the optimizer's steps, if it is to be taken."""
        for hook in self._steps:
            hook.remove()
        self._steps = []
        self._stood = {}
        if self.answering:
            optimizer = self.updates.optimizer
            self._steps = [optimizer.register_step_pre_hook(self._note_weights)]
            self._steps.append(optimizer.register_step_pre_hook(self._note_move))
            # at its end, too: a closure's gradient comes inside the step
            self._steps.append(optimizer.register_step_post_hook(self._note_move))

    def _note_weights(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Note the weights before the burst's last step, which will fit the examples that the answer is taken on.

        Where the pruner's step comes before the optimizer's, the answer is taken at these weights as it is.
        """
        closure = len(args) > 1 or kwargs.get("closure") is not None  # `args` begins with the optimizer
        if len(self.burst) == BURST - 1 and (self._arrived or closure):
            self._stood = {parameter: parameter.detach().clone() for parameter in self.updates.parameters}

    @torch.no_grad()
    def _note_move(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Note what a step's own gradient moves the weights by, if that gradient is the burst's first."""
        # none has been added if the pruner's step comes after the optimizer's, else this one, and none has come since
        if self.moved or len(self.burst) != int(not self._arrived):
            return
        self.updates.read()
        scale, parts = getattr(optimizer, "grad_scale", None), []
        for parameter in self.updates.parameters:
            gradient = parameter.grad
            if gradient is None or not self.updates.learns(parameter):
                parts.append(torch.zeros_like(parameter))
                continue
            gradient = gradient if scale is None else gradient / scale
            parts.append(self.updates.of(parameter).caused(gradient) * self.updates.clock)
        self.moved, self.unit = [torch.cat([part.reshape(-1) for part in parts])], self.updates.clock

    def held(self) -> list:
        """The burst under way, for `hold`."""
        return [self.burst, self.metric, self.answering, self.moved, self.unit]

    def hold(self, held: list) -> None:
        """Go on with a burst of before the weights were attached, on their device.

        Args:
            held: What `held` returned.

        Raises:
            ValueError: if it is of other weights.
        """
        self.burst, self.metric, self.answering, self.moved, self.unit = held
        device, length = self._owned.device, sum(p.numel() for p in self._owned.parameters)
        vectors = [gradient for gradient, _ in self.burst] + self.metric[1:]
        moved = sum(p.numel() for p in self.updates.parameters) if self.moved else 0
        if any(len(vector) != length for vector in vectors) or any(len(vector) != moved for vector in self.moved):
            lengths = ", ".join(str(len(v)) for v in vectors + self.moved)
            raise ValueError(
                f"`state` must hold gradients of the network's {length} weights; got {lengths}. Restore it from the run."
            )
        self.moved = [upload(vector, device) for vector in self.moved]
        self._watch_optimizer()
        self.burst = [(upload(gradient, device), draw) for gradient, draw in self.burst]
        self.metric = self.metric[:1] + [upload(part, device) for part in self.metric[1:]]

    def listen(self, weights: bool) -> None:
        """Note the gradients of the step to come as its backward passes leave them, before anyone changes them.

        Args:
            weights: Whether what weight decay and past gradients do is measured, too.
        """
        if self.updates is not None:
            self.notice_learning()
        for parameter in dict.fromkeys(self._owned.parameters):
            if parameter.requires_grad and self._learning.get(parameter, True):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, weights)))

    def notice_learning(self) -> None:
        """Begin anew for structures with a parameter that learns since the last time."""
        self.updates.read()
        learning = {p: self.updates.learns(p) for p in self._owned.parameters}
        begun = [p for p, learns in learning.items() if learns and not self._learning.get(p, True)]
        if begun:
            self.put(partial(self.pools.clear, self._owned.owners(begun)))
            self.followed = 0
            self.begin()
        self._learning = learning

    @torch.no_grad()
    def _take_gradient(self, weights: bool, parameter: nn.Parameter) -> None:
        if not self._arrived and self.updates is not None:
            self.updates.read()  # again: learning rates may have changed since `listen`
        self._arrived[parameter] = gradient = parameter.grad.detach().clone()
        if parameter not in self._versions:
            self._versions[parameter] = parameter._version
            if weights or not self.burst:
                self._before[parameter] = update = self.updates.of(parameter) if self.updates else Update(1.0)
                if not self.burst and update.second is not None:
                    self._second[parameter] = update.second * update.old
            if weights and not self.pools.products_known:
                self._weights[parameter] = parameter.detach().clone()
        elif self._versions[parameter] != parameter._version:
            self._versions[parameter] = -1  # told by `add`: an error in a backward pass would leave it half done
        if weights:
            self._multiply_state(parameter, gradient, self._before[parameter])

    def _multiply_state(self, parameter: nn.Parameter, gradient: torch.Tensor, update: Update) -> None:
        """Growth by weight decay and by the mean of past gradients, up to the loss's scale."""
        parts: dict[str, tuple[torch.Tensor, float | torch.Tensor]] = {}
        if update.decay > 0.0:
            weights = update.scaled(parameter.detach()) if update.coupled else parameter.detach()
            parts["pull"] = gradient * weights, update.decay * update.rate
        if update.momentum is not None:
            mean = update.momentum if update.momentum_scaled else update.scaled(update.momentum)
            parts["displaced"] = gradient * mean, update.momentum_factor * update.rate
        for place in self._owned.places[parameter]:
            for name, (values, factor) in parts.items():
                found = [part * factor for part in self._owned.reduce(place, values)]
                if name == "displaced" and update.coupled and "pull" in parts:
                    found = [part - pull for part, pull in zip(found, self._sums["pull"][place], strict=True)]
                self._sums.setdefault(name, {})[place] = found

    def ignore(self) -> None:
        """End what `listen` began."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()

    def forget(self) -> None:
        """Forget the gradients that came since `listen`, as those of a step that was refused."""
        self._arrived, self._before, self._second = {}, {}, {}
        self._weights, self._sums, self._versions = {}, {}, {}

    def add(self, draw: NDArray, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Follow a step: add what `listen` noted, if it was called; on three steps close to each other.

        Args:
            draw: Gate values of the step (their means over the batch, for gates of single examples), shape (n,). The
                gradient of a gated weight carries its gate, which is divided out.
            grad_scale: Factor that the loss was multiplied with before ``backward()``.

        Raises:
            RuntimeError: if the weights changed between the step's backward passes.
        """
        if self._arrived:
            if -1 in self._versions.values():
                raise RuntimeError(
                    "`optimizer` must take one gradient a step at the same weights; got weights that changed between two "
                    "backward passes of a step, as sharpness-aware optimizers do. Use another optimizer."
                )
            self._add(draw, grad_scale)
        self.ignore()
        kept = self._momentum
        self.share = kept * self.share + (1.0 - kept) * draw
        self.followed += 1

    @property
    def _momentum(self) -> float:
        return self.updates.momentum if self.updates else 0.0

    @torch.no_grad()
    def _add(self, draw: NDArray, grad_scale: float | torch.Tensor) -> None:
        gradient = self._owned.flat(self._arrived)
        if isinstance(grad_scale, torch.Tensor) or grad_scale != 1.0:
            gradient /= grad_scale
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.float()
        gradient = self.group.mean(gradient)
        self._add_state(draw, grad_scale)
        if not self.pools.products_known:
            return
        if not self.burst:
            self.metric = Metric.of(self._owned, self._before, self._second).parts
        self.burst.append((gradient, draw))
        if len(self.burst) == BURST:
            gradients, draws = zip(*self.burst, strict=True)
            self._multiply(gradients, np.array(draws))
            self.begin()

    def answer(self, draw: NDArray, response: Response) -> None:
        """Pool what the first gradient of the burst takes off the next one's product with it.

        Args:
            draw: Gate values at which `response` is taken, shape (n,).
            response: Takes parameters, by how much parameters are to be moved, and where they stand if not where they are;
                returns the change of the first ones' gradients that moving causes.
        """
        (gradient, before), [moved] = self.burst[0], self.moved
        parts = moved.split([p.numel() for p in self.updates.parameters])
        moves = {p: part.view(p.shape) for p, part in zip(self.updates.parameters, parts, strict=True)}
        learning = [p for p in dict.fromkeys(self._owned.parameters) if self.updates.learns(p)]
        change = response(learning, moves, self._stood)
        change = self._owned.flat(dict(zip(learning, change, strict=True))).to(gradient.dtype)
        left = Metric(self._owned, self.metric).times([g for g, _ in self.burst])[0]
        found = self.group.mean(self._owned.of_flat(left * change))
        on = (before > 0.5) & (draw > 0.5)
        self.put(partial(self._pool_answer, on, self.unit * np.where(on, before * draw, 1.0)), found)

    @property
    def answerable(self) -> bool:
        """Whether the gradients' answer can be probed now."""
        return len(self.burst) == BURST - 1 and bool(self.moved) and self.unit > 0.0

    def _pool_answer(self, on: NDArray[np.bool_], scale: NDArray, found: NDArray) -> None:
        """Pool an answer where it is finite."""
        self.pools.answer.add(found / scale, on & np.isfinite(found))

    def _add_state(self, draw: NDArray, grad_scale: float | torch.Tensor) -> None:
        """Pool the growth by weight decay and by displacement."""
        owned, share = self._owned, self.share
        if self._weights:
            pull = self._sums.get("pull", {})
            changes = {p: -self._arrived[p] * (p.detach() - w) / self.updates.clock for p, w in self._weights.items()}
            self._sums["displaced"] = {
                place: owned.reduce(place, changes[p]) for place, p in enumerate(owned.parameters) if p in changes
            }
            for place, parts in pull.items():
                own = self._sums["displaced"][place]
                self._sums["displaced"][place] = [one - other for one, other in zip(own, parts, strict=True)]
            share = self._momentum * share + (1.0 - self._momentum) * draw
        settled = self.followed * (1.0 - self._momentum) >= SETTLED
        on, scale = draw > 0.5, np.where(draw > 0.5, draw, 1.0)
        for name, sums in self._sums.items():
            if name == "displaced" and not settled:
                continue
            found = self.group.mean(owned.gather(sums) / grad_scale)
            self.put(partial(self._pool_state, name, on, scale, share), found)

    def _pool_state(self, name: str, on: NDArray[np.bool_], scale: NDArray, share: NDArray, found: NDArray) -> None:
        """Pool what a step's gradient says of weight decay, or of displacement and the gates that it stems from."""
        seen, values = on & np.isfinite(found), found / scale
        getattr(self.pools, name).add(values, seen)
        if name == "displaced":
            self.pools.share.add(share, seen)

    def _multiply(self, gradients: Sequence[torch.Tensor], draws: NDArray) -> None:
        """Pool the mean product of a burst's gradients over the pairs with both gates on, and their mean square."""
        metric, squares = Metric(self._owned, self.metric), self.epoch_steps is not None
        left = metric.times(gradients)
        plain = bool(np.isin(draws, (0.0, 1.0)).all())  # then the gradient behind a closed gate is exactly 0
        on, scale = draws > 0.5, np.where(draws > 0.5, draws, 1.0)
        pairs, weights = [(0, 1), (1, 2), (2, 0)], []
        for both in (pairs, [(i, i) for i in range(BURST)] if squares else []):
            if not both:
                continue
            counts = [(on[i] & on[j]).astype(float) for i, j in both]
            if plain:
                total = torch.zeros_like(left[0])
                for i, j in both:
                    total.addcmul_(left[i], gradients[j])
                weights.append((self._owned.of_flat(total), np.ones(self.size), sum(counts)))
            else:
                for count, (i, j) in zip(counts, both, strict=True):
                    part = self._owned.of_flat(left[i] * gradients[j])
                    weights.append((part, count / (scale[i] * scale[j]), count))
        clock, repeated = (self.updates.clock, self.updates.repeated) if self.updates else (0.0, 0.0)
        far = (on[2] & on[0]).astype(float)
        near = (on[0] & on[1]).astype(float) + (on[1] & on[2])
        reach = clock * (near + (1.0 + repeated) * far) / np.maximum(near + far, 1.0)
        take = partial(
            self._pool_products, reach, [(factor, count) for _, factor, count in weights], 1 if plain else BURST
        )
        self.put(take, *(sums for sums, _, _ in weights))

    def _pool_products(
        self, reach: NDArray, how: Sequence[tuple[NDArray, NDArray]], pairs: int, *sums: NDArray
    ) -> None:
        """Pool the mean product, and the mean product corrected for batches of one epoch."""
        parts = [values * factor for values, (factor, _) in zip(sums, how, strict=True)]
        counts = [count for _, count in how]
        number = sum(counts[:pairs])
        seen, number = number > 0.0, np.maximum(number, 1.0)
        product = corrected = sum(parts[:pairs]) / number
        if self.epoch_steps is not None:
            square = sum(parts[pairs:]) / np.maximum(sum(counts[pairs:]), 1.0)
            corrected = product + (square - product) / max(self.epoch_steps, 1.0)
        seen &= np.isfinite(product) & np.isfinite(corrected)  # a gradient that overflowed is skipped
        for pool, values in (
            (self.pools.gain_below, product),
            (self.pools.gain, corrected),
            (self.pools.reach, reach),
        ):
            pool.add(values, seen)
