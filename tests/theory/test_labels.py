"""Basins of systems from the literature: small basins, zoomed grids, ties; the right values are known by symmetry."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from catode.theory import BoxSystem
from catode.theory.basins import UNDECIDED, basins_fractions, basins_of_attraction
from catode.theory.basins.equilibria import find


def harvested(loss, names="x, y"):
    """Two competitors, each harvested at a constant rate: extinction of both attracts a small corner."""
    text = f"x*(1 - x - 2*y) - {loss}, y*(1 - y - 2*x) - {loss}"
    return BoxSystem.from_expressions(names, text, lower=(0, 0), upper=(2, 2))


@pytest.mark.parametrize("loss", ["1/20", "1/50", "1/1000"])
def test_a_basin_smaller_than_the_grid_has_its_attractor(loss):
    line = np.linspace(0.0, 2.0, 41)
    basins = basins_of_attraction(harvested(loss), (line, line), 200.0)
    survivor = 0.5 + np.sqrt(0.25 - eval(loss))
    right = [[0.0, 0.0], [0.0, survivor], [survivor, 0.0]]
    assert np.allclose(sorted(basins.attractors.tolist()), right, atol=1e-5)
    both = int(np.flatnonzero(np.all(np.abs(basins.attractors) < 1e-9, axis=1))[0])
    assert basins.labels[0, 0] == both
    # On the diagonal x' = x (1 - 3 x) - loss: below its lower root both die out, above it they tie.
    root = (1.0 - np.sqrt(1.0 - 12.0 * eval(loss))) / 6.0
    diagonal = np.diag(basins.labels)
    assert np.array_equal(diagonal == both, line < root) and np.all(diagonal[line > root] == UNDECIDED)
    mirrored = {both: both, UNDECIDED: UNDECIDED} | {i: 3 - both - i for i in range(3) if i != both}
    assert np.array_equal(np.vectorize(mirrored.get)(basins.labels), basins.labels.T)
    assert basins.resolution.shape == (2,) and np.all(basins.resolution <= 2e-3)


@pytest.mark.parametrize("half", [1e-1, 1e-3, 1e-6])
def test_a_grid_zoomed_to_a_boundary_is_labelled(half):
    system = BoxSystem.from_expressions("x, y", "x - x**3, -y", lower=(-2, -2), upper=(2, 2))
    line = np.linspace(-half, half, 21)
    basins = basins_of_attraction(system, (line, line), 80.0)
    signs = np.sign(basins.attractors[:, 0])
    assert sorted(signs) == [-1, 1]
    for i in (*range(10), *range(11, 21)):
        assert np.all(signs[basins.labels[i]] == np.sign(line[i]))
    assert np.all(basins.labels[10] == UNDECIDED)  # x = 0 to rounding


def test_where_nothing_is_decided_a_warning_says_so():
    circle = BoxSystem.from_expressions("x, y", "-y, x", lower=(-9, -9), upper=(9, 9))
    with pytest.warns(UserWarning, match="No attractor was found from 9 starts by time 50: all are undecided"):
        basins = basins_of_attraction(circle, ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), 50.0)
    assert basins_fractions(basins) == {UNDECIDED: 1.0}
    slow = BoxSystem.from_expressions("x, y", "x - x**3, -y", lower=(-2, -2), upper=(2, 2))
    with pytest.warns(UserWarning, match="No attractor was reached from 4 starts by time 1"):
        basins_of_attraction(slow, ([-0.1, 0.1], [0.1, 0.2]), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        basins_of_attraction(slow, ([-0.1, 0.1], [0.1, 0.2]), 60.0)


def test_attractors_nearer_to_each_other_than_the_radius_are_told_apart():
    text = "-1000000*x*(x - 1/1000)*(x - 1/500), -y"
    system = BoxSystem.from_expressions("x, y", text, lower=(-0.01, -1), upper=(0.01, 1))
    basins = basins_of_attraction(system, ([-1e-3, 5e-4, 1.5e-3, 3e-3, 5e-3], [0.0, 0.5]), 100.0, radius=1.0)
    assert basins.resolution[0] <= 2.6e-4
    ends = basins.attractors[basins.labels[:, 0], 0]
    assert ends == pytest.approx([0.0, 0.0, 2e-3, 2e-3, 2e-3], abs=1e-4)


TOGGLE = BoxSystem.from_expressions(
    "x, y, z", "1 - x, 4*x/(1 + z**4) - y, 4*x/(1 + y**4) - z", lower=(0,) * 3, upper=(5,) * 3
)


def test_ties_of_a_symmetric_switch_are_undecided():
    line = np.linspace(0.0, 4.0, 9)
    basins = basins_of_attraction(TOGGLE, (np.linspace(0.0, 2.0, 3), line, line), 100.0)
    assert len(basins.attractors) == 2
    up = int(basins.attractors[:, 1].argmax())
    y, z = np.meshgrid(line, line, indexing="ij")
    right = np.where(y > z, up, np.where(y < z, 1 - up, UNDECIDED))
    assert np.array_equal(basins.labels, np.broadcast_to(right, basins.labels.shape))


def test_a_line_of_ties_is_undecided_as_a_whole():
    with pytest.warns(UserWarning, match="all are undecided"):
        ties = basins_of_attraction(TOGGLE, (np.linspace(0.0, 2.0, 5), 0.5, 0.5), 100.0)
    assert ties.labels.tolist() == [UNDECIDED] * 5
    away = basins_of_attraction(TOGGLE, (np.linspace(0.0, 2.0, 5), 0.5, 0.51), 100.0)
    assert len(set(away.labels.tolist())) == 1 and away.labels[0] >= 0


@pytest.mark.parametrize("compiled", [True, False])
def test_ties_in_the_plane_and_on_the_line(compiled):
    text = BoxSystem.from_expressions("x, y", "x*(3 - x - 2*y), y*(3 - 2*x - y)", lower=(0, 0), upper=(4, 4))
    system = text if compiled else BoxSystem(velocity=text.velocity, lower=text.lower, upper=text.upper)
    line = np.linspace(0.25, 3.25, 13)
    basins = basins_of_attraction(system, (line, line), 200.0)
    first = int(basins.attractors[:, 0].argmax())
    x, y = np.meshgrid(line, line, indexing="ij")
    assert np.array_equal(basins.labels, np.where(x == y, UNDECIDED, np.where(x > y, first, 1 - first)))
    bistable = BoxSystem.from_expressions("x", "x*(1 - x)*(x - 1/2)", lower=(0,), upper=(1,))
    assert basins_of_attraction(bistable, ([0.25, 0.5, 0.75],), 200.0).labels[1] == UNDECIDED


@pytest.mark.parametrize("d", [5, 6, 7])
def test_attractors_off_the_grid_are_found_in_many_dimensions(d):
    """Of d competitors, each harvested, one survives or none; the grid sees two of them alone."""
    names = [f"x{i}" for i in range(d)]
    text = [f"{n}*(1 - {n} - {' - '.join(f'2*{m}' for m in names if m != n)}) - 1/40" for n in names]
    system = BoxSystem.from_expressions(", ".join(names), ", ".join(text), lower=[0] * d, upper=[2] * d)
    basins = basins_of_attraction(system, [np.linspace(0.0, 2.0, 5)] * 2 + [0.0] * (d - 2), 200.0)
    survivor = 0.5 + np.sqrt(0.25 - 0.025)
    right = [[0.0] * d, *(survivor * np.eye(d))]
    assert len(basins.attractors) == d + 1
    for state in right:
        assert np.abs(basins.attractors - state).max(axis=1).min() < 1e-5
    assert basins.left_out == max(0, 3**d - 729)
    alone = basins.labels[1:, 0], basins.labels[0, 1:]  # at 0.5, above the lower root of x (1 - x) = 1/40
    for labels, axis in zip(alone, (0, 1), strict=True):
        assert np.allclose(basins.attractors[labels, axis], survivor, atol=1e-5)
    assert not basins.attractors[basins.labels[0, 0]].any()


def test_algebra_and_newton_find_the_same_stable_equilibria():
    system = harvested("1/20")
    by_algebra, by_newton = (find(system, algebra=way) for way in (True, False))
    stable = [sorted(e.state.round(9).tolist() for e in found if e.stable) for found in (by_algebra, by_newton)]
    assert stable[0] == stable[1] and len(stable[0]) == 3
    assert {e.origin for e in by_newton if e.face.count(0)} == {"searched"}


def test_ties_of_two_among_three_are_undecided_whoever_the_third_is():
    """A neighbour may be a tie too, and its label arbitrary: a move towards it says nothing."""
    text = "x*(1 - x - 2*y - 2*z), y*(1 - y - 2*x - 2*z), z*(1 - z - 2*x - 2*y)"
    system = BoxSystem.from_expressions("x, y, z", text, lower=(0, 0, 0), upper=(3, 3, 3))
    line = np.linspace(0.0, 1.5, 10)
    basins = basins_of_attraction(system, (line, line, line), 400.0)
    sizes = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1)
    ordered = np.sort(sizes, axis=-1)
    assert np.array_equal(basins.labels == UNDECIDED, ordered[..., 2] == ordered[..., 1])
    winner = basins.attractors[basins.labels].argmax(axis=-1)
    assert np.array_equal(winner[basins.labels >= 0], sizes.argmax(axis=-1)[basins.labels >= 0])


def test_a_tie_on_a_face_that_the_flow_leaves_stays_undecided():
    """Two of three competitors start alike, both on the box's upper faces: the third decides nothing, symmetry keeps them alike."""
    rates = [f"{a}*(1 - {a} - 2*{b} - 2*{c}) - 1/40" for a, b, c in ("xyz", "yxz", "zxy")]
    system = BoxSystem.from_expressions("x, y, z", ", ".join(rates), lower=[0] * 3, upper=[2] * 3)
    basins = basins_of_attraction(system, [np.linspace(0.0, 2.0, 5)] * 3, 400.0)
    starts = np.stack(np.meshgrid(*basins.axes, indexing="ij"), -1).reshape(-1, 3)
    labels, ordered = basins.labels.ravel(), np.sort(starts, axis=1)
    tie = (ordered[:, 2] == ordered[:, 1]) & (ordered[:, 2] > 0)
    assert (labels[tie] == -1).all()
    winners = basins.attractors[labels[~tie & (ordered[:, 2] > 0)]].argmax(axis=1)
    np.testing.assert_array_equal(winners, starts[~tie & (ordered[:, 2] > 0)].argmax(axis=1))
