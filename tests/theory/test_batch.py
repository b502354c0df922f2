"""Many starts at once: closed forms, one start at a time, and the two forms of the scheme against each other."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sympy
from hypothesis import assume, given, settings
from numba.core.errors import TypingError
from scipy.linalg import expm
from test_flow import BENEFIT, EVERY, LAYER, UNIT
from test_systems import numbers

from catode.theory import BenefitSystem, UnitSystem, integrate
from catode.theory.flow import _batch_compiled, batch
from catode.theory.flow.batch import STATUSES, integrate_batch
from catode.theory.systems.box import BoxSystem

LAWS = settings(max_examples=15, deadline=None, derandomize=True)
FINE = {"rtol": 1e-9, "atol": 1e-11}
GATES = BoxSystem.from_expressions(
    "x, y, theta",
    "-0.1*x + 0.5*theta*y, -0.1*y + 0.5*theta*x, 1.0*(0.5*x*y - 0.1)",
    lower=(0, 0, 0),
    upper=(np.inf, np.inf, 1),
)
"""A unit by its two norms: on the diagonal the UnitSystem `UNIT`, with u = x^2 + y^2."""


def box(function, lower, upper):
    def velocity(state):
        return np.stack(function(*np.moveaxis(state, -1, 0)), axis=-1)

    return BoxSystem(velocity=velocity, lower=lower, upper=upper)


def turning(lower, upper):
    return box(lambda x, y: (-y, 1.0 * x), lower, upper)


class Explosive(UnitSystem):
    """A planar system that is not affine in its size."""

    def field(self, state):
        state = np.asarray(state, dtype=float)
        return np.stack([state[..., 0] ** 2, 0.0 * state[..., 1]], axis=-1)


@pytest.mark.parametrize("system", [LAYER, BENEFIT], ids=["layer", "benefit"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-6, 1e-8, 1e-10])
def test_inside_the_box_the_flow_is_the_matrix_exponential_to_the_tolerance(system, rtol):
    rng, saddle = np.random.default_rng(0), np.array(system.saddle)
    starts = saddle + rng.uniform(-0.5, 0.5, (200, 2)) * [saddle[0], 0.0] + rng.uniform(0.3, 0.5, (200, 1)) * [0.0, 1.0]
    result = integrate_batch(system, starts, 0.8, rtol=rtol, atol=rtol * 1e-2)
    exact = saddle + (starts - saddle) @ expm(0.8 * system.jacobian(saddle)).T
    assert result.compiled
    assert (result.statuses == "horizon").all()
    assert (result.times == 0.8).all()
    assert np.allclose(result.ends, exact, rtol=0.0, atol=20.0 * rtol)


@EVERY
def test_each_start_ends_as_it_does_alone(systems):
    @LAWS
    @given(systems, numbers(0.0, 2.0), numbers(0.0, 1.0))
    def law(system, fraction, theta):
        starts = np.array([[fraction * system.saddle[0], theta], [0.0, theta], [1.7 * system.saddle[0], 0.5]])
        assume(np.abs(starts[:, 1] - system.separatrix(starts[:, 0])).min() > 1e-4)
        time = 30.0 / system.growth_rate
        many = integrate_batch(system, starts, time, absorbing=True, **FINE)
        assert many.compiled
        for start, end, when, status in zip(starts, many.ends, many.times, many.statuses, strict=True):
            alone = integrate(system, start, time)
            if alone.status != status:  # `integrate` also judges at the horizon
                assert status == "horizon" and when == time
                continue
            assert np.isclose(when, alone.times[-1], rtol=1e-6)
            if status != "failed":
                assert np.allclose(end, alone.end, rtol=1e-6, atol=1e-8)

    law()


@EVERY
def test_numpy_and_numba_follow_the_same_paths(systems):
    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(systems)
    def law(system):
        rng = np.random.default_rng(1)
        starts = rng.uniform(0.0, [2.0 * system.saddle[0], 1.0], (20, 2))
        same = BoxSystem(velocity=system.field, lower=(0, 0), upper=(np.inf, 1))
        time = 3.0 / system.growth_rate
        first, second = integrate_batch(system, starts, time, **FINE), integrate_batch(same, starts, time, **FINE)
        assert first.compiled and not second.compiled
        assert np.array_equal(first.codes, second.codes)
        good = first.codes != STATUSES.index("failed")
        assert np.allclose(first.ends[good], second.ends[good], rtol=1e-6, atol=1e-8)

    law()


def test_three_coordinates_keep_their_invariant_whatever_the_faces_do():
    starts = np.random.default_rng(2).uniform(0.0, [1.0, 1.0, 1.0], (500, 3))
    result = integrate_batch(GATES, starts, 5.0, **FINE)
    assert result.compiled
    assert (result.statuses == "horizon").all()
    first, last = np.square(starts[:, 0]) - np.square(starts[:, 1]), result.ends[:, 0] ** 2 - result.ends[:, 1] ** 2
    assert np.allclose(last, first * np.exp(-2.0 * 0.1 * 5.0), rtol=0.0, atol=1e-7)
    assert {0.0, 1.0} <= set(result.ends[:, 2])
    plain = BoxSystem(velocity=GATES.velocity, lower=GATES.lower, upper=GATES.upper)
    assert np.allclose(integrate_batch(plain, starts[:20], 5.0, **FINE).ends, result.ends[:20], atol=1e-7)


def test_on_the_diagonal_three_coordinates_are_a_unit():
    size, theta = np.random.default_rng(3).uniform(0.0, [1.0, 1.0], (200, 2)).T
    both = [
        integrate_batch(UNIT, np.stack([2.0 * size**2, theta], -1), 30.0, absorbing=True, **FINE),
        integrate_batch(GATES, np.stack([size, size, theta], -1), 30.0, absorbing=True, **FINE),
    ]
    assert np.array_equal(both[0].codes, both[1].codes)
    assert set(both[0].statuses) == {"pruned", "kept"}
    assert np.allclose(both[0].times, both[1].times, rtol=1e-6, atol=1e-8)


def test_theta_leaves_the_lower_face_when_its_speed_turns():
    system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, drift=0.01)
    benefits = np.linspace(0.0, 0.04, 50)
    leave, rate = (0.1 - benefits) / 0.01, np.sqrt(0.5)
    result = integrate_batch(system, np.stack([benefits, 0.0 * benefits], -1), 11.0, **FINE)
    exact = 0.02 * (np.cosh(rate * np.maximum(11.0 - leave, 0.0)) - 1.0)  # theta'' = q theta + delta
    assert (exact < 1.0).all()
    assert np.allclose(result.ends[:, 1], exact, atol=1e-8)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_dip_below_zero_within_one_step_is_caught(compiled):
    system = BenefitSystem(price=0.1, gain=1e-3, rate_ratio=1.0, drift=1.0)  # b = g at t ~ 0.1, theta turns there
    if not compiled:
        system = BoxSystem(velocity=system.field, lower=(0, 0), upper=(np.inf, 1))
    theta = 0.1**2 / 2.0 * np.array([0.1, 0.5, 0.9, 0.999, 1.01, 1.5])  # theta falls by (g - b)^2 / (2 delta)
    result = integrate_batch(system, np.stack([0.0 * theta, theta], -1), 50.0, absorbing=True)
    assert result.statuses.tolist() == ["pruned"] * 4 + ["kept"] * 2
    assert np.allclose(result.times[:4], 0.1 - np.sqrt(0.1**2 - 2.0 * theta[:4]), rtol=1e-3)


def check_sagging(system, compiled):
    """theta = theta_0 - t/2 + t^2/2 until the other coordinate, t, meets its face, in the same step; then straight."""
    theta = np.array([0.02, 0.12, 0.1249, 0.1251, 0.2, 0.9])
    result = integrate_batch(system, np.stack([0.0 * theta, theta], -1), 5.0, absorbing=True, **FINE)
    assert result.compiled == compiled
    assert result.statuses.tolist() == ["pruned"] * 3 + ["kept"] * 3
    exact = np.where(theta < 0.125, 0.5 - np.sqrt(np.maximum(0.25 - 2.0 * theta, 0.0)), 1.0 + 2.0 * (1.0 - theta))
    assert np.allclose(result.times, exact, rtol=0.0, atol=1e-8)
    assert np.all(result.steps < 40)
    return result


def test_a_dip_before_another_coordinate_meets_its_face_is_caught():
    check_sagging(box(lambda s, y: (1.0 + 0.0 * s, s - 0.5), (0, 0), (1, 1)), False)


def test_a_circle_cut_by_a_face_is_followed_along_it():
    system = turning((-2, -2), (1, 2))
    starts = np.stack([np.ones(40), np.linspace(-0.99, -0.1, 40)], -1)  # pushed along x = 1 up to y = 0
    result = integrate_batch(system, starts, 2.5, **FINE)
    angle = 2.5 + starts[:, 1]
    assert np.allclose(result.ends, np.stack([np.cos(angle), np.sin(angle)], -1), atol=1e-8)


def test_a_path_that_only_touches_a_face_goes_on():
    result = integrate_batch(turning((-1, -1), (1, 1)), [[0.8, 0.6], [1.0, 0.0]], 20.0, **FINE)
    assert (result.statuses == "horizon").all()
    assert np.allclose(np.linalg.norm(result.ends, axis=1), 1.0, atol=1e-6)
    assert np.allclose(result.ends[1], [np.cos(20.0), np.sin(20.0)], atol=1e-5)


def test_a_corner_holds_what_is_pushed_into_it():
    system = box(lambda x, y: (1.0 + 0.0 * x, 0.5 - x), (0, 0), (1, 1))
    starts = np.random.default_rng(4).uniform(0.0, 1.0, (100, 2))
    early, late = integrate_batch(system, starts, 1e-3), integrate_batch(system, starts, 1e3)
    inside = starts[:, 0] < 0.99
    assert np.allclose(early.ends[inside, 0], starts[inside, 0] + 1e-3, atol=1e-12)
    assert np.array_equal(late.ends, np.tile([1.0, 0.0], (100, 1)))


def test_a_field_that_does_not_move_stays():
    result = integrate_batch(UNIT, [UNIT.saddle, [0.0, 0.0]], 10.0)
    assert np.array_equal(result.ends[1], [0.0, 0.0])
    still = integrate_batch(box(lambda x, y: (0.0 * x, 0.0 * y), (0, 0), (1, 1)), [[0.0, 1.0], [0.5, 0.5]], 10.0)
    assert still.ends.tolist() == [[0.0, 1.0], [0.5, 0.5]]
    assert (still.times == 10.0).all()


def test_a_start_stops_near_a_target():
    system = box(lambda x, y: (-x, -2.0 * y), (-1, -1), (1, 1))
    result = integrate_batch(system, [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 100.0, targets=[[0.5, 9.0], [0.0, 0.0]])
    assert result.statuses.tolist() == ["arrived"] * 3
    assert result.targets.tolist() == [1, 1, 1]
    assert np.all(np.abs(result.ends) <= 1e-3)
    assert np.all(result.times[:2] >= np.log(1e3) / [1.0, 2.0])
    assert result.times[2] == 0.0


def test_growth_beyond_the_range_of_floats_is_a_status():
    result = integrate_batch(UNIT, [[0.5, 0.5], [0.1, 0.0]], 5e3)
    assert result.statuses.tolist() == ["failed", "horizon"]
    assert np.isfinite(result.ends).all()
    assert integrate_batch(UNIT, [[0.5, 0.5]], 5e3, absorbing=True).statuses.tolist() == ["kept"]


def test_a_blow_up_and_too_many_steps_are_statuses():
    system = Explosive(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
    result = integrate_batch(system, [[0.5, 0.5], [0.0, 0.5]], 10.0)
    assert not result.compiled
    assert result.statuses.tolist() == ["failed", "horizon"]
    assert np.isclose(result.times[0], 2.0, rtol=1e-6)
    for same in (UNIT, BoxSystem(velocity=UNIT.field, lower=(0, 0), upper=(np.inf, 1))):
        short = integrate_batch(same, [[0.5, 0.5]], 10.0, max_steps=3)
        assert short.statuses.tolist() == ["failed"]
        assert short.steps.tolist() == [3]
        assert 0.0 < short.times[0] < 10.0


def test_no_starts_are_no_error():
    for system in (UNIT, turning((-1, -1), (1, 1))):
        assert integrate_batch(system, np.empty((0, 2)), 1.0).ends.shape == (0, 2)


def test_numbers_in_the_expressions_do_not_change_what_is_compiled():
    def source(rate):
        return batch._parametrise(BoxSystem.from_expressions("x", f"-{rate}*x + 0.25*x**2", lower=[0], upper=[1]))

    (first, values), (second, others) = source(0.7), source(1.9)
    assert first == second
    assert values.tolist() != others.tolist()


def test_without_a_place_to_write_it_compiles_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_batch_compiled, "_folder", lambda: tmp_path / "file" / "folder")
    system = BoxSystem.from_expressions("s, y", "1, s - 1/2", lower=(0, 0), upper=(1, 1))
    assert check_sagging(system, True).compile_seconds > 0.1
    assert check_sagging(system, True).compile_seconds < 0.1
    integrate_batch(system, np.asfortranarray([[0.0, 0.5], [0.1, 0.5]]), 1.0, targets=np.zeros((3, 2), order="F"))
    solve = _batch_compiled.compile_solver(batch._pose(system).source)
    assert len(solve.signatures) == 1  # all calls share one compilation


def test_what_cannot_be_compiled_runs_in_numpy(tmp_path, monkeypatch):
    def refuse(space):
        raise TypingError("no")

    monkeypatch.setattr(_batch_compiled, "_warm", refuse)
    monkeypatch.setattr(_batch_compiled, "_folder", lambda: tmp_path)
    starts, x = np.linspace(-1.0, 1.0, 7)[:, None], sympy.Symbol("x")
    for term in (-sympy.re(x), -x):  # sympy has no code for the first, and numba refuses the second
        system = BoxSystem(velocity=np.negative, lower=[-1], upper=[1], names=("x",), expressions=(term,))
        assert (batch._parametrise(system)[0] is None) == term.has(sympy.re)
        result = integrate_batch(system, starts, 2.0, **FINE)
        assert not result.compiled and result.compile_seconds == 0.0
        assert np.allclose(result.ends, starts * np.exp(-2.0), atol=1e-8)


def test_the_module_loads_neither_numba_nor_sympy():
    code = "import sys, catode.theory.basins as b; assert not {'numba', 'sympy', 'torch', 'scipy.integrate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "unit"}, "`system` must be a BoxSystem or a PlanarSystem"),
        ({"starts": [[0.1, 1.5]]}, r"`starts` must lie in the box, coordinate 1 in \[0, 1\]; got starts\[0, 1\]=1.5"),
        ({"starts": [[-0.1, 0.5]]}, r"`starts` must lie in the box, coordinate 0 in \[0, inf\]"),
        ({"starts": [0.1, 0.5]}, r"`starts` must have shape \(n, 2\)"),
        ({"starts": [[np.nan, 0.5]]}, "`starts` must be finite"),
        ({"horizon": 0.0}, "`horizon` must be positive"),
        ({"rtol": 0.5}, r"`rtol` must lie in \(0, 0.1\]"),
        ({"atol": 0.0}, "`atol` must be positive"),
        ({"absorbing": 1}, "`absorbing` must be True or False"),
        ({"targets": [0.0, 0.0]}, r"`targets` must have shape \(m, 2\)"),
        ({"radius": 0.0}, "`radius` must be positive"),
        ({"scale": [1.0, 2.0, 3.0]}, "`scale` must have shape"),
        ({"scale": -1.0}, "`scale` must be positive"),
        ({"max_steps": 0}, "`max_steps` must be an integer of at least 1"),
        (
            {"system": turning((-1, -1), (1, np.inf)), "absorbing": True},
            "`system` must bound its last coordinate on both sides where `absorbing`",
        ),
    ],
)
def test_bad_inputs_are_refused(change, message):
    arguments = {"system": UNIT, "starts": [[0.1, 0.5]], "horizon": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        integrate_batch(**arguments)
