"""Laws of the three comparison systems: every system against every law."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, trace_separatrix
from catode.theory.systems import growth_rate

LAWS = settings(max_examples=60, deadline=None, derandomize=True)
SLOW = settings(max_examples=40, deadline=None, derandomize=True)


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


layers = st.builds(
    LayerSystem,
    price=numbers(0.01, 1.0),
    weight_decay=numbers(0.0, 0.5),
    rate_ratio=numbers(0.1, 5.0),
    grad_bound=numbers(0.2, 3.0),
    benefit_slope=numbers(0.2, 3.0),
)
units = st.builds(
    UnitSystem,
    price=numbers(0.01, 1.0),
    weight_decay=numbers(0.0, 0.5),
    rate_ratio=numbers(0.1, 5.0),
    benefit_slope=numbers(0.2, 3.0),
)
benefits = st.builds(
    BenefitSystem,
    price=numbers(0.01, 1.0),
    gain=numbers(0.05, 3.0),
    rate_ratio=numbers(0.1, 5.0),
    decay=numbers(0.0, 0.5),
    drift=numbers(0.0, 0.2),
)
EVERY = pytest.mark.parametrize("systems", [layers, units, benefits], ids=["layer", "unit", "benefit"])


@EVERY
def test_the_saddle_is_an_equilibrium_with_the_stated_growth_rate(systems):
    @LAWS
    @given(systems)
    def law(system):
        scale = np.abs(system.jacobian(system.saddle)).max() * (1.0 + np.abs(system.saddle).max())
        assert np.abs(system.field(system.saddle)).max() <= 1e-13 * scale
        values = np.linalg.eigvals(system.jacobian(system.saddle))
        assert values.min() < 0.0
        assert np.isclose(values.max(), system.growth_rate, rtol=1e-9)

    law()


@EVERY
def test_the_jacobian_is_the_derivative_of_the_field(systems):
    @LAWS
    @given(systems, numbers(0.0, 3.0), numbers(0.0, 1.0))
    def law(system, size, theta):
        state, h = np.array([size, theta]), 1e-6
        columns = [(system.field(state + h * e) - system.field(state - h * e)) / (2 * h) for e in np.eye(2)]
        assert np.allclose(np.stack(columns, axis=-1), system.jacobian(state), rtol=1e-6, atol=1e-7)

    law()


@EVERY
def test_the_separatrix_is_the_integrated_stable_manifold(systems):
    @SLOW
    @given(systems)
    def law(system):
        """Relative to theta as it is split at the saddle, |theta - theta*| + |theta*|: |theta| itself may be 0 on it."""
        points = trace_separatrix(system, low=0.05, high=2.5)
        exact, saddle = system.separatrix(points[:, 0]), system.saddle[1]
        assert np.all(np.diff(points[:, 0]) > 0.0)
        assert np.isclose(points[0, 0], 0.05 * system.saddle[0])
        assert np.isclose(points[-1, 0], 2.5 * system.saddle[0])
        assert np.all(np.abs(points[:, 1] - exact) <= 1e-6 * (np.abs(exact - saddle) + abs(saddle)))

    law()


@EVERY
def test_the_separatrix_passes_through_the_saddle_and_never_rises_with_size(systems):
    @LAWS
    @given(systems, numbers(0.01, 4.0), numbers(0.01, 4.0))
    def law(system, one, other):
        size, theta = system.saddle
        assert np.isclose(system.separatrix(size), theta, rtol=1e-12, atol=1e-15)
        low, high = np.sort([one * size, other * size])
        assert system.separatrix(low) >= system.separatrix(high)

    law()


@EVERY
def test_the_separatrix_rises_with_price(systems):
    @LAWS
    @given(systems, numbers(0.01, 3.0), numbers(1.001, 3.0))
    def law(system, size, factor):
        dearer = dataclasses.replace(system, price=factor * system.price)
        assert dearer.separatrix(size) > system.separatrix(size) - 1e-12

    law()


@pytest.mark.parametrize(("systems", "name"), [(layers, "grad_bound"), (benefits, "gain")], ids=["layer", "benefit"])
def test_the_separatrix_falls_with_gain_below_the_price_without_drift(systems, name):
    @LAWS
    @given(systems, numbers(0.0, 1.0), numbers(1.001, 3.0))
    def law(system, fraction, factor):
        if name == "gain":
            system = dataclasses.replace(system, drift=0.0)
        assume(system.saddle[1] > 0.0 or fraction < 0.999)
        size = fraction * system.saddle[0]
        stronger = dataclasses.replace(system, **{name: factor * getattr(system, name)})
        assert stronger.separatrix(size) < system.separatrix(size)

    law()


@EVERY
def test_membership_is_the_separatrix_within_the_box(systems):
    @LAWS
    @given(systems, numbers(0.0, 3.0), numbers(-0.5, 1.5))
    def law(system, size, theta):
        state = np.array([size, theta])
        inside = bool(system.contains(state))
        if not 0.0 <= theta <= 1.0:
            assert not inside
        elif not getattr(system, "empty", False):
            assert inside == bool(theta < system.separatrix(size))
        assert not (inside and system.contains_mirror(state))
        if system.saddle[1] >= 0.0 and inside:
            assert system.in_basin(state)

    law()


@EVERY
def test_every_method_is_vectorised(systems):
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(systems)
    def law(system):
        states = np.random.default_rng(0).uniform(0.0, 1.0, (3, 4, 2))
        for method in ("field", "projected_field", "jacobian", "project", "contains", "in_basin", "contains_mirror"):
            whole = getattr(system, method)(states)
            assert whole.shape[:2] == (3, 4)
            assert np.array_equal(whole[1, 2], getattr(system, method)(states[1, 2]))
        assert system.separatrix(states[..., 0]).shape == (3, 4)
        assert system.mirror_separatrix(states[..., 0]).shape == (3, 4)
        assert system.rest(states).shape == (3, 4)

    law()


@EVERY
def test_projection_only_removes_outward_speed(systems):
    @LAWS
    @given(systems, numbers(0.0, 3.0), st.sampled_from([0.0, 0.5, 1.0]))
    def law(system, size, theta):
        raw, speed = system.field([size, theta]), system.projected_field([size, theta])
        assert speed[0] == raw[0] or (size == 0.0 and raw[0] < 0.0 and speed[0] == 0.0)
        if theta == 0.0:
            assert speed[1] == max(raw[1], 0.0)
        elif theta == 1.0:
            assert speed[1] == min(raw[1], 0.0)
        else:
            assert speed[1] == raw[1]

    law()


def test_linear_invariants_of_layer_and_benefit_grow_at_mu():
    @LAWS
    @given(st.one_of(layers, benefits), numbers(0.0, 2.0), numbers(0.0, 1.0))
    def law(system, x, theta):
        gain = system.grad_bound if isinstance(system, LayerSystem) else system.gain
        row = np.array([system.growth_rate, gain])
        value, level = row @ [x, theta], row @ system.saddle
        assert np.isclose(row @ system.field([x, theta]), system.growth_rate * (value - level), rtol=1e-9, atol=1e-9)

    law()


def test_first_integral_of_the_unit_is_constant_along_its_field():
    @LAWS
    @given(units, numbers(0.01, 3.0), numbers(0.0, 1.0))
    def law(system, u, theta):
        kappa, rho, g = system.benefit_slope, system.rate_ratio, system.price
        slope = [-rho * (kappa / 2 - g / u), 2 * kappa * theta - 2 * system.weight_decay]
        field = system.field([u, theta])
        assert abs(slope @ field) <= 1e-12 * (1.0 + np.abs(slope * field).max())

    law()


def test_unit_separatrix_is_infinite_at_zero_and_accurate_at_the_saddle():
    system = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
    with np.errstate(all="raise", divide="raise"):
        assert system.separatrix(0.0) == np.inf
        assert system.contains([0.0, 1.0])
    size, theta = system.saddle
    slope = -np.sqrt(system.rate_ratio * system.price / (2.0 * system.benefit_slope))
    for d in (1e-12, 1e-9, 1e-6, 1e-3, 9.999e-3):  # sqrt(d - log(1 + d)) = d / sqrt(2) (1 - d / 3 + 7 d^2 / 36 ..)
        d = (size * (1.0 + d) - size) / size
        leading = slope * d * (1.0 - d / 3.0 + 7.0 * d * d / 36.0)
        assert np.isclose(system.separatrix(size * (1.0 + d)) - theta, leading, rtol=1e-5, atol=1e-16)
    left, right = system.separatrix(size * (1 + np.array([0.01 - 1e-12, 0.01 + 1e-12])))
    assert abs(left - right) < 1e-11  # the series joins the logarithm


def test_a_negative_benefit_counts_as_zero():
    system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05, gain_lower=0.5, decay_upper=0.05)
    assert system.separatrix(-3.0) == system.separatrix(0.0)
    assert np.array_equal(system.projected_field([-3.0, 0.5]), system.projected_field([0.0, 0.5]))
    assert not system.contains([-3.0, 0.2])
    assert not system.contains_mirror([-1e-9, 1.0])
    assert system.contains_mirror([0.0, 1.0])


@pytest.mark.parametrize(("decay", "drift"), [(0.05, 0.006), (0.05, 0.1), (0.0, 0.08)])
def test_a_drift_too_strong_leaves_no_domain(decay, drift):
    system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=decay, drift=drift)
    assert system.empty
    grid = np.stack(np.meshgrid(np.linspace(0.0, 0.2, 9), np.linspace(0.0, 1.0, 9)), axis=-1)
    assert not system.contains(grid).any()
    assert np.all(np.isinf(system.time_to_zero(grid)))


def test_nothing_is_certain_without_the_lower_bounds_or_with_weak_ones():
    grid = np.stack(np.meshgrid(np.linspace(0.0, 0.5, 9), np.linspace(0.0, 1.0, 9)), axis=-1)
    unknown = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0)
    zero = dataclasses.replace(unknown, gain_lower=0.0, decay_upper=0.1)
    weak = dataclasses.replace(unknown, gain_lower=0.1, decay_upper=1.0)
    known = dataclasses.replace(unknown, gain_lower=0.4, decay_upper=0.1)
    for system in (unknown, zero, weak):
        assert not system.contains_mirror(grid).any()
        assert np.all(np.isinf(system.mirror_separatrix(grid[..., 0])))
    assert known.contains_mirror(grid).any()


def test_growth_rate_is_stable_for_a_strong_decay_and_zero_without_gain():
    assert np.isclose(growth_rate(1e8, 1.0, 1.0), 1e-8, rtol=1e-12)
    assert growth_rate(0.0, 1.0, 0.0) == 0.0
    assert growth_rate(1.0, 1.0, 0.0) == 0.0


LAYER = {"price": 0.1, "weight_decay": 0.1, "rate_ratio": 1.0, "grad_bound": 1.0, "benefit_slope": 0.5}
UNIT = {"price": 0.1, "weight_decay": 0.1, "rate_ratio": 1.0, "benefit_slope": 0.5}
BENEFIT = {"price": 0.1, "gain": 0.5, "rate_ratio": 1.0, "gain_lower": 0.1, "decay_upper": 0.2}


@pytest.mark.parametrize(
    ("make", "base", "change", "message"),
    [
        (LayerSystem, LAYER, {"price": 0.0}, "`price` must be positive"),
        (LayerSystem, LAYER, {"weight_decay": -0.1}, "`weight_decay` must be non-negative"),
        (LayerSystem, LAYER, {"grad_bound": float("inf")}, "`grad_bound` must be positive and finite"),
        (LayerSystem, LAYER, {"benefit_slope": "1"}, "`benefit_slope` must be a real number"),
        (UnitSystem, UNIT, {"rate_ratio": 0.0}, "`rate_ratio` must be positive"),
        (UnitSystem, UNIT, {"benefit_slope": float("nan")}, "`benefit_slope` must be positive"),
        (BenefitSystem, BENEFIT, {"gain": 0.0}, "`gain` must be positive"),
        (BenefitSystem, BENEFIT, {"drift": -1.0}, "`drift` must be non-negative"),
        (BenefitSystem, BENEFIT, {"gain_lower": 0.6}, r"`gain_lower` must lie in \[0, 0.5\]"),
        (BenefitSystem, BENEFIT, {"decay": 0.3}, r"`decay_upper` must lie in \[0.3, inf\)"),
        (BenefitSystem, BENEFIT, {"gain_lower": None}, "`gain_lower` must be a real number; got gain_lower=None. Give"),
        (BenefitSystem, BENEFIT, {"decay_upper": None}, "`decay_upper` must be a real number; got decay_upper=None"),
    ],
)
def test_bad_parameters_are_refused(make, base, change, message):
    with pytest.raises(ValueError, match=message):
        make(**{**base, **change})


@pytest.mark.parametrize("state", [[1.0], [[1.0, 2.0, 3.0]], 1.0, [np.nan, 0.0], "ab"])
def test_bad_states_are_refused(state):
    with pytest.raises(ValueError, match="`state` must"):
        LayerSystem(**LAYER).contains(state)


@pytest.mark.parametrize("name", ["catode.theory", "catode.theory.__main__", "catode.theory.networks"])
def test_the_theory_loads_at_import_nothing_that_is_slow_to_load(name):
    heavy = ("torch", "sympy", "numba", "matplotlib", "scipy.stats", "scipy.integrate", "catode.prune", "catode.train")
    code = f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
