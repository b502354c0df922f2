"""Fields on a box: expressions against functions, projection, the Jacobian at the faces, bad inputs."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_systems import numbers

from catode.theory.systems.box import BoxSystem

LAWS = settings(max_examples=50, deadline=None, derandomize=True)
TEXT = "x*y - z**2 + 1/3, sin(x) - y, exp(-z)*x - 1/2"
KNOWN = BoxSystem.from_expressions("x, y, z", TEXT, lower=(-1, 0, -2), upper=(1, 2, np.inf))
STATES = arrays(np.float64, (4, 3), elements=numbers(-3.0, 3.0))


def by_hand(state):
    x, y, z = np.moveaxis(state, -1, 0)
    return np.stack([x * y - z**2 + 1 / 3, np.sin(x) - y, np.exp(-z) * x - 0.5], axis=-1)


HAND = BoxSystem(velocity=by_hand, lower=KNOWN.lower, upper=KNOWN.upper)


@LAWS
@given(STATES)
def test_expressions_and_functions_agree(states):
    assert np.allclose(KNOWN.field(states), by_hand(states), rtol=1e-12, atol=1e-12)
    assert np.allclose(KNOWN.jacobian(states), HAND.jacobian(states), rtol=1e-6, atol=1e-7)


@LAWS
@given(STATES)
def test_every_method_is_vectorised(states):
    for method, shape in (("field", (3,)), ("projected_field", (3,)), ("project", (3,)), ("jacobian", (3, 3))):
        whole = getattr(KNOWN, method)(states)
        assert whole.shape == (4, *shape)
        assert np.array_equal(whole[2], getattr(KNOWN, method)(states[2]))
        assert np.array_equal(whole.reshape(2, 2, *shape), getattr(KNOWN, method)(states.reshape(2, 2, 3)))


@LAWS
@given(STATES)
def test_projection_is_the_nearest_state_and_idempotent(states):
    inside = KNOWN.project(states)
    assert np.all((inside >= KNOWN.lower) & (inside <= KNOWN.upper))
    assert np.array_equal(KNOWN.project(inside), inside)
    moved = inside != states
    assert np.all((inside == KNOWN.lower)[moved] | (inside == KNOWN.upper)[moved])


@LAWS
@given(arrays(np.float64, (3,), elements=st.sampled_from([-9.0, -1.0, 0.0, 0.3, 1.0, 2.0, 9.0])))
def test_the_projected_field_only_loses_outward_speed(state):
    speed, state = KNOWN.projected_field(state), KNOWN.project(state)
    raw = KNOWN.field(state)
    lost = speed != raw
    outward = ((state == KNOWN.lower) & (raw < 0.0)) | ((state == KNOWN.upper) & (raw > 0.0))
    assert np.array_equal(lost, outward) and np.all(speed[lost] == 0.0)
    step = KNOWN.project(state + 1e-6 * speed) - state  # so a small step stays in the box
    assert np.allclose(step, 1e-6 * speed, atol=1e-12)


def test_the_derivative_is_taken_inside_the_box():
    def velocity(state):  # not a number outside the box
        with np.errstate(invalid="ignore"):
            return np.stack([state[..., 0] ** 2.5 + state[..., 1], np.arccos(state[..., 1] / 2.0) ** 2], axis=-1)

    system = BoxSystem(velocity=velocity, lower=(0.0, -1.0), upper=(4.0, 1.0))
    for x in (0.0, 1e-7, 1e-3, 2.0, 4.0):
        for y in (-1.0, 0.3, 1.0 - 1e-9, 1.0):
            exact = [[2.5 * x**1.5, 1.0], [0.0, -2.0 * np.arccos(y / 2.0) / np.sqrt(4.0 - y * y)]]
            assert system.jacobian([x, y]) == pytest.approx(np.array(exact), abs=2e-8, rel=1e-7)
    cubic = BoxSystem(velocity=lambda s: s**3, lower=(0.0,), upper=(1.0,))
    assert cubic.jacobian(np.array([[0.0], [0.5], [1.0]]))[:, 0, 0] == pytest.approx([0.0, 0.75, 3.0], abs=1e-9)
    assert cubic.jacobian([2.0])[0, 0] == pytest.approx(12.0, rel=1e-8)  # a state outside: central differences


def test_a_narrow_box_has_a_derivative_too():
    narrow = BoxSystem(velocity=lambda s: 3.0 * s, lower=(0.0,), upper=(1e-7,))
    assert narrow.jacobian([0.0])[0, 0] == pytest.approx(3.0, rel=1e-6)


def test_symbols_texts_and_matrices_are_read_alike():
    x, y = sympy.symbols("x y")
    given_as = [
        ("x, y", "y, -x"),
        ([x, y], (y, -x)),
        ([x, y], sympy.Matrix([y, -x])),
        ("x y", ["y", "-x"]),
    ]
    for coordinates, expressions in given_as:
        system = BoxSystem.from_expressions(coordinates, expressions, lower=(-1, -1), upper=(1, 1))
        assert system.names == ("x", "y") and system.expressions == (y, -x) and system.dimension == 2
        assert system.field([0.25, 0.5]).tolist() == [0.5, -0.25]
    single = BoxSystem.from_expressions("beta", "1 - beta", lower=(0,), upper=(2,))  # beta is a function of sympy
    assert single.field([0.5]).tolist() == [0.5]
    constant = BoxSystem.from_expressions("x, y", "1, 0", lower=(0, 0), upper=(1, 1))
    assert constant.field(np.zeros((5, 2))).tolist() == [[1.0, 0.0]] * 5
    assert constant.jacobian(np.zeros((5, 2))).shape == (5, 2, 2)


def test_the_box_cannot_be_changed_from_outside():
    lower = np.zeros(2)
    system = BoxSystem(velocity=np.negative, lower=lower, upper=np.ones(2))
    lower[0] = 5.0
    assert system.lower.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="read-only"):
        system.lower[0] = 5.0


def read(expressions, coordinates="x, y"):
    return lambda: BoxSystem.from_expressions(coordinates, expressions, lower=(0, 0), upper=(1, 1))


def made(**changes):
    return lambda: BoxSystem(**{"velocity": np.negative, "lower": (0.0, 0.0), "upper": (1.0, 1.0), **changes})


def check(state):
    return lambda: KNOWN.check_inside("start", state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (read("x +, y"), "`expressions` must be sympy expressions or text that sympy reads"),
        (read(""), "`expressions` must be sympy expressions or text"),
        (read("x"), "`expressions` must be one for each of 2 coordinates"),
        (read("x, y, 1"), "`expressions` must be one for each of 2 coordinates"),
        (read("x, y + k"), r"`expressions` must hold no other symbols than x, y; got expressions=\['k'\]"),
        (read([None, 1]), "`expressions` must be sympy expressions of known functions"),
        (read("x, f(y)"), r"`expressions` must be sympy expressions of known functions; got expressions=f\(y\)"),
        (read("x, y > 0"), "`expressions` must be sympy expressions of known functions"),
        (read("x, log(y - 2)"), "`velocity` must be finite in the box"),
        (read("x, x", "x, x"), "`coordinates` must be different"),
        (made(upper=(1.0, 0.0)), r"`upper` must exceed lower\[1\]=0; got upper\[1\]=0.0"),
        (made(upper=(1.0,)), r"`upper` must have shape \(2,\), that of `lower`"),
        (made(lower=0.0), r"`lower` must have shape \(d,\) with d >= 1"),
        (made(lower=(np.nan, 0.0)), "`lower` must not be NaN"),
        (made(lower=("a", 0.0)), "`lower` must be an array of real numbers"),
        (made(lower=(np.inf, 0.0), upper=(np.inf, 1.0)), r"`upper` must exceed lower\[0\]=inf"),
        (made(names=("x", "x")), "`names` must name 2 different coordinates"),
        (made(names=("x",)), "`names` must name 2 different coordinates"),
        (made(velocity=3.0), "`velocity` must take states of shape"),
        (made(velocity=lambda s: s[..., 0]), r"`velocity` must return shape \(4, 2\)"),
        (made(velocity=lambda s: s / 0.0 if s is None else s * np.nan), "`velocity` must be finite in the box"),
        (made(derivative=lambda s: s), r"`derivative` must return shape \(4, 2, 2\)"),
        (check([0.0, 0.0]), r"`start` must have shape \(..., 3\)"),
        (check([0.0, -1.0, 0.0]), r"`start` must lie in the box, y in \[0, 2\]; got start\[1\]=-1.0"),
        (check([0.0, np.nan, 0.0]), "`start` must be finite"),
    ],
)
def test_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
