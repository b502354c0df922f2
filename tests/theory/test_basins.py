"""Basins by two independent ways, and of systems whose basins are known by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from test_batch import GATES, box
from test_flow import BENEFIT, EVERY, LAYER, UNIT

from catode.theory import BenefitSystem, UnitSystem, integrate
from catode.theory.basins import UNDECIDED, basins_fractions, basins_of_attraction, find_attractors

LAWS = settings(max_examples=12, deadline=None, derandomize=True)
BAND = 1e-3


def grid(system, n=60):
    return np.linspace(0.0, 2.5 * system.saddle[0], n), np.linspace(0.0, 1.0, n)


def states(axes):
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


@EVERY
def test_integration_and_the_separatrix_agree_outside_a_narrow_band(systems):
    @LAWS
    @given(systems)
    def law(system):
        if system.saddle[1] < 0.0:
            return
        axes = grid(system)
        by_steps, exact = basins_of_attraction(system, axes), basins_of_attraction(system, axes, method="separatrix")
        near = np.abs(axes[1] - system.separatrix(axes[0])[:, None]) <= BAND
        undecided = by_steps.labels == UNDECIDED
        wrong = (by_steps.labels != exact.labels) & ~near
        assert not (wrong & ~undecided).any()
        if system.saddle[1] <= 0.9:  # near theta* = 1 the flow along the upper face is too slow for any horizon
            assert not wrong.any()

    law()


@EVERY
def test_the_separatrix_labels_are_the_basin_of_the_system(systems):
    @LAWS
    @given(systems)
    def law(system):
        axes = grid(system)
        if system.saddle[1] < 0.0:
            with pytest.raises(ValueError, match=r"`system` must have a saddle with theta\* >= 0"):
                basins_of_attraction(system, axes, method="separatrix")
            return
        labels = basins_of_attraction(system, axes, method="separatrix").labels
        assert np.array_equal(labels == 0, system.in_basin(states(axes)))

    law()


@pytest.mark.parametrize("system", [LAYER, UNIT, BENEFIT], ids=["layer", "unit", "benefit"])
def test_labels_are_what_one_start_at_a_time_gives(system):
    axes = (np.linspace(0.0, 2.3 * system.saddle[0], 4), np.linspace(0.0, 1.0, 4))
    basins = basins_of_attraction(system, axes)
    for index in np.ndindex(basins.labels.shape):
        status = integrate(system, [axes[0][index[0]], axes[1][index[1]]], 1e4 / system.growth_rate).status
        assert basins.names[basins.labels[index]] == status


def test_a_start_on_the_separatrix_is_undecided():
    system = UnitSystem(price=1.0, weight_decay=1.0, rate_ratio=1.0, benefit_slope=2.0)
    basins = basins_of_attraction(system, ([0.5, 1.0, 2.0], [0.25, 0.5, 1.0]), method="separatrix")
    assert system.saddle == (1.0, 0.5)
    assert basins.labels[1].tolist() == [0, UNDECIDED, 1]


def test_the_attractors_of_a_planar_system_are_its_limits_on_the_faces():
    axes = (np.linspace(0.0, 1.0, 5),) * 2
    assert basins_of_attraction(UNIT, axes).attractors.tolist() == [[0.0, 0.0], [np.inf, 1.0]]
    assert np.allclose(basins_of_attraction(LAYER, axes).attractors, [[0.0, 0.0], [10.0, 1.0]])
    assert np.allclose(basins_of_attraction(BENEFIT, axes).attractors, [[0.0, 0.0], [10.0, 1.0]])


def test_a_higher_price_widens_the_basin_of_the_removed_state():
    axes = (np.linspace(0.0, 1.0, 50),) * 2
    shares = []
    for price in (0.02, 0.05, 0.1, 0.2, 0.5):
        system = UnitSystem(price=price, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
        fractions = basins_fractions(basins_of_attraction(system, axes))
        assert np.isclose(sum(fractions.values()), 1.0)
        shares.append(fractions[0])
    assert (np.diff(shares) > 0.0).all()


def test_three_coordinates_agree_with_a_unit_on_the_diagonal_and_are_symmetric():
    size, theta = np.linspace(0.0, 1.0, 13), np.linspace(0.0, 1.0, 11)
    basins = basins_of_attraction(GATES, (size, size, theta), 400.0, absorbing=True)
    assert basins.labels.shape == (13, 13, 11)
    assert basins.failed == 0
    assert (basins.labels != UNDECIDED).all()
    assert np.array_equal(basins.labels, basins.labels.transpose(1, 0, 2))
    alike = np.arange(13)
    on_diagonal = basins.labels[alike, alike]
    unit = basins_of_attraction(UNIT, (2.0 * size**2, theta), method="separatrix")
    assert np.array_equal(on_diagonal, unit.labels)
    assert (np.diff(basins.labels, axis=2) >= 0).all()  # the system is cooperative
    assert (np.diff(basins.labels, axis=0) >= 0).all()
    slice_ = basins_of_attraction(GATES, (size, 0.5, theta), 400.0, absorbing=True)
    assert np.array_equal(slice_.labels, basins.labels[:, 6])


def well(bend):
    """Two wells, sheared: w = x - bend y^2 obeys w' = w - w^3, and y' = -y; the boundary is x = bend y^2."""

    def function(x, y):
        w = x - bend * y**2
        return w - w**3 - 2.0 * bend * y**2, -y

    return box(function, (-2, -1), (3, 1))


def test_a_curved_boundary_of_a_system_of_ones_own_is_found():
    axes = (np.linspace(-1.5, 2.4, 41), np.linspace(-0.9, 0.9, 20))
    basins = basins_of_attraction(well(0.7), axes, 60.0)
    order = np.argsort(basins.attractors[:, 0])
    assert np.allclose(basins.attractors[order], [[-1.0, 0.0], [1.0, 0.0]], atol=1e-5)
    distance = states(axes)[..., 0] - 0.7 * states(axes)[..., 1] ** 2
    expected = np.where(distance > 0.0, order[1], order[0])
    assert np.array_equal(basins.labels[np.abs(distance) > BAND], expected[np.abs(distance) > BAND])
    given_ = basins_of_attraction(well(0.7), axes, 60.0, attractors=[[1.0, 0.0], [-1.0, 0.0]])
    assert np.array_equal(given_.labels[distance > BAND], np.zeros((distance > BAND).sum()))


def test_faces_make_attractors_and_the_saddle_is_none():
    system = box(lambda x, y: (y - 0.5, x - 0.5), (0, 0), (1, 1))
    axes = (np.linspace(0.0, 1.0, 11),) * 2
    basins = basins_of_attraction(system, axes, 60.0)
    order = np.argsort(basins.attractors[:, 0])
    assert np.array_equal(basins.attractors[order], [[0.0, 0.0], [1.0, 1.0]])
    height = np.add.outer(np.arange(11), np.arange(11)) - 10
    assert np.array_equal(basins.labels[height < 0], np.full((height < 0).sum(), order[0]))
    assert np.array_equal(basins.labels[height > 0], np.full((height > 0).sum(), order[1]))


def test_of_two_that_compete_one_survives_and_a_tie_is_undecided():
    system = box(lambda x, y: (x * (1 - x - 2 * y), y * (1 - y - 2 * x)), (0, 0), (2, 2))
    axes = (np.linspace(0.1, 1.5, 8),) * 2
    basins = basins_of_attraction(system, axes, 80.0, attractors=[[1.0, 0.0], [0.0, 1.0]])
    x, y = states(axes)[..., 0], states(axes)[..., 1]
    assert np.array_equal(basins.labels, np.where(x > y, 0, np.where(x < y, 1, UNDECIDED)))
    assert basins_fractions(basins) == {-1: 1 / 8, 0: 7 / 16, 1: 7 / 16}


def test_a_cycle_is_no_attractor():
    circle = box(lambda x, y: (x - y - x * (x**2 + y**2), x + y - y * (x**2 + y**2)), (-2, -2), (2, 2))
    assert find_attractors(circle, [[0.5, 0.1], [1.5, 0.0], [0.0, 0.0]], 30.0).shape == (0, 2)
    inward = box(lambda x, y: (-x - y, x - y), (-2, -2), (2, 2))
    assert np.allclose(find_attractors(inward, [[0.5, 0.1], [1.5, 0.0]], 30.0), [[0.0, 0.0]], atol=1e-9)


def test_failures_are_undecided_and_counted():
    explosive = box(lambda x, y: (x**2, -y), (-np.inf, -1), (np.inf, 1))
    basins = basins_of_attraction(explosive, ([-1.0, 1.0], [0.0, 0.5]), 1e4, attractors=[[0.0, 0.0]])
    assert basins.labels.tolist() == [[0, 0], [UNDECIDED, UNDECIDED]]
    assert basins.failed == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "unit"}, "`system` must be a BoxSystem or a PlanarSystem"),
        ({"axes": 1.0}, "`axes` must be a sequence"),
        ({"axes": ([0.0],)}, "`axes` must have one entry for each of 2 coordinates; got axes=1"),
        ({"axes": (0.1, 0.2)}, "`axes` must let at least one coordinate vary"),
        ({"axes": ([0.0, np.nan], [0.0])}, r"`axes\[0\]` must be finite"),
        ({"axes": ([[0.0]], [0.0])}, r"`axes\[0\]` must have shape"),
        ({"axes": ([], [0.0])}, r"`axes\[0\]` must have shape"),
        ({"axes": ([0.0], [1.5])}, "`starts` must lie in the box"),
        (
            {"axes": ([0.0], [1.5]), "method": "separatrix"},
            r"`axes\[1\]` must lie in the box, \[0, 1\]; got axes\[1\]=1.5",
        ),
        ({"axes": ([-0.5], [0.5]), "method": "separatrix"}, r"`axes\[0\]` must lie in the box"),
        ({"horizon": -1.0}, "`horizon` must be positive"),
        ({"method": "guess"}, "`method` must be one of 'integration', 'separatrix'"),
        ({"absorbing": "yes"}, "`absorbing` must be True or False"),
        ({"attractors": [[0.0, 0.0]]}, "`attractors` must be None where the system is absorbing"),
        ({"attractors": [0.0], "absorbing": False}, r"`attractors` must have shape \(m, 2\)"),
        ({"system": well(0.0)}, "`horizon` must be a real number for a BoxSystem"),
        ({"system": well(0.0), "method": "separatrix"}, "`method` must be 'integration' for other than"),
        ({"radius": 0.0, "absorbing": False}, "`radius` must be positive"),
        (
            {"system": BenefitSystem(price=1.0, gain=1.0, rate_ratio=1.0, drift=0.1), "method": "separatrix"},
            r"`system` must have a saddle with theta\* >= 0 for the separatrix to bound a basin",
        ),
    ],
)
def test_bad_inputs_are_refused(change, message):
    arguments = {"system": UNIT, "axes": ([0.0, 0.1], [0.0, 0.5]), **change}
    with pytest.raises(ValueError, match=message):
        basins_of_attraction(**arguments)


def test_fractions_refuse_what_are_no_basins():
    with pytest.raises(ValueError, match="`basins` must be a Basins"):
        basins_fractions(np.zeros((2, 2)))
