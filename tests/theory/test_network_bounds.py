"""Constants of real networks are bounds, and the domains that they give are not empty."""

from __future__ import annotations

import doctest
from fractions import Fraction

import numpy as np
import pytest
from test_networks import CASE, KINDS, PLAIN, TWO, ball, case, network

from catode.theory import networks
from catode.theory.networks import Structure, draw
from catode.theory.networks.bounds import COORDINATES, bounds, natural_radius

EVERY = pytest.mark.parametrize("coordinates", COORDINATES)


def climb(structure, radius, value, rounds=15, n=200):
    """Largest value found in the ball: random states, then ever smaller steps from the best."""
    rng, w = np.random.default_rng(1), ball(structure, radius, n)
    for i in range(rounds):
        best = w[np.argsort(value(w))[-20:]]
        w = np.repeat(best, n // 20, axis=0)
        w[20:] += radius * 0.7**i * rng.normal(size=w[20:].shape)
        w *= np.minimum(1.0, radius / np.linalg.norm(w, axis=1))[:, None]
        w = np.concatenate([best, w])
    return float(value(w).max())


def gradient(structure, w):
    """grad L1 by the structure's weights."""
    velocity = structure.field(np.concatenate([w, np.ones((len(w), 1))], axis=1))[:, :-1]
    return -velocity - structure.network.weight_decay * w


def claims(structure, found):
    """Each constant as a ratio that must not exceed 1, as a function of the weights."""
    lam, half = structure.network.weight_decay, len(structure.weights) // 2
    tiny = 1e-300

    def norms(w):
        return np.linalg.norm(w[:, :half], axis=1), np.linalg.norm(w[:, half:], axis=1)

    def benefit(w):
        return structure.benefit(structure.embed(w, np.ones(len(w))))

    def drift(w):
        return lam * np.sum(w * gradient(structure, w), axis=1) + found.decay * benefit(w)

    ratios = {
        "eta": lambda w: np.linalg.norm(gradient(structure, w), axis=1) / found.grad_bound,
        "q": lambda w: np.sum(gradient(structure, w) ** 2, axis=1) / found.gain,
        "kappa 4.1": lambda w: np.abs(benefit(w)) / (found.norm_slope * np.linalg.norm(w, axis=1)),
        "kappa 4.2": lambda w: np.abs(benefit(w)) / (found.unit_slope * np.prod(norms(w), axis=0) + tiny),
        "in": lambda w: (
            np.linalg.norm(gradient(structure, w)[:, :half], axis=1) / (found.unit_slope * norms(w)[1] + tiny)
        ),
        "out": lambda w: (
            np.linalg.norm(gradient(structure, w)[:, half:], axis=1) / (found.unit_slope * norms(w)[0] + tiny)
        ),
    }
    return ratios | ({"delta": lambda w: drift(w) / found.drift} if lam > 0.0 else {})


@CASE
def test_no_state_in_the_ball_exceeds_a_constant(name):
    structure = case(name)
    for radius in (natural_radius(structure, "layer"), 2.0):
        found = bounds(structure, radius=radius)
        for claim, ratio in claims(structure, found).items():
            worst = climb(structure, radius, ratio)
            assert 0.02 < worst <= 1.0 + 1e-9, (claim, radius, worst)  # 1e-9: rounding of the sampled value


def test_with_one_example_and_linear_units_the_constants_are_attained():
    """x = 1, target 2, M = v w: L1 = (1 - v w)^2 / 2. The worst weights are (R, -R) / sqrt(2)."""
    structure = Structure(network(inputs=[[1.0]], targets=[[2.0]], activation="identity", weight_decay=0.3))
    found, product = bounds(structure, radius=1.4), 0.98
    assert np.isclose(found.unit_slope, 1.0 + product, rtol=1e-11)
    assert np.isclose(found.norm_slope * 1.4, product + product**2 / 2, rtol=1e-11)
    assert np.isclose(found.drift, 0.3 * product**2, rtol=1e-11)
    worst = 1.4 / np.sqrt(2.0) * np.array([[1.0, -1.0]])
    for claim, ratio in claims(structure, found).items():
        attained = (1.0 + product / 2) / (1.0 + product) if claim == "kappa 4.2" else 1.0  # its gradients are the worst
        assert np.isclose(ratio(worst), attained, rtol=1e-9), claim


@pytest.mark.parametrize("name", ["identity", "linear unit"])
def test_linear_units_attain_the_slope_near_zero(name):
    """There b = -w_out' (mean e0 x') w_in, averaged over the gates of the others: the spectral norm is its maximum."""
    structure = case(name)
    found = bounds(structure, radius=1e-3)
    assert climb(structure, 1e-3, claims(structure, found)["kappa 4.2"]) > 0.999


@KINDS
def test_rounding_is_paid_for_where_the_loss_derivative_cancels(kind):
    """The output of the rest meets the target to the last digits, so that floats know no digit of e0."""
    if kind == "layer":
        structure, rest = Structure(network(inputs=[[0.3]], targets=[[0.3]], activation="identity")), Fraction(0)
    else:
        structure = Structure(
            network(**TWO, inputs=[[0.3]], targets=[[0.321]], activation="identity"), 0, [0.0, 0.1, 0.0, 0.7, 0.0, 1.0]
        )
        rest = Fraction(0.1) * Fraction(0.3) * Fraction(0.7)
    x, target = (Fraction(getattr(structure.network, name)[0][0]) for name in ("inputs", "targets"))
    exact = abs(x + rest - target) * x
    first, square = structure.moments()[:2]
    assert exact <= Fraction(first) <= exact + Fraction(1e-11)
    assert x * x <= Fraction(square)


@EVERY
@pytest.mark.parametrize("name", ["tanh", "identity", "logistic", "unit"])
def test_the_comparison_system_bounds_the_real_speeds(name, coordinates):
    structure, h = case(name), 1e-5
    found = bounds(structure, coordinates)
    w = ball(structure, found.radius * (1.0 - h), 300)
    theta = np.random.default_rng(2).random(300)
    velocity = structure.field(np.column_stack([w, theta]))
    size = {
        "layer": lambda w: np.linalg.norm(w, axis=1),
        "unit": lambda w: np.sum(w**2, axis=1),
        "benefit": lambda w: structure.benefit(structure.embed(w, theta)),
    }[coordinates]
    growth = (size(w + h * velocity[:, :-1]) - size(w - h * velocity[:, :-1])) / (2.0 * h)
    limit = found.system.field(np.stack([size(w), theta], axis=-1))
    assert np.all(growth <= limit[:, 0] + 1e-8)
    assert np.all(velocity[:, -1] <= limit[:, 1] + 1e-12)


@CASE
def test_the_natural_ball_is_just_filled_by_the_domain(name):
    structure = case(name)
    system = bounds(structure, "layer").system
    mu, lam = system.growth_rate, system.weight_decay
    assert np.isclose(
        system.price / system.benefit_slope * (mu + lam) / mu, natural_radius(structure, "layer"), rtol=1e-6
    )
    assert np.isclose(bounds(structure, "unit").system.saddle[0], natural_radius(structure, "unit") ** 2, rtol=1e-6)
    found = bounds(structure, "benefit")
    theta = found.system.saddle[1]
    assert not found.system.empty
    assert theta >= 0.5 * found.decay * found.system.price / found.gain * (1.0 - 1e-6)
    shares = [
        bounds(structure, "unit", radius=f * natural_radius(structure, "unit")).share(50) for f in (0.5, 1.0, 2.0)
    ]
    assert shares[1] == max(shares) > 0.0


@KINDS
def test_in_most_networks_the_domain_is_at_least_a_hundredth_of_the_box(kind):
    """The box knows neither data nor bounds: 0 <= theta <= 1 and norms up to twice that of Glorot's initialisation."""
    shares = np.array([bounds(draw(seed, kind)).share(100) for seed in range(40)])
    assert np.mean(shares >= 0.01) >= 0.5
    assert np.all(shares > 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds(case("tanh"), "norm"), "`coordinates` must be one of 'layer', 'unit', 'benefit'"),
        (lambda: bounds(case("tanh"), radius=0.0), "`radius` must be positive"),
        (lambda: bounds(case("tanh"), level=1.0), "`level` must be None where nothing else moves"),
        (lambda: bounds(PLAIN()), "`level` must be a number where the rest moves"),
        (lambda: bounds(PLAIN(), level=-1.0), "`level` must be positive"),
        (
            lambda: bounds(Structure(network(**TWO, weight_decay=0.0)), level=1.0),
            "`weight_decay` must be positive where",
        ),
        (lambda: bounds(case("tanh")).share(0), "`n` must be an integer of at least 1"),
        (lambda: bounds(case("tanh")).certifies([0.0, 0.0]), r"`states` must have shape \(..., 3\)"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(networks.bounds).failed == 0
