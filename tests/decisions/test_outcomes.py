"""What becomes of structures at a check: the laws of `catode.decisions.outcomes`, a walk in loops, every fate by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import limits, mask, network

from catode.decisions.outcomes import Outcomes
from catode.decisions.rules import NEARLY_ONE
from catode.decisions.target import Target
from catode.structures import fates
from catode.structures.fates import (
    COMMITTED,
    KEPT_AS_LAST,
    KEPT_AT_TARGET,
    KEPT_FOR_WIDTH,
    KEPT_OUT_OF_TIME,
    PRUNED_TOLERANCE,
    PRUNED_ZERO,
    REMOVED_OUT_OF_TIME,
    REMOVED_WITH_BLOCK,
    UNDECIDED,
)

COST = network((16,), (12, 8), (8,))
OWNER, N = COST.inventory, COST.size


@st.composite
def checks(draw, targets=(None, "macs", "params"), multiples=(1, 4, 8), watching=False):
    """Rules, and the arguments of `Outcomes.settle` at some check of some run."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    quantity = draw(st.sampled_from(targets))
    target = None if quantity is None else Target(COST, quantity, draw(st.floats(0.1, 0.95)))
    multiple = draw(st.sampled_from(multiples))
    kept = np.ones(N, dtype=bool)
    for units in OWNER.units:  # widths that earlier checks may have left
        kept[rng.permutation(units)[: rng.integers(0, len(units) // multiple) * multiple]] = False
    open_ = kept & (rng.random(N) < draw(st.floats(0.3, 1.0)))
    theta = np.where(open_, rng.choice([0.0, 0.2, 0.6, 0.95, 1.0], size=N), np.where(kept, 1.0, 0.0))
    zero = open_ & (theta == 0.0) & (rng.random(N) < draw(st.floats(0.0, 1.0)))
    rest = open_ & ~zero
    safe = rest & (rng.random(N) < draw(st.floats(0.0, 0.6)))
    if target is not None and draw(st.booleans()):  # one that what may go would lead past
        ends = [target.of(kept), target.of(OWNER.close(kept & ~zero & ~safe))]
        least = target.of(np.zeros(N))
        target = Target(COST, quantity, min(max(np.interp(rng.random(), [0, 1], ends), least + 1e-3), 0.999))
    found = limits(N, keep_prob=theta, benefit=rng.normal(size=N), benefit_upper=rng.gamma(1.0, size=N), price=0.5)
    return Outcomes(COST, multiple, target), dict(
        fate=np.where(open_, UNDECIDED, np.where(kept, COMMITTED, PRUNED_ZERO)).astype("<U32"),
        kept=kept,
        limits=found,
        zero=zero,
        safe=safe,
        certain=rest & (theta >= NEARLY_ONE) & (rng.random(N) < 0.5),
        watching=(rng.random(N) < 0.5) & watching,
        final=draw(st.booleans()),
    )


@given(checks())
def test_every_structure_ends_in_one_piece_with_the_network(check):
    rules, given_ = check
    result = rules.settle(**given_)
    open_ = given_["fate"] == UNDECIDED
    assert np.isin(result.fate, fates.FATES).all()
    assert (result.kept == OWNER.close(result.kept)).all() and not (result.kept & ~given_["kept"]).any()
    assert result.kept[OWNER.is_layer].any()
    assert (result.fate == given_["fate"])[~open_ & (result.kept == given_["kept"])].all(), "the decided stay decided"
    gone = given_["kept"] & ~result.kept
    assert np.isin(result.fate[gone], fates.REMOVED).all()
    assert not np.isin(result.fate[open_ & result.kept], fates.REMOVED).any()
    assert not (result.folded & ~result.kept).any()
    assert (result.folded == (result.fate == KEPT_FOR_WIDTH)).all() and not (result.folded & result.certain).any()
    timeless = np.isin(result.fate, [KEPT_OUT_OF_TIME, REMOVED_OUT_OF_TIME])
    assert given_["final"] or not timeless.any(), "time is out at the end alone"
    assert not (result.fate[open_] == KEPT_AT_TARGET).any() or rules.target is not None
    if given_["final"]:
        assert not (result.fate == UNDECIDED).any()
    if result.everything:
        assert (result.kept == given_["kept"]).all() and (result.fate[open_] == KEPT_AS_LAST).all()
        assert not (result.certain | result.folded | result.watched).any()


@given(checks(targets=[None], multiples=[1]))
def test_alone_goes_what_may_go_and_stays_what_is_certain(check):
    rules, given_ = check
    result = rules.settle(**given_)
    going, open_ = given_["zero"] | given_["safe"], given_["fate"] == UNDECIDED
    if given_["final"]:
        going = going | (open_ & ~given_["certain"] & (given_["limits"].keep_prob < 0.5))
    left = OWNER.close(given_["kept"] & ~going)
    assert result.everything == (not left[OWNER.is_layer].any())
    if not result.everything:
        assert (result.kept == left).all() and not result.folded.any()
        assert (result.fate[given_["zero"]] == PRUNED_ZERO).all()
        assert (result.fate[given_["safe"]] == PRUNED_TOLERANCE).all()
        assert (result.fate[given_["certain"] & ~given_["safe"] & left] == COMMITTED).all()


@given(checks())
def test_widths_change_by_whole_groups_unless_the_block_goes(check):
    rules, given_ = check
    result = rules.settle(**given_)
    for units in OWNER.units:
        before, after = given_["kept"][units].sum(), result.kept[units].sum()
        assert after in (0, before) or after % rules.round_to == 0
        assert result.folded[units].sum() < rules.round_to, "a whole group would have gone"


@given(checks(targets=["macs", "params"]))
def test_a_target_keeps_what_would_lead_past_it_and_says_so(check):
    rules, given_ = check
    result = rules.settle(**given_)
    free = Outcomes(COST, rules.round_to).settle(**given_ | {"final": False})
    if not (free.everything or result.everything or given_["final"]):
        assert not (free.kept & ~result.kept).any(), "a target lets nothing more go"
    met = rules.target.of(given_["kept"]) <= rules.target.share
    if met and rules.target.of(free.kept) < rules.target.share:
        assert (result.kept == given_["kept"]).all() or rules.target.of(result.kept) >= rules.target.share
    if not result.everything:
        stays = (given_["fate"] == UNDECIDED) & result.kept & (result.fate != UNDECIDED) & ~result.folded
        near_one = given_["limits"].keep_prob >= NEARLY_ONE
        assert (result.fate[stays] == np.where(near_one, COMMITTED, KEPT_AT_TARGET)[stays]).all()


@given(checks(targets=[None], multiples=[1], watching=True))
def test_what_is_watched_stays_undecided_beyond_the_end(check):
    rules, given_ = check
    result = rules.settle(**given_ | {"final": True})
    own = given_["watching"] & (given_["fate"] == UNDECIDED) & ~given_["certain"]
    own &= ~given_["zero"] & ~given_["safe"]
    if not result.everything:
        assert (result.watched == own).all()
        assert (result.fate[own & result.kept] == UNDECIDED).all()
        assert (result.fate[own & ~result.kept] == REMOVED_WITH_BLOCK).all()


def walk(rules, fate, kept, limits, zero, safe, certain, watching, final):
    """Without a target, site by site and structure by structure; None where nothing would be left."""
    kept = [bool(k) for k in kept]

    def remove(going):
        """Take `going` out in whole groups; returns those that wait."""
        waits = set()
        for units in OWNER.units:
            left = [s for s in units if kept[s]]
            own = sorted(
                (s for s in left if s in going),
                key=lambda s: (limits.keep_prob[s], limits.benefit[s] / limits.price[s]),
            )
            while own and (len(left) - len(own)) % rules.round_to:
                waits.add(own.pop())
            for s in own:
                kept[s] = False
        for s in range(OWNER.layers):
            kept[s] = kept[s] and s not in going
        for place in OWNER.places:
            kept[place.layer] = kept[place.layer] and any(kept[s] for s in place.units)
        for place in OWNER.places:
            for s in place.units:
                kept[s] = kept[s] and kept[place.layer]
        return waits

    open_ = [s for s in range(N) if fate[s] == UNDECIDED]
    going = {s for s in open_ if zero[s] or safe[s]}
    waits = remove(going)
    out_of_time, down = set(), set()
    if final:
        out_of_time = {
            s
            for s in open_
            if not (certain[s] and s not in going)
            and not (watching[s] and s not in going)
            and (s not in going or kept[s])
        }
        down = {s for s in out_of_time if s in waits or limits.keep_prob[s] < 0.5}
        waits = remove(down)
    if not any(kept[: OWNER.layers]):
        return None
    ends = list(map(str, fate))
    for s in range(N):
        was = fate[s] in (UNDECIDED, COMMITTED)
        if kept[s]:
            if fate[s] != UNDECIDED:
                continue
            if certain[s] and s not in going:
                ends[s] = COMMITTED
            elif final and s in waits:
                ends[s] = KEPT_FOR_WIDTH
            elif s in out_of_time:
                ends[s] = KEPT_OUT_OF_TIME
        elif was:
            if zero[s]:
                ends[s] = PRUNED_ZERO
            elif safe[s]:
                ends[s] = PRUNED_TOLERANCE
            elif s in down:
                ends[s] = REMOVED_OUT_OF_TIME
            else:
                ends[s] = REMOVED_WITH_BLOCK
    if not final:  # where all that is undecided waits at 0, no group can come together any more
        for units in OWNER.units:
            own = [s for s in units if kept[s] and fate[s] == UNDECIDED and ends[s] != COMMITTED]
            if all(s in waits and zero[s] for s in own):
                for s in own:
                    ends[s] = KEPT_FOR_WIDTH
    return kept, ends


@settings(max_examples=200)
@given(checks(targets=[None], watching=True))
def test_law_without_a_target_a_check_ends_as_a_walk_in_loops_does(check):
    rules, given_ = check
    result, expected = rules.settle(**given_), walk(rules, **given_)
    assert result.everything == (expected is None)
    if expected is not None:
        assert result.kept.tolist() == expected[0]
        assert result.fate.tolist() == expected[1]


SMALL = network((4,), (4,))  # layers 0 and 1, units 2 to 5 and 6 to 9


def settle(*, theta=None, zero=(), safe=(), certain=(), watching=(), final=False, decided=(), benefit=None, **rules):
    n, theta = SMALL.size, np.ones(SMALL.size) if theta is None else np.asarray(theta, float)
    upper = np.linspace(0.01, 0.09, n) if benefit is None else np.asarray(benefit, float)
    found = limits(n, keep_prob=theta, benefit=upper, benefit_upper=upper)
    marks = {"zero": zero, "safe": safe, "certain": certain, "watching": watching}
    result = Outcomes(SMALL, **rules).settle(
        np.where(mask(n, *decided), COMMITTED, UNDECIDED).astype("<U32"),
        np.ones(n, dtype=bool),
        found,
        **{name: mask(n, *numbers) for name, numbers in marks.items()},
        final=final,
    )
    return result


def ends(result):
    """Numbers by fate, but for what is undecided."""
    return {
        str(fate): np.flatnonzero(result.fate == fate).tolist() for fate in np.unique(result.fate) if fate != UNDECIDED
    }


HALF = [1.0, 1.0, 0.5, 0.49, 1.0, 1.0, 1.0, 1.0, 0.0, 0.2]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, {}),
        ({"certain": [3, 7]}, {COMMITTED: [3, 7]}),
        ({"safe": [3]}, {PRUNED_TOLERANCE: [3]}),
        ({"zero": [3], "safe": [6]}, {PRUNED_ZERO: [3], PRUNED_TOLERANCE: [6]}),
        ({"zero": [2, 3, 4], "safe": [5]}, {PRUNED_ZERO: [2, 3, 4], PRUNED_TOLERANCE: [5], REMOVED_WITH_BLOCK: [0]}),
        ({"safe": [1], "zero": [7]}, {PRUNED_TOLERANCE: [1], PRUNED_ZERO: [7], REMOVED_WITH_BLOCK: [6, 8, 9]}),
        ({"zero": [0], "certain": [0, 2, 6]}, {PRUNED_ZERO: [0], REMOVED_WITH_BLOCK: [2, 3, 4, 5], COMMITTED: [6]}),
        ({"zero": [0], "decided": [0, 2, 6]}, {PRUNED_ZERO: [0], REMOVED_WITH_BLOCK: [2, 3, 4, 5], COMMITTED: [6]}),
        (
            {"final": True, "theta": HALF},
            {KEPT_OUT_OF_TIME: [0, 1, 2, 4, 5, 6, 7], REMOVED_OUT_OF_TIME: [3, 8, 9]},
        ),
        (
            {"final": True, "theta": HALF, "zero": [8], "certain": [9], "watching": [0, 3], "safe": [4]},
            {PRUNED_ZERO: [8], COMMITTED: [9], PRUNED_TOLERANCE: [4], KEPT_OUT_OF_TIME: [1, 2, 5, 6, 7]},
        ),
        ({"zero": [0, 1]}, {KEPT_AS_LAST: list(range(10))}),
        (
            {"zero": [2, 3, 4, 5], "safe": [1], "decided": [7]},
            {KEPT_AS_LAST: [0, 1, 2, 3, 4, 5, 6, 8, 9], COMMITTED: [7]},
        ),
        # groups of 4: one unit waits, and is kept for the width where time is out or nothing else is undecided
        ({"zero": [3], "round_to": 4}, {}),
        ({"zero": [3], "round_to": 4, "decided": [2, 4, 5]}, {KEPT_FOR_WIDTH: [3], COMMITTED: [2, 4, 5]}),
        ({"zero": [3], "round_to": 4, "certain": [2, 4, 5]}, {KEPT_FOR_WIDTH: [3], COMMITTED: [2, 4, 5]}),
        ({"safe": [3], "round_to": 4, "decided": [2, 4, 5]}, {COMMITTED: [2, 4, 5]}),  # its theta may rise again
        ({"zero": [3], "safe": [2], "round_to": 4, "decided": [4, 5]}, {COMMITTED: [4, 5]}),
        # the last that waits has nothing to wait for once the others went
        (
            {"safe": [3, 4], "zero": [5], "round_to": 2, "decided": [2]},
            {PRUNED_TOLERANCE: [3, 4], KEPT_FOR_WIDTH: [5], COMMITTED: [2]},
        ),
        (
            {"zero": [3], "round_to": 4, "final": True},
            {KEPT_FOR_WIDTH: [3], KEPT_OUT_OF_TIME: [0, 1, 2, *range(4, 10)]},
        ),
        (
            {"zero": [3, 4, 9], "round_to": 2, "final": True},
            {PRUNED_ZERO: [3, 4], KEPT_FOR_WIDTH: [9], KEPT_OUT_OF_TIME: [0, 1, 2, 5, 6, 7, 8]},
        ),
        (  # a unit that waited goes with one whose time is out
            {"zero": [9], "round_to": 2, "final": True, "theta": [*[1.0] * 7, 0.3, 1.0, 0.0]},
            {PRUNED_ZERO: [9], REMOVED_OUT_OF_TIME: [7], KEPT_OUT_OF_TIME: [0, 1, 2, 3, 4, 5, 6, 8]},
        ),
        (
            {"final": True, "theta": [0.3, 1.0, *[0.4] * 4, *[1.0] * 4]},
            {REMOVED_OUT_OF_TIME: [0, 2, 3, 4, 5], KEPT_OUT_OF_TIME: [1, 6, 7, 8, 9]},
        ),
        (
            {"final": True, "theta": [0.3, *[0.8] * 5, *[1.0] * 4]},
            {REMOVED_OUT_OF_TIME: [0], REMOVED_WITH_BLOCK: [2, 3, 4, 5], KEPT_OUT_OF_TIME: [1, 6, 7, 8, 9]},
        ),
    ],
)
def test_fates_by_hand(how, expected):
    result = settle(**how)
    assert ends(result) == expected
    assert result.everything == (KEPT_AS_LAST in expected)
    assert np.flatnonzero(result.folded).tolist() == expected.get(KEPT_FOR_WIDTH, [])
    gone = [s for fate in fates.REMOVED for s in expected.get(fate, [])]
    assert np.flatnonzero(~result.kept).tolist() == sorted(gone)
    old = how.get("decided", [])
    newly = [s for s in expected.get(COMMITTED, []) if s not in old]
    assert [s for s in np.flatnonzero(result.certain) if result.kept[s]] == newly


def share(removed, target=0.5):
    """The share of the MACs that is left without these structures and what goes with them."""
    return Target(SMALL, "macs", target).of(SMALL.inventory.close(~mask(10, *removed)))


def macs(removed):
    """The target that this many units of the first block, and a little, lead to."""
    return Target(SMALL, "macs", 1.0 - removed * Target(SMALL, "macs", 0.5).parts(np.ones(10, dtype=bool))[2])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # below the target nothing more is certain by its benefit
        ({"target": macs(2), "certain": [3, 7]}, {}),
        ({"target": macs(2), "safe": [3]}, {PRUNED_TOLERANCE: [3]}),
        # of three that may go, the two of the least worth take the network to the target; everything else then stays
        (
            {"target": macs(2), "safe": [3, 4, 5], "theta": [1, 1, 0.89, 0.1, 0.1, 0.1, 0.9, 1, 1, 1]},
            {PRUNED_TOLERANCE: [3, 4], KEPT_AT_TARGET: [2, 5], COMMITTED: [0, 1, 6, 7, 8, 9]},
        ),
        (
            {
                "target": macs(2),
                "zero": [3, 4, 5],
                "benefit": [0, 0, 0, 0.09, 0.02, 0.01, 0, 0, 0, 0],
                "theta": [0.95] * 10,
            },
            {PRUNED_ZERO: [4, 5], COMMITTED: [0, 1, 2, 3, 6, 7, 8, 9]},
        ),
        # time is out before the target is met: all that is undecided goes as far as the target
        (
            {"target": macs(2), "final": True, "theta": [0.95] * 2 + [0.8] * 8},
            {REMOVED_OUT_OF_TIME: [2, 3], KEPT_AT_TARGET: [4, 5, 6, 7, 8, 9], COMMITTED: [0, 1]},
        ),
    ],
)
def test_fates_at_a_target_by_hand(how, expected):
    upper = how.pop("benefit", [0.09, 0.09, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08])
    result = settle(benefit=upper, **how)
    assert ends(result) == expected
    stays = [*expected.get(COMMITTED, []), *expected.get(KEPT_AT_TARGET, [])]
    assert np.flatnonzero(result.certain).tolist() == sorted(stays)


def settled(target, going, *, decided=(), upper=None, price=0.1, **rules):
    """Kept structures after a check at a target, whatever theta."""
    upper = np.arange(10) / 100 if upper is None else np.array(upper)
    found = limits(10, keep_prob=0.5, benefit=upper, benefit_upper=upper, price=price)
    fate, none = np.where(mask(10, *decided), COMMITTED, UNDECIDED).astype("<U32"), np.zeros(10, dtype=bool)
    marks = dict(zero=none, safe=mask(10, *going), certain=none, watching=none, final=False)
    return Outcomes(SMALL, target=target, **rules).settle(fate, ~none, found, **marks).kept


def test_at_a_target_the_least_benefit_for_its_price_goes_first():
    price = [0.1, 0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1]
    upper = [0, 0, 0.03, 0.02, 0.04, 0.05, 0, 0, 0, 0]
    assert np.flatnonzero(~settled(macs(1), [2, 3, 4, 5], upper=upper, price=price)).tolist() == [4]
    assert np.flatnonzero(~settled(macs(1), [2, 3, 4, 5], upper=upper)).tolist() == [3]


def test_how_far_past_the_target_one_may_lead_is_the_part_of_the_least_that_is_undecided():
    parts = Target(SMALL, "macs", 0.5).parts(np.ones(10, dtype=bool))
    assert parts[6] < parts[2]  # the units of the second block are smaller
    target = Target(SMALL, "macs", 1 - parts[0] + 0.5 * (parts[2] + parts[6]))
    for decided, goes in (([1, *range(3, 10)], True), ([1, *range(3, 9)], False)):
        assert settled(target, [0], decided=decided)[0] == (not goes)


def test_a_block_that_is_not_to_go_stays_though_it_is_worth_the_least():
    target = Target(SMALL, "macs", 1 - 0.8 * (1 - share([0])))
    assert np.flatnonzero(~settled(target, [2, 3, 4, 5])).tolist() == [2, 3, 4]
    assert np.flatnonzero(~settled(target, [0, 2, 3, 4, 5])).tolist() == [0, 2, 3, 4, 5]


def test_what_is_gone_already_does_not_count_among_the_undecided():
    whole, without = np.ones(10, dtype=bool), Target(SMALL, "macs", 0.5).of(SMALL.inventory.close(~mask(10, 0, 6)))
    parts = Target(SMALL, "macs", 0.5).parts(whole)
    target = Target(SMALL, "macs", without + 0.5 * (parts[2] + parts[6]))
    kept = settled(target, [6, 0], decided=[1, 3, 4, 5, 7, 8, 9], upper=[0.01, *[0.0] * 9])
    assert np.flatnonzero(~kept).tolist() == [0, 2, 3, 4, 5, 6]


def test_widths_that_are_no_multiple_come_to_one_with_the_first_group():
    odd = network((6,), (4,))
    target = Target(odd, "macs", 0.5)
    part = target.parts(np.ones(12, dtype=bool))[2]
    upper, none = np.r_[0.5, 0.5, np.arange(10) / 100], np.zeros(12, dtype=bool)
    for removed, gone in ((2, [2, 3]), (1.5, [2, 3]), (5.9, [0, *range(2, 8)])):
        result = Outcomes(odd, 4, Target(odd, "macs", 1 - removed * part)).settle(
            np.full(12, UNDECIDED, dtype="<U32"), ~none, limits(12, benefit=upper, benefit_upper=upper),
            zero=none, safe=mask(12, *range(2, 8)), certain=none, watching=none, final=False,
        )  # fmt: skip
        assert np.flatnonzero(~result.kept).tolist() == gone


def test_at_a_target_whole_groups_go_and_those_left_over_wait():
    result = settle(target=macs(2), round_to=2, safe=[2, 3, 4], theta=[0.5] * 10, benefit=np.arange(10) / 100)
    assert ends(result)[PRUNED_TOLERANCE] == [2, 3]
    assert not result.folded.any() and KEPT_AT_TARGET in ends(result) and result.kept[4]


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("before", [KEPT_FOR_WIDTH, COMMITTED])
def test_what_was_decided_before_is_not_decided_anew_at_a_target(before, final):
    old, found = (
        mask(10, 3, 4),
        limits(10, keep_prob=0.5, benefit=np.arange(10) / 100, benefit_upper=np.arange(10) / 100),
    )
    none = np.zeros(10, dtype=bool)
    result = Outcomes(SMALL, target=macs(0.2)).settle(
        np.where(old, before, UNDECIDED).astype("<U32"), ~none, found,
        zero=mask(10, 2), safe=none, certain=none, watching=none, final=final,
    )  # fmt: skip
    assert (result.fate[old] == before).all() and not result.certain[old].any()
    assert (result.fate[~old] == KEPT_AT_TARGET).all() and result.certain[~old].all()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # the one undecided structure is a block, far too much: that units could go which are decided does not matter
        ({"target": macs(1), "decided": [0, *range(2, 10)]}, [1]),
        # nor does a block that goes at this check, and would be little by itself once its units are gone
        ({"target": Target(SMALL, "macs", share([0]) - 0.01), "zero": [0], "decided": range(2, 10)}, [1]),
        # a unit that could still go alone; and the same where it could only go with another
        ({"target": macs(1), "decided": [0, 1, *range(3, 10)]}, []),
        ({"target": macs(1), "decided": [0, 1, *range(3, 10)], "round_to": 2}, [2]),
        ({"target": macs(2), "decided": [0, 1, *range(4, 10)], "round_to": 2}, []),
        ({"target": macs(0.9), "decided": [0, 1, *range(4, 10)], "round_to": 2}, [2, 3]),
        # one unit alone makes no group, however much of the way to the target a group would be
        ({"target": macs(2), "decided": [0, 1, *range(3, 10)], "round_to": 2}, [2]),
        # a block may go that leads past the target by less than it falls short
        ({"target": Target(SMALL, "macs", 1 - 0.8 * (1 - share([0]))), "decided": range(1, 10)}, []),
        ({"target": Target(SMALL, "macs", 1 - 0.4 * (1 - share([0]))), "decided": range(1, 10)}, [0]),
    ],
)
def test_what_is_undecided_stays_once_none_of_it_may_go(how, expected):
    result = settle(**how)
    assert np.flatnonzero(result.certain).tolist() == expected


def test_every_fate_occurs_in_the_tables_above():
    seen = {UNDECIDED}
    for case in (test_fates_by_hand, test_fates_at_a_target_by_hand):
        for _, expected in case.pytestmark[0].args[1]:
            seen |= expected.keys()
    assert seen == set(fates.FATES) - {fates.KEPT_AT_LEAST}  # which tests/decisions/test_fewest_units.py has
