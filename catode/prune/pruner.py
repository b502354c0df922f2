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

import zlib
from collections import Counter
from collections.abc import Sequence
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
from catode.decisions.shadow import FILTER, SCALE, Shadow
from catode.decisions.target import Target
from catode.prune.checking import Check, Checking
from catode.prune.describe.costs import Counts, describe
from catode.prune.describe.protocol import Prunable
from catode.prune.describe.steptime import MeasuredComplexity, Table
from catode.prune.devices.distributed import Group, norms_are_shared
from catode.prune.devices.transfer import DeferredReads, upload
from catode.prune.gated import cut
from catode.prune.gated.draws import GateDraws
from catode.prune.gated.gates import Gates
from catode.prune.gated.network import Network
from catode.prune.measure.capture import Capture
from catode.prune.measure.losses import Loss, Objective
from catode.prune.measure.measuring import Measuring, Probed, check_finite
from catode.prune.optimizers import Clock, Updates, check_optimizer, ode_time
from catode.prune.settings import PrunerSettings
from catode.prune.state import PrunerState, check_fits, pack, unpack
from catode.structures import fates
from catode.theory.tolerance.measured import LEAST_PRICE


class Pruner:
    """Gates a model, moves its keep probabilities, and removes what is safe to remove.

    The loss must be a mean softmax cross-entropy over the batch (soft targets allowed): the pruner recovers the targets
    from the logits and their gradient, so that its ``step()`` needs no arguments.

    Args:
        model: A network with a method ``structures()`` (see `catode.prune.describe.protocol`); gated in place.
        example_input: One input batch; only its shape matters.
        optimizer: The model's optimizer, whose group that learns fastest sets the ODE time of a step; its state follows
            every compaction. See docs/theory.md section 8 for what is known of which.
        step_times: Price by these measured times (see `catode.prune.describe.steptime`) in place of MACs.
        group: Processes that train together, each on its share of every batch (see `catode.prune.devices.distributed`); None for
            a single process. Gradients must be averaged over them before the optimizer's step. A probe takes its images
            from the whole batch, or from each share if a batch norm is not synchronised.
        **settings: Fields of `catode.prune.settings.PrunerSettings`; `nu` and `steps` are needed.

    Attributes:
        settings: The settings.
        complexity: The network's complexity polynomial; its `inventory` numbers the structures.
        gated: Which structures have gates at all, shape (n,).

    Raises:
        ValueError: for settings out of range or a model without ``structures()``.
        TypeError: for a setting that does not exist, or one without default that is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: torch.Tensor,
        *,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None = None,
        step_times: Sequence[Table] | None = None,
        group: Group | None = None,
        **settings: Any,
    ):
        if not isinstance(model, Prunable):
            raise ValueError(
                f"`model` must have a method structures(); got {type(model).__name__}. See catode.prune.describe.protocol."
            )
        check_optimizer(optimizer)
        own = self.settings = PrunerSettings.of(settings)
        self.model, self.optimizer, self.group = model, optimizer, group or Group()
        self.blocks = model.structures()
        self.complexity = describe(model, self.blocks, example_input)
        self.target = Target.choose(self.complexity, own.target_macs, own.target_params)
        if step_times is not None:
            self.complexity = MeasuredComplexity(self.complexity, step_times)
        self.inventory = inventory = self.complexity.inventory
        self.is_layer = inventory.is_layer
        self.gated = np.where(self.is_layer, own.alpha > 0, own.alpha < 1)
        speed = ThetaSpeed(own.rate_ratio, own.steps)
        self.schedule = Schedule(
            own.steps, own.watch_until, own.warmup, own.measure_every, own.check_every, own.read_every
        )
        self._checking = Checking(own, self.schedule, self.complexity, self.target)
        self._device = next(model.parameters()).device
        shared = norms_are_shared(model)
        self.gates = Gates(model, inventory, self.group if shared else None)
        self._reads = DeferredReads()
        keep_prob = np.where(self.gated, own.initial_keep_prob, 1.0)
        draws = GateDraws(own.seed, self._device, keep_prob)
        self._capture = Capture(model, self.gates, draws, own.per_example, self.group)
        label_rng = torch.Generator(self._device).manual_seed(own.seed + 1)
        self._capture.note_random = loss is not None
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
            self._begin = self.schedule.begin(own.memory, inventory.layers, own.layers_per_probe)
        if self._begin == 0:
            self._start()

    # --- queries ----------------------------------------------------------------------------------------------------

    @property
    def keep_prob(self) -> NDArray:
        """theta, shape (n,); layers first, then units site by site."""
        return self.state.keep_prob

    @property
    def fate(self) -> NDArray[np.str_]:
        """One of `catode.structures.fates.FATES` of every structure, shape (n,)."""
        return self.state.fate

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Structures in the network, shape (n,)."""
        return self.state.kept

    @property
    def nu(self) -> float:
        """Nats that the whole network may cost at this moment."""
        return self.state.nu

    @property
    def shadow(self) -> Shadow | None:
        """Record of a shadow run."""
        return self.state.shadow

    @property
    def started(self) -> bool:
        """Whether gates are in the model (until it is `finished`)."""
        return self.state.started

    @property
    def finished(self) -> bool:
        """Whether everything is decided and the model has no gates."""
        return self.state.finished

    @property
    def expected_complexity(self) -> float:
        """J at the current thetas, in [0, 1]."""
        return self.complexity.index(self.keep_prob, self.settings.beta)

    @property
    def expected_macs(self) -> float:
        """Expected MACs of the whole network at the current thetas."""
        return self.complexity.macs(self.keep_prob)

    @property
    def undecided(self) -> int:
        """Structures without a decision."""
        return int(self._open.sum())

    @property
    def layers_kept(self) -> int:
        """Residual branches in the network."""
        return int(self.kept[self.is_layer].sum())

    @property
    def units_kept(self) -> int:
        """Units in the network, without dead channels."""
        return int(self.kept[~self.is_layer].sum())

    @property
    def kept_for_width(self) -> int:
        """Units in the network only because of `round_to`."""
        return int((self.kept & self.state.for_width).sum())

    @property
    def decided_by_rule(self) -> float:
        """Share of the gated structures whose fate a measurement decided, in [0, 1]."""
        decided = self.gated & ~np.isin(self.fate, (fates.UNDECIDED, *fates.NOT_BY_RULE))
        return float(decided.sum() / self.gated.sum())

    def keep_prob_by_kind(self) -> dict[str, NDArray]:
        """theta of the gated layers and of the gated units."""
        kinds = (("layers", self.is_layer), ("units", ~self.is_layer))
        return {name: self.keep_prob[kind & self.gated] for name, kind in kinds if (kind & self.gated).any()}

    def decisions(self) -> dict[str, int]:
        """Number of gated structures of each fate."""
        return dict(sorted(Counter(self.fate[self.gated].tolist()).items()))

    def counts(self) -> Counts:
        """MACs and parameters of the network as cut so far."""
        kept = self.kept.astype(float)
        return Counts(round(self.complexity.macs(kept)), round(self.complexity.params(kept)))

    def macs_removed(self, fate: str) -> int:
        """MACs that the whole network would lose by removing the structures of one fate alone."""
        kept = self.inventory.close(self.fate != fate)
        return round(self.complexity.macs(np.ones(self.complexity.size)) - self.complexity.macs(kept.astype(float)))

    def prices(self) -> NDArray:
        """Price of every structure at the current thetas, nats, shape (n,)."""
        return self.complexity.prices(self.keep_prob, nu=self.nu, alpha=self.settings.alpha, beta=self.settings.beta)

    def limits(self) -> Limits:
        """Everything measured about every structure."""
        return measure(
            self.state.evidence,
            self.state.products.pools,
            keep_prob=self.keep_prob.copy(),
            price=np.maximum(self.prices(), LEAST_PRICE),
            rate_ratio=self.state.rates,
        )

    def structure(self) -> dict:
        """Kept blocks and units in the original numbering, as in structure.json."""
        return self.inventory.record(self.kept)

    def checksum(self) -> int:
        """Checksum of what must be the same in all processes: thetas, masks, and the state of the gate draws.

        `read`, `snapshot` and `state_dict` between two readings move the thetas of this process alone: call ``read()`` in
        all processes first.
        """
        generator = self.state.draws.generator.get_state().numpy()
        return zlib.crc32(generator, zlib.crc32(self.kept, zlib.crc32(self.keep_prob)))

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict]:
        """State dict of the compact network in mean field (theta folded into the weights), and its structure."""
        self.read()
        return self._network.snapshot(self.kept, self.state.present), self.structure()

    def state_dict(self) -> dict:
        """Everything that a pruner on a fresh model needs to resume exactly: tensors, numbers and text.

        The optimizer's state is not in it.
        """
        self.read()
        return {"model": {name: t.detach().clone() for name, t in self.model.state_dict().items()}, "pruner": pack(self.state)}

    def load_state_dict(self, state: dict) -> None:
        """Load the `state_dict` of a pruner with the same arguments; the model must be fresh and whole.

        The model is cut to the saved structure, and the optimizer follows; restore the optimizer's state afterwards.

        Raises:
            ValueError: if the state is of another network, of another kind of run, or of an earlier version.
        """
        own = self.state
        check_fits(own, state, self.inventory, self.model.state_dict())
        self._network.remove_gates()
        self._capture.detach()
        unpack(own, state["pruner"])
        whole = np.ones_like(own.kept)
        own.present = self._network.cut(own.kept, whole, self.inventory.units, stay=own.present)
        self.model.load_state_dict(state["model"])
        if own.started and not own.finished:
            burst = own.products.burst, own.products.metric  # attaching starts a new one
            self._install()
            own.products.burst, own.products.metric = burst
            own.products.to_device()
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
            batch: The batch, for the `loss` that the pruner was given: that of the step, or its last micro-batch.
            grad_scale: Factor that the loss was multiplied with before ``backward()`` (a gradient scaler's).
            skipped: Whether the optimizer skipped the step because the gradient overflowed; then no ODE time passes. None:
                whether its ``step()`` was not called. Both may be tensors of the device.

        Returns:
            The check, if this step had one.

        Raises:
            RuntimeError: if no backward pass through the gated model came before, or, as a `NotFinite`, if the loss of a step
                that the optimizer took was not finite; no theta has moved since, and nothing was removed.
            ValueError: if the loss that was trained on is not the one that was given.
        """
        own = self.state
        if own.finished:
            return None
        elapsed, steps = self._clock.take()
        own.speed.see(self._clock.base, own.done + 1)
        skipped = steps == 0 if skipped is None else skipped
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
        if self._capture.note_random:
            self._measuring.check_loss(batch, grad_scale)
            self._capture.note_random = False
        due = own.done % self.settings.measure_every == 0
        own.done += 1
        probed = self._measuring.probe(own.done, self._open, own.turns, batch, grad_scale) if due else None
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

    def read(self) -> None:
        """Read what the device has measured since the last reading; ``step()`` does so every `read_every` steps."""
        self._reads.read()
        self.gates.keep_prob.copy_(self._theta())

    def finish(self) -> nn.Module:
        """Decide what is still undecided by rounding, remove gates and dead channels, return the compact, plain model.

        Train a little further afterwards: the running statistics of batch norms still include what was removed last.
        """
        own = self.state
        if not own.finished:
            self.read()
            self._check(ode_time(self.optimizer), final=True, last=True)
        own.present = self._network.cut(self.kept, self.kept, own.present)
        return self.model

    # --- a step's parts ---------------------------------------------------------------------------------------------

    @property
    def _open(self) -> NDArray[np.bool_]:
        """Undecided structures, shape (n,)."""
        return self.state.fate == fates.UNDECIDED

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
        self._capture.begin(own.done % self.settings.measure_every == 0 or self._capture.note_random)
        place = own.done % self.schedule.burst_every
        if place == first:
            own.products.begin()
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
        own, limits, before = self.state, self.limits(), self.state.fate
        verdict = self._checking.settle(
            own, limits, step_time, final=final, last=last, sizes=self._unit_norms() if own.shadow else None
        )
        removed = self._carry_out(verdict.outcome)
        if (final and not verdict.outcome.watched.any()) or not self.undecided:
            own.finished = True
            self._network.remove_gates()
            self._capture.detach()
        elif self.target is not None:
            self._checking.update_price(own, limits, ode_time(self.optimizer))
        return self._checking.report(own, limits, verdict, before, removed, final)

    def _carry_out(self, outcome: Outcome) -> int:
        """Apply the outcome of a check; returns the number of structures removed."""
        own = self.state
        before, changed = own.kept, (outcome.fate != own.fate).any()
        own.fate, own.kept = outcome.fate.astype(own.fate.dtype), outcome.kept
        own.for_width |= outcome.folded
        fold = np.where(outcome.folded, own.keep_prob, 1.0)
        own.keep_prob = np.where(own.kept, np.where(self._open, own.keep_prob, 1.0), 0.0)
        if changed:
            self._network.remove_gates()
            own.present = self._network.cut(own.kept, before, own.present, self.settings.width_multiple, fold=fold)
            self._install()
        return int((before & ~own.kept).sum())

    def _unit_norms(self) -> dict[str, NDArray]:
        """Norms for the shadow's rules by size, shape (n,) each; infinite for layers and removed units."""
        sizes = np.full((2, self.inventory.size), np.inf)
        for place in self.inventory.standing(self.kept):
            sizes[:, self.state.present[place.number]] = cut.unit_norms(self.model, place.site)
        return dict(zip((FILTER, SCALE), sizes, strict=True))
