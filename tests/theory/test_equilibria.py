"""Equilibria, nullclines and manifolds against closed forms."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_systems import benefits, layers, numbers, units

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, integrate, trace_separatrix
from catode.theory.box import BoxSystem
from catode.theory.equilibria import ENDS, STABILITIES, find, manifolds, nullclines

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
    from catode.theory.equilibria import Equilibrium, _Tracer

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
        (lambda: find("layer"), "`system` must be a BoxSystem or a PlanarSystem"),
        (lambda: find(LAYER, starts=0), "`starts` must be an integer of at least 1"),
        (
            lambda: find(BoxSystem(velocity=lambda x: -x, lower=np.zeros(7), upper=np.ones(7))),
            r"`system` must have at most 729 faces; got system=2187. Freeze",
        ),
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


def test_the_import_loads_no_heavy_library():
    code = (
        "import sys, catode.theory.equilibria, catode.theory.continuation;"
        "print([m for m in ('torch', 'sympy', 'scipy.integrate', 'contourpy', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
