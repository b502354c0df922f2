"""The pruner around a training loop that the user owns.

    pruner = Pruner(model, example_input, optimizer=optimizer, nu=0.5, steps=2000)
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        pruner.step()
    model = pruner.finish()        # a compact, plain nn.Module

`Pruner` listens to the optimizer's steps and asks its parts: `measuring` for estimates, `catode.decisions` for what they
mean, `network` for carrying it out.

Source: docs/mathematics.md sections 2 to 5 (prices, theta step, tolerance, commitment); docs/conventions.md item 3 (fates).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.decisions.limits import Limits, measure
from catode.decisions.motion import ThetaSpeed, rate_ratios
from catode.decisions.outcomes import Outcome
from catode.decisions.priors import PRIORS
from catode.decisions.schedule import Schedule
from catode.decisions.shadow import FILTER, SCALE
from catode.decisions.target import Target
from catode.prune import selfcheck
from catode.prune.checking import Check, Checking, PruningWarning, cannot_decide, check_numbers, gated
from catode.prune.describe import consistency
from catode.prune.describe.costs import describe
from catode.prune.describe.protocol import branch, unwrapped
from catode.prune.describe.steptime import MeasuredComplexity, Table
from catode.prune.describe.trace.describing import blocks_of
from catode.prune.devices.distributed import Group, current, norms_are_shared
from catode.prune.devices.precision import own_precision
from catode.prune.devices.transfer import DeferredReads, upload
from catode.prune.gated import cut
from catode.prune.gated.draws import GateDraws
from catode.prune.gated.gates import Gates
from catode.prune.gated.heads import adopt, release
from catode.prune.gated.network import Cut, Network
from catode.prune.measure.bounds import project
from catode.prune.measure.capture import Capture
from catode.prune.measure.losses import Loss, Objective
from catode.prune.measure.measuring import Measuring, Probed, check_finite
from catode.prune.optimizers import Clock, Updates, check_optimizer, check_owner, ode_time
from catode.prune.queries import Queries
from catode.prune.recalibration import recalibrate_norms
from catode.prune.settings import ONE_EPOCH, PrunerSettings
from catode.prune.state import PrunerState, check_fits, pack, unpack
from catode.structures import fates
from catode.structures.description import Block
from catode.theory.tolerance.measured import LEAST_PRICE


class Pruner(Queries):
    """Gates a model, moves its keep probabilities, and removes what is safe to remove.

    A mean cross-entropy with one label for each example is recognised from its gradient, and a model's own loss is taken from
    what it returns: then ``step()`` needs no arguments. Any other loss is given; see docs/loops.md.

    Args:
        model: A network; gated in place.
        example_input: One input batch: a tensor, a tuple of arguments or a mapping of keyword arguments; only shapes matter.
        optimizer: The model's optimizer, whose group that learns fastest sets the ODE time of a step; its state follows
            every compaction. See docs/theory.md section 8 for what is known of which.
        blocks: What can go, such as `catode.describe` finds with some of it protected; None: what the model's method
            ``structures()`` says (see `catode.prune.describe.protocol`), or, if it has none, what `catode.describe` finds.
        loss: ``loss(model, batch)``, the mean loss over a batch's examples; None for one that is recognised.
        step_times: Price by these measured times (see `catode.prune.describe.steptime`) in place of MACs.
        group: Processes that train together, each on its share of every batch (see `catode.prune.devices.distributed`); None for
            those of torch.distributed's default group, if there is one. Gradients must be averaged over them before the
            optimizer's step, as ``pruner.group.join`` does. A probe takes its images from the whole batch, or from each share
            if a batch norm is not synchronised.
        self_check: Whether to try the model's description on copies of it, see `catode.prune.selfcheck`.
        **settings: Fields of `catode.prune.settings.PrunerSettings`; `nu` and `steps` are needed.

    Attributes:
        settings: The settings.
        complexity: The network's complexity polynomial; its `inventory` numbers the structures.
        gated: Which structures have gates at all, shape (n,).
        group: Processes that train together.
        self_check: Result of the self-check; None without one.

    Raises:
        ValueError: for settings out of range, or a model of which nothing can go or that cannot be described.
        TypeError: for a setting that does not exist, or one without default that is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None = None,
        blocks: Sequence[Block] | None = None,
        step_times: Sequence[Table] | None = None,
        group: Group | None = None,
        self_check: bool = True,
        **settings: Any,
    ):
        model = unwrapped(model)
        check_optimizer(optimizer)
        check_owner(optimizer, model)
        check_numbers(model)
        own = self.settings = PrunerSettings.of(settings)
        self.model, self.optimizer, self.group = model, optimizer, group or current()
        self.group.agree(model, step=0)
        blocks = blocks_of(model, example_input) if blocks is None else blocks
        self.blocks = list(blocks)
        consistency.check(model, self.blocks)
        adopt(model, self.blocks)
        check_owner(optimizer, model, [p for block in self.blocks for p in branch(model, block).values()])
        self.complexity = describe(model, self.blocks, example_input)
        self.inventory = inventory = self.complexity.inventory
        self.is_layer = inventory.is_layer
        self.gated = gated(inventory, own.alpha)
        self.target = Target.choose(self.complexity, own.target_macs, own.target_params, self.gated)
        if step_times is not None:
            self.complexity = MeasuredComplexity(self.complexity, step_times)
        speed = ThetaSpeed(own.rate_ratio, own.steps)
        self.schedule = Schedule(
            own.steps, own.watch_until, own.warmup, own.measure_every, own.check_every, own.read_every
        )
        self._checking = Checking(own, self.schedule, self.complexity, self.target, self.gated)
        padded = own.width_multiple if self.gated[~self.is_layer].any() else 1
        self.self_check = selfcheck.check(model, example_input, self.blocks, padded=padded) if self_check else None
        self._device = next(model.parameters()).device
        shared = norms_are_shared(model)
        self.gates = Gates(model, inventory, self.group if shared else None)
        self._reads = DeferredReads()
        keep_prob = np.where(self.gated, own.initial_keep_prob, 1.0)
        draws = GateDraws(own.seed, self._device, keep_prob)
        self._capture = Capture(model, self.gates, draws, own.per_example, self.group, inputs=loss is None)
        label_rng = torch.Generator(self._device).manual_seed(own.seed + 1)
        self._measuring = Measuring(
            self._capture,
            Objective(loss),
            self.is_layer,
            estimators=(own.layer_estimator, own.estimator),
            probe_size=own.probe_size,
            per_probe=own.layers_per_probe,
            measure_every=own.measure_every,
            shared=shared,
            label_rng=label_rng,
        )
        self.state = PrunerState.fresh(
            own,
            inventory,
            keep_prob,
            gated=self.gated,
            rate_ratio=rate_ratios(
                self.complexity, nu=own.nu, alpha=own.alpha, beta=own.beta, theta_speed=speed.at_unit
            ),
            speed=speed,
            updates=Updates(optimizer),
            corrected=self._measuring.corrected,
            burst_every=self.schedule.burst_every,
            put=self._reads.put,
            draws=draws,
            label_rng=label_rng,
        )
        self.state.products.group = self.group
        self._clock = Clock(optimizer)
        self._network = Network(model, optimizer, inventory, self.gates, self.state.products)
        self._begin = 0
        if own.initial_keep_prob == 1.0:
            layers = int((self.is_layer & inventory.removable).sum())
            self._begin = self.schedule.begin(own.memory, layers, own.layers_per_probe)
        if self._begin == 0:
            self._start()
        which = self.gated & (~self.is_layer if self.gated[~self.is_layer].any() else self.is_layer)
        pool = dict(memory=own.memory, check_every=own.check_every, risk=own.risk)
        self._say("" if own.epoch_steps or own.tolerance is not None else ONE_EPOCH)
        self._say(cannot_decide(own.steps, own.warmup, prices=self.prices()[which], **pool))

    # --- queries ----------------------------------------------------------------------------------------------------

    def limits(self) -> Limits:
        """Everything measured about every structure."""
        return measure(
            self.state.evidence,
            self.state.products.pools,
            keep_prob=self.keep_prob.copy(),
            price=np.maximum(self.prices(), LEAST_PRICE),
            rate_ratio=self.state.rates,
        )

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict]:
        """State dict of the compact network in mean field (theta folded into the weights), and its structure.

        A branch without weights to fold theta into, as one that ends in an activation, stands whole from a theta of 1/2 on.
        """
        self.read()
        state, kept = self._network.snapshot(self.kept, self.state.present, self.keep_prob)
        return state, self.inventory.record(kept)

    def on_cut(self, follower: nn.Module | Callable[[Cut], object]) -> None:
        """Let something follow every cut of the network, such as an average of its weights for evaluation.

        A copy is cut along with the network, and its gates are always at theta, also in train mode. Call it at once when the
        copy has been made, before or after the gates are in.

        Args:
            follower: A copy of the model as it is now, or a module that holds it as ``module``, like PyTorch's ``AveragedModel``
                and timm's ``ModelEma``. Or a function, which is called with every `catode.prune.gated.network.Cut` just made.

        Raises:
            ValueError: if it is no copy of the model as it is now.
            TypeError: if it is neither a module nor a function.
        """
        if isinstance(follower, nn.Module):
            self._network.follow(follower)
        elif callable(follower):
            self._network.call(follower)
        else:
            raise TypeError(
                f"`on_cut` must be given a copy of the model, or a function; got {type(follower).__name__}. Pass the module."
            )

    def state_dict(self) -> dict:
        """Everything but the optimizer's state that a pruner on a fresh model needs to resume exactly: tensors, numbers, text."""
        self.read()
        return {
            "model": {name: t.detach().clone() for name, t in self.model.state_dict().items()},
            "pruner": pack(self.state),
            "clock": self._clock.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Load the `state_dict` of a pruner with the same arguments; the model must be fresh and whole.

        The model is cut to the saved structure, and the optimizer follows; restore the optimizer's state afterwards.

        Raises:
            ValueError: if the state is of another network, of another kind of run, or of an earlier version.
        """
        own = self.state
        check_fits(own, state, self.inventory, self.model.state_dict())
        self._clock.load_state_dict(state.get("clock", {}))
        self._network.remove_gates()
        self._capture.detach()
        unpack(own, state["pruner"])
        whole = np.ones_like(own.kept)
        own.present = self._network.cut(own.kept, whole, self.inventory.units, stay=own.present)
        self.model.load_state_dict(state["model"])
        if own.finished:
            self._clock.close()
        elif own.started:
            burst = own.products.held()  # attaching starts a new one
            self._install()
            own.products.hold(burst)
            self._capture.attach()
            own.draws.hold(own.draws.rows)
            self.gates.set(self._theta(), own.draws.here)
            self._listen()

    # --- the training loop ------------------------------------------------------------------------------------------

    def step(
        self, batch: Any = None, *, grad_scale: float | torch.Tensor = 1.0, skipped: bool | torch.Tensor | None = None
    ) -> Check | None:
        """Follow one optimizer step: measure; every `read_every` steps move the thetas; check when due.

        Any number of forward and backward passes may have come before, whose gradients add up to the loss's.

        Args:
            batch: The batch as it was trained on, or its last micro-batch, where the pruner was given a `loss`.
            grad_scale: Factor that the loss was multiplied with before ``backward()`` (a gradient scaler's).
            skipped: Whether the optimizer skipped the step because the gradient overflowed; then no ODE time passes. None:
                whether its ``step()`` was not called. Both may be tensors of the device.

        Returns:
            The check, if this step had one.

        Raises:
            RuntimeError: if no backward pass through the gated model came before, or, as a `NotFinite`, if the loss of a step
                that the optimizer took was not finite; no theta has moved since, and nothing was removed.
            ValueError: if the loss that was trained on is not the one that was given, or mixes examples.
        """
        if self.state.finished:
            return None
        eager = torch.compiler.set_stance("force_eager")  # whatever was compiled
        with torch.enable_grad(), own_precision(self._device), eager:  # and whatever the loop has around it
            try:
                return self._step(batch, grad_scale, skipped)
            except Exception:
                self.state.products.forget()
                raise

    def read(self) -> None:
        """Read what the device has measured since the last reading; ``step()`` does so every `read_every` steps."""
        self._reads.read()
        self.gates.keep_prob.copy_(self._theta())

    def finish(self, recalibrate: Iterable[Any] | None = None) -> nn.Module:
        """Decide what is still undecided by rounding, remove gates and dead channels, return the compact, plain model.

        The running statistics of batch norms still know what was removed in the last hundred steps: give training batches
        to recalibrate them, or train on for as long.

        Args:
            recalibrate: Training batches, to compute the running statistics of all batch norms anew: for a `loss` that was given
                what it takes, else inputs of the model, or tuples and lists that begin with one. None: leave them.

        Raises:
            ValueError: if there are no batches.
        """
        own = self.state
        if not own.finished:
            self.read()
            self._check(ode_time(self.optimizer), final=True, last=True)
        own.present = self._network.cut(self.kept, self.kept, own.present)
        release(self.model)
        if recalibrate is not None:
            recalibrate_norms(self.model, recalibrate, self._measuring.objective.given, self.group)
        return self.model

    # --- a step's parts ---------------------------------------------------------------------------------------------

    def _step(self, batch: Any, grad_scale: float | torch.Tensor, skipped: bool | torch.Tensor | None) -> Check | None:
        own = self.state
        self._network.check_step(own.done, self.group, self.gated, own.kept)
        self._measuring.objective.check_given(batch)
        if self.settings.max_norm is not None:
            project(self.model, self.blocks, own.kept, self.settings.max_norm)
        elapsed, idle = self._clock.take()
        own.speed.see(self._clock.base, own.done + 1)
        first = skipped is None and own.done == 0 and idle is True  # skipped, or before the optimizer's first step
        skipped = (False if first else idle) if skipped is None else skipped
        if not isinstance(skipped, torch.Tensor):
            skipped = torch.full((), float(skipped), device=self._device)
        if not own.started:
            own.done += 1
            self._reads.put(partial(self._advance_time, elapsed), skipped)
            if own.done % self.settings.read_every == 0:
                self.read()
            if own.done >= self._begin:
                self._start()
            return None
        draw, derivative = self._capture.derivative(grad_scale)
        skipped = ~derivative.isfinite().all() if first else skipped
        if self._capture.checked:
            self._measuring.check_loss(batch, grad_scale)
        due = own.done % self.settings.measure_every == 0
        own.done += 1
        answer = partial(own.products.answer, own.draws.values(False)) if own.products.answerable else None
        probed = self._measuring.probe(own.done, self._open, own.turns, batch, grad_scale, answer) if due else None
        record = partial(self._record_step, own.done, elapsed, draw, probed)
        self._reads.put(record, skipped, derivative, *(probed.numbers if probed else ()))
        own.products.add(draw, grad_scale)
        check = None
        if self.schedule.reads(own.done):
            self.read()
            if self.schedule.checks(own.done):
                check = self._check(ode_time(self.optimizer), own.done >= self.settings.steps)
        if not own.finished:
            own.draws.drop()
            self._draw()
        return check

    def _start(self) -> None:
        """Install the gates and start measuring."""
        self.state.started = True
        self._install()
        self._capture.attach()
        self._draw()

    def _install(self) -> None:
        """Gate what is undecided."""
        self._network.install(self.kept, self._open, self.state.present)

    def _theta(self) -> torch.Tensor:
        """theta for the gates, shape (n,), on the device."""
        return upload(torch.from_numpy(self.keep_prob).float(), self._device)

    def _draw(self) -> None:
        """Set the gates of the next step, drawn for all steps up to the next reading; capture it if it is measured."""
        own, theta = self.state, None
        if own.draws.empty:
            theta = self._theta()
            own.draws.draw(self.keep_prob, self.schedule.until_read(own.done))
        self.gates.set(theta, own.draws.here)
        self._listen()

    def _listen(self) -> None:
        """Note what the step to come is measured by."""
        own, (first, second, _) = self.state, self.schedule.burst
        self._capture.begin(own.done % self.settings.measure_every == 0)
        place = own.done % self.schedule.burst_every
        if place == first:
            own.products.begin(self.schedule.answers(own.done))
        own.products.ignore()
        if place in self.schedule.burst:
            own.products.listen(weights=place == second)

    def _advance_time(self, step_time: float, skipped: NDArray) -> None:
        """Advance the ODE time by one step, unless the optimizer skipped it."""
        if not skipped:
            self.state.time += step_time

    def _record_step(
        self, done: int, step_time: float, draw: NDArray, probed: Probed | None, skipped: NDArray, *numbers: NDArray
    ) -> None:
        """Record one step: its number, ODE time, draw and probe, and the values read from the device."""
        self._advance_time(step_time, skipped)
        if skipped:
            return
        own, open_ = self.state, self._open
        own.pending += step_time
        derivative, *found = numbers
        check_finite(derivative, done)
        paired = self._measuring.take(probed, own.evidence, open_, *found) if probed else {}
        self._move(*self._measuring.estimates(own.evidence, open_, draw, derivative, paired), done)

    def _move(self, estimate: NDArray, seen: NDArray[np.bool_], done: int) -> None:
        """SGD step of theta under its prior, of training step `done`, with the prices of this moment; pools the evidence."""
        own = self.state
        own.evidence.add(estimate, seen, own.time, own.pending)
        if done > self.settings.warmup:
            upper = own.evidence.limits()[1]
            moving = seen & ~own.zero & own.evidence.enough & np.isfinite(upper)
            force, step = (upper - self.prices())[moving], (own.rates * own.pending)[moving]
            own.keep_prob[moving] = PRIORS[self.settings.prior](
                own.keep_prob[moving], force, step, self.settings.images
            )
            own.zero |= moving & (own.keep_prob == 0.0)  # absorbed: removed at the next check
            if own.shadow:
                own.shadow.passed(done, own.time, own.keep_prob, moving)
        own.pending[seen] = 0.0

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _check(self, step_time: float, final: bool = False, last: bool = False) -> Check:
        """Decide what can be decided, and carry it out.

        Args:
            step_time: ODE time of a step.
            final: Whether everything must be decided, but for what a shadow run watches.
            last: Whether watching ends here too.
        """
        own, before = self.state, self.state.fate
        if own.started:
            own.products.notice_learning()  # since the last burst of gradients
            self._reads.read()
        limits = self.limits()
        own.bounds.see(self.model, self.blocks, own.kept, limits)
        self.group.agree(self.model, self.checksum(), own.done)
        verdict = self._checking.settle(
            own, limits, step_time, final=final, last=last, sizes=self._unit_norms() if own.shadow else None
        )
        removed = self._carry_out(verdict.outcome)
        if (final and not verdict.outcome.watched.any()) or not self.undecided:
            own.finished = True
            self._network.remove_gates()
            self._capture.detach()
            self._clock.close()
        elif self.target is not None:
            self._checking.update_price(own, limits, ode_time(self.optimizer))
        check = self._checking.report(own, limits, verdict, before, removed, final, step_time)
        self._say(*check.warnings)
        return check

    def _say(self, *lines: str) -> None:
        """Say something aloud, and keep it for the summary."""
        for line in filter(None, lines):
            self.state.warnings.append(line)
            warnings.warn(line, PruningWarning, stacklevel=4)

    def _carry_out(self, outcome: Outcome) -> int:
        """Apply the outcome of a check; returns the number of structures removed."""
        own = self.state
        before, changed = own.kept, (outcome.fate != own.fate).any()
        own.fate, own.kept = outcome.fate.astype(own.fate.dtype), outcome.kept
        own.for_width |= outcome.folded & (own.fate == fates.KEPT_FOR_WIDTH)
        fold = np.where(outcome.folded, own.keep_prob, 1.0)
        thetas, own.keep_prob = own.keep_prob, np.where(own.kept, np.where(self._open, own.keep_prob, 1.0), 0.0)
        if changed:
            self._network.remove_gates()
            own.present = self._network.cut(own.kept, before, own.present, self.settings.width_multiple, fold=fold)
            self._install()
        removed = int((before & ~own.kept).sum())
        own.cut_at = own.done if removed or (thetas != own.keep_prob).any() else own.cut_at
        return removed

    def _unit_norms(self) -> dict[str, NDArray]:
        """Norms for the shadow's rules by size, shape (n,) each; infinite for layers and removed units."""
        sizes, layout = np.full((2, self.inventory.size), np.inf), self._network.layout(self.state.present)
        for place in self.inventory.standing(self.kept):
            sizes[:, self.state.present[place.number]] = cut.unit_norms(self.model, place.site, layout)
        return dict(zip((FILTER, SCALE), sizes, strict=True))
