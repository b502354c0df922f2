"""The rules by which structures are removed or stay, one by one: closed forms, brute force, simulated thetas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import inventory, limits, mask
from scipy.integrate import solve_ivp
from scipy.stats import norm

from catode.decisions import rules
from catode.theory.tolerance import commit_alarm, derive

RISK = 0.05


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.04])
def test_the_tolerance_divides_what_sinks_from_what_comes_back_when_theta_moves_by_the_upper_limit(margin, side):
    b, price, q, a, rho, memory = 0.02, 0.1, 0.5, 0.05, 0.05, 5.0
    known = limits(
        benefit=b, benefit_upper=b + margin, price=price, gain=q, decay=a, rate_ratio=rho, memory=memory,
        drift=0.0, noise=0.0, benefit_noise=0.0,
    )  # fmt: skip
    separatrix, edge = (float(v[0]) for v in rules.tolerances(known, mask(1, 0), risk=RISK))
    assert 0.01 < edge == separatrix < 0.95

    def speed(_, state):
        benefit, pool, theta = state
        return q * theta - a * benefit, (benefit - pool) / memory, rho * (pool + margin - price)

    ends = [lambda _, state: state[2], lambda _, state: state[2] - 1.0]
    for end in ends:
        end.terminal = True
    path = solve_ivp(speed, (0, 1e4), [b + margin, b, edge * (1 + 0.01 * side)], events=ends, rtol=1e-9, atol=1e-12)
    assert [len(times) for times in path.t_events] == ([1, 0] if side < 0 else [0, 1])


def test_tolerances_are_those_of_each_structure_alone_and_nan_elsewhere():
    gain = np.array([0.5, 0.7, 0.6, np.inf, 0.4])
    known = limits(5, gain=gain, price=[0.1, 0.2, 0.3, 0.4, 0.5])
    where = mask(5, 0, 2, 3, 4)  # 3 is not known
    separatrix, values = rules.tolerances(known, where, risk=0.02)
    assert np.isnan(separatrix).tolist() == np.isnan(values).tolist() == [False, True, False, True, False]
    for s in (0, 2, 4):
        alone = derive(
            benefit=0.02, pooled=0.01, price=known.price[s] - 0.01, gain=gain[s], decay=0.05, rate_ratio=1.0, noise=0.02,
            benefit_noise=0.001, drift=0.001, step_time=0.01, memory=0.5, risk=0.02,
        )  # fmt: skip
        assert (separatrix[s], values[s]) == (float(alone.separatrix), float(alone.values))
        assert values[s] < separatrix[s]


def test_less_risk_means_smaller_tolerances_and_the_same_separatrix():
    found = [rules.tolerances(limits(), mask(1, 0), risk=risk) for risk in (0.2, 0.05, 0.01)]
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] > found[1][1] > found[2][1]


def test_a_fixed_tolerance_takes_the_place_of_the_derived_one_where_everything_is_known():
    known = limits(3, noise=[0.02, np.nan, 0.02])
    separatrix, values = rules.tolerances(known, mask(3, 0, 1), risk=RISK, fixed=0.25)
    np.testing.assert_array_equal(values, [0.25, np.nan, np.nan])
    np.testing.assert_array_equal(separatrix, rules.tolerances(known, mask(3, 0, 1), risk=RISK)[0])


@pytest.mark.parametrize("fixed", [None, 0.5])
def test_nothing_known_gives_nothing(fixed):
    for known, where in ((limits(2, gain=np.inf), [True, True]), (limits(2), [False, False])):
        assert np.isnan(rules.tolerances(known, np.array(where), risk=RISK, fixed=fixed)).all()


@pytest.mark.parametrize(
    ("upper", "theta", "value", "expected"),
    [
        (0.09, 0.2, 0.3, True),
        (0.09, 0.3, 0.3, True),  # at the tolerance
        (0.09, 0.31, 0.3, False),
        (0.1, 0.2, 0.3, False),  # the benefit may pay the price
        (0.11, 0.2, 0.3, False),
        (0.09, 0.0, 0.0, True),
        (0.09, 0.2, np.nan, False),
        (np.inf, 0.2, 0.3, False),
        (0.09, 0.1, -0.1, False),
        (0.09, 0.1, -np.inf, False),
    ],
)
def test_safe_by_hand(upper, theta, value, expected):
    # the pooled benefit and its lower limit are far below the price in every row
    found = rules.safe(
        limits(benefit_upper=upper, keep_prob=theta, benefit=-1.0, benefit_lower=-2.0), np.array([value])
    )
    assert found.tolist() == [expected]


@st.composite
def sites(draw):
    """An inventory, which units are left, the rules' inputs; few distinct values, so that ties occur."""
    widths = draw(st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=2), min_size=1, max_size=3))
    owner = inventory(*map(tuple, widths))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    left = owner.left(rng.random(owner.size) < draw(st.sampled_from([0.3, 0.8, 1.0])))
    there = owner.is_layer | mask(owner.size, *np.concatenate(left))
    chosen = there & (rng.random(owner.size) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    known = limits(
        owner.size,
        benefit=rng.choice([-0.1, 0.0, 0.02, 0.04, np.nan, np.inf], owner.size),
        benefit_upper=rng.choice([-0.02, 0.01, 0.03, 0.05], owner.size),
        price=rng.choice([0.06, 0.1, 0.2], owner.size),
        keep_prob=rng.choice([0.1, 0.2, 0.3], owner.size),
    )
    return owner, left, chosen, known, draw(st.sampled_from([1, 2, 4]))


@settings(max_examples=60)
@given(sites())
def test_law_one_check_removes_one_layer_and_a_quarter_of_a_site_the_least_useful_first(case):
    owner, left, safe, known, multiple = case
    allowed = rules.ration(safe, known, owner.is_layer, left, multiple)
    assert not (allowed & ~safe).any()
    order = [known.benefit_upper[s] / known.price[s] for s in range(owner.size)]
    layers = [s for s in range(owner.layers) if safe[s]]
    assert allowed[: owner.layers].sum() == min(len(layers), 1)
    groups = [(layers, 1)]
    for units in left:
        groups.append(([s for s in units if safe[s]], max(multiple, len(units) // 4)))
    for group, most in groups:
        gone, stays = [s for s in group if allowed[s]], [s for s in group if not allowed[s]]
        assert len(gone) == min(most, len(group))
        assert all((order[a], a) < (order[b], b) for a in gone for b in stays)


@pytest.mark.parametrize(
    ("units", "multiple", "expected"),
    [(8, 1, 2), (11, 1, 2), (12, 1, 3), (3, 1, 1), (8, 4, 4), (40, 4, 10), (40, 1, 10)],
)
def test_a_quarter_of_a_site_goes_at_once_but_a_whole_group_at_least(units, multiple, expected):
    owner, n = inventory((units,)), units + 1
    upper = np.r_[0.05, np.arange(units) / 1000]
    allowed = rules.ration(~owner.is_layer, limits(n, benefit_upper=upper), owner.is_layer, owner.units, multiple)
    assert np.flatnonzero(allowed).tolist() == list(range(1, expected + 1))


def test_without_a_word_on_groups_units_go_one_by_one():
    owner = inventory((3,))
    assert rules.ration(np.ones(4, bool), limits(4), owner.is_layer, owner.units).tolist() == [True, True, False, False]


@settings(max_examples=60)
@given(sites())
def test_law_sites_are_left_with_whole_groups_none_or_all(case):
    owner, left, leaving, known, multiple = case
    held = rules.hold_back(leaving, known, left, multiple)
    assert not (held & ~leaving).any() and not held[: owner.layers].any()
    worth = np.where(np.isfinite(known.benefit), known.benefit, 0.0) / known.price
    for units in left:
        own = [s for s in units if leaving[s]]
        waits, goes = [s for s in own if held[s]], [s for s in own if not held[s]]
        stays = len(units) - len(goes)
        assert stays % multiple == 0 or not goes
        assert len(waits) < multiple
        for more in range(1, len(waits) + 1):  # no more could have gone
            assert (stays - more) % multiple
        for a, b in itertools.product(waits, goes):
            assert (known.keep_prob[a], worth[a]) >= (known.keep_prob[b], worth[b])


def test_the_most_useful_wait_by_hand():
    # site of 8 units, numbers 1 to 8; five may leave: five stay, so that one waits for a multiple of 4
    known = limits(9, keep_prob=[1, 0.1, 0.3, 0.2, 0.1, 0.3, 1, 1, 1], benefit=[0, 0.09, 0.02, 0.0, 0.0, 0.03, 0, 0, 0])
    units = [np.arange(1, 9)]
    held = rules.hold_back(mask(9, 1, 2, 3, 4, 5), known, units, 4)
    assert np.flatnonzero(held).tolist() == [5]  # largest keep probability, then largest benefit
    known.price[5] = 1.0  # now its benefit for the price is the smaller one
    assert np.flatnonzero(rules.hold_back(mask(9, 1, 2, 3, 4, 5), known, units, 4)).tolist() == [2]
    known.benefit[2], known.benefit[5] = np.inf, 0.001  # nothing known counts as no benefit
    assert np.flatnonzero(rules.hold_back(mask(9, 1, 2, 3, 4, 5), known, units, 4)).tolist() == [5]


# a structure that is certain to stay; every test below changes one thing
CERTAIN = dict(
    keep_prob=0.95, benefit=1.0, benefit_lower=0.9, benefit_upper=1.1, price=0.1, rate_ratio=0.5, noise=1e-3
)  # fmt: skip
WHEN = dict(slope=(0.0, 0.0), progress=0.6, steps_left=200, step_time=0.02, risk=RISK)


def certain(known=True, **changes):
    when = {name: changes.pop(name, value) for name, value in WHEN.items()}
    when["slope"] = tuple(np.array([float(value)]) for value in when["slope"])
    return bool(rules.certain(limits(**CERTAIN | changes), np.array([known]), **when)[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"known": False}, False),
        ({"keep_prob": 0.9}, True),
        ({"keep_prob": 0.899}, False),
        ({"progress": 0.5}, True),
        ({"progress": 0.499}, False),
        ({"progress": 1.0}, True),
        ({"benefit_lower": 0.1001}, True),
        ({"benefit_lower": 0.1}, False),
        ({"benefit_lower": 0.09}, False),  # the upper limit and the benefit itself are ten times the price
        ({"benefit_lower": -0.09}, False),
        ({"benefit_lower": 0.09, "slope": (9.0, 0.0)}, False),  # growth to come is no reason
        ({"slope": (9.0, 0.0)}, True),
    ],
)
def test_certain_by_hand(changes, expected):
    assert certain(**changes) == expected


# the time constant with which the lower limit 0.9 falls to the price 0.1 within 200 steps of 0.02, for a benefit of 1
FALL = math.log(0.9 / 0.1) / 4.0


@pytest.mark.parametrize(
    ("slope", "error"), [(-FALL, 0.0), (0.0, FALL / norm.ppf(0.95)), (FALL, 2 * FALL / norm.ppf(0.95))]
)
def test_the_lower_limit_must_stay_above_the_price_to_the_end_at_the_fastest_fall_that_is_likely(slope, error):
    # error: no fall is seen, but one as fast is possible at the risk; and a growth that may as well be a fall
    fall = norm.ppf(0.95) * error - slope
    assert fall == pytest.approx(FALL)
    for factor, expected in ((0.99, True), (1.01, False)):
        assert certain(slope=(factor * slope, factor * error), noise=1e-6) == expected


def test_the_fall_is_in_proportion_to_the_benefit_and_to_the_time_that_is_left():
    for factor, expected in ((0.99, True), (1.01, False)):
        assert certain(slope=(-2 * FALL * factor, 0.0), benefit=2.0, noise=1e-6) == expected
        assert certain(slope=(-FALL * factor, 0.0), step_time=0.01, steps_left=400, noise=1e-6) == expected
        assert certain(slope=(-2 * FALL * factor, 0.0), step_time=0.01, noise=1e-6) == expected
        assert certain(slope=(0.0, FALL * factor / norm.ppf(0.8)), risk=0.2, noise=1e-6) == expected


def test_what_noise_alone_may_bring_to_zero_is_not_committed():
    # Page's bound for a walk that starts 0.95 above 0: steps * exp(-2 * 0.95 * speed * (benefit - price) / noise^2)
    for risk, steps in ((RISK, 200), (0.01, 200), (RISK, 20)):
        noise = math.sqrt(2 * 0.95 * 0.5 * (0.9 - 0.1) / math.log(steps / risk))
        for factor, expected in ((0.999, True), (1.001, False)):
            assert certain(noise=noise * factor, risk=risk, steps_left=steps) == expected
            # growth to come does not count there either
            assert certain(noise=noise * factor, risk=risk, steps_left=steps, slope=(9.0, 0.0)) == expected
    noise = math.sqrt(2 * 0.95 * 0.5 * (0.45 - 0.1) / math.log(200 / RISK))  # by the end half of the limit is left
    for factor, expected in ((0.999, True), (1.001, False)):
        assert certain(noise=noise * factor, slope=(-math.log(2) / 4.0, 0.0)) == expected


def test_simulated_thetas_that_are_certain_to_stay_reach_zero_less_often_than_the_risk():
    rho, tau, steps, theta0, rng = 0.5, 0.02, 200, 0.95, np.random.default_rng(0)
    benefit, price = 0.9, 0.1
    noise = max(s for s in np.linspace(0.05, 2.0, 79) if certain(noise=s, risk=0.2))
    assert noise < 2.0 and certain(noise=noise, risk=0.2)
    theta, gone = np.full(20000, theta0), np.zeros(20000, bool)
    for _ in range(steps):
        theta += tau * rho * (benefit - price) + noise * math.sqrt(tau) * rng.standard_normal(theta.size)
        theta = np.minimum(theta, 1.0)
        gone |= theta <= 0.0
    assert 0.0 < gone.mean() <= 0.2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"progress": 0.749}, False),
        ({"benefit_lower": 0.1 / 3 * 0.999}, False),
        ({"benefit_lower": 0.1 / 3 * 1.001}, True),
        ({"benefit_lower": 0.1 / 3}, False),
        ({"benefit_upper": 0.3 * 0.999}, True),
        ({"benefit_upper": 0.3 * 1.001}, False),
        ({"benefit_upper": 0.1 * 3}, False),
        ({"benefit_upper": 0.1}, True),
        ({"benefit_upper": 0.0999}, False),  # it is known not to pay
        ({"known": False}, False),
        ({"keep_prob": 0.899}, False),
    ],
)
def test_what_lies_near_its_price_is_kept_in_the_last_quarter(changes, expected):
    near = dict(benefit=0.12, benefit_lower=0.05, benefit_upper=0.2, progress=0.75)
    assert certain(**near | changes) == expected


def test_a_benefit_that_may_be_harm_is_never_near_its_price():
    assert not certain(benefit=0.12, benefit_lower=-0.05, benefit_upper=0.2, progress=0.9)


def test_the_accepted_risk_itself_is_too_much():
    alarm = commit_alarm(benefit=0.9, price=0.1, rate_ratio=0.5 * 0.95, noise=0.3, step_time=0.0, steps_left=200)
    for risk, expected in ((float(alarm), False), (float(np.nextafter(alarm, 1.0)), True)):
        assert 0.0 < risk < 0.5 and certain(noise=0.3, risk=risk) == expected


@pytest.mark.parametrize("lower", [-0.1, 0.0])
def test_a_benefit_of_nothing_is_not_divided_by(lower):
    with np.errstate(all="raise"):
        assert not certain(benefit=0.0, benefit_lower=lower, benefit_upper=0.1, slope=(-1.0, 0.0), progress=0.9)


def test_certain_is_decided_for_each_structure_alone():
    known = limits(
        5,
        **CERTAIN
        | dict(
            benefit_lower=[0.9, 0.09, 0.9, 0.9, 0.9], noise=[1e-3, 1e-3, 9.0, 1e-3, 1e-3], keep_prob=[1, 1, 1, 0.5, 1]
        ),
    )
    slope = np.array([0.0, 0.0, 0.0, 0.0, -99.0]), np.zeros(5)
    found = rules.certain(known, np.ones(5, bool), **WHEN | {"slope": slope})
    assert found.tolist() == [True, False, False, False, False]
