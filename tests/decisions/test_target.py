"""Ending at a share of the MACs or parameters: the laws of `catode.decisions.target`, and examples by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import inventory, network

from catode.decisions.target import HEADROOM, LAG, RAMP, SLACK, Target, missed
from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory

COST = network((16,), (12, 8), (8,))
BLOCKS, close = COST.inventory.layers, COST.inventory.close


@st.composite
def states(draw):
    """A target, a closed network above it, what is undecided in it, and what each is worth."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = Target(COST, draw(st.sampled_from(["macs", "params"])), draw(st.floats(0.1, 0.95)))
    kept = close(rng.random(COST.size) < draw(st.floats(0.6, 1.0)))
    open_ = kept & (rng.random(COST.size) < draw(st.floats(0.0, 1.0)))
    return target, kept, open_, rng.gamma(1.0, size=COST.size)


@given(states(), st.integers(0, 2**32 - 1))
def test_removal_goes_no_further_than_the_target(state, seed):
    target, kept, open_, worth = state
    going = open_ & (np.random.default_rng(seed).random(COST.size) < 0.7)
    left = target.remove(kept, going, open_, worth)
    assert not (left & ~kept).any() and (left == close(left)).all()
    gone, cost = kept & ~left, target.of(kept) - target.share
    if cost > 0:
        # past the target by no more than the slack, or by the least single part plus what it promotes
        least = target.parts(kept)[open_].min(initial=0.0)
        emptied = target.of(left) < target.share - max(SLACK, least) and (gone & ~going).any()
        assert target.of(left) >= target.share - max(SLACK, least) - 1e-12 or emptied
    else:
        assert not gone.any() or target.of(close(kept & ~going)) >= target.share


@given(states())
def test_what_stays_short_of_the_target_is_worth_more(state):
    target, kept, open_, worth = state
    units = open_ & (np.arange(COST.size) >= BLOCKS)
    left = target.remove(kept, units, units, worth)
    if (
        target.of(left) > target.share + SLACK
    ):  # what could not go would have led past the target by more than is left to it
        assert (target.parts(kept)[units & left] >= target.of(left) - target.share).all()
    elif (units & left).any() and target.of(kept) > target.share:
        assert abs(target.of(left) - target.share) < SLACK + 2 * target.parts(kept)[units].max()


@given(states(), st.floats(0.0, 1.0))
def test_level_prices_out_just_enough(state, progress):
    target, kept, open_, worth = state
    level = target.level(kept, open_, worth, progress)
    due = target.due(progress)
    if target.of(kept) <= due or target.of(close(kept & ~open_)) > due:
        assert level is None
        return
    marginal = level / HEADROOM
    assert target.of(close(kept & ~(open_ & (worth <= marginal * (1 + 1e-9))))) <= due
    assert target.of(close(kept & ~(open_ & (worth < marginal * (1 - 1e-9))))) > due


@given(st.floats(0.1, 0.9), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_share_due_falls_to_the_target(share, first, second):
    target = Target(COST, "macs", share)
    early, late = sorted((first, second))
    assert 1.0 >= target.due(early) >= target.due(late) >= share - 1e-12
    assert target.due(RAMP) == pytest.approx(share) and target.due(-LAG) == 1.0
    whole, none = np.ones(COST.size), np.zeros(COST.size)
    assert target.lags(whole, whole > 0, late) and not target.lags(none, none > 0, late)


def test_parts_are_what_goes_with_each_structure():
    target, kept = Target(COST, "params", 0.5), np.ones(COST.size, dtype=bool)
    parts = target.parts(kept)
    for s in (0, BLOCKS - 1, BLOCKS, COST.size - 1):
        without = kept.copy()
        without[s] = False
        assert parts[s] == pytest.approx(1.0 - target.of(without), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 1e-4])
def test_out_of_reach(share):
    with pytest.raises(ValueError, match="`target_macs` must"):
        Target(COST, "macs", share)


def test_a_share_of_nothing_but_what_stays_anyway_is_out_of_reach():
    least = Target(COST, "macs", 0.5).of(np.zeros(COST.size))
    with pytest.raises(ValueError, match=rf"Without any block the network keeps {least:.4f}"):
        Target(COST, "macs", least)
    assert Target(COST, "macs", float(np.nextafter(least, 1.0))).share > least


@given(states(), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_law_what_may_go_brings_the_share_nearer_and_not_far_past(state, size, seed):
    target, kept, open_, _ = state
    rng = np.random.default_rng(seed)
    sizes = np.where(rng.random(COST.size) < 0.2, np.inf, np.where(COST.inventory.is_layer, 1, size))
    given_ = None if size == 1 else sizes
    may = target.may_go(kept, open_, given_)
    after = np.full(COST.size, np.nan)
    for s in np.flatnonzero(open_):
        if given_ is None:
            group = [s]
        elif np.isfinite(sizes[s]):  # as many of its site, whether they are open or not
            own = (
                [s]
                if s < BLOCKS
                else [u for u in COST.inventory.units[COST.inventory.unit_site[s - BLOCKS]] if kept[u]]
            )
            group = own[: int(sizes[s])]
            if len(group) < sizes[s]:
                continue
        else:
            assert not may[s]
            continue
        without = kept.copy()
        without[group] = False
        after[s] = target.of(without)
    now = target.of(kept)
    known = np.isfinite(after)
    if (open_ & ~known & np.isfinite(sizes)).any():
        return  # a group larger than its site has no share to compare with
    slack = max(SLACK, (now - after[known]).min(initial=np.inf))
    for s in np.flatnonzero(known):
        near = abs(after[s] - target.share) < abs(now - target.share) - 1e-12
        assert may[s] == (near and after[s] > target.share - slack) or (
            abs(abs(after[s] - target.share) - abs(now - target.share)) < 1e-9
            or abs(after[s] - target.share + slack) < 1e-9
        )
    assert not (may & ~open_).any()


def test_one_removal_past_the_target_is_the_last():
    target = Target(COST, "macs", 0.9)
    kept, none = np.ones(COST.size, dtype=bool), np.zeros(COST.size, dtype=bool)
    assert target.may_go(kept, kept).any() and not target.may_go(kept, none).any()
    while target.of(kept) > 0.9:
        unit = np.flatnonzero(kept & ~COST.inventory.is_layer)[-1]
        kept[unit] = False
    assert not target.may_go(kept, kept & ~COST.inventory.is_layer).any()


def test_of_by_hand():
    small = network((2,))  # stem 50 MACs; 40 for each unit, 43 for each unit, 8 for the block
    assert Target(small, "macs", 0.9).of(np.array([1, 1, 1])) == 1.0
    assert Target(small, "macs", 0.9).of(np.array([1.0, 1.0, 0.0])) == pytest.approx((50 + 83 + 8) / (50 + 166 + 8))
    assert Target(small, "params", 0.9).of(np.array([1.0, 0.5, 0.0])) == pytest.approx((3 + 2.5 + 5) / (3 + 10 + 5))
    assert Target(small, "macs", 0.9).parts(np.array([True, True, False])) == pytest.approx(
        [91 / 224, 83 / 224, 83 / 224]
    )


@pytest.mark.parametrize(
    ("progress", "theta", "kept", "expected"),
    [
        (0.25, 1.0, 1.0, True),  # 0.8 is due of the expected share
        (0.25, 0.0, 1.0, False),  # nothing is due of the physical one yet
        (0.3, 0.0, 1.0, False),
        (0.31, 0.0, 1.0, True),
        (0.0, 1.0, 1.0, False),
        (1.0, 0.0, 0.0, False),
    ],
)
def test_a_network_lags_in_expectation_or_physically(progress, theta, kept, expected):
    target = Target(COST, "macs", 0.6)
    assert target.lags(np.full(COST.size, theta), np.full(COST.size, kept > 0), progress) == expected


@pytest.mark.parametrize(("progress", "due"), [(-1, 1.0), (0, 1.0), (0.125, 0.9), (0.25, 0.8), (0.5, 0.6), (1.0, 0.6)])
def test_due_by_hand(progress, due):
    assert Target(COST, "macs", 0.6).due(progress) == pytest.approx(due)


UNITS = ~COST.inventory.is_layer
WHOLE, ALL = np.ones(COST.size), np.ones(COST.size, dtype=bool)


def price(worth, *, nu=2.0, theta=WHOLE, progress=0.25, growth=0.5, open_=UNITS):
    return Target(COST, "macs", 0.6).update_price(
        nu, ALL, open_, np.full(COST.size, worth), theta, progress=progress, growth=growth
    )


def test_the_price_level_grows_by_a_bounded_factor_where_the_network_lags():
    assert price(1e-6) == pytest.approx(2.0 * np.exp(0.5))
    assert price(1e-6, growth=1.0) == price(1e-6, growth=7.0) == pytest.approx(2.0 * np.e)
    assert price(1e-6, growth=0.0) == 2.0
    for nu in (2.0, 0.01):  # nothing is known: the level can only grow
        assert price(np.nan, nu=nu) == pytest.approx(nu * np.exp(0.5))


def test_the_price_level_is_at_least_what_the_target_takes():
    assert price(10.0) == pytest.approx(HEADROOM * 10.0) and HEADROOM == 1.5
    assert price(-3.0, theta=np.zeros(COST.size)) == 2.0  # what is worth nothing needs no price
    assert price(0.4, theta=np.zeros(COST.size)) == pytest.approx(0.6)  # and the level may fall where nothing lags


def test_the_price_level_stays_where_nothing_is_due_or_nothing_can_be_done():
    assert price(10.0, progress=0.0) == 2.0
    assert price(10.0, theta=np.zeros(COST.size), open_=np.zeros(COST.size, dtype=bool)) == 2.0


def test_the_level_is_that_of_the_marginal_structure_by_hand():
    small = network((4,))  # 50 + 8 + 4 * 83 MACs: 83 of 390 with each unit
    target, kept, open_ = (
        Target(small, "macs", 1 - 2 * 83 / 390 - 1e-9),
        np.ones(5, bool),
        np.array([0, 1, 1, 1, 1]) > 0,
    )
    worth = np.array([0.1, 4.0, 2.0, 3.0, 1.0])
    assert target.level(kept, open_, worth, 0.5) == pytest.approx(1.5 * 3.0)
    assert Target(small, "macs", 1 - 2 * 83 / 390 + 1e-9).level(kept, open_, worth, 1.0) == pytest.approx(1.5 * 2.0)
    worth[4] = np.inf  # nothing is known of it: it stays
    assert target.level(kept, open_, worth, 1.0) == pytest.approx(1.5 * 4.0)
    kept[1] = False
    assert target.level(kept, open_, np.array([0.1, 0.5, 2.0, 3.0, 1.0]), 0.5) == pytest.approx(1.5 * 2.0)
    assert target.level(kept, open_ & (worth < 2.5), worth, 1.0) is None  # out of reach, by a hair


def test_removal_is_in_the_order_of_worth_and_in_whole_groups():
    small = network((8,))
    every = np.ones(9, bool)
    open_ = every & ~small.inventory.is_layer
    worth = np.array([0.0, 8, 7, 6, 5, 4, 3, 2, 1])
    part = Target(small, "macs", 0.5).parts(every)[1]
    target = Target(small, "macs", 1 - 3 * part)
    assert np.flatnonzero(~target.remove(every, open_, open_, worth)).tolist() == [6, 7, 8]
    pairs = [np.array([1, 2]), np.array([5, 8]), np.array([3, 6])]  # mean worth 7.5, 2.5, 4.5
    going = np.isin(np.arange(9), np.concatenate(pairs))
    # two go; two more would lead as far past the target as two are short of it
    assert np.flatnonzero(~target.remove(every, going, open_, worth, pairs)).tolist() == [5, 8]
    near = Target(small, "macs", 1 - 3.99 * part)
    assert np.flatnonzero(~near.remove(every, going, open_, worth, pairs)).tolist() == [3, 5, 6, 8]
    # with all that is to go the target is not passed: all of it goes
    far = Target(small, "macs", 1 - 6.5 * part)
    assert np.flatnonzero(~far.remove(every, going, open_, worth, pairs)).tolist() == [1, 2, 3, 5, 6, 8]


def test_what_leads_as_far_past_the_target_as_it_falls_short_does_not_go():
    even = Complexity([Term("stem", 8, 8), Term("conv", 4, 4, 0, None, 0)], inventory((2,)))
    kept, units = np.ones(3, dtype=bool), np.array([False, True, True])
    for share, goes in ((0.875, False), (0.874, True), (0.876, False)):  # a unit is a quarter of it all
        assert Target(even, "macs", share).may_go(kept, units).tolist() == [False, goes, goes]
        assert Target(even, "macs", share).remove(kept, units, units, np.arange(3.0)).tolist() == [True, not goes, True]


def test_where_there_are_small_pieces_a_large_one_may_lead_a_hundredth_past_the_target():
    fine = network((400,))
    kept, open_ = np.ones(401, dtype=bool), np.isin(np.arange(401), [1, 2])
    part = Target(fine, "macs", 0.5).parts(kept)[1]
    assert part < 0.003
    sizes = np.where(np.arange(401) == 2, 120.0, 1.0)
    for past, goes in ((0.0099, True), (0.0101, False)):
        target = Target(fine, "macs", 1 - 120 * part + past)
        assert target.may_go(kept, open_, sizes)[1:3].tolist() == [True, goes]


@pytest.mark.parametrize(
    ("macs", "params", "expected"), [(None, None, None), (0.5, None, ("macs", 0.5)), (None, 0.4, ("params", 0.4))]
)
def test_the_target_of_the_share_that_is_given(macs, params, expected):
    target = Target.choose(COST, macs, params)
    assert (target and (target.quantity, target.share)) == expected


def test_two_targets_are_one_too_many():
    with pytest.raises(ValueError, match=r"^`target_macs` must be left out with target_params; got target_macs=0.5\. "):
        Target.choose(COST, 0.5, 0.5)
    with pytest.raises(ValueError, match="^`quantity` must be one of 'macs', 'params'"):
        Target(COST, "layers", 0.5)


def test_a_target_is_missed_by_more_than_a_hundredth():
    assert (
        not missed(0.5, 0.3)
        and not missed(0.5, 0.5)
        and not missed(0.5, 0.5 + SLACK)
        and missed(0.5, 0.5 + 1.5 * SLACK)
    )
    assert missed(0.0, 0.02) and not missed(0.9, 0.905)


def test_what_has_no_gate_counts_as_staying_and_the_hint_says_so():
    layers = COST.inventory.is_layer
    first = np.zeros(COST.size, dtype=bool)
    first[[units[0] for units in COST.inventory.units]] = True
    of_first_block = COST.inventory.units[0]
    for gated, stays, hint in (
        (None, [], "Without any block"),
        (layers | ~layers, [], "Without any block"),
        (layers, [], "Without any block"),  # with its block every unit goes
        (~layers, [], "Without any block"),  # with all its units every block goes
        (~layers & ~first, np.flatnonzero(layers | first), "Without all that can go"),
        (~first & (np.arange(COST.size) != 0), [0, of_first_block[0]], "Without all that can go"),
    ):
        mask = np.zeros(COST.size)
        mask[stays] = 1.0
        least = Target(COST, "macs", 0.9).of(mask)
        target = Target(COST, "macs", least + 1e-3, gated)
        assert target == Target(COST, "macs", least + 1e-3, None if gated is None else gated.copy()), (
            "masks are not compared"
        )
        with pytest.raises(ValueError, match=rf"target_macs.*{hint} the network keeps {least:.4f}\."):
            Target(COST, "macs", least - 1e-3, gated)


def test_a_block_that_cannot_go_is_none_of_what_stays_without_gates():
    blocks = [
        Block("rest", "", (Site("s", 4, ("a",), ("b",), least=1),), removable=False),
        Block("b", "b.out", (Site("b.s", 4, ("b.a",), ()),)),
    ]
    cost = Complexity(
        [Term("stem", 10, 1), Term("a", 5, 1, 0, None, 0), Term("b.a", 5, 1, 1, None, 1)], Inventory(blocks)
    )
    with pytest.raises(ValueError, match="Without any block the network keeps"):
        Target(cost, "macs", 0.1)
