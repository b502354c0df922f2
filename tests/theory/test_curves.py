"""Nullclines and manifolds against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from test_equilibria import BENEFIT, EVERY, LAYER, SLOW, UNIT, box, the_saddle
from test_systems import numbers

from catode.theory import trace_separatrix
from catode.theory.basins.curves import ENDS, _Tracer, manifolds, nullclines
from catode.theory.basins.equilibria import Equilibrium, find
from catode.theory.systems.box import BoxSystem


@pytest.mark.parametrize("system", [LAYER, UNIT, BENEFIT], ids=["layer", "unit", "benefit"])
def test_manifolds_are_the_separatrix_and_end_on_faces(system):
    saddle = the_saddle(system)
    result = manifolds(system, saddle, tolerance=1e-8, points=60)
    for branch in result.stable:
        assert np.abs(branch.points[:, 1] - system.separatrix(branch.points[:, 0])).max() <= 1e-8
        assert branch.end == "face" and np.array_equal(branch.points[0], saddle.state)
        size, theta = branch.points[-1]
        assert min(size, theta, 1.0 - theta) == 0.0
    assert {branch.end for branch in result.unstable} == {"equilibrium", "window"}
    size, theta = trace_separatrix(system, low=0.3, high=1.7).T
    both = np.concatenate([branch.points for branch in result.stable])
    both = both[np.argsort(both[:, 0])]
    inside = (size > both[0, 0]) & (size < both[-1, 0])
    assert inside.sum() > 5 and np.abs(np.interp(size, *both.T) - theta)[inside].max() < 1e-2


def test_the_curved_unstable_manifold_keeps_the_first_integral_until_it_slides():
    kappa, lam, rho, g = 0.5, 0.1, 1.0, 0.1

    def integral(state):
        u, theta = np.moveaxis(state, -1, 0)
        return kappa * theta**2 - 2 * lam * theta - rho * (kappa * u / 2 - g * np.log(u))

    result = manifolds(UNIT, the_saddle(UNIT), window=((0.0, 0.0), (4.0, 1.0)), points=100)
    for branch in result.unstable:
        free = (branch.points[:, 1] > 0.0) & (branch.points[:, 1] < 1.0)
        assert free.sum() > 20 and not free.all()
        assert np.abs(integral(branch.points[free]) - integral(np.array(UNIT.saddle))).max() < 1e-8
        face = branch.points[~free]
        assert np.all(face[:, 1] == face[-1, 1])
    removed, kept = sorted(result.unstable, key=lambda b: b.points[-1, 0])
    assert removed.end == "equilibrium" and np.abs(removed.points[-1]).max() < 1e-7
    assert kept.end == "window" and np.array_equal(kept.points[-1], [4.0, 1.0])


def test_a_branch_slides_along_a_face_and_leaves_it_where_it_must():
    # x grows; y falls until x = 1/2, rests on y = 0, and is released there along y = (x - 1/2)^2 / 2.
    system = box("x, y", "x/10 + 1/10, (x - 1/2)*(x + 1)/10", (-1, 0), (1, 1))
    still = Equilibrium(
        state=np.array([-0.5, 0.0]),
        face=(0, -1),
        speed=np.zeros(2),
        resting=(),
        eigenvalues=np.ones(1),
        stability="saddle",
        isolated=True,
        origin="searched",
    )
    branch = _Tracer(system, system.lower, system.upper, 1e-8, 10.0, 80).follow(still, still.state, 1.0)
    x, y = branch.points.T
    before = x < 1.0  # there it slides up
    assert before.sum() > 20 and np.all(y[x < 0.5] == 0.0)
    assert np.abs(y - np.maximum(x - 0.5, 0.0) ** 2 / 2)[before].max() < 1e-8
    assert branch.points[-1] == pytest.approx([1.0, 1.0])


def test_a_saddle_on_a_face_has_one_stable_branch():
    # On y = 1 the field is x' = x; inside, x = 0 rises to it.
    system = box("x, y", "x, 1 + y*0 + x**2", (-1, 0), (1, 1))
    (saddle,) = [e for e in find(system) if e.stability == "saddle"]
    assert saddle.state == pytest.approx([0.0, 1.0]) and saddle.pushed == (1,)
    result = manifolds(system, saddle, points=20)
    (stable,) = result.stable
    assert stable.end == "face" and stable.points[-1] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert np.abs(stable.points[:, 0]).max() == 0.0
    assert [b.points[-1].tolist() for b in result.unstable] == [[-1.0, 1.0], [1.0, 1.0]]


def test_an_unstable_branch_ends_at_a_focus():
    system = box("x, y", "y, x - x**3 - y", (-2, -2), (2, 2))
    for branch in manifolds(system, find_at(system, (0.0, 0.0))).unstable:
        assert branch.end == "equilibrium"
        assert np.abs(np.abs(branch.points[-1]) - [1.0, 0.0]).max() < 1e-8


def find_at(system, state):
    return next(e for e in find(system) if np.abs(e.state - state).max() < 1e-9)


@EVERY
def test_nullclines_are_the_closed_forms_and_end_on_the_window(systems):
    @SLOW
    @given(systems, numbers(1.5, 4.0))
    def law(system, factor):
        size, theta = system.saddle
        assume(0.05 < theta < 0.95)
        high = np.array([factor * size, 1.0])
        lines = nullclines(system, window=((0.0, 0.0), high), resolution=40)
        assert list(lines) == ["size", "theta"]
        for i, pieces in enumerate(lines.values()):
            assert pieces
            for line in pieces:
                scale = np.abs(system.jacobian(line)).max() * high.max()
                assert np.abs(system.field(line)[:, i]).max() <= 1e-12 * scale
                assert np.all((line >= 0.0) & (line <= high))
        (vertical,) = lines["theta"]
        assert np.allclose(vertical[:, 0], size, rtol=1e-12)
        assert sorted(vertical[[0, -1], 1]) == [0.0, 1.0]

    law()


def test_a_curved_nullcline_is_followed_and_cut_at_the_box():
    system = box("x, y", "x**2 + y**2 - 1, x - 3", (0, 0), (2, 0.8))
    lines = nullclines(system, resolution=50)
    assert lines["y"] == ()
    (arc,) = lines["x"]
    assert np.abs(np.linalg.norm(arc, axis=1) - 1.0).max() < 1e-14
    ends = arc[np.argsort(arc[[0, -1], 1]) * (len(arc) - 1)]
    assert ends == pytest.approx(np.array([[1.0, 0.0], [0.6, 0.8]]), abs=1e-13)


def test_nullclines_along_a_face_are_found():
    sides = np.concatenate(nullclines(UNIT, resolution=50)["size"])
    assert np.any(sides[:, 0] == 0.0) and np.any(np.abs(sides[:, 1] - 0.2) < 1e-14)


BOX = box("x, y", "y, x", (-1, -1), (1, 1))
SADDLE = the_saddle(LAYER)
NODE = find(LAYER)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nullclines(box("x", "-x", (0,), (1,))), "`system` must have two coordinates"),
        (
            lambda: nullclines(BoxSystem.from_expressions("x, y", "y, x", lower=(0, 0), upper=(np.inf, 1))),
            "`window` must be given for a box without end",
        ),
        (lambda: nullclines(LAYER, window=3.0), "`window` must be a pair of corners"),
        (lambda: nullclines(LAYER, window=((0.0, 0.0), (1.0, 2.0))), "`window` must lie in the box, theta in"),
        (lambda: nullclines(LAYER, window=((1.0, 0.0), (1.0, 1.0))), "`window` must have its lower corner below"),
        (lambda: nullclines(LAYER, resolution=1), "`resolution` must be an integer of at least 2"),
        (lambda: manifolds(LAYER, NODE), "`saddle` must be a saddle with no frozen coordinate at rest; got saddle='st"),
        (lambda: manifolds(BOX, SADDLE, window=((-1, -1), (0, 0))), "`saddle` must lie in the window"),
        (lambda: manifolds(LAYER, SADDLE, tolerance=0.1), r"`tolerance` must lie in \[1e-10, 0.01\]"),
        (lambda: manifolds(LAYER, SADDLE, points=1), "`points` must be an integer of at least 2"),
    ],
)
def test_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ends_are_named():
    assert ENDS == ("face", "window", "equilibrium", "horizon", "failed")
    cycle = box("x, y", "x*(1 - x) , 1/2 + 0*y", (-1, 0), (2, np.inf))
    saddle = [e for e in find(cycle) if e.stability == "saddle"]
    assert saddle == []  # y grows for ever
