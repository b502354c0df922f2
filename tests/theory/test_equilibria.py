"""Equilibria against closed forms."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_systems import benefits, layers, units

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, integrate
from catode.theory.basins.equilibria import STABILITIES, find
from catode.theory.systems.box import BoxSystem

SLOW = settings(max_examples=8, deadline=None, derandomize=True)
EVERY = pytest.mark.parametrize("systems", [layers, units, benefits], ids=["layer", "unit", "benefit"])
LAYER = LayerSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
BENEFIT = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)


def box(coordinates, expressions, lower, upper, *, known=True):
    system = BoxSystem.from_expressions(coordinates, expressions, lower=lower, upper=upper)
    return (
        system
        if known
        else BoxSystem(velocity=system.velocity, lower=system.lower, upper=system.upper, names=system.names)
    )


def classes(system):
    return {tuple(e.state.round(9).tolist()): e.stability for e in find(system)}


def the_saddle(system):
    (saddle,) = [e for e in find(system) if e.stability == "saddle"]
    return saddle


def expected(system):
    """Closed forms for the comparison systems with a positive decay: state to class, for those in the box."""
    size, theta = system.saddle
    states = {(0.0, 0.0): "stable node"}
    if 0.0 < theta < 1.0:
        states[size, theta] = "saddle"
    if isinstance(system, LayerSystem) and theta < 1.0:
        states[system.grad_bound / system.weight_decay, 1.0] = "stable node"
    if isinstance(system, BenefitSystem):
        if system.drift > 0.0:
            del states[0.0, 0.0]
        if 0.0 < system.drift / system.decay < size:
            states[system.drift / system.decay, 0.0] = "stable node"
        if theta < 1.0:
            states[(system.gain + system.drift) / system.decay, 1.0] = "stable node"
    return states


@EVERY
def test_comparison_systems_have_the_equilibria_of_their_closed_forms(systems):
    seen = set()

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(systems)
    def law(system):
        assume(getattr(system, "weight_decay", getattr(system, "decay", 0.0)) > 1e-3)
        assume(min(abs(system.saddle[1]), abs(system.saddle[1] - 1.0)) > 1e-6)
        assume(getattr(system, "drift", 0.0) == 0.0 or system.drift > 1e-6)
        found, known = find(system), expected(system)
        assert len(found) == len(known)
        for state, stability in known.items():
            (match,) = [e for e in found if np.allclose(e.state, state, rtol=1e-9, atol=1e-12)]
            assert match.stability == stability and match.isolated
            assert not match.resting or state == (0.0, 0.0)
            if stability == "saddle":
                assert np.isclose(match.eigenvalues[-1].real, system.growth_rate, rtol=1e-9)
            seen.add(stability)

    law()
    assert seen == {"stable node", "saddle"}


@EVERY
def test_the_projected_flow_stands_still_at_each_equilibrium(systems):
    @SLOW
    @given(systems)
    def law(system):
        for e in find(system):
            scale = np.abs(system.jacobian(e.state)).max() * (1.0 + np.abs(e.state).max())
            assert np.abs(system.projected_field(e.state)).max() <= 1e-10 * scale
            assert e.stability in STABILITIES
            assert e.interior == (not e.pushed and not e.resting)
            assert all(np.sign(e.speed[i]) == e.face[i] for i in e.pushed)

    law()


@EVERY
def test_stable_ones_attract_and_others_do_not(systems):
    @SLOW
    @given(systems, st.integers(0, 3))
    def law(system, seed):
        for e in find(system):
            if e.stability == "degenerate":
                continue
            rng = np.random.default_rng(seed)
            offset = 1e-4 * system.saddle[0] * rng.uniform(0.1, 1.0, 2) * rng.choice([-1.0, 1.0], 2)
            near = system.project(e.state + offset)
            rates = e.eigenvalues.real
            horizon = 3.0 / -rates.max() if e.stable else 4.0 / rates.max()
            end = integrate(system, near, horizon, events=False).end
            assert (np.linalg.norm(end - e.state) < 0.3 * np.linalg.norm(offset)) == e.stable

    law()


def test_no_eigenvalue_is_taken_across_the_clamp():
    kept = next(e for e in find(BENEFIT) if e.face == (0, 1))
    assert kept.eigenvalues == pytest.approx([-0.05], rel=1e-12)  # the raw Jacobian there has +0.68 and -0.73
    assert kept.pushed == (1,) and kept.speed[1] == pytest.approx(9.9)
    assert kept.state == pytest.approx([10.0, 1.0])


def test_a_zero_outside_the_box_is_no_equilibrium():
    assert classes(BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=6.0)) == {(0.0, 0.0): "stable node"}
    outside = box("x, y", "x - 2, y - 1/2", (0, 0), (1, 1))
    assert classes(outside) == {(0.0, 0.0): "stable node", (0.0, 1.0): "stable node", (0.0, 0.5): "saddle"}


def test_a_saddle_on_a_face_is_degenerate_there():
    system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=5.0)  # theta* = 1
    (on,) = [e for e in find(system) if e.face == (0, 1)]
    assert on.resting == (1,) and on.pushed == () and on.stability == "degenerate" and on.isolated
    assert on.state == pytest.approx([0.1, 1.0])


def test_a_continuum_is_named_so():
    found = find(BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0))  # b' = 0 on theta = 0
    assert {e.stability for e in found} == {"degenerate"}
    line = [e for e in found if e.face == (0, -1)]
    assert line and not any(e.isolated for e in line)
    assert all(e.state[0] <= 0.1 + 1e-12 for e in line)


@pytest.mark.parametrize("known", [True, False], ids=["expressions", "function"])
@pytest.mark.parametrize(
    ("expressions", "stability"),
    [
        ("-x, -2*y", "stable node"),
        ("x, 2*y", "unstable node"),
        ("-x + y, -x - y", "stable focus"),
        ("x + y, -x + y", "unstable focus"),
        ("y, x", "saddle"),
        ("y, -x", "centre"),
        ("x**2, -y", "degenerate"),
    ],
)
def test_linear_parts_have_their_textbook_class(expressions, stability, known):
    system = box("x, y", expressions, (-1, -1), (1, 1), known=known)
    (middle,) = [e for e in find(system) if np.abs(e.state).max() < 1e-6]
    assert middle.stability == stability
    assert middle.interior and middle.isolated and middle.stable == stability.startswith("stable")


@pytest.mark.parametrize("known", [True, False], ids=["expressions", "function"])
def test_a_face_that_attracts_makes_a_saddle_of_an_unstable_node(known):
    system = box("x, y, z", "x - 1/2, y - 1/4, 1 + x", (0, 0, 0), (1, 1, 1), known=known)
    found = classes(system)
    assert found[0.5, 0.25, 1.0] == "saddle"
    assert found[1.0, 0.25, 1.0] == "saddle" and found[1.0, 0.0, 1.0] == "stable node"
    assert len(found) == 9 and all(z == 1.0 for _, _, z in found)


def test_algebra_and_search_agree_on_random_cubics():
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.lists(st.integers(-9, 9), min_size=12, max_size=12))
    def law(k):
        terms = "{}*x**3 + {}*x*y + {}*y**2 + {}*x + {}*y + {}/10"
        text = f"{terms.format(*k[:6])}, {terms.format(*k[6:])}"
        solved = find(box("x, y", text, (-1, -1), (1, 1)))
        assume(all(np.abs(e.eigenvalues.real).min(initial=1.0) > 1e-2 and not e.resting for e in solved))
        assume(all(e.isolated for e in solved) and all(e.origin == "solved" for e in solved))
        searched = find(box("x, y", text, (-1, -1), (1, 1), known=False), starts=200)
        assert {tuple(e.state.round(6) + 0.0) for e in solved} == {tuple(e.state.round(6) + 0.0) for e in searched}

    law()


def test_algebra_finds_every_root_of_a_known_grid():
    cubic = "({0} - 1/5)*({0} - 1/2)*({0} - 4/5)"
    found = classes(box("x, y", f"-{cubic.format('x')}, -{cubic.format('y')}", (0, 0), (1, 1)))
    roots = (0.2, 0.5, 0.8)
    stability = {0: "stable node", 1: "saddle", 2: "unstable node"}
    assert found == {(x, y): stability[(x == 0.5) + (y == 0.5)] for x in roots for y in roots}


def test_a_vanishing_tail_is_no_equilibrium():
    assert find(BoxSystem.from_expressions("x", "exp(-x)", lower=(0,), upper=(np.inf,))) == ()
    (rest,) = find(BoxSystem.from_expressions("x", "cos(x) - x", lower=(0,), upper=(1,)))
    assert rest.state == pytest.approx([0.7390851332151607], rel=1e-14) and rest.origin == "searched"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("layer"), "`system` must be a BoxSystem or a PlanarSystem"),
        (lambda: find(LAYER, starts=0), "`starts` must be an integer of at least 1"),
        (lambda: find(LAYER, max_faces=0), "`max_faces` must be an integer of at least 1"),
    ],
)
def test_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_import_loads_no_heavy_library():
    code = (
        "import sys, catode.theory.basins.curves, catode.theory.basins.continuation;"
        "print([m for m in ('torch', 'sympy', 'scipy.integrate', 'contourpy', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
