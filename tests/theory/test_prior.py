"""The priors: what sympy proves of each regulariser, and every prior against the laws of the flow."""

from __future__ import annotations

import doctest
import itertools
import subprocess
import sys

import numpy as np
import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from catode.theory.priors import priors as module
from catode.theory.priors.priors import BernoulliPrior, FlatteningPrior, HardConcrete, Prior, SpikeAndSlab

LAWS = settings(max_examples=25, deadline=None, derandomize=True)
THETA, PI, GAMMA, PRICE, COST = sympy.symbols("theta prior_prob gamma price slab_cost", positive=True)
B = sympy.Symbol("b", real=True)


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


flattening = st.builds(FlatteningPrior, numbers(0.01, 50.0).filter(lambda gamma: gamma != 1.0))
bernoulli = st.builds(BernoulliPrior, numbers(0.01, 0.99))
slab = st.builds(SpikeAndSlab, numbers(0.01, 0.99), numbers(0.0, 5.0))
concrete = st.builds(HardConcrete, numbers(0.01, 2.0), numbers(0.3, 1.0), numbers(-0.5, -0.05), numbers(1.05, 1.5))
EVERY = pytest.mark.parametrize(
    "priors", [flattening, bernoulli, slab, concrete], ids=["flattening", "bernoulli", "slab", "concrete"]
)


# --- what sympy proves ---------------------------------------------------------------------------------------------


def test_the_flattening_density_integrates_to_one():
    primitive = sympy.integrate(FlatteningPrior.density_expression(), PI)
    assert sympy.simplify(primitive.subs(PI, 1) - primitive.subs(PI, 0)) == 1


def test_the_flattening_minimiser_is_the_one_minimum():
    objective = FlatteningPrior.objective_expression()
    best = FlatteningPrior.minimiser_expression()
    assert sympy.simplify(best - THETA / (THETA + GAMMA * (1 - THETA))) == 0
    odds = sympy.Symbol("odds", positive=True)  # theta = odds / (1 + odds) runs through (0, 1)
    curvature = objective.diff(PI, 2).subs(PI, best).subs(THETA, odds / (1 + odds))
    assert sympy.factor(sympy.simplify(curvature)).is_positive
    slope = objective.diff(PI)  # at the faces it keeps its sign, so that pi* = theta there
    assert sympy.simplify(slope.subs(THETA, 0) - GAMMA / ((1 - PI) * (1 + (GAMMA - 1) * PI))) == 0
    assert sympy.simplify(slope.subs(THETA, 1) + 1 / (PI * (1 + (GAMMA - 1) * PI))) == 0


@pytest.mark.parametrize("above", [True, False], ids=["gamma above 1", "gamma below 1"])
def test_the_flattened_value_is_exactly_linear(above):
    value = FlatteningPrior.objective_expression().subs(PI, FlatteningPrior.minimiser_expression())
    constant = sympy.log(sympy.log(GAMMA) / (GAMMA - 1))
    odds, excess = sympy.symbols("odds excess", positive=True)
    rest = (value - FlatteningPrior.expression() - constant).subs(THETA, odds / (1 + odds))
    rest = rest.subs(GAMMA, 1 + excess if above else 1 / (1 + excess))
    rest = rest.replace(sympy.log, lambda x: sympy.log(sympy.factor(sympy.expand_log(x))))
    assert sympy.simplify(sympy.expand_log(rest)) == 0  # every entropy term has cancelled


@pytest.mark.parametrize(("prior", "cost"), [(BernoulliPrior, 0), (SpikeAndSlab, COST)], ids=["bernoulli", "slab"])
def test_entropy_keeps_the_vertices_out_of_reach(prior, cost):
    slope = sympy.diff(prior.expression(), THETA)
    assert sympy.limit(slope, THETA, 0, "+") == -sympy.oo
    assert sympy.limit(slope, THETA, 1, "-") == sympy.oo
    assert sympy.simplify(slope.diff(THETA) - 1 / (THETA * (1 - THETA))) == 0  # positive: one rest point, stable
    rest = 1 / (1 + sympy.exp(-(sympy.log(PI) - sympy.log(1 - PI) + B - cost)))
    assert sympy.simplify(sympy.expand_log(sympy.simplify(slope.subs(THETA, rest) - B), force=True)) == 0


def test_the_slab_adds_its_own_kl_times_theta():
    """KL of (1 - theta) delta_0 + theta N(m, s^2) from (1 - pi) delta_0 + pi N(0, v^2), atom and density apart."""
    w, m = sympy.symbols("w m", real=True)
    s, v = sympy.symbols("s v", positive=True)
    posterior = sympy.exp(-((w - m) ** 2) / (2 * s**2)) / sympy.sqrt(2 * sympy.pi * s**2)
    log_ratio = sympy.log(THETA) - sympy.log(PI) + sympy.log(v / s) + w**2 / (2 * v**2) - (w - m) ** 2 / (2 * s**2)
    shifted = sympy.expand(sympy.expand_log(log_ratio).subs(w, m + s * w))
    normal = [sympy.integrate((posterior * s).subs(w, m + s * w) * w**k, (w, -sympy.oo, sympy.oo)) for k in range(3)]
    assert normal == [1, 0, 1]
    density = sum(shifted.coeff(w, k) * moment for k, moment in enumerate(normal))
    atom = sympy.log(1 - THETA) - sympy.log(1 - PI)
    slab_kl = sympy.log(v) - sympy.log(s) + (s**2 + m**2) / (2 * v**2) - sympy.Rational(1, 2)
    whole = THETA * density + (1 - THETA) * atom
    assert sympy.simplify(whole - SpikeAndSlab.expression().subs(COST, slab_kl)) == 0


def test_the_hard_concrete_penalty_is_linear_but_its_vertices_lie_at_infinity():
    assert sympy.diff(HardConcrete.expression(), THETA) == PRICE
    s, t = sympy.Symbol("s", real=True), sympy.Symbol("t", positive=True)
    theta = 1 / (1 + sympy.exp(-s))
    assert sympy.limit(theta, s, sympy.oo) == 1
    assert sympy.limit(theta, s, -sympy.oo) == 0
    mobility = HardConcrete.mobility_expression()
    assert sympy.simplify(mobility.subs(THETA, theta) - theta.diff(s) ** 2) == 0
    # under a constant force f, s' = f dtheta/ds: 2 s + 2 sinh(s) grows at exactly the rate f, so 1 - theta ~ 1 / (f t)
    assert sympy.simplify(((2 * s + 2 * sympy.sinh(s)).diff(s) * theta.diff(s)).rewrite(sympy.exp)) == 1
    assert sympy.limit((2 * sympy.log(t) + t - 1 / t) * (1 - 1 / (1 + 1 / t)), t, sympy.oo) == 1


def test_the_mean_of_a_hard_concrete_gate_is_convex_in_theta():
    beta, k = sympy.symbols("temperature k", positive=True)
    v, start, location = sympy.symbols("v start log_alpha", real=True)
    beyond = 1 / (1 + sympy.exp(beta * v - location))  # P(logit of the gate > v)
    active = beyond.subs(v, start)
    factor = sympy.exp(-beta * (v - start))
    share = THETA * k / (1 - THETA + THETA * k)
    assert sympy.simplify(share.subs({THETA: active, k: factor}) - beyond) == 0
    assert sympy.simplify(share.diff(THETA, 2) - 2 * k * (1 - k) / (1 - THETA + THETA * k) ** 3) == 0
    assert (share.diff(THETA).subs(THETA, 0).simplify(), share.diff(THETA).subs(THETA, 1).simplify()) == (k, 1 / k)


# --- every prior against the laws of the flow ----------------------------------------------------------------------


@EVERY
def test_the_slope_is_the_derivative_of_the_regulariser(priors):
    @LAWS
    @given(priors, numbers(0.01, 0.99))
    def law(prior, theta):
        h = 1e-6
        difference = (prior.regulariser(theta + h) - prior.regulariser(theta - h)) / (2 * h)
        assert np.isclose(difference, prior.slope(theta), rtol=1e-6, atol=1e-7)

    law()


@EVERY
def test_the_rest_points_are_where_the_velocity_changes_sign_and_only_those(priors):
    @LAWS
    @given(priors, numbers(-3.0, 3.0))
    def law(prior, benefit):
        points = prior.rest_points(benefit)
        thetas = [point.keep_prob for point in points]
        assert thetas == sorted(thetas)
        for point in points:
            theta = point.keep_prob
            assert abs(prior.velocity(theta, benefit)) <= 1e-9 * (1 + 1 / min(max(theta, 1e-3), max(1 - theta, 1e-3)))
            gap = 1e-4 * min([1.0] + [abs(theta - end) for end in (0.0, 1.0, *thetas) if end != theta])
            below = prior.velocity(theta - gap, benefit) if theta > 0.0 else 1.0
            above = prior.velocity(theta + gap, benefit) if theta < 1.0 else -1.0
            if point.stability == "stable":
                assert below > 0.0 > above
            elif point.stability == "unstable":
                assert (theta > 0.0 and below < 0.0) or (theta < 1.0 and above > 0.0)
        edges = sorted({0.0, 1.0, *thetas})
        for low, high in itertools.pairwise(edges):
            signs = np.sign(prior.velocity(low + (high - low) * np.linspace(0.01, 0.99, 41), benefit))
            assert np.all(signs == signs[0])

    law()


@LAWS
@given(flattening, numbers(-5.0, 5.0))
def test_flattening_always_ends_at_a_vertex_with_a_hard_switch_at_the_price(prior, benefit):
    points = prior.rest_points(benefit)
    assert all(point.is_vertex for point in points)
    if benefit != prior.price:
        assert [(point.keep_prob, point.stability) for point in points] == [(float(benefit > prior.price), "stable")]
    tie = prior.rest_points(prior.price)
    assert [(point.keep_prob, point.stability) for point in tie] == [(0.0, "neutral"), (1.0, "neutral")]
    assert prior.velocity(0.3, prior.price) == 0.0


@LAWS
@given(st.one_of(bernoulli, slab), numbers(-50.0, 800.0))
@example(SpikeAndSlab(0.5, 900.0), 0.0)
def test_a_prior_with_entropy_never_ends_at_a_vertex(prior, benefit):
    (point,) = prior.rest_points(benefit)
    assert point.stability == "stable"
    assert not point.is_vertex
    shift = logit(prior.prior_prob) + benefit - getattr(prior, "slab_cost", 0.0)
    assert np.isclose(point.keep_prob, expit(shift), rtol=1e-12, atol=1e-15)


@LAWS
@given(concrete, numbers(0.1, 0.9))
def test_hard_concrete_is_hysteretic_and_stops_at_its_vertices(prior, share):
    low, high = prior.price / prior.response(1.0), prior.price / prior.response(0.0)
    assert prior.response(0.0) < 1.0 < prior.response(1.0)
    assert np.all(np.diff(prior.response(np.linspace(0.0, 1.0, 21))) > 0.0)
    stable = lambda benefit: [p.keep_prob for p in prior.rest_points(benefit) if p.stability == "stable"]  # noqa: E731
    assert stable(0.9 * low) == [0.0]
    assert stable(float(low + share * (high - low))) == [0.0, 1.0]
    assert stable(1.1 * high) == [1.0]
    assert np.array_equal(prior.velocity([0.0, 1.0], 1.1 * high), [0.0, 0.0])


@pytest.mark.parametrize("log_alpha", [-2.0, 0.5, 3.0])
def test_hard_concrete_agrees_with_samples_of_its_gate(log_alpha):
    prior = HardConcrete(0.1, 0.5, -0.2, 1.1)
    u = np.random.default_rng(0).uniform(size=100_000)
    z = np.clip(prior.low + (prior.high - prior.low) * expit((logit(u) + log_alpha) / prior.temperature), 0.0, 1.0)
    theta = prior.keep_prob(log_alpha)
    assert abs(np.mean(z > 0.0) - theta) < 4.0 * np.sqrt(theta * (1.0 - theta) / u.size)
    assert abs(z.mean() - prior.mean_gate(theta)) < 4.0 * z.std() / np.sqrt(u.size)


@LAWS
@given(concrete, numbers(0.01, 0.99))
def test_the_response_is_the_derivative_of_the_mean_gate(prior, theta):
    h = 1e-6
    difference = (prior.mean_gate(theta + h) - prior.mean_gate(theta - h)) / (2 * h)
    assert np.isclose(difference, prior.response(theta), rtol=1e-6)
    assert np.allclose(prior.mean_gate([0.0, 1.0]), [0.0, 1.0], atol=1e-9)


def test_the_numeric_minimiser_is_a_minimum_and_the_density_a_density():
    objective = sympy.lambdify((THETA, PI, GAMMA), FlatteningPrior.objective_expression())
    nodes, weights = np.polynomial.legendre.leggauss(100)

    @LAWS
    @given(flattening, numbers(0.01, 0.99), numbers(0.001, 0.999))
    def law(prior, theta, other):
        best = prior.minimiser(theta)
        assert objective(theta, best, prior.gamma) <= objective(theta, other, prior.gamma) + 1e-12
        constant = np.log(prior.price / (prior.gamma - 1.0))
        assert np.isclose(objective(theta, best, prior.gamma), prior.regulariser(theta) + constant, atol=1e-9)
        assert np.isclose(prior.density((nodes + 1.0) / 2.0) @ weights / 2.0, 1.0)

    law()


@EVERY
def test_every_method_is_vectorised_and_finite_where_it_should_be(priors):
    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(priors)
    def law(prior):
        theta = np.array([[0.0, 0.2, 0.5], [0.7, 0.9, 1.0]])
        for name in ("regulariser", "slope", "response", "mobility"):
            values = getattr(prior, name)(theta)
            assert values.shape == theta.shape
            assert name == "slope" or np.all(np.isfinite(values))
            assert np.isclose(values[1, 1], getattr(prior, name)(0.9), rtol=1e-13)
        assert prior.velocity(theta, 0.1).shape == theta.shape
        assert prior.velocity(0.5, [0.1, 0.2]).shape == (2,)

    law()


def test_the_faces_take_the_limits():
    assert np.allclose(BernoulliPrior(0.2).regulariser([0.0, 1.0]), -np.log([0.8, 0.2]))
    assert BernoulliPrior(0.2).slope([0.0, 1.0]).tolist() == [-np.inf, np.inf]
    assert BernoulliPrior(0.2).velocity([0.0, 1.0], 3.0).tolist() == [np.inf, -np.inf]


PRIOR = FlatteningPrior(20.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlatteningPrior(0.0), "`gamma` must be positive and finite; got gamma=0.0"),
        (lambda: FlatteningPrior(1), r"`gamma` must differ from 1; got gamma=1.0. There the prior is uniform"),
        (lambda: FlatteningPrior("2"), "`gamma` must be a real number"),
        (lambda: BernoulliPrior(0.0), r"`prior_prob` must lie in \(0, 1\); got prior_prob=0.0. At 0 or 1"),
        (lambda: BernoulliPrior(float("nan")), r"`prior_prob` must lie in \(0, 1\)"),
        (lambda: SpikeAndSlab(1.0, 1.0), r"`prior_prob` must lie in \(0, 1\)"),
        (lambda: SpikeAndSlab(0.5, -1.0), "`slab_cost` must be non-negative"),
        (lambda: HardConcrete(0.0), "`price` must be positive and finite; got price=0.0. Without a price"),
        (lambda: HardConcrete(0.1, 0.0), r"`temperature` must lie in \[0.01, 1\]"),
        (lambda: HardConcrete(0.1, low=0.0), r"`low` must lie in \[-10, -0.001\]"),
        (lambda: HardConcrete(0.1, high=1.0), r"`high` must lie in \[1.001, 11\]"),
        (lambda: HardConcrete(0.1).keep_prob(np.inf), "`log_alpha` must be finite"),
        (lambda: HardConcrete(0.1).mean_gate(1.2), r"`theta` must lie in \[0, 1\]"),
        (lambda: PRIOR.regulariser([0.5, 1.5]), r"`theta` must lie in \[0, 1\]; got theta\[1\]=1.5"),
        (lambda: PRIOR.slope("a"), "`theta` must be a real number"),
        (lambda: PRIOR.minimiser(-0.1), r"`theta` must lie in \[0, 1\]"),
        (lambda: PRIOR.density(2.0), r"`prior_prob` must lie in \[0, 1\]"),
        (lambda: PRIOR.rest_points(np.inf), "`benefit` must be finite"),
        (lambda: PRIOR.velocity(0.5, None), "`benefit` must be a real number"),
        (lambda: PRIOR.velocity([0.1, 0.2], [1.0, 2.0, 3.0]), "`theta`, `benefit` must broadcast together"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(module) == (0, 5)


def test_importing_the_symbolic_modules_loads_neither_torch_nor_sympy():
    code = (
        "import sys, catode.theory.priors.priors, catode.theory.networks; "
        "print([m for m in ('torch', 'sympy', 'matplotlib', 'catode.train') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def test_a_prior_without_an_expression_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Prior()
