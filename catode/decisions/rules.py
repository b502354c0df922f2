"""The rules by which structures are removed or committed, as functions of what was measured.

`found` is always a `catode.decisions.evidence.summary`: arrays of shape (n,) by name.

Source: THEORY sections 3 to 5, CONTRACT item 3; docs/theory.md for the pool, the rationing and the indifference zone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from catode.theory import tolerance

MOST_OF_A_SITE = 0.25  # share of a site's units that one check may remove: their benefits were measured one by one
COMMIT_FROM, INDIFFERENT_FROM = 0.5, 0.75  # shares of the deciding phase, see `certain`
INDIFFERENCE = 3.0  # a benefit known to lie within this factor of the price is not worth deciding
LEAST_PRICE = 1e-12  # nats; below it a price is that of a unit whose layer is all but gone
NEARLY_ONE = 0.9  # keep probability from which commitment is considered; the alarm bound uses the actual value


def tolerances(
    found: dict[str, NDArray], where: NDArray[np.bool_], *, memory: NDArray, risk: float, fixed: float | None = None
) -> tuple[NDArray, NDArray]:
    """Separatrix and tolerance of the structures in `where`.

    Args:
        found: What was measured.
        where: Structures with evidence enough, shape (n,).
        memory: Time constant of each pooled benefit, ODE time, shape (n,).
        risk: Accepted probability of removing what would not have gone by itself.
        fixed: A tolerance to use in place of the derived ones.

    Returns:
        Two arrays of shape (n,), NaN where nothing is known.
    """
    separatrix, values = np.full((2, len(where)), np.nan)
    where = where & np.all([np.isfinite(v) for v in found.values()], axis=0)
    if where.any():
        derived = tolerance.derive(**inputs(found, where, memory), risk=risk)
        separatrix[where], values[where] = derived.separatrix, derived.values
    if fixed is not None:
        values = np.where(where, fixed, np.nan)
    return separatrix, values


def inputs(found: dict[str, NDArray], where: NDArray[np.bool_], memory: NDArray) -> dict[str, NDArray]:
    """Arguments of `catode.theory.tolerance.derive` for the structures in `where`, all finite; see `tolerances`."""
    part = {k: v[where] for k, v in found.items()}
    # theta moves by the pool plus its margin: a pool that sees a price lower by the margin
    price = part["price"] - (part["benefit_upper"] - part["benefit"])
    return {
        "benefit": part["benefit_upper"],
        "pooled": part["benefit"],
        "price": np.maximum(price, LEAST_PRICE),
        "memory": memory[where],
        **{k: part[k] for k in ("gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift", "step_time")},
    }


def ration(
    safe: NDArray[np.bool_],
    found: dict[str, NDArray],
    is_layer: NDArray[np.bool_],
    sites: Sequence[NDArray[np.int64]],
    multiple: int = 1,
) -> NDArray[np.bool_]:
    """Let one check remove at most one layer and a quarter of a site, or one group, the least useful first.

    Benefits are measured with all the others in place; spreading the removals over checks lets the pools follow.

    Args:
        safe: Structures that may be removed, shape (n,).
        found: What was measured.
        is_layer: Which structures are layers, shape (n,).
        sites: Numbers of the units left at each site.
        multiple: Size of a group; fewer units cannot leave, see `hold_back`.
    """
    allowed = np.zeros_like(safe)
    ratio = np.divide(found["benefit_upper"], found["price"], out=np.zeros(len(safe)), where=safe)
    layers = np.flatnonzero(safe & is_layer)
    if len(layers):
        allowed[layers[np.argmin(ratio[layers])]] = True
    for left in sites:
        units = left[safe[left]]
        most = max(multiple, int(MOST_OF_A_SITE * len(left)))
        allowed[units[np.argsort(ratio[units], kind="stable")[:most]]] = True
    return allowed


def hold_back(
    leaving: NDArray[np.bool_], found: dict[str, NDArray], sites: Sequence[NDArray[np.int64]], multiple: int
) -> NDArray[np.bool_]:
    """Units that must wait so that each site is left with a multiple of some number of units, with none, or with all.

    Only whole groups go: of the units that may leave, those of the largest keep probability (then of the largest benefit
    for their price) wait for others. Fewer than `multiple` wait at a site, and nothing goes that might not have.

    Args:
        leaving: Structures that may go, shape (n,).
        found: What was measured.
        sites: Numbers of the units left at each site.
        multiple: What widths are rounded up to.
    """
    held = np.zeros_like(leaving)
    worth = np.where(np.isfinite(found["benefit"]), found["benefit"], 0.0) / found["price"]
    for left in sites:
        units = left[leaving[left]]
        order = np.lexsort((worth[units], found["keep_prob"][units]))[::-1]
        held[units[order[: -(len(left) - len(units)) % multiple]]] = True
    return held


def certain(
    found: dict[str, NDArray],
    known: NDArray[np.bool_],
    *,
    slope: tuple[NDArray, NDArray],
    progress: float,
    steps_left: int,
    step_time: float,
    risk: float,
) -> NDArray[np.bool_]:
    """Structures to commit: certain to stay until the deciding phase ends, or not worth telling (THEORY 3 and 4.4).

    The gain's lower limit is 0 in practice, so the mirror domain is empty and the finite-horizon test decides: theta
    is near 1; the benefit's lower limit, carried to the horizon at the rate at which benefits are seen to fall,
    stays above the price; and noise alone reaches 0 with less than the stated risk. Benefits fall while the loss
    falls, so nothing is committed in the first half of the phase. In its last quarter a structure whose
    benefit is known to lie near its price is kept too: it does not matter.

    Args:
        found: What was measured.
        known: Structures with evidence enough, shape (n,).
        slope: Growth of the benefits and its standard error, nats/time, shape (n,) each.
        progress: Share of the deciding phase that is over.
        steps_left: Steps until it ends.
        step_time: ODE time of a step.
        risk: Accepted probability of a false alarm.
    """
    lower, upper, price = (found[k] for k in ("benefit_lower", "benefit_upper", "price"))
    near_one = known & (found["keep_prob"] >= NEARLY_ONE) & (lower > 0.0)
    growth = slope[0] - float(ndtri(1.0 - risk)) * slope[1]
    fall = np.maximum(-growth, 0.0)[near_one] / found["benefit"][near_one]
    last = np.zeros_like(lower)
    last[near_one] = lower[near_one] * np.exp(-fall * steps_left * step_time)
    committed = near_one & (lower > price) & (last > price) & (progress >= COMMIT_FROM)
    where = np.flatnonzero(committed)
    if len(where):
        alarm = tolerance.commit_alarm(
            benefit=last[where],
            price=price[where],
            rate_ratio=found["rate_ratio"][where] * found["keep_prob"][where],
            noise=found["noise"][where],
            step_time=found["step_time"][where],
            steps_left=steps_left,
        )
        committed[where] = alarm < risk
    if progress >= INDIFFERENT_FROM:
        committed |= near_one & (lower > price / INDIFFERENCE) & (upper < price * INDIFFERENCE) & (upper >= price)
    return committed
