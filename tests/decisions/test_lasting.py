"""Sites that must keep a unit: whatever may go, one stays, the best of those that would have been the last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import limits

from catode.decisions.outcomes import Outcomes
from catode.decisions.target import Target
from catode.structures import fates
from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory

OWNER = Inventory(
    [
        Block("branch", "o", (Site("a", 6, (), ()),)),
        Block("held", "", (Site("b", 8, (), ()), Site("c", 5, (), ())), removable=False),
    ]
)
COST = Complexity(
    [
        Term("stem", 40, 4),
        Term("a.in", 7, 3, 0, None, 0),
        Term("a.out", 9, 2, 0, 0, None),
        Term("b", 5, 2, None, None, 1),
        Term("c", 3, 1, None, 1, 2),
        Term("head", 4, 2, None, 2, None),
    ],
    OWNER,
)
N, HELD = OWNER.size, ~OWNER.removable


def settle(theta, *, zero=(), safe=(), final=False, target=None, multiple=1, benefit=1.0, kept=None):
    kept = np.ones(N, dtype=bool) if kept is None else kept
    open_ = kept & ~HELD
    fate = np.where(open_, fates.UNDECIDED, np.where(kept, fates.COMMITTED, fates.PRUNED_ZERO)).astype("<U32")
    none = np.zeros(N, dtype=bool)
    marks = [np.isin(np.arange(N), which) for which in (zero, safe)]
    found = limits(N, keep_prob=theta, benefit=benefit, benefit_upper=benefit, price=0.5)
    return Outcomes(COST, multiple, target).settle(
        fate, kept, found, zero=marks[0], safe=marks[1], certain=none, watching=none, final=final
    )


def test_the_price_of_units_of_blocks_that_stay():
    """Share of the removable part, which is everything but the stem and what has no units."""
    theta = np.ones(N)
    total = 7 * 6 + 9 * 6 + 5 * 8 + 3 * 8 * 5 + 4 * 5
    assert COST.removable_macs == total
    prices = COST.prices(theta, nu=2.0, alpha=0.5, beta=0.0)
    b, c = OWNER.units[1], OWNER.units[2]
    assert prices[b] == pytest.approx((5 + 3 * 5) / total) and prices[c] == pytest.approx((3 * 8 + 4) / total)
    assert prices[:2] == pytest.approx([(7 * 6 + 9 * 6) / total, 0.0])


def test_the_least_share_keeps_one_unit_of_every_site():
    least = (40 + 5 + 3 + 4) / COST.macs(np.ones(N))
    with pytest.raises(ValueError, match=f"the network keeps {least:.4f}"):
        Target(COST, "macs", least * 0.99)
    assert Target(COST, "macs", least * 1.01).share == least * 1.01


@pytest.mark.parametrize("final", [False, True])
def test_of_units_that_would_all_go_the_best_stays(final):
    theta = np.ones(N)
    b = OWNER.units[1]
    theta[b] = 0.1
    theta[b[3]] = 0.2
    result = settle(theta, zero=b[:2], safe=b[2:], final=final)
    assert np.flatnonzero(result.kept[b]).tolist() == [3]
    assert result.fate[b[3]] == fates.KEPT_AS_LAST
    assert set(result.fate[b[:2]]) == {fates.PRUNED_ZERO} and result.fate[b[5]] == fates.PRUNED_TOLERANCE


def test_among_equal_thetas_the_larger_benefit_for_its_price_stays():
    theta, benefit = np.zeros(N), np.zeros(N)
    c = OWNER.units[2]
    benefit[c[2]] = 1.0
    result = settle(theta, zero=c, benefit=benefit)
    assert np.flatnonzero(result.kept[c]).tolist() == [2] and result.fate[c[2]] == fates.KEPT_AS_LAST


def test_what_is_rounded_down_at_the_end_leaves_one():
    result = settle(np.where(OWNER.is_layer, 1.0, 0.3), final=True)
    last = np.flatnonzero(result.fate == fates.KEPT_AS_LAST)
    assert last.tolist() == np.flatnonzero(OWNER.at_least(result.kept)).tolist() and len(last) == 2
    assert not result.kept[0] and not result.kept[OWNER.units[0]].any() and not result.everything


@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([None, 0.3, 0.6, 0.9]),
)
def test_law_every_site_that_must_last_keeps_a_unit(seed, multiple, final, share):
    rng = np.random.default_rng(seed)
    kept = OWNER.close(rng.random(N) < 0.8)
    theta = np.where(HELD, 1.0, rng.choice([0.0, 0.3, 0.7, 1.0], size=N))
    zero = np.flatnonzero(kept & ~HELD & (theta == 0.0) & (rng.random(N) < 0.9))
    safe = np.setdiff1d(np.flatnonzero(kept & ~HELD & (rng.random(N) < rng.random())), zero)
    target = None if share is None else Target(COST, "macs", share)
    benefit = rng.normal(size=N)
    result = settle(
        theta, zero=zero, safe=safe, final=final, target=target, multiple=multiple, benefit=benefit, kept=kept
    )
    assert (OWNER.close(result.kept) == result.kept).all() and not (result.kept & ~kept).any()
    assert result.kept[HELD].all() and all(result.kept[OWNER.units[n]].any() for n in (1, 2))
    last = result.fate == fates.KEPT_AS_LAST
    assert result.kept[last].all()
    if not result.everything:
        assert not last[OWNER.is_layer].any() and not last[OWNER.units[0]].any()
    assert (kept & ~result.kept <= np.isin(result.fate, fates.REMOVED)).all()
    assert not final or not ((result.fate == fates.UNDECIDED) & result.kept).any()
