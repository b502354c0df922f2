"""Certificates: what is certified ends removed, what is tampered with fails, and nearly all of D is certified."""

from __future__ import annotations

import dataclasses
import functools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_systems import benefits, layers, numbers, units

from benchmarks.networks import area, certificates, draw_system
from catode.theory import BenefitSystem, LayerSystem, UnitSystem, integrate, integrate_batch
from catode.theory.certificates import Certificate, _certify_polygon, certify
from catode.theory.certificates import certificate as module
from catode.theory.certificates._exact import Segments, bernstein_on_box, evaluate
from catode.theory.systems import growth_rate
from catode.theory.systems.box import BoxSystem

LAWS = settings(max_examples=30, deadline=None, derandomize=True)
LAYER = LayerSystem(price=0.1, weight_decay=0.3, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
BENEFIT = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.1, drift=0.004)
EVERY = pytest.mark.parametrize("system", [LAYER, UNIT, BENEFIT], ids=["layer", "unit", "benefit"])


def edge_states(proof, rng, n):
    """States a hair inside the certified polygon, in the box."""
    polygon = np.array([[float(x) for x in p] for p in proof.chains[0]])
    k = rng.integers(0, len(polygon) - 1, n)
    s = rng.uniform(0.0, 1.0, (n, 1))
    states = (polygon[k] * (1 - s) + polygon[k + 1] * s) * (1.0 - 1e-9)
    return np.stack([states[:, 0], np.minimum(states[:, 1], 1.0)], axis=1)


def reseal(proof, **change):
    """A forger's certificate: changed, with a seal that fits."""
    changed = dataclasses.replace(proof, **change)
    return dataclasses.replace(changed, seal=module._digest(changed._body()))


@pytest.mark.parametrize("kind", ["layer", "unit"])
def test_almost_all_of_the_domain_of_50_drawn_systems_is_certified(kind):
    shares, _ = certificates(kind, 50)
    assert len(shares) == 50 and np.all((shares >= 0.99) & (shares <= 1.0 + 1e-4))  # 1e-4: of the exact area's sum


def test_certified_starts_end_removed_in_200_drawn_systems():
    rng = np.random.default_rng(2)
    starts = 0
    for i in range(201):
        system = draw_system(rng, ("layer", "unit", "benefit")[i % 3], 0.02, 1.4)
        proof = certify(system, slack=0.04, size=2.0)
        inside = rng.uniform(0.0, 1.0, (40, 2)) * [2.0, 1.0]
        edge = edge_states(proof, rng, 8)
        states = np.concatenate([inside[proof.contains(inside)], edge[edge[:, 0] <= 2.0]])
        assert proof.contains(states).all() and len(states)
        starts += len(states)
        ends = integrate_batch(system, states, 1e4, rtol=1e-5, atol=1e-8, absorbing=True)  # finer than the slack
        assert np.all(ends.statuses == "pruned"), (system, states[ends.statuses != "pruned"])
        if i % 10 == 0:  # by the other integrator too
            assert integrate(system, states[-1], 1e4, rtol=1e-5, atol=1e-8).status == "pruned"
    assert starts >= 3000


@EVERY
def test_the_gauge_is_a_lyapunov_function_with_the_stated_rate(system):
    proof = certify(system)
    rng = np.random.default_rng(3)
    for state in edge_states(proof, rng, 6) * rng.uniform(0.2, 1.0, (6, 1)):
        path = integrate(system, state, 1e3, rtol=1e-10)
        value = proof.value(path.states)
        assert np.all(np.diff(value) <= 1e-9)
        room = (1.0 - value[0]) * np.exp(float(proof.rate) * path.times)
        assert np.all(1.0 - value >= room * (1.0 - 1e-6) - 1e-9)
        assert path.status == "pruned"
        assert path.times[-1] <= np.log(1.0 / (1.0 - value[0])) / float(proof.rate) * (1.0 + 1e-6)


def test_for_the_layer_the_gauge_is_the_linear_function_of_the_theory():
    proof = certify(LAYER, slack=1e-4)
    mu, level = LAYER.growth_rate, LAYER.price / LAYER.benefit_slope * (LAYER.growth_rate + LAYER.weight_decay)
    states = np.random.default_rng(4).uniform(0.0, 0.2, (50, 2))
    linear = (mu * states[:, 0] + LAYER.grad_bound * states[:, 1]) / level
    assert np.allclose(proof.value(states), linear, rtol=1e-3)
    assert np.isclose(float(proof.rate), mu, rtol=1e-3)


@EVERY
def test_the_exact_field_is_that_of_the_system(system):
    proof = certify(system)
    for state in np.random.default_rng(5).uniform(0.0, 1.0, (20, 2)):
        exact = [evaluate(f, tuple(map(Fraction, state.tolist()))) for f in proof.field]
        assert np.allclose([float(x) for x in exact], system.field(state), rtol=1e-13, atol=1e-15)


@EVERY
def test_json_gives_back_the_same_certificate_and_proof(system):
    proof = certify(system)
    again = Certificate.from_json(proof.to_json())
    assert again == proof and again.verify() and again.stays
    states = np.random.default_rng(6).uniform(0.0, 1.0, (200, 2))
    assert np.array_equal(again.contains(states), proof.contains(states))
    assert not (again.contains(states) & ~system.contains(states)).any()


def test_any_change_of_the_text_is_found():
    proof = certify(UNIT, slack=0.01)
    body = json.loads(proof.to_json())

    def altered(change):
        copy = json.loads(json.dumps(body))
        change(copy)
        return Certificate.from_json(json.dumps(copy))

    assert altered(lambda copy: None).verify()
    assert not altered(lambda c: c["chains"][0][3].__setitem__(1, "1/7")).verify()
    assert not altered(lambda c: c["system"][1].__setitem__(1, "1/5")).verify()  # a dearer unit: true, yet not ours
    assert not altered(lambda c: c["upper"].__setitem__(0, "2")).verify()
    assert "seal" in altered(lambda c: c["names"].__setitem__(0, "norm")).fault()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.__setitem__("certificate", 999),
        lambda c: c.__setitem__("certificate", True),
        lambda c: c.__setitem__("certificate", "1"),
        lambda c: c.pop("certificate"),
        lambda c: c.__setitem__("note", "approved"),
        lambda c: c["names"].append(7) or c["names"].pop(0),
        lambda c: c["system"][1].append("1/2"),
        lambda c: c["lower"].__setitem__(0, "0/7"),
    ],
)
def test_what_a_certificate_would_not_write_is_not_read(change):
    """Every byte of the text counts: what the reader would drop or rewrite is refused, before the seal is looked at."""
    body = json.loads(certify(UNIT, slack=0.01).to_json())
    change(body)
    with pytest.raises(ValueError, match="`text` must be the JSON of a certificate"):
        Certificate.from_json(json.dumps(body))


def test_another_version_is_refused_with_its_number_and_a_second_value_for_a_key():
    text = certify(UNIT, slack=0.01).to_json()
    with pytest.raises(ValueError, match="`certificate` must be 1, the version that is read here; got certificate=999"):
        Certificate.from_json(text.replace('"certificate":1', '"certificate":999'))
    with pytest.raises(ValueError, match="give every key once"):
        Certificate.from_json(text.replace('"kind":', '"kind":"order","kind":', 1))
    with pytest.raises(ValueError, match="RecursionError"):
        Certificate.from_json("[" * 100_000)


@EVERY
def test_a_forged_seal_does_not_help(system):
    proof = certify(system)
    chain = proof.chains[0]
    larger = tuple(tuple(x * Fraction(101, 100) for x in p) for p in chain)
    assert "cross" in reseal(proof, chains=(larger,)).fault()
    for name in ("price", "rate_ratio"):  # a lower price or a slower theta shrinks D
        pairs = tuple((key, value * Fraction(9, 10) if key == name else value) for key, value in proof.system[1:])
        assert not reseal(proof, system=(proof.system[0], *pairs)).verify()
    folded = (chain[0], (chain[-1][0], chain[0][1] * 2), chain[-1])
    assert "fall" in reseal(proof, chains=(folded,)).fault()
    cut = (*chain[:-1], (chain[-1][0], Fraction(1, 100)))
    assert "lead" in reseal(proof, chains=(cut,)).fault()
    negative = tuple((key, -value) for key, value in proof.system[1:])
    assert "out of range" in reseal(proof, system=(proof.system[0], *negative)).fault()
    assert "No comparison system" in reseal(proof, system=("Spiral", *proof.system[1:])).fault()


def test_a_polygon_that_runs_along_the_size_axis_is_refused():
    proof = certify(LAYER)
    (x, y) = proof.chains[0][-1]
    assert "fall" in reseal(proof, chains=((*proof.chains[0], (x * Fraction(1001, 1000), y)),)).fault()


@pytest.mark.parametrize("kind", [LayerSystem, UnitSystem])
def test_without_weight_decay_the_domain_ends_at_the_size_where_theta_turns(kind):
    bound = {"grad_bound": 1.0} if kind is LayerSystem else {}
    system = kind(price=0.1, weight_decay=0.0, rate_ratio=1.0, benefit_slope=0.5, **bound)
    proof = certify(system)
    assert proof.stays and proof.share >= 0.98 * area(system)
    assert 0.98 * system.saddle[0] < float(proof.chains[0][-1][0]) < system.saddle[0]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_size_does_not_matter(scale):
    scaled = dataclasses.replace(UNIT, price=UNIT.price * scale, rate_ratio=UNIT.rate_ratio / scale)
    one, other = certify(UNIT, slack=0.02), certify(scaled, slack=0.02, size=scale)
    assert np.isclose(other.share, one.share, rtol=1e-6)
    states = np.random.default_rng(10).uniform(0.0, 1.0, (300, 2))
    assert np.allclose(other.value(states * [scale, 1.0]), one.value(states), rtol=1e-6)
    assert np.array_equal(other.contains(states * [scale, 1.0]), one.contains(states))


@LAWS
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.floats(0.9, 1.2))
def test_whatever_polygon_verifies_lies_in_the_domain(seed, where, factor):
    rng = np.random.default_rng(seed)
    system = draw_system(rng, "unit")
    proof = certify(system, slack=0.1)
    chain = list(proof.chains[0])
    k = int(where * (len(chain) - 1))
    chain[k] = tuple(x * Fraction(factor) for x in chain[k])
    forged = reseal(proof, chains=(tuple(chain),))
    if forged.verify():
        points = np.array([[float(x) for x in p] for p in chain[1:]])
        assert np.all(points[:, 1] <= system.separatrix(points[:, 0]) + 1e-9)


@pytest.mark.parametrize("systems", [layers, units, benefits], ids=["layer", "unit", "benefit"])
def test_order_is_preserved_by_the_projected_flow(systems):
    """The order lemma of docs/certificates.md: ordered starts stay ordered, through every arrival at a face."""

    @LAWS
    @given(systems, *[numbers(0.0, 2.0)] * 2, *[numbers(0.0, 1.0)] * 2, numbers(0.1, 3.0))
    def law(system, size, more, theta, share, time):
        size, theta = size * system.saddle[0], np.array([theta, theta + share * (1.0 - theta)])
        starts = np.stack([[size, size * (1.0 + more)], np.minimum(theta, 1.0)], axis=-1)
        low, high = (integrate(system, start, time / system.growth_rate, events=False).end for start in starts)
        assert np.all(low <= high + 1e-6 * (1.0 + np.abs(high)))

    law()


@LAWS
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_order_is_preserved_in_cooperative_boxes_and_by_what_stays_below(seed, d):
    """Random cooperative fields with a face for every coordinate; beside them a flow that is pushed down at random."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(d, d))
    matrix[~np.eye(d, dtype=bool)] = np.abs(matrix[~np.eye(d, dtype=bool)])
    centre, push, pace = rng.random(d), rng.random(d), rng.uniform(1.0, 9.0, d)

    def system(strength):
        def velocity(y):
            return np.tanh((y - centre) @ matrix.T) - strength * push * (1.0 + np.sin(pace * y.sum(-1, keepdims=True)))

        return BoxSystem(velocity=velocity, lower=np.zeros(d), upper=np.ones(d))

    low = rng.random(d)
    high = low + rng.random(d) * rng.integers(0, 2, d) * (1.0 - low)
    above = integrate(system(0.0), high, 3.0).end
    for strength, start in ((0.0, low), (0.3, low), (0.3, high)):
        assert np.all(integrate(system(strength), start, 3.0).end <= above + 1e-6)


def test_order_is_not_preserved_where_the_system_is_not_cooperative():
    system = box("1/2 - x/9, 1/3 - x")
    low, high = (integrate(system, start, 1.0).end for start in ([0.1, 0.5], [0.9, 0.5]))
    assert low[0] < high[0] and low[1] > high[1]


@functools.cache
def staircase():
    text = "2*u*(theta/2 - 1/5), u/4 - 1/10"
    return certify(BoxSystem.from_expressions("u, theta", text, lower=(0, 0), upper=(1, 1)), directions=4)


def memory():
    text = "theta/2 - b/20, 2*(b - B), B - 1/10"
    return BoxSystem.from_expressions("b, B, theta", text, lower=(0, 0, 0), upper=(1, 1, 1))


def test_the_staircase_covers_most_of_the_domain_of_a_plane_system():
    exact = UnitSystem(price=0.1, weight_decay=0.2, rate_ratio=1.0, benefit_slope=0.5)
    proof = staircase()
    assert proof.kind == "order" and Certificate.from_json(proof.to_json()) == proof
    states = np.random.default_rng(8).uniform(0.0, 1.0, (4000, 2))
    inside = proof.contains(states)
    assert not (inside & ~exact.contains(states)).any()
    assert np.isclose(inside.mean(), proof.share, atol=0.03)
    assert 0.8 * area(exact) <= proof.share <= area(exact)


def test_the_staircase_in_three_dimensions_stays_below_the_known_separatrix():
    proof = certify(memory(), directions=2, slack=5e-3)
    states = np.random.default_rng(9).uniform(0.0, 0.3, (6000, 3))
    inside = proof.contains(states)
    rate = float(growth_rate(0.05, 1.0, 0.5, 0.5))
    form = np.array([1.0, (rate + 0.05) * 0.5, 0.5 / rate])  # docs/theory.md section 2, with T = 1/2
    assert inside.sum() > 100
    assert np.all(states[inside] @ form < form @ [0.1, 0.1, 0.01])
    system, y = memory(), states[inside]
    for _ in range(2000):
        y = system.project(y + 0.05 * system.field(y))
    assert np.all(y[:, 2] == 0.0) and y.max() < 0.02


def test_forged_order_certificates_fail():
    proof = staircase()
    chain = proof.chains[0]
    raised = (tuple(min(x + Fraction(1, 50), Fraction(1)) for x in chain[0]), *chain[1:])
    assert "super-solution" in reseal(proof, chains=(raised, *proof.chains[1:])).fault()
    assert "ends neither" in reseal(proof, chains=(chain[:2],), durations=(proof.durations[0][:1],)).fault()
    assert "point down" in reseal(proof, goal=(Fraction(9, 10), Fraction(9, 10))).fault()
    halves = tuple(t / 2 for t in proof.durations[0])
    assert "super-solution" in reseal(proof, durations=(halves, *proof.durations[1:])).fault()
    one, two = proof.system
    flipped = (tuple((p, -c if p == (1, 1) else c) for p, c in one), two)
    assert "not cooperative" in reseal(proof, system=flipped).fault()
    with pytest.raises(ValueError, match="`value` must be asked of"):
        proof.value([0.1, 0.1])


@LAWS
@given(st.lists(st.fractions(-3, 3, max_denominator=9), min_size=9, max_size=9), st.data())
def test_bernstein_coefficients_enclose_the_polynomial(coefficients, data):
    powers = [(i, j) for i in range(3) for j in range(3)]
    polynomial = dict(zip(powers, coefficients, strict=True))
    numbers = st.fractions(-2, 2, max_denominator=7)
    a, b = data.draw(st.tuples(numbers, numbers)), data.draw(st.tuples(numbers, numbers))
    (row,), factor = Segments([polynomial])(a, b)
    low, high = tuple(map(min, a, b)), tuple(map(max, a, b))
    tensor = bernstein_on_box(polynomial, low, high)
    assert Fraction(row[0], factor) == evaluate(polynomial, a)
    assert Fraction(row[-1], factor) == evaluate(polynomial, b)
    assert tensor[0, 0] == evaluate(polynomial, low)
    assert tensor[-1, -1] == evaluate(polynomial, high)
    for s in (Fraction(1, 3), Fraction(4, 7)):
        point = tuple(x + s * (y - x) for x, y in zip(a, b, strict=True))
        value = evaluate(polynomial, point)
        assert min(row) <= value * factor <= max(row)
        assert min(tensor.flat) <= value <= max(tensor.flat)


def box(text, lower=(0, 0), upper=(1, 1)):
    return BoxSystem.from_expressions("x, y", text, lower=lower, upper=upper)


EMPTY = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05, drift=0.01)


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        (box("y - x, -x/2 - y"), {}, r"cooperative in its box; got system\[1, 0\]=-0.5. .*d\(y'\)/d\(x\), is -0.5 at"),
        (box("(x - 1/2)*y - x, x/9 - y"), {}, r"entry \[0, 1\], d\(x'\)/d\(y\), is -0.5 at \(x, y\) = \(0, "),
        (box("sin(y) - x, x - y"), {}, "`system` must be polynomial with rational coefficients; got .*sin"),
        (box("y - x, x - 1/10", upper=(np.inf, 1)), {}, "`system` must have a bounded box"),
        (box("y + 1 - x, x - y"), {}, "must rest at the lower corner of its box; .*x rises"),
        (box("y + x, x/2 - y"), {}, "must attract a neighbourhood of the lower corner"),
        (BoxSystem(velocity=lambda s: -s, lower=(0, 0), upper=(1, 1)), {}, "must know its field in symbols"),
        ("layer", {}, "`system` must be a LayerSystem, UnitSystem, BenefitSystem or BoxSystem"),
        (LAYER, {"slack": 0.0}, r"`slack` must lie in \(0, 0.5\)"),
        (LAYER, {"size": -1.0}, "`size` must be positive"),
        (box("y/9 - x, x/9 - y"), {"directions": 0}, "`directions` must be an integer in"),
        (EMPTY, {}, "`slack` must leave a part of D; .*D is empty"),
    ],
)
def test_bad_inputs_are_refused(system, options, message):
    with pytest.raises(ValueError, match=message):
        certify(system, **options)


def test_too_small_a_slack_is_refused(monkeypatch):
    monkeypatch.setattr(_certify_polygon, "_MAX_EDGES", 60)
    with pytest.raises(ValueError, match="`slack` must leave enough margin for the exact proof; got slack=1e-08"):
        certify(UNIT, slack=1e-8)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", '{"kind": "magic"}', '{"kind": "lyapunov", "system": []}'),
        *('{"kind": "order", "system": [[[[0], 1]]]}', '{"kind": "order", "system": [[[[0], "one"]]]}'),
    ],
)
def test_text_that_is_no_certificate_is_refused(text):
    with pytest.raises(ValueError, match="`text` must"):
        Certificate.from_json(text)


def test_membership_is_decided_without_rounding_error():
    proof = certify(LAYER)
    (x0, y0), (x1, _) = proof.chains[0]
    for x in np.linspace(0.0, float(x1), 23):
        edge = y0 * (1 - Fraction(float(x)) / x1)
        for y in (np.nextafter(float(edge), -1), float(edge), np.nextafter(float(edge), 1)):
            if y >= 0.0:
                assert bool(proof.contains([x, y])) == (Fraction(float(y)) <= edge)
    assert x0 == 0 and not proof.contains([-0.1, 0.0]) and not proof.contains([0.0, -1e-300])
    negative = certify(BENEFIT).contains([[-5.0, 0.05], [-5.0, 0.9]])
    assert negative.tolist() == [True, False]


def test_a_drift_past_the_price_is_said():
    proof = certify(BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, drift=0.01))
    assert proof.verify() and not proof.stays
