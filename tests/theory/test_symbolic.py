"""Exact small networks, the comparison systems derived from one structure, and the identities of docs/mathematics.md."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import numpy as np
import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory
from catode.theory import BenefitSystem, LayerSystem, UnitSystem
from catode.theory.networks import (
    GatedNetwork,
    benefit_comparison,
    gated,
    layer_comparison,
    mirror_comparison,
    unit_comparison,
)

LAWS = settings(max_examples=25, deadline=None, derandomize=True)
HALF = sympy.Rational(1, 2)


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


def zero(expression):
    return sympy.simplify(expression) == 0


# --- networks ------------------------------------------------------------------------------------------------------

PLAIN = {"inputs": [[1.0], [-0.5]], "targets": [[1.5], [0.4]], "widths": (2,), "prices": 0.1, "weight_decay": 0.05}
SINGLE = {"inputs": [[0.8]], "targets": [[1.5]]}
LABELS = {"targets": [[1.0], [-1.0]], "loss": "logistic"}
NETWORKS = {
    "tanh": PLAIN,
    "relu": PLAIN | SINGLE | {"widths": (1, 1), "activation": "relu", "rate_ratio": 3.0},
    "square": PLAIN | {"activation": "square", "gated": "units", "prices": [0.1, 0.2]},
    "identity": PLAIN | {"inputs": [[1.0, 0.5]], "targets": [[0.0, -1.0]], "widths": (1,), "activation": "identity"},
    "two layers": PLAIN | SINGLE | {"widths": (1, 2), "gated": "layers", "activation": "identity"},
    "logistic": PLAIN | LABELS | {"widths": (1,), "rate_ratio": 0.5},
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def build(name):
    return GatedNetwork(**NETWORKS[name])


def draw(network, n=5, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(n, len(network.weights)))
    return np.concatenate([weights, rng.uniform(size=(n, len(network.keep_probs)))], axis=1)


def run_network(network, weights, pattern):
    """Mean loss of one gate pattern, written again in numpy."""
    x, y = np.array(network.inputs), np.array(network.targets)
    weights, gates, d = list(weights), list(pattern), np.shape(network.inputs)[1]
    for width in network.widths:
        inward = np.reshape([weights.pop(0) for _ in range(width * d)], (width, d))
        outward = np.reshape([weights.pop(0) for _ in range(width * d)], (d, width))
        layer = gates.pop(0) if network.gated != "units" else 1.0
        units = [gates.pop(0) for _ in range(width)] if network.gated != "layers" else np.ones(width)
        hidden = x @ inward.T
        hidden = {
            "identity": hidden,
            "tanh": np.tanh(hidden),
            "relu": np.maximum(hidden, 0.0),
            "square": hidden**2,
        }[network.activation]
        x = x + layer * (hidden * units) @ outward.T
    losses = 0.5 * (x - y) ** 2 if network.loss == "squared" else np.logaddexp(0.0, -x * y)
    return losses.sum(axis=1).mean()


@EVERY
def test_the_cost_is_the_mean_over_gate_patterns_plus_the_penalty(name):
    network = build(name)
    for state in draw(network):
        weights, theta = np.split(state, [len(network.weights)])
        mean = sum(
            np.prod(np.where(pattern == 1.0, theta, 1.0 - theta)) * run_network(network, weights, pattern)
            for pattern in network.patterns
        )
        expected = mean + 0.5 * network.weight_decay * weights @ weights + network.prices @ theta
        assert np.isclose(network.value(state), expected, rtol=1e-12)


@EVERY
def test_field_and_jacobian_agree_with_finite_differences(name):
    network, h = build(name), 1e-5
    states = draw(network)
    steps = h * np.eye(states.shape[1])
    rates = np.repeat([1.0, network.rate_ratio], [len(network.weights), len(network.keep_probs)])
    slopes = [(network.value(states + e) - network.value(states - e)) / (2 * h) for e in steps]
    columns = [(network.field(states + e) - network.field(states - e)) / (2 * h) for e in steps]
    assert np.allclose(network.field(states), -rates * np.stack(slopes, axis=-1), rtol=1e-7, atol=1e-8)
    assert np.allclose(network.jacobian(states), np.stack(columns, axis=-1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["tanh", "logistic"])
def test_the_numeric_field_is_the_symbolic_flow(name):
    network = build(name)
    states = draw(network)
    faces = len(network.weights) + np.arange(len(network.keep_probs))
    states[1:3, faces] = [[0.0], [1.0]]
    for field, flow in ((network.field, network.flow()), (network.projected_field, network.projected_flow())):
        exact = sympy.lambdify(network.state, flow, "numpy", cse=True)
        assert np.allclose(field(states), [exact(*state).ravel() for state in states], rtol=1e-10, atol=1e-12)


@EVERY
def test_the_expected_loss_is_multilinear_and_exact_at_the_vertices(name):
    network = build(name)
    expected, loss = network.expected_loss(), network.loss_expression()
    for theta in network.keep_probs:
        assert sympy.expand(expected.diff(theta, 2)) == 0
    for pattern in network.patterns.astype(int).tolist():
        vertex = dict(zip(network.keep_probs, pattern, strict=True))
        assert expected.subs(vertex) == loss.subs(dict(zip(network.gates, pattern, strict=True)))


@pytest.mark.parametrize("name", ["tanh", "two layers"])
def test_the_slope_of_the_cost_is_price_minus_benefit(name):
    network = build(name)
    expected = network.expected_loss()
    for theta, price in zip(network.keep_probs, network.prices, strict=True):
        benefit = expected.subs(theta, 0) - expected.subs(theta, 1)
        assert sympy.expand(network.cost().diff(theta) - (sympy.Rational(str(price)) - benefit)) == 0


@pytest.mark.parametrize("name", ["tanh", "relu", "two layers"])
def test_no_keep_probs_cost_less_than_the_best_vertex(name):
    network = build(name)
    k = len(network.keep_probs)
    for state in draw(network, 3):
        grid = np.tile(state, (200, 1))
        grid[:, -k:] = np.random.default_rng(1).uniform(size=(200, k))
        vertices = np.tile(state, (2**k, 1))
        vertices[:, -k:] = network.patterns
        assert network.value(vertices).min() <= network.value(grid).min() + 1e-12


@EVERY
def test_the_cost_never_rises_along_the_projected_field(name):
    network = build(name)
    states = draw(network, 40)
    states[:20, len(network.weights) :] = np.round(states[:20, len(network.weights) :])
    rates = np.repeat([1.0, network.rate_ratio], [len(network.weights), len(network.keep_probs)])
    gradient = -network.field(states) / rates
    assert np.all(np.sum(gradient * network.projected_field(states), axis=1) <= 1e-12)


@pytest.mark.parametrize("name", ["tanh", "square", "logistic"])
def test_with_weight_decay_the_removed_state_is_always_stable(name):
    network = build(name)
    removed = np.zeros(len(network.state))
    k = len(network.weights)
    assert np.array_equal(network.field(removed)[:k], np.zeros(k))
    assert np.all(network.field(removed)[k:] < 0.0)  # the price, for b(0) = 0
    assert np.allclose(network.jacobian(removed)[:k, :k], -network.weight_decay * np.eye(k))


def test_at_fixed_prices_the_theta_field_is_divergence_free():
    network = build("tanh")
    flow = network.flow()
    for i, theta in enumerate(network.keep_probs, len(network.weights)):
        assert sympy.expand(flow[i].diff(theta)) == 0


# --- prices that follow theta: a game ------------------------------------------------------------------------------


def complexity_index():
    """J of docs/mathematics.md section 2: two hidden sites (2 and 1 units) in the first block, one (1 unit) in the second."""
    shares = sympy.symbols("c1:5", positive=True)
    layers = sympy.symbols("theta_B1:3", real=True)
    units = sympy.symbols("theta_1_1:4", real=True) + sympy.symbols("theta_2_1:2", real=True)
    first, second, other = units[0] + units[1], units[2], units[3]
    first_block = shares[0] * first + shares[1] * first * second + shares[2] * second
    return shares, layers, units, layers[0] * first_block + layers[1] * shares[3] * other


def test_moving_prices_make_a_game_with_the_stated_antisymmetric_part():
    """docs/mathematics.md section 2 states A - A^T, twice the antisymmetric part, A the Jacobian of the prices."""
    nu, alpha = sympy.symbols("nu alpha", positive=True)
    _, layers, units, index = complexity_index()
    thetas = [*layers, *units]
    strength = [nu * (alpha if theta in layers else 1 - alpha) for theta in thetas]
    prices = [each * index.diff(theta) for each, theta in zip(strength, thetas, strict=True)]
    jacobian = sympy.Matrix(prices).jacobian(thetas)
    for i, one in enumerate(thetas):
        assert jacobian[i, i] == 0  # divergence-free on every face
        assert sympy.expand(prices[i] - (strength[i] * index).diff(one)) == 0  # each team descends its own potential
        assert sympy.expand((prices[i] - (nu / 2 * index).diff(one)).subs(alpha, HALF)) == 0
        for j, other in enumerate(thetas):
            team = (one in layers) - (other in layers)
            expected = team * (2 * alpha - 1) * nu * index.diff(one, other)
            assert sympy.expand(jacobian[i, j] - jacobian[j, i] - expected) == 0


def test_the_symbolic_prices_are_those_of_the_complexity_index():
    links = [(0, None, 0), (0, 0, 1), (0, 1, None), (1, 2, None)]
    terms = [Term(str(i), 1.0, 1.0, *link) for i, link in enumerate(links)]
    sites = [Site("a", 2, (), ()), Site("b", 1, (), ())], [Site("c", 1, (), ())]
    inventory = Inventory([Block(str(i), str(i), tuple(own)) for i, own in enumerate(sites)])
    numeric = Complexity(terms, inventory)
    theta = np.array([0.5, 0.9, 0.3, 0.7, 0.2, 0.6])
    shares, layers, units, index = complexity_index()
    values = dict(zip([*layers, *units], theta.tolist(), strict=True)) | dict.fromkeys(shares, 1 / 6)
    nu, alpha = 2.0, 0.3
    exact = [nu * (alpha if t in layers else 1 - alpha) * index.diff(t).subs(values) for t in (*layers, *units)]
    assert np.allclose(numeric.prices(theta, nu=nu, alpha=alpha, beta=0.5), np.array(exact, dtype=float))


# --- what the estimators see ---------------------------------------------------------------------------------------


def test_straight_through_has_the_stated_mean_and_is_right_only_at_one_half():
    theta, g0, g1, h, price, x = sympy.symbols("theta g0 g1 h price x", real=True)
    mean = theta * g1 + (1 - theta) * g0
    quadratic = g0 * x + h * x**2 / 2  # g(x) = g0 + h x
    bias = mean.subs(g1, g0 + h) - (quadratic.subs(x, 1) - quadratic.subs(x, 0))
    assert sympy.factor(bias) == h * (2 * theta - 1) / 2
    size = sympy.Symbol("size", positive=True)  # |g0|, with g0 < 0: the structure helps at first
    (rest,) = sympy.solve(price + mean.subs(g0, -size), theta)
    assert zero(rest - (size - price) / (size + g1))
    assert (price + mean).subs({theta: 0, g0: -size}) == price - size  # removes iff |g0| < price
    flat = quadratic.subs(h, -g0)  # the quadratic with g(1) = 0
    benefit = flat.subs(x, 0) - flat.subs(x, 1)
    assert zero(benefit - (-g0) / 2)  # so |g0| < price iff b < price / 2


def test_straight_through_is_blind_at_a_gate_of_one_with_stationary_weights():
    """Output M homogeneous of degree c in w = (s, t); the loss is any function of shortcut + xi M(w)."""
    s, t, c, p, lam, theta = sympy.symbols("s t c p lambda theta", positive=True)
    base, xi, scale = sympy.symbols("base xi scale", real=True)
    loss = sympy.Function("loss")(base + xi * scale * s**p * t ** (c - p))
    inner = sum(w * loss.diff(w) for w in (s, t)).subs(xi, 1).doit()  # w . grad L1
    g1 = loss.diff(xi).subs(xi, 1).doit()
    assert zero(inner - c * g1)  # Euler
    stationary = inner + lam * (s**2 + t**2) / theta  # w . (theta grad L1 + lambda w) / theta
    assert zero(c * (g1 + lam * (s**2 + t**2) / (c * theta)) - stationary)


def test_the_curvature_correction_and_the_trapezoid_are_exact_for_quadratics():
    a, g, h, x = sympy.symbols("a g h x", real=True)
    loss = a + g * x + h * x**2 / 2
    change = loss.subs(x, 1) - loss.subs(x, 0)
    for xi in (0, 1):
        assert sympy.expand((loss.diff(x) + (HALF - x) * h).subs(x, xi) - change) == 0
    assert sympy.expand((loss.diff(x).subs(x, 0) + loss.diff(x).subs(x, 1)) / 2 - change) == 0


def test_the_curvature_of_cross_entropy_is_the_variance_of_the_logit_slope():
    odds, d = sympy.symbols("odds:3", positive=True), sympy.symbols("d:3", real=True)
    xi = sympy.Symbol("xi", real=True)
    logits = [sympy.log(a) + xi * b for a, b in zip(odds, d, strict=True)]
    total = sum(map(sympy.exp, logits))
    p = [sympy.exp(logit) / total for logit in logits]
    mean = sum(q * s for q, s in zip(p, d, strict=True))
    variance = sum(q * (s - mean) ** 2 for q, s in zip(p, d, strict=True))
    losses = [sympy.log(total) - logit for logit in logits]
    sampled = sum(q * loss.diff(xi) ** 2 for q, loss in zip(p, losses, strict=True))  # label from the model
    assert sympy.cancel((losses[0].diff(xi, 2) - variance).subs(xi, 0)) == 0
    assert sympy.cancel((sampled - variance).subs(xi, 0)) == 0


def test_the_test_length_and_the_alarm_rate_of_the_sequential_view():
    gap, variance, rho, tau, x, eps = sympy.symbols("gap variance rho tau x eps", positive=True)
    per_draw = (2 * gap) ** 2 / (2 * variance)  # drift of the log-likelihood ratio of b = price +- gap
    assert zero(sympy.log(1 / eps) / per_draw - variance * sympy.log(1 / eps) / (2 * gap**2))
    chance = sympy.exp(-2 * gap / (tau * rho * variance) * x)  # that theta, x above an alarm, ever reaches it
    drift, diffusion = rho * gap, tau * rho**2 * variance
    assert zero(drift * chance.diff(x) + diffusion / 2 * chance.diff(x, 2))


# --- the comparison systems ----------------------------------------------------------------------------------------

layer, unit, benefit, mirror = map(
    functools.cache, (layer_comparison, unit_comparison, benefit_comparison, mirror_comparison)
)
DERIVED = {"layer": (layer, LayerSystem), "unit": (unit, UnitSystem), "benefit": (benefit, BenefitSystem)}
DRAWN = {
    "layer": ("price", "weight_decay", "rate_ratio", "grad_bound", "benefit_slope"),
    "unit": ("price", "weight_decay", "rate_ratio", "benefit_slope"),
    "benefit": ("price", "gain", "rate_ratio", "decay", "drift"),
}
SYSTEM = pytest.mark.parametrize("name", DERIVED)
LINEAR = pytest.mark.parametrize("derive", [layer, benefit, mirror], ids=["layer", "benefit", "mirror"])


@SYSTEM
def test_the_derived_system_is_the_numeric_one(name):
    derive, numeric = DERIVED[name]
    comparison = derive()
    order = tuple(comparison.parameters[parameter] for parameter in DRAWN[name])
    assert set(order) == set(comparison.parameters.values())
    parts = (*comparison.velocity, comparison.jacobian, *comparison.saddle, comparison.growth_rate)
    evaluate = sympy.lambdify((*order, *comparison.state), (*parts, comparison.separatrix))

    @LAWS
    @given(st.tuples(*[numbers(0.05, 2.0)] * len(order)), numbers(0.05, 3.0), numbers(0.0, 1.0))
    def law(values, size, theta):
        system = numeric(**dict(zip(DRAWN[name], values, strict=True)))
        assume(abs(size / system.saddle[0] - 1.0) > 1e-3)  # where d - log(1 + d) cancels
        first, second, jacobian, *saddle, rate, separatrix = evaluate(*values, size, theta)
        assert np.allclose([first, second], system.field([size, theta]), rtol=1e-12, atol=1e-12)
        assert np.allclose(jacobian, system.jacobian([size, theta]), rtol=1e-12)
        assert np.allclose(saddle, system.saddle, rtol=1e-12)
        assert np.isclose(rate, system.growth_rate, rtol=1e-9)
        assert np.isclose(separatrix, system.separatrix(size), rtol=1e-6, atol=1e-6)

    law()


def test_the_derived_mirror_separatrix_is_the_numeric_one():
    comparison = mirror()
    names = ("price", "gain_lower", "rate_ratio", "decay_upper", "drift")
    evaluate = sympy.lambdify(
        (*(comparison.parameters[name] for name in names), comparison.state[0]), comparison.separatrix
    )

    @LAWS
    @given(st.tuples(*[numbers(0.05, 2.0)] * 5), numbers(0.0, 1.0))
    def law(values, fraction):
        given_ = dict(zip(names, values, strict=True))
        system = BenefitSystem(**given_, gain=2.0)
        b = fraction * system.price
        if (system.decay_upper * system.price + system.drift) / system.gain_lower < 1.0:
            assert np.isclose(system.mirror_separatrix(b), evaluate(*values, b), rtol=1e-9)
        else:
            assert system.mirror_separatrix(b) == np.inf

    law()


@SYSTEM
def test_the_saddle_is_one_and_the_system_is_cooperative(name):
    comparison = DERIVED[name][0]()
    at = dict(zip(comparison.state, comparison.saddle, strict=True))
    assert all(zero(speed.subs(at, simultaneous=True)) for speed in comparison.velocity)
    jacobian = comparison.jacobian
    assert jacobian[0, 1].is_nonnegative
    assert jacobian[1, 0].is_nonnegative
    there = jacobian.subs(at, simultaneous=True)
    mu = comparison.growth_rate
    assert zero(sympy.expand((there - mu * sympy.eye(2)).det()))
    assert sympy.simplify(there.det()).is_negative  # eigenvalues of either sign


@LINEAR
def test_v_grows_from_its_threshold_at_mu(derive):
    comparison = derive()
    v, mu = comparison.invariant, comparison.growth_rate
    level = v.subs(dict(zip(comparison.state, comparison.saddle, strict=True)), simultaneous=True)
    assert zero(comparison.along(v) - mu * (v - level))
    assert zero(v.subs(comparison.state[1], comparison.separatrix) - level)  # the separatrix is V = V*


def test_the_thresholds_of_the_layer_are_those_of_theory():
    g, lam, rho, eta, kappa = (layer().parameters[name] for name in DRAWN["layer"])
    (r, theta), mu, v = layer().state, layer().growth_rate, layer().invariant
    assert zero(mu - (-lam + sympy.sqrt(lam**2 + 4 * rho * kappa * eta)) / 2)
    assert zero(v - (mu * r + eta * theta))
    assert zero(v.subs({r: g / kappa, theta: lam * g / (kappa * eta)}) - g / kappa * (mu + lam))


def test_the_separatrices_in_benefit_coordinates_are_those_of_theory():
    g, q, rho, a, delta = (benefit().parameters[name] for name in DRAWN["benefit"])
    b, mu, separatrix = benefit().state[0], benefit().growth_rate, benefit().separatrix
    assert zero(mu - (-a + sympy.sqrt(a**2 + 4 * rho * q)) / 2)
    assert zero(separatrix - (g * (mu + a) - delta - mu * b) / q)
    assert zero(separatrix.subs(a, 0) - ((g - b) * sympy.sqrt(rho / q) - delta / q))
    g, q, a, delta = (mirror().parameters[name] for name in ("price", "gain_lower", "decay_upper", "drift"))
    b, mu = mirror().state[0], mirror().growth_rate
    assert zero(mirror().separatrix - (g * (mu + a) + delta - mu * b) / q)
    assert mirror().saddle == (g, (a * g + delta) / q)


def test_the_time_to_zero_is_when_v_reaches_zero():
    mu, start, level, t = sympy.symbols("mu start level t", positive=True)  # start < level
    v = level + (start - level) * sympy.exp(mu * t)
    assert zero(v.diff(t) - mu * (v - level))
    assert zero(v.subs(t, sympy.log(level / (level - start)) / mu))


def test_the_first_integral_of_the_unit_and_its_separatrix():
    g, lam, rho, kappa = (unit().parameters[name] for name in DRAWN["unit"])
    u, theta = unit().state
    h = unit().invariant
    assert zero(h - (kappa * theta**2 - 2 * lam * theta - rho * (kappa * u / 2 - g * sympy.log(u))))
    assert zero(unit().along(h))
    assert unit().saddle == (2 * g / kappa, lam / kappa)
    assert zero(unit().growth_rate ** 2 - 2 * rho * kappa * g)
    top = 2 * g / kappa
    depth = rho / kappa * (kappa * (u - top) / 2 - g * sympy.log(u / top))
    bend = (unit().separatrix - lam / kappa) / sympy.sign(top - u)
    assert zero(sympy.expand_log(bend**2 - depth, force=True))
    level = h.subs({u: top, theta: lam / kappa}, simultaneous=True)
    assert zero(sympy.expand_log(h.subs(theta, lam / kappa + sympy.sqrt(depth)) - level, force=True))


def test_the_branch_of_the_unit_separatrix_is_the_stable_one():
    values = {unit().parameters[name]: value for name, value in zip(DRAWN["unit"], (0.1, 0.1, 1.0, 0.5), strict=True)}
    at = dict(zip(unit().state, unit().saddle, strict=True))
    eigen = unit().jacobian.subs(at, simultaneous=True).subs(values).eigenvects()
    (stable,) = (vector for value, _, (vector,) in eigen if value < 0)
    left, right = (float(unit().separatrix.subs(values).subs(unit().state[0], 0.4 + h)) for h in (-1e-4, 1e-4))
    assert left > 0.2 > right
    assert np.isclose((right - left) / 2e-4, float(stable[1] / stable[0]), rtol=1e-3)


def test_the_pooled_system_keeps_the_law_of_v():
    """docs/theory.md section 2: a pool of memory T between b and theta."""
    b, pool, theta, g, q, rho, a, delta, memory, mu = sympy.symbols("b B theta g q rho a delta T mu", positive=True)
    rho_q = mu * (mu + a) * (1 + memory * mu)
    v = b + (mu + a) * memory * pool + q / mu * theta
    speed = {b: q * theta - a * b + delta, pool: (b - pool) / memory, theta: rho * (pool - g)}
    level = v.subs({b: g, pool: g, theta: (a * g - delta) / q}, simultaneous=True)
    law = sum(v.diff(x) * speed[x] for x in speed) - mu * (v - level)
    assert zero(law.subs(rho, rho_q / q))


# --- the comparison systems bound real structures ------------------------------------------------------------------


@LAWS
@given(numbers(-2.0, 2.0), numbers(-2.0, 2.0), numbers(0.0, 1.0))
def test_the_unit_system_bounds_a_unit_of_a_logistic_network(inward, outward, theta):
    """|dL/doutput| <= 1, so that with identity units kappa = mean |x| bounds both gradients and the benefit."""
    network = logistic_unit()
    kappa = float(np.abs(network.inputs).mean())
    rates = {"price": 0.1, "weight_decay": network.weight_decay, "rate_ratio": network.rate_ratio}
    bound = UnitSystem(**rates, benefit_slope=kappa)
    speed = network.field([inward, outward, theta])
    size = inward**2 + outward**2
    limit = bound.field([size, theta])
    assert 2.0 * (inward * speed[0] + outward * speed[1]) <= limit[0] + 1e-12
    assert speed[2] <= limit[1] + 1e-12


@LAWS
@given(numbers(-2.0, 2.0), numbers(-2.0, 2.0), numbers(0.0, 1.0))
def test_the_benefit_grows_as_theory_says(inward, outward, theta):
    """b' = theta |grad L1|^2 + lambda w.grad L1, in a network with nothing else that moves."""
    network, h = logistic_unit(), 1e-6
    weights = np.array([inward, outward])
    benefit = lambda w: network.value([*w, 0.0]) - network.value([*w, 1.0]) + network.prices[0]  # noqa: E731
    gradient = -network.field([*weights, 1.0])[:2] - network.weight_decay * weights  # grad L1
    speed = network.field([*weights, theta])[:2]
    growth = (benefit(weights + h * speed) - benefit(weights - h * speed)) / (2 * h)
    exact = theta * gradient @ gradient + network.weight_decay * weights @ gradient
    assert np.isclose(growth, exact, rtol=1e-6, atol=1e-8)


@functools.cache
def logistic_unit():
    given_ = PLAIN | LABELS | {"widths": (1,), "gated": "units", "activation": "identity", "rate_ratio": 2.0}
    return GatedNetwork(**given_)


def test_the_effective_decay_is_at_most_the_degree_times_lambda():
    """b + g(1) is the integral of xi L'' over [0, 1]: not negative for a loss convex along the output."""
    x = sympy.Symbol("x", real=True)
    loss = sum(coefficient * x**k for k, coefficient in enumerate(sympy.symbols("c0:6", real=True)))
    benefit, g1 = loss.subs(x, 0) - loss.subs(x, 1), loss.diff(x).subs(x, 1)
    assert sympy.expand(benefit + g1 - sympy.integrate(x * loss.diff(x, 2), (x, 0, 1))) == 0
    c, lam, size = sympy.symbols(
        "c lambda b", positive=True
    )  # a_eff = -lambda c g(1) / b <= c lambda iff b + g(1) >= 0
    excess = sympy.Symbol("excess", nonnegative=True)
    assert (c * lam + lam * c * (excess - size) / size).simplify().is_nonnegative


def test_at_stationary_weights_the_benefit_stands_still_and_its_decay_is_of_second_order():
    """docs/mathematics.md section 4.3 has a_eff = 0 there; exactly it is lambda^2 |w|^2 / (theta b), small but not zero."""
    w, lam, theta, b = sympy.symbols("w lambda theta b", positive=True)
    gradient = -lam * w / theta  # theta grad L1 + lambda w = 0
    assert zero(theta * gradient**2 + lam * w * gradient)
    assert zero(-lam * w * gradient / b - lam**2 * w**2 / (theta * b))
    x = sympy.Symbol("x", positive=True)  # a linear layer with L1 = (1 - x)^2 / 2 and theta = 1
    (at,) = sympy.solve(-(1 - x) + lam * x, x)
    decay = (lam * x * (1 - x) / (HALF - (1 - x) ** 2 / 2)).subs(x, at)
    assert zero(decay - 2 * lam**2 / (1 + 2 * lam))
    assert decay.subs(lam, HALF) > 0


@LAWS
@given(*[numbers(0.0, 1.0)] * 4)
def test_the_clipped_discrete_step_keeps_the_order(size, theta, more_size, more_theta):
    system = BenefitSystem(price=0.3, gain=0.8, rate_ratio=2.0, decay=0.5)
    low = np.array([size, theta])
    high = np.minimum(low + np.array([more_size, more_theta]), [np.inf, 1.0])
    step = 1.0 / system.decay
    assert np.all(system.project(low + step * system.field(low)) <= system.project(high + step * system.field(high)))


# --- noise ---------------------------------------------------------------------------------------------------------


def test_the_noise_of_v_is_a_sum_of_two_and_their_covariance():
    q, mu, sigma, sigma_b, cov = sympy.symbols("q mu sigma sigma_b cov", real=True)
    row = sympy.Matrix([mu, q])
    covariance = sympy.Matrix([[sigma_b**2, cov], [cov, sigma**2]])  # of (b, theta)
    variance = (row.T * covariance * row)[0]
    assert sympy.expand(variance - (q**2 * sigma**2 + mu**2 * sigma_b**2 + 2 * mu * q * cov)) == 0


def test_the_variance_of_the_discounted_noise_continuous_and_discrete():
    mu, s, tau, t, x = sympy.symbols("mu s tau t x", positive=True)
    continuous = sympy.integrate(s**2 * sympy.exp(-2 * mu * t), (t, 0, sympy.oo))
    assert zero(continuous - s**2 / (2 * mu))
    # V_{k+1} - V* = (1 + tau mu)(V_k - V*) + sqrt(tau) s xi_k: the variance of M is tau s^2 times the sum of x^(k+1)
    geometric = x / (1 - x)
    assert zero(geometric - x - x * geometric)  # and converges, for 0 < x < 1
    discrete = tau * s**2 * geometric.subs(x, (1 + tau * mu) ** -2)
    assert zero(discrete - s**2 / (mu * (2 + tau * mu)))
    assert sympy.limit(discrete, tau, 0) == continuous


def test_the_tolerance_is_where_the_escape_bound_is_the_risk():
    """Phi(-k) = eps iff k = z_{1-eps}, with k = (V* - V) sqrt(2 mu) / s_V; solved for theta. For any noise of that variance
    Cantelli's eps = 1 / (1 + k^2) takes its place."""
    g, q, a, delta, mu, s_v, z, eps = sympy.symbols("g q a delta mu s_V z eps", positive=True)
    b, theta = sympy.symbols("b theta", nonnegative=True)
    level = g * (mu + a) - delta
    k = (level - mu * b - q * theta) * sympy.sqrt(2 * mu) / s_v
    (tolerance,) = sympy.solve(sympy.Eq(k, z), theta)
    separatrix = (level - mu * b) / q
    assert zero(tolerance - (separatrix - z * s_v / (q * sympy.sqrt(2 * mu))))
    assert zero(1 / (1 + z**2).subs(z, sympy.sqrt(1 / eps - 1)) - eps)


def test_the_path_of_v_is_its_start_and_the_discounted_noise():
    """V_t - V* = e^(mu t) (V_0 - V* + M_t) solves dV = mu (V - V*) dt + s dB, where dM = e^(-mu t) s dB."""
    mu, t, start, level = sympy.symbols("mu t start level", real=True)
    noise, speed = sympy.Function("M")(t), sympy.Symbol("speed", real=True)  # speed stands for s dB/dt
    path = level + sympy.exp(mu * t) * (start - level + noise)
    slope = path.diff(t).subs(noise.diff(t), sympy.exp(-mu * t) * speed)
    assert zero(slope - mu * (path - level) - speed)
    assert zero(path.subs(t, 0).subs(noise.subs(t, 0), 0) - start)


def test_the_least_price_that_can_be_decided():
    """With b = a = delta = 0 the tolerance is positive iff g > z s sqrt(tau / 2) (rho q)^(1/4)."""
    g, z, s, tau, rho, q = sympy.symbols("g z s tau rho q", positive=True)
    mu = sympy.sqrt(rho * q)
    noise_v = q * rho * s * sympy.sqrt(tau)
    tolerance = g * sympy.sqrt(rho / q) - z * noise_v / (q * sympy.sqrt(2 * mu))
    (least,) = sympy.solve(tolerance, g)
    assert zero(least - z * s * sympy.sqrt(tau / 2) * (rho * q) ** sympy.Rational(1, 4))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [1.0, 2.0]}, r"`inputs` must have shape \(n, d\) with 1 <= n <= 8 and 1 <= d <= 2; got inputs of"),
        ({"inputs": np.ones((9, 1))}, "`inputs` must have shape"),
        ({"inputs": [[1.0], [np.nan]]}, "`inputs` must be finite"),
        ({"targets": [[1.0]]}, r"`targets` must have shape \(2, 1\), that of `inputs`"),
        ({"loss": "logistic"}, r"`targets` must be labels -1 or 1 for the logistic loss; got targets\[0, 0\]=1.5"),
        ({"loss": "hinge"}, "`loss` must be one of 'squared', 'logistic'; got loss='hinge'"),
        ({"widths": ()}, r"`widths` must list one or 2 widths; got widths=\(\). Write e.g."),
        ({"widths": 2}, "`widths` must list one or 2 widths"),
        ({"widths": (2, 4)}, r"`widths\[1\]` must be an integer in \[1, 3\]"),
        ({"widths": (1.0,)}, r"`widths\[0\]` must be an integer"),
        ({"prices": [0.1, 0.2]}, r"`prices` must have shape \(\) or \(3,\), one for each gate"),
        ({"prices": -0.1}, "`prices` must be non-negative"),
        ({"weight_decay": -1.0}, "`weight_decay` must be non-negative"),
        ({"rate_ratio": 0.0}, "`rate_ratio` must be positive"),
        ({"activation": "gelu"}, "`activation` must be one of 'identity', 'tanh', 'relu', 'square'"),
        ({"gated": "weights"}, "`gated` must be one of 'layers', 'units', 'both'"),
    ],
)
def test_bad_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GatedNetwork(**PLAIN | change)


@pytest.mark.parametrize("method", ["value", "field", "jacobian", "projected_field"])
@pytest.mark.parametrize(
    ("state", "message"), [(0.0, r"shape \(..., 7\)"), ([0.0] * 6, "shape"), ([np.inf] * 7, "fin")]
)
def test_bad_states_are_refused(method, state, message):
    with pytest.raises(ValueError, match=rf"`state` must .*{message}"):
        getattr(build("tanh"), method)(state)


def test_networks_are_values_and_vectorise():
    one, other = GatedNetwork(**PLAIN), build("tanh")
    assert one == other
    assert hash(one) == hash(other)
    assert dataclasses.replace(one, weight_decay=0.2) != one
    states = draw(other, 6).reshape(2, 3, -1)
    for method in ("value", "field", "jacobian", "projected_field"):
        whole = getattr(other, method)(states)
        assert np.allclose(whole[1, 2], getattr(other, method)(states[1, 2]), rtol=1e-13)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(gated) == (0, 3)
