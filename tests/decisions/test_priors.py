"""Steps of theta under the priors against the flows and rest points of catode.theory.priors.priors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from catode.decisions.priors import PRIORS, bernoulli, concrete, flattening
from catode.prune.pruner import Pruner
from catode.theory.priors.priors import BernoulliPrior, FlatteningPrior, HardConcrete
from catode.train.models import DenseResNet

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


def train(steps, **changes):
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=2, width=32, hidden=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    options = dict(nu=4.0, rate_ratio=0.05, steps=120, warmup=20, check_every=10, probe_size=16, memory=50)
    pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **options | changes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 1, 8, 8, generator=generator)
        loss = F.cross_entropy(model.train()(x), (x.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    return pruner


@pytest.mark.parametrize("prior", ["bernoulli", "concrete"])
def test_under_the_rivals_thetas_come_to_rest_inside(prior):
    pruner = train(120, prior=prior, tolerance=0.01, images=1438, initial_keep_prob=0.9)
    assert pruner.finished and set(PRIORS) == {"flattening", "bernoulli", "concrete"}
    assert not np.isin(pruner.state, ["committed", "pruned_zero"]).any()
    assert pruner.decisions().get("forced", 0) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prior="flat"), "`prior` must be one of"),
        (dict(prior="bernoulli"), "`prior` must be flattening without a fixed tolerance"),
        (
            dict(prior="bernoulli", tolerance=0.1, target_macs=0.5),
            "`prior` must be flattening without a fixed tolerance, with a",
        ),
        (dict(prior="bernoulli", tolerance=0.1), "`images` must be given"),
        (dict(prior="concrete", tolerance=0.1), "`initial_keep_prob` must be below 1"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError) as caught:
        train(0, **change)
    assert message in str(caught.value)
