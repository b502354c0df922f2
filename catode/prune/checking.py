"""Checks of a pruner: `catode.decisions` applied to its state, the price level for a target, and the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from catode._validate import fail
from catode.decisions.check import Checks, Moment, Verdict
from catode.decisions.evidence import LEAST_EVIDENCE
from catode.decisions.limits import QUANTITIES, Limits
from catode.decisions.motion import CROSSINGS
from catode.decisions.outcomes import Outcomes
from catode.decisions.rules import NEARLY_ONE
from catode.decisions.schedule import NOISE, Schedule, needed_memory, needed_phase
from catode.decisions.target import Target
from catode.prune.settings import PrunerSettings
from catode.prune.state import PrunerState
from catode.records import PLACE
from catode.structures import fates
from catode.structures.complexity import Complexity
from catode.structures.inventory import Inventory
from catode.theory.tolerance.measured import LEAST_PRICE

HOPELESS = 100  # times as many steps as a run has, from which no longer run is proposed
SEEN, LEAST_CROSSINGS = 0.25, 2.0  # share of the deciding phase after which fewer crossings of theta are spoken of
RISING = 1.2  # times its mean so far, from which a learning rate is taken to rise
SLOWLY = "thetas move slowly"
ALOUD = 0.1  # share of the structures decided because time was out from which a warning says so
ROW_FIELDS = ("step", "time", *PLACE, *QUANTITIES, "risk", "separatrix", "tolerance", "fate")
MOST_ROWS = 1_000_000  # of structures.csv, about: a ResNet-50 over 90 epochs of ImageNet would have 50 million, 11 GB


@dataclass(frozen=True)
class Check:
    """Report of one check.

    Attributes:
        rows: One record for every structure that was undecided before it or changed its fate, keys `ROW_FIELDS`. In
            runs of very many checks and units, undecided units are recorded at some of the checks only (`MOST_ROWS`).
        warnings: One line each.
        removed: Number of structures removed, those removed with their block included.
    """

    rows: list[dict]
    warnings: list[str] = field(default_factory=list)
    removed: int = 0


class PruningWarning(UserWarning):
    """Something about a pruned run that its user should know."""


def check_numbers(model: nn.Module) -> None:
    """Make sure that a network holds numbers, as one on the device ``meta`` does not.

    Raises:
        ValueError: if it does not.
    """
    name = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if name is not None:
        fail("model", "hold numbers", f"`{name}` on the device meta", hint="Use to_empty(device=...), and fill it.")


def gated(inventory: Inventory, alpha: float) -> NDArray[np.bool_]:
    """Which structures have gates: those that can go and have a price, shape (n,).

    Args:
        inventory: Numbering of the structures.
        alpha: Layers (1) against units (0).

    Raises:
        ValueError: if none has.
    """
    found = np.where(inventory.is_layer, alpha > 0, alpha < 1) & inventory.removable
    if found.any():
        return found
    if not inventory.removable.any():
        raise ValueError(
            "`least` must leave something that can go; got the whole width everywhere in a model of which no branch can go. "
            "Lower it."
        )
    if alpha < 1:
        raise ValueError(
            f"`alpha` must be above 0 for a model of which no width can go below its `least`; got {alpha:g}. Raise it."
        )
    raise ValueError(f"`alpha` must be below 1 for a model of which no branch can go; got {alpha:g}. Use 0.")


def cannot_decide(
    steps: int, warmup: int, *, memory: int, check_every: int, risk: float, prices: NDArray, epochs: float | None = None
) -> str:
    """Why a run cannot decide by rule, before anything was measured, as text: too few steps, or prices of 0; empty if it can.

    Args:
        steps: Steps until the deciding phase ends.
        warmup: Those of them before it begins.
        memory: Steps over which measurements are pooled.
        check_every: Steps between checks.
        risk: Accepted probability of a mistake.
        prices: Prices of the gated units, or of the layers where there are none, nats.
        epochs: Epochs of the run, to say how many it needs; None to say how many steps.
    """
    phase, price = steps - warmup, float(np.median(prices))
    if price == 0.0:
        return (
            f"{int((prices == 0.0).sum()):,} of {prices.size:,} structures are free at first and not removed for their "
            "price: the measured times do not grow with their widths. Measure again on an idle device, or price by MACs."
        )
    by_phase, by_pool = (
        needed_phase(memory, check_every),
        needed_phase(float(needed_memory(NOISE, max(price, LEAST_PRICE), risk))),
    )
    needed = max(by_phase, by_pool)
    if phase >= needed:
        return ""
    reason, hint = f"ten times `memory`, {memory}, and `check_every`, {check_every}", "a smaller memory"
    if by_pool > by_phase:
        reason, hint = f"at the noise of a ResNet-20, {NOISE:g} nats, and prices of {price:.2g} nats", "a larger nu"
    longer = (
        f"steps={warmup + needed} or " if epochs is None else f"about {math.ceil(epochs * needed / phase)} epochs or "
    )
    return (
        f"the deciding phase should have about {needed:,} steps, {reason}; it has {phase:,}. What is undecided at its end is "
        f"rounded: use {longer if needed < HOPELESS * phase else ''}{hint}."
    )


class Checking:
    """Makes a pruner's decisions and reports them.

    Args:
        settings: The pruner's settings.
        schedule: Its steps.
        complexity: The network's complexity.
        target: A share of the network to end at, or None.
        gated: Which structures have gates at all, shape (n,).
    """

    def __init__(
        self,
        settings: PrunerSettings,
        schedule: Schedule,
        complexity: Complexity,
        target: Target | None,
        gated: NDArray[np.bool_],
    ):
        self.gated = gated
        self.settings, self.schedule, self.inventory = settings, schedule, complexity.inventory
        self.target = target
        outcomes = Outcomes(complexity, settings.round_to, target)
        self.checks = Checks(outcomes, settings.risk, settings.tolerance, settings.prior == "flattening")

    def enough(self, state: PrunerState) -> NDArray[np.bool_]:
        """Structures with enough evidence to decide, shape (n,)."""
        settled = state.speed.settled(state.done, self.settings.check_every)
        return state.evidence.enough & (state.products.pools.count >= LEAST_EVIDENCE) & settled

    def settle(
        self,
        state: PrunerState,
        limits: Limits,
        step_time: float,
        *,
        final: bool,
        last: bool,
        sizes: dict[str, NDArray] | None,
    ) -> Verdict:
        """Decide what can be decided; changes nothing but the record of a shadow run.

        Args:
            state: The pruner's state.
            limits: Measured quantities.
            step_time: ODE time of a step.
            final: Whether everything must be decided, but for what a shadow run watches.
            last: Whether watching ends here too.
            sizes: Norms of the units for a shadow run's rules by size, by rule.
        """
        moment = Moment(
            fate=state.fate,
            kept=state.kept,
            zero=state.zero,
            enough=self.enough(state),
            slope=state.evidence.slope(),
            done=state.done,
            time=state.time,
            step_time=step_time,
            progress=self.schedule.progress(state.done),
            steps_left=self.settings.steps - state.done,
            final=final,
            watching=not last and state.done < self.settings.watch_until,
        )
        return self.checks.settle(limits, moment, state.shadow, sizes)

    def update_price(self, state: PrunerState, limits: Limits, step_time: float) -> None:
        """Set nu to the level for the target; a useless structure keeps sinking at the same speed.

        Args:
            state: The pruner's state, changed in place.
            limits: Measured quantities, at the prices so far.
            step_time: ODE time of a step.
        """
        passed = (state.done - self.schedule.checked_before(state.done)) * step_time
        level = self.target.update_price(
            state.nu,
            state.kept,
            self.enough(state) & (state.fate == fates.UNDECIDED),
            state.nu * limits.benefit / limits.price,
            state.keep_prob,
            progress=self.schedule.progress(state.done),
            growth=state.speed.value * passed,
        )
        state.rate_ratio = state.rate_ratio * (state.nu / level)  # not in place: `limits` holds what was used
        state.nu = level

    def report(
        self,
        state: PrunerState,
        limits: Limits,
        verdict: Verdict,
        before: NDArray[np.str_],
        removed: int,
        final: bool,
        step_time: float,
    ) -> Check:
        """Rows and warnings of a check that was carried out.

        Args:
            state: The pruner's state after it.
            limits: Measured quantities.
            verdict: Its decisions.
            before: Fates before it.
            removed: Number of structures removed.
            final: Whether the deciding phase ended.
            step_time: ODE time of a step.
        """
        noted = (state.fate != before) | verdict.decided | self._due(before == fates.UNDECIDED, state.done, final)
        names, columns = self.inventory.names(), limits.columns()
        columns |= {"separatrix": verdict.separatrix, "tolerance": verdict.tolerance}
        same = {"step": state.done, "time": state.time, "risk": self.settings.risk}
        rows = []
        for s in np.flatnonzero(noted):
            values = {name: float(values[s]) for name, values in columns.items()}
            row = same | names[s] | values | {"fate": str(state.fate[s])}
            rows.append({name: row[name] for name in ROW_FIELDS})
        warnings = self._out_of_time(state, limits, before) if final else self._slow(state, step_time)
        if verdict.outcome.everything:
            name = "nu" if self.target is None else f"target_{self.target.quantity}"
            value, fault, other = (
                (state.nu, "large", "smaller") if self.target is None else (self.target.share, "small", "larger")
            )
            warnings.append(
                f"everything would go at step {state.done}: `{name}`={value:g} is too {fault}. Pruning stops here and keeps "
                f"the present network; choose a {other} {name}."
            )
        return Check(rows, warnings, removed)

    def _slow(self, state: PrunerState, step_time: float) -> list[str]:
        """Said once, from a quarter of the deciding phase on: that thetas move too slowly to get anywhere, as text."""
        speed, own = state.speed, self.settings
        told = any(line.startswith(SLOWLY) for line in state.warnings)
        if told or speed.asked is not None or self.schedule.progress(state.done) < SEEN or state.time <= 0:
            return []
        mean = state.time / state.done
        if step_time > RISING * mean:  # a warm-up, which may still come to what the groups name
            return []
        crossings = speed.value * mean * (own.steps - own.warmup)
        if crossings >= LEAST_CROSSINGS:
            return []
        return [
            f"{SLOWLY}: at the learning rates so far one can fall from 1 to 0 {crossings:.2g} times in the deciding phase, "
            f"since the optimizer's groups name rates that are not reached (`initial_lr`, `max_lr`), or took larger steps before. "
            f"Pass rate_ratio={CROSSINGS / (own.steps * mean):.3g}, or delete `initial_lr` from the groups."
        ]

    def _out_of_time(self, state: PrunerState, limits: Limits, before: NDArray[np.str_]) -> list[str]:
        """What was decided only because the deciding phase ended, as text, and how long it should have been."""
        timeless = (before == fates.UNDECIDED) & np.isin(
            state.fate, (fates.KEPT_OUT_OF_TIME, fates.REMOVED_OUT_OF_TIME)
        )
        removed = timeless & (state.fate == fates.REMOVED_OUT_OF_TIME)
        near_one = int((removed & (limits.keep_prob >= NEARLY_ONE)).sum())
        state.removed_near_one += near_one
        total = int(self.gated.sum())
        if timeless.sum() <= ALOUD * total and not near_one:
            return []
        text = f"{int(timeless.sum()):,} of {total:,} structures were decided because time was out, not by what was measured: "
        text += f"{int((timeless & ~removed).sum()):,} kept, {int(removed.sum()):,} removed"
        if near_one:
            text += f", {near_one:,} of those with a theta of {NEARLY_ONE} or more"
        done, own = state.done, self.settings
        text += f", after {done:,} steps" + (f" of {own.steps:,}" if done < own.steps else "")
        needed = self.needed(state, limits, timeless)
        if needed is not None:
            text += (
                f"; to tell half of them from their prices takes a deciding phase of about {needed:,} steps, this had "
            )
            text += f"{max(done - own.warmup, 0):,}"
        return [f"{text}."]

    def needed(self, state: PrunerState, limits: Limits, where: NDArray[np.bool_]) -> int | None:
        """Steps that the deciding phase should have, at the noise measured, to decide half of some structures.

        Args:
            state: The pruner's state.
            limits: Measured quantities.
            where: The structures, shape (n,).

        Returns:
            None if too little was measured.
        """
        variance = state.evidence.variance()
        known = where & np.isfinite(variance) & np.isfinite(limits.step_time) & (limits.step_time > 0)
        known &= limits.price > LEAST_PRICE  # no number of steps tells a benefit of 0 from a price of 0
        if not known.any() or state.time <= 0:
            return None
        every = limits.step_time[known] * state.done / state.time  # steps from one estimate to the next
        memory = needed_memory(
            np.sqrt(variance[known]), limits.price[known], self.settings.risk, state.evidence.correlation()[known]
        )
        return needed_phase(float(np.median(memory * every)), self.settings.check_every)

    def _due(self, open_: NDArray[np.bool_], done: int, final: bool) -> NDArray[np.bool_]:
        """Undecided structures to record: layers at every check, units as often as `MOST_ROWS` permits."""
        every = self.settings.check_every
        skip = max(1, round(len(open_) * self.settings.watch_until / every / MOST_ROWS))
        return open_ & (self.inventory.is_layer | final | (done // every % skip == 0))
