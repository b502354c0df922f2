"""How fast thetas move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import network

from catode.decisions.motion import ThetaSpeed, rate_ratios

NETWORK = network((4, 6), (3,))
SETTINGS = dict(nu=2.0, alpha=0.25, beta=0.5)


@settings(max_examples=30)
@given(st.floats(1e-3, 10.0), st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.floats(1e-3, 1e3))
def test_law_a_useless_structure_sinks_from_1_to_0_in_the_stated_time(nu, alpha, beta, speed):
    common = dict(nu=nu, alpha=alpha, beta=beta)
    ratios = rate_ratios(NETWORK, **common, theta_speed=speed)
    price = NETWORK.prices(np.ones(NETWORK.size), **common)
    assert 1.0 - ratios * price * (1.0 / speed) == pytest.approx(0.0, abs=1e-12)


def test_what_is_nearly_free_sinks_slower_than_its_kind_would_have_it():
    # a site of one unit beside sites of 300: of these, each is a small share of its kind's mean
    lone = network((1, 300), (300, 300))
    price = lone.prices(np.ones(lone.size), nu=1.0, alpha=0.5, beta=0.0)
    ratios = rate_ratios(lone, nu=1.0, alpha=0.5, beta=0.0, theta_speed=1.0)
    units = np.flatnonzero(~lone.inventory.is_layer)
    slow = units[price[units] < 0.05 * price[units].mean()]
    assert 0 < len(slow) < len(units)
    assert ratios[slow] * 0.05 * price[units].mean() == pytest.approx(1.0)
    rest = np.setdiff1d(units, slow)
    assert ratios[rest] * price[rest] == pytest.approx(1.0)


@pytest.mark.parametrize(("alpha", "kind"), [(0.0, True), (1.0, False)])
def test_a_kind_without_price_has_the_ratio_1(alpha, kind):
    ratios = rate_ratios(NETWORK, nu=2.0, alpha=alpha, beta=0.5, theta_speed=0.3)
    free = NETWORK.inventory.is_layer == kind
    assert (ratios[free] == 1.0).all() and (ratios[~free] != 1.0).all()


@pytest.mark.parametrize("change", [dict(nu=1e-310), dict(alpha=1e-320), dict(theta_speed=1e300, nu=1e-10)])
def test_prices_that_nothing_can_be_divided_by_are_refused(change):
    with pytest.raises(ValueError, match=r"^`nu` must give every gated structure a price [^\n]+; got nu=[^\n]+\.$"):
        rate_ratios(NETWORK, **SETTINGS | {"theta_speed": 1.0} | change)


def test_a_network_without_units_has_ratios_without_a_warning():
    cost = network((), ())
    found = rate_ratios(cost, nu=1.0, alpha=0.5, beta=0.0, theta_speed=2.0)
    assert found == pytest.approx(2.0 / cost.prices(np.ones(2), nu=1.0, alpha=0.5, beta=0.0))


def test_the_usual_speed_is_a_tenth_of_the_steps_at_the_base_time():
    speed = ThetaSpeed(None, 400)
    assert speed.value == 0.0 and not speed.settled(1, 50)
    speed.see(0.5, 1)
    assert speed.value * 0.5 * 400 == pytest.approx(10.0) and speed.settled(2, 50)
    speed.see(0.1, 2)  # a learning rate that falls changes nothing
    assert speed.base == 0.5 and speed.settled(3, 50)


def test_while_the_base_time_rises_nothing_may_count_on_the_speed():
    speed = ThetaSpeed(None, 400)
    for step in range(1, 101):
        speed.see(0.01 * step, step)
    assert speed.value * 400 == pytest.approx(10.0)
    assert not speed.settled(149, 50) and speed.settled(150, 50)
    asked = ThetaSpeed(0.3, 400)
    for step in range(1, 101):
        asked.see(0.01 * step, step)
    assert asked.value == 0.3 and asked.settled(100, 50)
