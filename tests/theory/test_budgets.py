"""Whatever integrates ends: a budget that is used up is a status, never an exception and never a search without end."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from test_networks import case

from catode.theory import UnitSystem, trace_separatrix
from catode.theory.networks import box_starts
from catode.theory.networks.runs import follow

UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)


class Saddle:
    """A saddle at (1, 1/2), x' = 1 - x and y' = y - 1/2, whose field is another one left of x = `edge`."""

    saddle = (1.0, 0.5)

    def __init__(self, beyond, edge=0.6):
        self.beyond, self.edge = beyond, edge

    def field(self, state):
        x, y = np.asarray(state, dtype=float)
        return np.array([1.0 - x, y - 0.5] if x >= self.edge else self.beyond(x, y))

    def jacobian(self, state):
        return np.array([[-1.0, 0.0], [0.0, 1.0]])


JUMPS = {
    "turns back": (lambda x, y: (-1.0, 0.0), "failed", "out of reach"),
    "turns back at a level": (lambda x, y: (-2.0 if y < 0.75 else 1.0, -1.0), "failed", "out of reach"),
    "is not a number": (lambda x, y: (np.nan, np.nan), "failed", "step size"),
    "stands still": (lambda x, y: (0.0, 0.0), "horizon", "The end of the span was reached"),
    "turns on a circle": (lambda x, y: (y - 0.5 + 1e-3, 0.4 - x), "failed", "out of reach"),
}


@pytest.mark.parametrize("name", JUMPS)
def test_a_separatrix_that_cannot_be_followed_has_a_status(name):
    beyond, status, message = JUMPS[name]
    points = trace_separatrix(Saddle(beyond), low=0.1, high=3.0)
    assert points.status == status and message in points.message and "left branch" in points.message
    assert np.isfinite(points).all() and points[-1, 0] == pytest.approx(3.0)
    right = points[points[:, 0] >= 0.61]
    assert np.allclose(right[:, 1], 0.5, atol=1e-9)


def test_a_whole_separatrix_is_complete_and_a_small_budget_cuts_it():
    points = trace_separatrix(UNIT, low=0.05, high=2.5)
    assert points.status == "complete" and points[[0, -1], 0] == pytest.approx(UNIT.saddle[0] * np.array([0.05, 2.5]))
    short = trace_separatrix(UNIT, low=0.05, high=2.5, max_evaluations=40)
    assert short.status == "failed" and "the budget of 40 evaluations of the field was used up" in short.message
    assert 2 < len(short) < len(points) and np.allclose(short[:, 1], UNIT.separatrix(short[:, 0]), atol=1e-8)
    assert (2.0 * short).status == "failed"  # what is computed from it says so too
    assert pickle.loads(pickle.dumps(short)).message == short.message
    with pytest.raises(ValueError, match="`max_evaluations` must be an integer"):
        trace_separatrix(UNIT, max_evaluations=0)


def test_a_field_that_is_not_finite_at_its_saddle_ends_at_once():
    points = trace_separatrix(Saddle(lambda x, y: (np.nan, np.nan), edge=1.5))
    assert points.status == "failed" and "not finite at the start" in points.message and len(points) < 4


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize("name", ["tanh", "unit"])
def test_a_network_without_steps_left_is_undecided(name, settle):
    structure = case(name)
    starts = box_starts(structure, 3, 0)
    whole = follow(structure, starts, 50.0, settle=settle)
    short = follow(structure, starts, 50.0, settle=settle, max_steps=5)
    cut = short.times < whole.times
    assert cut.any() and np.all(short.labels[cut] == -1) and np.isfinite(short.ends).all()
    with pytest.raises(ValueError, match="`max_steps` must be an integer"):
        follow(structure, starts, max_steps=0)
