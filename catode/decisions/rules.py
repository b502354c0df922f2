"""The rules by which structures are removed or committed, as functions of what was measured.

Source: docs/mathematics.md sections 3 to 5; docs/conventions.md item 3; docs/theory.md for the rationing and the
indifference zone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from catode.decisions.limits import Limits
from catode.theory import tolerance

MOST_OF_A_SITE = 0.25  # share of a site's units that one check may remove: their benefits were measured one by one
COMMIT_FROM, INDIFFERENT_FROM = 0.5, 0.75  # shares of the deciding phase, see `certain`
INDIFFERENCE = 3.0  # a benefit known to lie within this factor of the price is not worth deciding
NEARLY_ONE = 0.9  # keep probability from which commitment is considered; the alarm bound uses the actual value


def tolerances(
    limits: Limits, where: NDArray[np.bool_], *, risk: float, fixed: float | None = None
) -> tuple[NDArray, NDArray]:
    """Separatrix and tolerance of the structures in `where`.

    Args:
        limits: Measured quantities.
        where: Structures with enough evidence, shape (n,).
        risk: Accepted probability that a removed structure would have recovered.
        fixed: A tolerance to use in place of the derived ones.

    Returns:
        Two arrays of shape (n,), NaN where nothing is known.
    """
    separatrix, values = np.full((2, len(where)), np.nan)
    where = where & limits.known
    if where.any():
        derived = tolerance.derive(**limits.tolerance_arguments(where), risk=risk)
        separatrix[where], values[where] = derived.separatrix, derived.values
    if fixed is not None:
        values = np.where(where, fixed, np.nan)
    return separatrix, values


def safe(limits: Limits, tolerance_values: NDArray) -> NDArray[np.bool_]:
    """Structures that may be removed: the upper limit of the benefit below the price, theta at or below the tolerance.

    Args:
        limits: Measured quantities.
        tolerance_values: Tolerances, NaN where nothing is known, shape (n,).
    """
    return (limits.benefit_upper < limits.price) & (limits.keep_prob <= tolerance_values)


def ration(
    safe: NDArray[np.bool_],
    limits: Limits,
    is_layer: NDArray[np.bool_],
    sites: Sequence[NDArray[np.int64]],
    multiple: int | Sequence[int] = 1,
) -> NDArray[np.bool_]:
    """Let one check remove at most one layer and a quarter of a site, or one group, the least useful first.

    Benefits are measured with all the others in place; spreading removals over checks lets the pools follow.

    Args:
        safe: Structures that may be removed, shape (n,).
        limits: Measured quantities.
        is_layer: Which structures are layers, shape (n,).
        sites: Numbers of the units left at each site.
        multiple: Size of a group, of each site or of all; fewer units cannot leave, see `hold_back`.
    """
    allowed = np.zeros_like(safe)
    ratio = np.divide(limits.benefit_upper, limits.price, out=np.zeros(len(safe)), where=safe)
    layers = np.flatnonzero(safe & is_layer)
    if len(layers):
        allowed[layers[np.argmin(ratio[layers])]] = True
    for left, group in zip(sites, np.broadcast_to(multiple, len(sites)).tolist(), strict=True):
        units = left[safe[left]]
        most = max(group, int(MOST_OF_A_SITE * len(left)))
        allowed[units[np.argsort(ratio[units], kind="stable")[:most]]] = True
    return allowed


def worth(limits: Limits) -> NDArray[np.float64]:
    """Benefit over price of every structure, 0 where nothing is known, shape (n,)."""
    return np.where(np.isfinite(limits.benefit), limits.benefit, 0.0) / limits.price


def hold_back(
    leaving: NDArray[np.bool_], limits: Limits, sites: Sequence[NDArray[np.int64]], multiple: int | Sequence[int]
) -> NDArray[np.bool_]:
    """Units that must wait so that each site is left with a multiple of some number of units, with none, or with all.

    Only whole groups are removed: of the units that may leave, those of the largest keep probability (then of the largest
    benefit for their price) wait for others. Fewer than `multiple` wait at a site.

    Args:
        leaving: Structures that may go, shape (n,).
        limits: Measured quantities.
        sites: Numbers of the units left at each site.
        multiple: Widths are rounded up to multiples of this, that of each site or of all.
    """
    held = np.zeros_like(leaving)
    every = worth(limits)
    for left, group in zip(sites, np.broadcast_to(multiple, len(sites)).tolist(), strict=True):
        units = left[leaving[left]]
        order = np.lexsort((every[units], limits.keep_prob[units]))[::-1]
        held[units[order[: -(len(left) - len(units)) % group]]] = True
    return held


def certain(
    limits: Limits,
    known: NDArray[np.bool_],
    *,
    slope: tuple[NDArray, NDArray],
    progress: float,
    steps_left: int,
    step_time: float,
    risk: float,
) -> NDArray[np.bool_]:
    """Structures to commit: certain to stay until the deciding phase ends, or indifferent.

    The gain's lower limit is 0 in practice, so the mirror domain is empty and the finite-horizon test decides: theta
    is near 1; the benefit's lower limit, carried to the horizon at the rate at which benefits are seen to fall,
    stays above the price; and noise alone reaches 0 with less than the stated risk. Benefits fall while the loss
    falls, so nothing is committed in the first half of the phase. In its last quarter a structure whose
    benefit is known to lie near its price is kept too: it does not matter.

    Source: docs/mathematics.md sections 3 and 4.4.

    Args:
        limits: Measured quantities.
        known: Structures with enough evidence, shape (n,).
        slope: Growth of the benefits and its standard error, nats/time, shape (n,) each.
        progress: Share of the deciding phase that is over.
        steps_left: Steps until it ends.
        step_time: ODE time of a step.
        risk: Accepted probability of a false alarm.
    """
    lower, upper, price = limits.benefit_lower, limits.benefit_upper, limits.price
    near_one = known & (limits.keep_prob >= NEARLY_ONE) & (lower > 0.0)
    growth = slope[0] + float(ndtri(risk)) * slope[1]
    fall = np.maximum(-growth, 0.0)[near_one] / limits.benefit[near_one]
    last = np.zeros_like(lower)
    last[near_one] = lower[near_one] * np.exp(-fall * steps_left * step_time)
    committed = near_one & (last > price) & (progress >= COMMIT_FROM)
    where = np.flatnonzero(committed)
    if len(where):
        alarm = tolerance.commit_alarm(
            benefit=last[where],
            price=price[where],
            rate_ratio=limits.rate_ratio[where] * limits.keep_prob[where],
            noise=limits.noise[where],
            step_time=limits.step_time[where],
            steps_left=steps_left,
        )
        committed[where] = alarm < risk
    if progress >= INDIFFERENT_FROM:
        committed |= near_one & (lower > price / INDIFFERENCE) & (upper < price * INDIFFERENCE) & (upper >= price)
    return committed
