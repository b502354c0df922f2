"""Equilibria in corners whose coordinates rest and depend on each other, and boxes with more faces than are searched.

Stability is held against the projected flow itself: every near start must come back, by fine steps of Euler's method
projected at each step, which shares nothing with the classification.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from catode.theory import BoxSystem
from catode.theory.basins.equilibria import find


def comes_back(system, state, time=60.0, step=2e-3, distance=1e-3):
    """The share of near starts that end ten times nearer than they began, at least."""
    rng = np.random.default_rng(0)
    y = system.project(state + distance * rng.uniform(-1.0, 1.0, (200, system.dimension)))
    began = np.abs(y - state).max(axis=1)
    for _ in range(int(time / step)):
        y = system.project(y + step * system.field(y))
    return float((np.abs(y - state).max(axis=1) <= 0.1 * began).mean())


def at(system, state):
    (found,) = [e for e in find(system) if np.allclose(e.state, state, atol=1e-9)]
    return found


STABLE = {
    "one that follows the other": ("-(x - y), y*(1 - y)*(y - 1/2)", (0, 0), (-1, -0.5)),
    "the same, fast": ("-50*(x - y), y*(1 - y)*(y - 1/2)", (0, 0), (-50, -0.5)),
    "its mirror at the upper corner": ("-(x - y), y*(1 - y)*(y - 1/2)", (1, 1), (-1, -0.5)),
    "a push down from the other": ("-x - 3*y, -2*y", (0, 0), (-2, -1)),
    "two that feed each other": ("y - 2*x, x - 2*y", (0, 0), (-3, -1)),
    "two that turn about each other": ("5*y - x, -5*x - y", (0, 0), (-1, -1)),
    "free feeds frozen": ("-(x - 1/2), 3*(x - 1/2) - y", (0.5, 0), (-1, -1)),
    "a cascade of three": ("x*x - x + 7*y, 4*z - y, -z/2", (0, 0, 0), (-1, -1, -0.5)),
}


@pytest.mark.parametrize("name", STABLE)
def test_a_corner_that_attracts_is_stable(name):
    text, state, real = STABLE[name]
    d = len(state)
    system = BoxSystem.from_expressions("x, y, z"[: 3 * d - 2], text, lower=(0,) * d, upper=(1,) * d)
    point = at(system, state)
    assert point.stable, point.stability
    assert sorted(point.eigenvalues.real) == pytest.approx(sorted(real), abs=1e-9)
    assert comes_back(system, np.array(state, dtype=float)) == 1.0


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("2*y - x, 2*x - y", (0, 0)),  # they feed each other more than they lose
        ("y - x, y*(1 - y)*(y + 1/2)", (0, 0)),
        ("x*(1 - x) - y, -y", (0, 0)),
    ],
)
def test_a_corner_that_does_not_attract_is_not(text, state):
    system = BoxSystem.from_expressions("x, y", text, lower=(0, 0), upper=(1, 1))
    assert not at(system, state).stable
    assert comes_back(system, np.array(state, dtype=float)) < 1.0


def seven(d=7):
    """x' = x (1 - x) (x - 1/2), d times: 3^d equilibria, of which the 2^d corners attract."""
    return BoxSystem(velocity=lambda x: x * (1.0 - x) * (x - 0.5), lower=np.zeros(d), upper=np.ones(d))


def test_seven_dimensions_are_searched_and_what_is_left_out_is_said():
    with pytest.warns(UserWarning, match=r"1458 of 2187 faces were left out: .* Give max_faces=2187"):
        found = find(seven(), starts=2)
    assert found.faces == 2187 and found.left_out == 1458 and found.searched_to[0] == 2
    assert sum(e.stable for e in found) == 2**7 == sum(not np.isin(e.state, 0.5).any() for e in found)
    assert any(np.allclose(e.state, 0.5) for e in found)  # the interior is searched in any case


def test_all_faces_are_searched_where_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find(seven(3), max_faces=27)
        assert len(found) == 27 and found.left_out == 0 and found.note == "All 27 faces were searched."
    with pytest.warns(UserWarning, match="26 of 27 faces were left out"):
        assert [e.state.tolist() for e in find(seven(3), max_faces=1, starts=1)] == [[0.5] * 3]


def test_twenty_dimensions_do_not_list_their_faces_first():
    with pytest.warns(UserWarning, match="faces were left out"):
        found = find(seven(20), starts=1, max_faces=40)
    assert found.faces == 3**20 and sum(e.stable for e in found) == 39
