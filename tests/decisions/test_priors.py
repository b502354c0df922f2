"""Steps of theta under the priors against the flows and rest points of catode.theory.priors.priors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import expit

from catode.decisions.priors import PRIORS, bernoulli, concrete, flattening
from catode.theory.priors.priors import BernoulliPrior, FlatteningPrior, HardConcrete

PRICE = 0.02
thetas = st.floats(0.01, 0.99)
benefits = st.floats(-0.05, 0.05)


def one(value):
    return np.array([value])


@given(theta=thetas | st.sampled_from([0.0, 1.0]), benefit=benefits)
def test_law_flattening_is_the_projected_flow_of_its_prior(theta, benefit):
    new = flattening(one(theta), one(benefit - PRICE), one(1e-6), None)[0]
    velocity = FlatteningPrior(float(np.exp(PRICE))).velocity(theta, benefit)
    assert (new - theta) / 1e-6 == pytest.approx(float(velocity), abs=1e-9)


@given(theta=thetas, benefit=benefits, images=st.integers(10, 10**6))
def test_law_bernoulli_is_the_flow_of_its_prior_over_the_images(theta, benefit, images):
    step = 1e-7
    new = bernoulli(one(theta), one(benefit - PRICE), one(step), images)[0]
    prior = expit(-PRICE * images)
    if prior > 1e-12:
        velocity = BernoulliPrior(prior).velocity(theta, benefit * images) / images
        assert (new - theta) / step == pytest.approx(float(velocity), rel=1e-3, abs=1e-5)


@example(theta=1e-6, force=-1e-3, images=20_000, step=1e-3)  # the force takes all of theta, and more does not fit
@given(theta=st.floats(0, 1), force=st.floats(-0.05, 0.05), images=st.integers(10, 10**5), step=st.floats(1e-3, 1e3))
def test_law_the_bernoulli_step_is_stable_and_rests_where_the_theory_says(theta, force, images, step):
    rest = expit(images * force)
    new = bernoulli(one(theta), one(force), one(step), images)[0]
    assert min(theta, rest) - 1e-9 <= new <= max(theta, rest) + 1e-9  # monotone, never beyond the rest point
    value = one(theta)
    for _ in range(3):
        value = bernoulli(value, one(force), one(1e9), images)
    assert value[0] == pytest.approx(rest, abs=1e-6)


@given(theta=thetas, benefit=benefits)
def test_law_concrete_moves_as_a_gate_of_temperature_0(theta, benefit):
    new = concrete(one(theta), one(benefit - PRICE), one(1e-7), None)[0]
    speed = HardConcrete(PRICE).mobility(theta) * (benefit - PRICE)
    assert (new - theta) / 1e-7 / 16 == pytest.approx(float(speed), rel=1e-3, abs=1e-7)
    assert concrete(one(0.5), one(0.01), one(1e-3), None) == pytest.approx(
        flattening(one(0.5), one(0.01), one(1e-3), None), abs=1e-9
    )


@example(theta=1.0, share=-0.5, other=0.9, force=0.01)
@example(theta=0.0, share=0.5, other=0.1, force=0.01)
@example(theta=1.0, share=0.5, other=0.9, force=0.01)
@example(theta=0.0, share=-0.5, other=0.1, force=0.01)
@given(
    theta=st.floats(0.01, 0.99),
    share=st.floats(0.01, 3.0) | st.floats(-3.0, -0.01),
    other=st.floats(0.0, 1.0),
    force=st.floats(1e-4, 1.0),
)
def test_law_flattening_moves_theta_as_the_force_says_and_stops_at_the_ends(theta, share, other, force):
    """`share` is how far theta would move, in units of the way to the end that it is pushed towards."""
    move = PRIORS["flattening"]
    way = (1.0 - theta) if share > 0 else theta
    step, push = one(abs(share) * way / force), one(force if share > 0 else -force)
    new = move(one(theta), push, step, None)[0]
    assert 0.0 <= new <= 1.0 and (new != theta) == (way > 0.0), "what is pushed moves, but for what has arrived"
    expected = theta + way * min(max(share, -1.0), 1.0)
    assert new == pytest.approx(expected, abs=1e-12)
    # the projection brings no two thetas further apart, and keeps their order
    beside = move(one(other), push, step, None)[0]
    assert abs(new - beside) <= abs(theta - other) + 1e-12 and (new - beside) * (theta - other) >= 0.0


@given(theta=st.floats(0.0, 1.0) | st.sampled_from([0.0, 1.0]), step=st.floats(0.0, 1e6))
def test_law_without_force_no_theta_moves_under_flattening(theta, step):
    assert PRIORS["flattening"](one(theta), one(0.0), one(step), None)[0] == theta


def test_the_priors_have_their_names():
    assert {"flattening": flattening, "bernoulli": bernoulli, "concrete": concrete} == PRIORS
