"""Continuation in one parameter against the closed forms of the saddles, separatrices and areas."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from test_systems import benefits, layers, numbers, units

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, derive
from catode.theory.basins.continuation import STATUSES, follow
from catode.theory.systems.box import BoxSystem

LAWS = settings(max_examples=15, deadline=None, derandomize=True)
EVERY = pytest.mark.parametrize("systems", [layers, units, benefits], ids=["layer", "unit", "benefit"])
LAYER = partial(LayerSystem, price=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
UNIT = partial(UnitSystem, price=0.1, rate_ratio=1.0, benefit_slope=0.5)
BENEFIT = partial(BenefitSystem, price=0.1, rate_ratio=1.0, gain=0.5)


def only(result, event):
    (bifurcation,) = [b for b in result.bifurcations if b.event == event]
    return bifurcation


def test_the_layer_loses_its_saddle_where_lambda_g_is_kappa_eta():
    @LAWS
    @given(layers, numbers(0.1, 0.9))
    def law(system, share):
        make = partial(
            LayerSystem,
            price=system.price,
            rate_ratio=system.rate_ratio,
            grad_bound=system.grad_bound,
            benefit_slope=system.benefit_slope,
        )
        exact = system.grad_bound * system.benefit_slope / system.price
        result = follow(make, "weight_decay", [share * exact, 1.7 * exact])
        assert abs(only(result, "theta = 1").value - exact) <= 1e-10 * max(1.0, exact)
        assert result.statuses == ("inside", "above")
        assert only(result, "theta = 1").saddle == pytest.approx([make(weight_decay=0.0).saddle[0], 1.0])

    law()


def test_the_unit_loses_its_saddle_where_lambda_is_kappa():
    result = follow(UNIT, "weight_decay", [0.1, 0.9])
    assert abs(only(result, "theta = 1").value - 0.5) <= 1e-10
    assert "above 0.5" in only(result, "theta = 1").meaning
    price = follow(partial(UNIT.func, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5), "price", [0.01, 10.0])
    assert price.bifurcations == ()  # theta* = lambda / kappa whatever the price
    slope = follow(partial(UNIT.func, price=0.1, weight_decay=0.3, rate_ratio=1.0), "benefit_slope", [0.1, 0.2, 1.0])
    assert abs(only(slope, "theta = 1").value - 0.3) <= 1e-10
    assert "below 0.3" in only(slope, "theta = 1").meaning


@pytest.mark.parametrize(("name", "exact"), [("decay", 5.1), ("gain", 0.49), ("price", 0.102), ("drift", 0.01)])
def test_the_benefit_loses_its_saddle_where_a_g_less_delta_is_q(name, exact):
    base = {"price": 0.1, "rate_ratio": 1.0, "gain": 0.5, "decay": 5.0 if name in ("gain", "price") else 5.1}
    base["drift"] = 0.01
    make = partial(BenefitSystem, **{key: value for key, value in base.items() if key != name})
    result = follow(make, name, [0.6 * exact, 1.4 * exact])
    assert abs(only(result, "theta = 1").value - exact) <= 1e-10
    assert ("below" if name in ("gain", "drift") else "above") in only(result, "theta = 1").meaning


def test_drift_empties_the_domain_where_it_reaches_decay_times_price():
    result = follow(partial(BENEFIT, decay=0.5), "drift", [0.0, 0.02, 0.08, 0.2])
    crossing = only(result, "theta = 0")
    assert abs(crossing.value - 0.05) <= 1e-10 and "above 0.05" in crossing.meaning
    assert result.statuses == ("inside", "inside", "below", "below")
    assert result.share[0] > result.share[1] > result.share[2] == result.share[3] == 0.0


def test_a_bifurcation_on_a_given_value_is_found_once():
    assert only(follow(UNIT, "weight_decay", [0.25, 0.5, 0.75]), "theta = 1").value == 0.5
    assert only(follow(UNIT, "weight_decay", [0.25, 0.5]), "theta = 1").value == 0.5
    assert only(follow(UNIT, "weight_decay", [0.5, 0.75]), "theta = 1").value == 0.5
    assert follow(BENEFIT, "gain", [0.2, 0.4, 0.6]).bifurcations == ()  # theta* = 0 throughout, no crossing


@EVERY
def test_the_share_is_the_fraction_of_a_grid_in_the_domain(systems):
    @LAWS
    @given(systems)
    def law(system):
        result = follow(lambda x: system, "x", [0.0, 1.0], window=(0.0, 1.5 * system.saddle[0]))
        centres = (np.arange(300) + 0.5) / 300
        grid = np.stack(np.meshgrid(1.5 * system.saddle[0] * centres, centres), axis=-1)
        assert abs(result.share[0] - system.contains(grid).mean()) < 5e-3
        assert result.share[0] == result.share[1]
        assert np.array_equal(result.separatrix[0], system.separatrix(result.sizes))

    law()


def test_the_share_of_a_straight_domain_is_a_triangle():
    @LAWS
    @given(benefits)
    def law(system):
        assume(not system.empty)
        rise, slope = float(system.separatrix(0.0)), system.growth_rate / system.gain
        assume(0.0 < rise < 1.0)
        width = 2.0 * rise / slope
        result = follow(lambda x: system, "x", [0.0, 1.0], window=(0.0, width))
        assert result.share[0] == pytest.approx(0.25 * rise, rel=1e-12)

    law()


@EVERY
def test_a_higher_price_never_shrinks_the_domain(systems):
    @LAWS
    @given(systems)
    def law(system):
        result = follow(
            lambda price: dataclasses.replace(system, price=price),
            "price",
            system.price * np.array([0.5, 1.0, 2.0]),
            window=(0.0, 3.0 * system.saddle[0]),
        )
        assert np.all(np.diff(result.share) >= -1e-12)

    law()


def test_a_field_of_ones_own_gives_what_the_closed_form_gives():
    def make(weight_decay):
        return BoxSystem.from_expressions(
            "u, t", f"2*u*(t/2 - {weight_decay!r}), u/4 - 1/10", lower=(0, 0), upper=(4, 1)
        )

    values, sizes = [0.1, 0.45, 0.7], np.linspace(0.05, 1.0, 7)
    own = follow(make, "weight_decay", values, window=(0.0, 1.0), sizes=sizes)
    closed = follow(UNIT, "weight_decay", values, window=(0.0, 1.0), sizes=sizes)
    assert own.statuses == closed.statuses == ("inside", "inside", "above")
    assert own.saddles == pytest.approx(closed.saddles)
    assert own.share[:2] == pytest.approx(closed.share[:2], abs=1e-9) and np.isnan(own.share[2])
    for mine, exact in zip(own.separatrix[:2], closed.separatrix[:2], strict=True):
        inside = np.isfinite(mine)
        assert inside.sum() >= 4 and mine[inside] == pytest.approx(exact[inside], abs=1e-9)
        assert np.all(exact[mine == np.inf] >= 1.0) and np.all(exact[mine == -np.inf] <= 0.0)
    assert abs(only(own, "t = 1").value - 0.5) <= 1e-10
    assert np.all(np.isnan(own.separatrix[2]))


def test_a_fold_is_a_lost_saddle_and_a_rising_manifold_is_folded():
    def make(c):
        return BoxSystem.from_expressions("x, y", f"(x - 1/2)**2 - ({c!r}), (1/2 - y)/4", lower=(0, 0), upper=(1, 1))

    result = follow(make, "c", [-0.04, -0.01, 0.01, 0.04], window=(0.0, 1.0))
    assert result.statuses == ("lost", "lost", "folded", "folded")  # the stable manifold is the line x = const
    assert np.isnan(result.saddles[:2]).all()
    assert result.saddles[2:] == pytest.approx(np.array([[0.6, 0.5], [0.7, 0.5]]))
    assert result.bifurcations == ()
    assert set(result.statuses) <= set(STATUSES)


def test_noise_shrinks_the_domain_to_the_tolerance_and_a_larger_batch_restores_it():
    def noise(batch):
        return {"noise": 0.5 / np.sqrt(batch), "benefit_noise": 0.0, "step_time": 0.01, "risk": 0.05}

    system = BENEFIT(decay=0.05)
    result = follow(lambda batch: system, "batch", [1, 4, 16, 64, 256, 1e9], noise=noise, window=(0.0, 0.2))
    assert np.all(np.diff(result.share) == 0.0)
    assert np.all(np.diff(result.safe_share) >= 0.0) and np.all(result.safe_share <= result.share)
    below = system.separatrix(np.array([0.0, 0.1]))  # a benefit that may reach the price is never safe
    exact = 0.5 * below.sum() * 0.1 / 0.2
    assert result.safe_share[-1] == pytest.approx(exact, rel=1e-3)
    known = {"price": 0.1, "gain": 0.5, "decay": 0.05, "rate_ratio": 1.0, "drift": 0.0}
    assert np.array_equal(result.tolerance[3], derive(benefit=result.sizes, **known, **noise(64)).values)
    event = only(result, "tolerance = 0")
    assert abs(float(derive(benefit=0.0, **known, **noise(event.value)))) < 1e-12
    z, mu = 1.6448536269514722, system.growth_rate  # theta_sep(0) = z sigma / sqrt(mu (2 + tau mu))
    exact = (z * 0.5 / below[0]) ** 2 / (mu * (2.0 + 0.01 * mu))
    assert event.value == pytest.approx(exact, rel=1e-10) and "below 23.0" in event.meaning


GOOD = (LAYER, "weight_decay", [0.1, 1.0])


def line(c):
    return BoxSystem.from_expressions("x", "-x", lower=(0,), upper=(1,))


def many(c):
    return BoxSystem.from_expressions("x, y", "(x-1/4)*(x-1/2)*(x-3/4), 1/2 - y", lower=(0, 0), upper=(1, 1))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((LAYER(weight_decay=0.1), *GOOD[1:]), {}, "`make_system` must be callable"),
        ((LAYER, "a b", [0.1, 1.0]), {}, "`name` must be the name of a parameter"),
        ((LAYER, "weight_decay", [0.1]), {}, r"`values` must have shape \(n,\) with n >= 2"),
        (
            (LAYER, "weight_decay", [0.1, 0.3, 0.2]),
            {},
            r"`values` must increase, and so exceed 0.3; got values\[2\]=0.2",
        ),
        ((LAYER, "weight_decay", [-1.0, 0.3]), {}, "`weight_decay` must be non-negative"),
        ((lambda c: 3.0, "c", [0.0, 1.0]), {}, "`make_system` must return a PlanarSystem or a planar BoxSystem"),
        ((line, "c", [0.0, 1.0]), {}, "`make_system` must return a PlanarSystem or a planar BoxSystem"),
        ((many, "c", [0.0, 1.0]), {}, "`make_system` must return a system with one saddle inside its box"),
        (GOOD, {"window": (1.0, 0.5)}, r"`window` must lie in \(1, inf\)"),
        (GOOD, {"window": (-1.0, 0.5)}, r"`window` must lie in \[0, inf\)"),
        (GOOD, {"window": 1.0}, r"`window` must have shape \(2,\)"),
        (GOOD, {"sizes": [[0.1]]}, r"`sizes` must have shape \(m,\)"),
        (GOOD, {"noise": 0.1}, "`noise` must be callable"),
        (GOOD, {"noise": lambda **_: {}}, "`make_system` must return a BenefitSystem where `noise` is given"),
    ],
)
def test_bad_inputs_are_refused(args, options, message):
    with pytest.raises(ValueError, match=message):
        follow(*args, **options)
