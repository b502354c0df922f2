"""Widths with a least: units stay, the best ones; a branch may still go as a whole; a target stops at what can be reached."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import limits

from catode.decisions.outcomes import Outcomes
from catode.decisions.target import SLACK, Target
from catode.structures import fates
from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory

WIDTHS = (6, 8, 5, 9)


def network(*least: int) -> Complexity:
    """A branch of two widths, one of a single width, and a width in no branch; each term counts for MACs and parameters."""
    sites = [Site(name, width, (), (), least=fewest) for name, width, fewest in zip("abcd", WIDTHS, least, strict=True)]
    blocks = [
        Block("one", "o", tuple(sites[:2])),
        Block("two", "p", (sites[2],)),
        Block("held", "", (sites[3],), removable=False),
    ]
    terms = [
        Term("stem", 10, 4),
        Term("a", 7, 3, 0, None, 0),
        Term("ab", 2, 1, 0, 0, 1),
        Term("b", 5, 2, 0, 1, None),
        Term("c", 9, 2, 1, None, 2),
        Term("d", 5, 2, None, None, 3),
        Term("head", 4, 2, None, 3, None),
    ]
    return Complexity(terms, Inventory(blocks))


def settle(cost, *, kept=None, fate=None, theta=1.0, going=(), benefit=1.0, final=False, target=None, multiple=1):
    owner = cost.inventory
    kept = np.ones(owner.size, dtype=bool) if kept is None else kept
    if fate is None:
        fate = np.where(kept & owner.removable, fates.UNDECIDED, np.where(kept, fates.COMMITTED, fates.PRUNED_ZERO))
    none = np.zeros(owner.size, dtype=bool)
    found = limits(owner.size, keep_prob=theta, benefit=benefit, benefit_upper=benefit, price=0.5)
    return Outcomes(cost, multiple, target).settle(
        fate.astype("<U32"),
        kept,
        found,
        zero=np.isin(np.arange(owner.size), going) & kept & (fate == fates.UNDECIDED),
        safe=none,
        certain=none,
        watching=none,
        final=final,
    )


def fewest(cost: Complexity) -> np.ndarray:
    return np.array([place.site.least for place in cost.inventory.places])


def test_of_units_that_would_go_the_best_stay_folded_and_the_rest_is_decided():
    cost = network(0, 3, 0, 0)
    b, theta = cost.inventory.units[1], np.ones(cost.size)
    theta[b[:7]] = [0.0, 0.1, 0.3, 0.2, 0.0, 0.0, 0.0]
    result = settle(cost, theta=theta, going=b[:7])
    assert np.flatnonzero(result.kept[b]).tolist() == [2, 3, 7]
    assert set(result.fate[b[[2, 3, 7]]]) == {fates.KEPT_AT_LEAST}, "the one that was not going cannot go any more"
    assert result.folded[b].tolist() == [False, False, True, True, False, False, False, True]
    assert result.kept[: cost.inventory.layers].all(), "the branch stands"


def test_the_branch_goes_as_a_whole():
    cost = network(0, 3, 5, 0)
    owner = cost.inventory
    result = settle(cost, going=[0], theta=0.0)
    assert not result.kept[0] and not result.kept[owner.units[0]].any() and not result.kept[owner.units[1]].any()
    assert set(result.fate[owner.units[1]]) == {fates.REMOVED_WITH_BLOCK} and result.kept[1]
    emptied = settle(cost, going=owner.units[0], theta=0.0)
    assert not emptied.kept[0] and not emptied.kept[owner.units[1]].any(), "with the last unit of a width without least"


def test_a_width_that_is_to_stay_whole_has_nothing_that_can_go():
    owner = network(0, 8, 0, 9).inventory
    assert not owner.removable[owner.units[1]].any() and not owner.removable[owner.units[3]].any()
    assert owner.removable[owner.units[0]].all() and owner.least.tolist() == [0, 8, 0, 9]


def test_rounding_stops_at_the_first_multiple_above_the_least():
    cost = network(0, 3, 0, 0)
    b = cost.inventory.units[1]
    result = settle(cost, theta=np.where(np.arange(cost.size) == b[2], 0.4, 0.0), going=b, multiple=4)
    assert result.kept[b].sum() == 4 and result.kept[b[2]]
    assert sorted(result.fate[b[result.kept[b]]]) == [fates.KEPT_AT_LEAST] * 3 + [fates.KEPT_FOR_WIDTH]


def test_the_least_share_knows_what_cannot_go():
    cost = network(2, 3, 0, 4)
    whole = cost.macs(np.ones(cost.size))
    with pytest.raises(ValueError, match=f"Without any block the network keeps {(10 + 4 * 9) / whole:.4f}"):
        Target(cost, "macs", 0.01)
    units = ~cost.inventory.is_layer & cost.inventory.removable  # as where only units have gates
    left = 10 + 7 * 2 + 2 * 2 * 3 + 5 * 3 + 4 * 9
    with pytest.raises(ValueError, match=rf"Without all that can go the network keeps {left / whole:.4f}\.") as refused:
        Target(cost, "macs", left / whole - 1e-3, units)
    assert "\n" not in str(refused.value)
    assert Target(cost, "macs", left / whole + 1e-3, units).share > left / whole


@st.composite
def cases(draw):
    """A network with leasts, what earlier checks left of it, and a check."""
    cost = network(*(draw(st.integers(0, width)) for width in WIDTHS))
    owner, rng = cost.inventory, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    multiple = draw(st.sampled_from([1, 2, 4]))
    kept = np.ones(cost.size, dtype=bool)
    for units, least in zip(owner.units, owner.least, strict=True):
        first = len(units) % multiple or multiple
        most = max((len(units) - least - first) // multiple, -1)
        groups = int(rng.integers(0, most + 2))
        kept[rng.permutation(units)[: 0 if groups == 0 else first + (groups - 1) * multiple]] = False
    kept = owner.close(kept)
    open_ = kept & owner.removable & (rng.random(cost.size) < draw(st.floats(0.2, 1.0)))
    theta = np.where(open_, rng.choice([0.0, 0.3, 0.7, 0.95, 1.0], size=cost.size), np.where(kept, 1.0, 0.0))
    share = draw(st.sampled_from([None, 0.3, 0.5, 0.8]))
    floor = cost.macs(owner.close(np.zeros(cost.size, dtype=bool)).astype(float)) / cost.macs(np.ones(cost.size))
    target = None if share is None or share <= floor else Target(cost, "macs", share)
    fate = np.where(open_, fates.UNDECIDED, np.where(kept, fates.COMMITTED, fates.PRUNED_ZERO))
    going = np.flatnonzero(open_ & (theta == 0.0) & (rng.random(cost.size) < 0.9))
    given = dict(kept=kept, fate=fate, theta=theta, going=going, benefit=rng.normal(size=cost.size), target=target)
    return cost, given | {"final": draw(st.booleans()), "multiple": multiple}


@given(cases())
def test_law_no_width_goes_below_its_least_while_its_block_stands(case):
    cost, given_ = case
    owner, result = cost.inventory, settle(cost, **given_)
    assert (owner.close(result.kept) == result.kept).all() and not (result.kept & ~given_["kept"]).any()
    for place in owner.standing(result.kept):
        assert result.kept[place.units].sum() >= place.site.least
    at_least = result.fate == fates.KEPT_AT_LEAST
    assert result.kept[at_least].all() and result.folded[at_least].all() and not result.certain[at_least].any()
    assert (fewest(cost)[owner.unit_site[np.flatnonzero(at_least) - owner.layers]] > 0).all()
    if result.everything:
        return
    assert np.isin(result.fate[given_["kept"] & ~result.kept], fates.REMOVED).all()
    for place in owner.standing(result.kept):  # what is at its least is decided
        left = place.units[result.kept[place.units]]
        group = len(left) % given_["multiple"] or given_["multiple"]
        if place.site.least and len(left) - group < place.site.least:
            assert not (result.fate[left] == fates.UNDECIDED).any()
    assert not given_["final"] or not (result.fate == fates.UNDECIDED).any()


@given(cases())
def test_law_without_a_least_in_reach_nothing_is_different(case):
    """A least that no removal comes near changes neither what goes nor any fate."""
    cost, given_ = case
    result = settle(cost, **given_)
    owner = cost.inventory
    near = [
        place.site.least and given_["kept"][place.units].sum() - given_["multiple"] * 2 < place.site.least
        for place in owner.places
    ]
    if any(near) or given_["final"] or (result.fate == fates.KEPT_AT_LEAST).any():
        return
    free = network(0, 0, 0, 0)
    target = given_["target"]
    other = settle(free, **given_ | {"target": target and dataclasses.replace(target, complexity=free)})
    if other.kept[: owner.layers].all():
        assert (other.kept == result.kept).all() and (other.fate == result.fate).all()


@given(st.tuples(*(st.integers(0, width) for width in WIDTHS)), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_law_a_target_within_reach_is_reached_check_by_check(least, share, seed):
    """Useless units sink one after the other; only units have gates, so that the leasts alone stop them."""
    cost = network(*least)
    owner, rng = cost.inventory, np.random.default_rng(seed)
    gated = ~owner.is_layer & owner.removable
    floor = cost.macs(owner.close(~gated).astype(float)) / cost.macs(np.ones(cost.size))
    if not floor + SLACK < share or not gated.any():
        return
    target = Target(cost, "macs", share, gated)
    kept, fate = np.ones(cost.size, dtype=bool), np.where(gated, fates.UNDECIDED, fates.COMMITTED).astype("<U32")
    theta, benefit = np.ones(cost.size), rng.random(cost.size)
    for check in range(100):
        theta[gated & (rng.random(cost.size) < 0.3)] = 0.0
        going = np.flatnonzero(theta == 0.0)
        result = settle(
            cost, kept=kept, fate=fate, theta=theta, going=going, benefit=benefit, target=target, final=check == 99
        )
        kept, fate = result.kept, result.fate
        for place in owner.standing(kept):
            assert kept[place.units].sum() >= place.site.least
        if not (fate == fates.UNDECIDED).any():
            break
    smallest = target.parts(kept)[kept & gated]
    assert target.of(kept) <= share + max(SLACK, smallest.max(initial=0.0))
