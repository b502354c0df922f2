"""Fields from expressions with corners, jumps and special functions: numerics, derivatives, compiled form, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sympy
from scipy import special

from catode.theory import BoxSystem, integrate, integrate_batch
from catode.theory.basins.equilibria import find

LOW, HIGH = (-2.0, -2.0), (2.0, 2.0)


def made(text, coordinates="x, y"):
    return BoxSystem.from_expressions(coordinates, text, lower=LOW, upper=HIGH)


# First component at (x, y) = (-0.6, 0.25) and (0.7, 0.25), and its derivative by x there, all by hand.
KNOWN = {
    "Abs(x) - y": ([0.35, 0.45], [-1, 1]),
    "Abs(x**2 - 0.4) - y": ([0.04 - 0.25, 0.09 - 0.25], [1.2, 1.4]),
    "sign(x) - y": ([-1.25, 0.75], [0, 0]),
    "floor(x) - x": ([-1 + 0.6, -0.7], [-1, -1]),
    "ceiling(2*x) - y": ([-1.25, 1.75], [0, 0]),
    "Mod(x, 1/2)": ([0.4, 0.2], [1, 1]),
    "frac(x)*x": ([-0.24, 0.49], [0.4 - 0.6, 1.4]),
    "Heaviside(x)*x": ([0, 0.7], [0, 1]),
    "Max(x, y)": ([0.25, 0.7], [0, 1]),
    "erf(x)": ([-math.erf(0.6), math.erf(0.7)], [2 / math.sqrt(math.pi) * math.exp(-v * v) for v in (0.6, 0.7)]),
    "gamma(x + 3)": ([math.gamma(2.4), math.gamma(3.7)], [math.gamma(v) * special.digamma(v) for v in (2.4, 3.7)]),
    "besselj(0, x)": (special.j0([-0.6, 0.7]).tolist(), (-special.j1([-0.6, 0.7])).tolist()),
    "Piecewise((x, x < 0.5), (1 - x, True))": ([-0.6, 0.3], [1, -1]),
    "Piecewise((-x**2, x < 0), (exp(x), x <= 1), (9, True))": ([-0.36, math.exp(0.7)], [1.2, math.exp(0.7)]),
    "zeta(x + 3)": (special.zeta([2.4, 3.7]).tolist(), None),  # its derivative has no numerics: differences
}


@pytest.mark.parametrize("text", KNOWN)
def test_values_and_slopes_are_those_by_hand(text):
    system = made(f"({text}, -y)")
    states = np.array([[-0.6, 0.25], [0.7, 0.25]])
    values, slopes = KNOWN[text]
    assert system.field(states)[:, 0] == pytest.approx(values, rel=1e-12, abs=1e-12)
    if slopes is None:
        slopes = [(special.zeta(v + 1e-5) - special.zeta(v - 1e-5)) / 2e-5 for v in (2.4, 3.7)]
        assert system.derivative is None
    assert system.jacobian(states)[:, 0, 0] == pytest.approx(slopes, rel=1e-6, abs=1e-9)


COMPILED = ["Abs(x) - y", "sign(x) - y", "floor(2*x) - x", "erf(x) - y", "gamma(x + 3) - y", "Mod(x, 1/2) - y"]


@pytest.mark.parametrize("text", [*COMPILED, "Piecewise((x, x < 0.5), (1 - x, True))", "Heaviside(x - 1/2) - y"])
def test_the_compiled_and_the_numpy_form_agree(text):
    system = made(f"({text}, x - y)")
    plain = BoxSystem(velocity=system.velocity, lower=LOW, upper=HIGH)
    starts = [[0.6, 0.1], [0.9, -0.5], [-0.7, 0.3]]
    fast, slow = (integrate_batch(s, starts, 0.1) for s in (system, plain))
    assert fast.compiled and not slow.compiled
    assert np.allclose(fast.ends, slow.ends, rtol=1e-9, atol=1e-9)


def test_sign_is_zero_at_zero_in_every_form():
    system = made("sign(x), 0*y")
    assert system.field([0.0, 0.0]).tolist() == [0.0, 0.0]
    assert integrate_batch(system, [[0.0, 0.0]], 1.0).ends.tolist() == [[0.0, 0.0]]
    assert integrate(system, [0.0, 0.0], 1.0).states[-1].tolist() == [0.0, 0.0]


def test_a_path_along_an_absolute_value_has_the_closed_form():
    """x' = |x| - y with y' = -y from (1, 1): x = e^t - (e^t - e^-t)/2 while x > 0."""
    system = BoxSystem.from_expressions("x, y", "Abs(x) - y, -y", lower=(-9, -9), upper=(9, 9))
    right = math.e - (math.e - 1 / math.e) / 2
    assert integrate(system, [1.0, 1.0], 1.0).states[-1, 0] == pytest.approx(right, rel=1e-7)
    assert integrate_batch(system, [[1.0, 1.0]], 1.0).ends[0, 0] == pytest.approx(right, rel=1e-5)


def test_symbols_of_any_assumption_are_real():
    for symbol in (sympy.Symbol("x"), sympy.Symbol("x", complex=True), sympy.Symbol("x", positive=True)):
        system = BoxSystem.from_expressions([symbol], [sympy.Abs(symbol - 1)], lower=(-2,), upper=(2,))
        assert system.jacobian([[0.0], [1.5]]).ravel().tolist() == [-1.0, 1.0]
    assert made("re(x), conjugate(y)").field([0.5, 0.25]).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "states"),
    [
        ("erf(x) - y, x - 2*y", [[0.0, 0.0]]),  # erf(x) = x/2 also at +-0.99..: three zeros
        ("1 - gamma(x + 1) - x, -y", None),
        ("Abs(x) - 1, -y", [[1.0, 0.0], [-1.0, 0.0]]),
    ],
)
def test_equilibria_of_such_fields_are_found(text, states):
    system = made(text)
    found = find(system)
    inner = [e for e in found if e.interior]
    assert inner and all(np.abs(system.field(e.state)).max() <= 1e-9 for e in inner)
    for state in states or []:
        assert any(np.allclose(e.state, state, atol=1e-8) for e in inner)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polylog(2, x), y", "be of functions that numpy or scipy evaluates; .*polylog"),
        ("hyper([1], [2], x), y", "be of functions that numpy or scipy evaluates; .*hyper"),
        ("DiracDelta(x), y", "be of functions that numpy or scipy evaluates; .*DiracDelta"),
        ("sqrt(-1)*x, y", "be real and finite for real coordinates"),
        ("oo*x, y", "be real and finite for real coordinates"),
        ("x/0, y", "be real and finite for real coordinates"),
        ("(x > 0.5)*y, y", "be sympy expressions or text that sympy reads"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(text, message):
    with pytest.raises(ValueError, match=f"^`expressions` must {message}") as caught:
        made(text)
    assert "\n" not in str(caught.value)


SCIPY_STYLE = [
    (lambda y: [1 - y[0], 2 * y[0] - y[1], 0.5 - y[2]], 3),
    (lambda y: [y[1], -y[0]], 2),
    (lambda y: [1 - y[0]], 1),
    (lambda y: np.array([y[1], y[2], y[3], -y[0]]), 4),
    (lambda y: y - y.mean(axis=0), 3),  # mixes the states of a batch
    (lambda y: np.stack([y[:, 1], -y[:, 0]], axis=-1), 2),  # one batch axis only
]


@pytest.mark.parametrize(("velocity", "d"), SCIPY_STYLE)
def test_a_field_of_one_state_in_the_style_of_scipy_is_refused(velocity, d):
    with pytest.raises(ValueError, match=r"^`velocity` must .* Index the last axis"):
        BoxSystem(velocity=velocity, lower=np.zeros(d), upper=np.ones(d))


def test_its_transpose_is_taken():
    system = BoxSystem(
        velocity=lambda y: np.moveaxis(np.array(SCIPY_STYLE[0][0](np.moveaxis(y, -1, 0))), 0, -1),
        lower=np.zeros(3),
        upper=np.ones(3),
    )
    assert system.field(np.zeros((5, 3))).tolist() == [[1.0, 0.0, 0.5]] * 5


def test_a_derivative_in_the_style_of_scipy_is_refused():
    with pytest.raises(ValueError, match="`derivative` must"):
        BoxSystem(
            velocity=lambda y: 1.0 - y,
            derivative=lambda y: [[-1, 0, 0], [0, -1, 0], [0, 0, -1]],
            lower=np.zeros(3),
            upper=np.ones(3),
        )
