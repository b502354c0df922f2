"""Constants of real networks are bounds, the domains they give converge, and Theorem 3.1 on networks drawn at random."""

from __future__ import annotations

import dataclasses
import doctest
import functools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from benchmarks import _common
from benchmarks import networks as benchmark
from catode.theory import networks as module
from catode.theory.flow import integrate
from catode.theory.networks import (
    COORDINATES,
    Structure,
    bounds,
    coverage,
    draw,
    follow,
    natural_radius,
    usual_norm,
)
from catode.theory.symbolic import GatedNetwork

# No shrinking: a seed has no simpler form, and each takes a second.
FEW = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
SEEDS = st.integers(0, 10**6)
KINDS = pytest.mark.parametrize("kind", ["layer", "unit"])
EVERY = pytest.mark.parametrize("coordinates", COORDINATES)


def network(**change):
    plain = {
        "inputs": [[1.0], [-0.5]],
        "targets": [[1.8], [-1.0]],
        "widths": (1,),
        "prices": 0.05,
        "weight_decay": 0.05,
    }
    return GatedNetwork(**plain | {"gated": "layers", "activation": "tanh"} | change)


LABELS = {"targets": [[1.0], [-1.0]], "loss": "logistic", "rate_ratio": 2.0}
TWO = {"widths": (2,), "gated": "units"}
OTHERS = [0.3, 0.9, -0.2, 0.8, 0.5, 0.7]  # the second unit stands at weights 0.9 and 0.8, kept with probability 0.7
CASES = {
    "tanh": lambda: Structure(network()),
    "relu": lambda: Structure(
        network(activation="relu", inputs=[[1.0, 0.2], [-0.5, 0.7]], targets=[[1.8, 0], [0.4, 1]])
    ),
    "identity": lambda: Structure(network(activation="identity", widths=(2,))),
    "no decay": lambda: Structure(network(activation="identity", weight_decay=0.0)),
    "logistic": lambda: Structure(network(**LABELS)),
    "unit": lambda: Structure(network(**TWO), 0, OTHERS),
    "linear unit": lambda: Structure(network(**LABELS | TWO, activation="identity"), 0, OTHERS),
}
CASE = pytest.mark.parametrize("name", CASES)


@functools.cache
def case(name):
    return CASES[name]()


def ball(structure, radius, n, seed=0):
    """Weights of the structure in a ball, many of them at its surface."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, len(structure.weights)))
    return w * (radius * np.minimum(2.0 * rng.random(n), 1.0) / np.linalg.norm(w, axis=1))[:, None]


def climb(structure, radius, value, rounds=15, n=200):
    """Largest value found in the ball: random states, then ever smaller steps from the best."""
    rng, w = np.random.default_rng(1), ball(structure, radius, n)
    for i in range(rounds):
        best = w[np.argsort(value(w))[-20:]]
        w = np.repeat(best, n // 20, axis=0)
        w[20:] += radius * 0.7**i * rng.normal(size=w[20:].shape)
        w *= np.minimum(1.0, radius / np.linalg.norm(w, axis=1))[:, None]
        w = np.concatenate([best, w])
    return float(value(w).max())


def gradient(structure, w):
    """grad L1 by the structure's weights."""
    velocity = structure.field(np.concatenate([w, np.ones((len(w), 1))], axis=1))[:, :-1]
    return -velocity - structure.network.weight_decay * w


def claims(structure, found):
    """Each constant as a ratio that must not exceed 1, as a function of the weights."""
    lam, half = structure.network.weight_decay, len(structure.weights) // 2
    tiny = 1e-300

    def norms(w):
        return np.linalg.norm(w[:, :half], axis=1), np.linalg.norm(w[:, half:], axis=1)

    def benefit(w):
        return structure.benefit(structure.embed(w, np.ones(len(w))))

    def drift(w):
        return lam * np.sum(w * gradient(structure, w), axis=1) + found.decay * benefit(w)

    ratios = {
        "eta": lambda w: np.linalg.norm(gradient(structure, w), axis=1) / found.grad_bound,
        "q": lambda w: np.sum(gradient(structure, w) ** 2, axis=1) / found.gain,
        "kappa 4.1": lambda w: np.abs(benefit(w)) / (found.norm_slope * np.linalg.norm(w, axis=1)),
        "kappa 4.2": lambda w: np.abs(benefit(w)) / (found.unit_slope * np.prod(norms(w), axis=0) + tiny),
        "in": lambda w: (
            np.linalg.norm(gradient(structure, w)[:, :half], axis=1) / (found.unit_slope * norms(w)[1] + tiny)
        ),
        "out": lambda w: (
            np.linalg.norm(gradient(structure, w)[:, half:], axis=1) / (found.unit_slope * norms(w)[0] + tiny)
        ),
    }
    return ratios | ({"delta": lambda w: drift(w) / found.drift} if lam > 0.0 else {})


def edge(found, n, seed=0):
    """Starts just inside the certified domain: random weights, the largest theta that is certified."""
    w = ball(found.structure, found.radius, 4 * n, seed)
    w *= np.random.default_rng(seed).random((4 * n, 1))
    low, high = np.zeros(len(w)), np.ones(len(w))
    alive = found.certifies(found.structure.embed(w, low))
    for _ in range(30):
        theta = 0.5 * (low + high)
        inside = found.certifies(found.structure.embed(w, theta))
        low, high = np.where(inside, theta, low), np.where(inside, high, theta)
    return found.structure.embed(w, low)[alive & (low > 0.0)][:n]


# --- the constants -------------------------------------------------------------------------------------------------


@CASE
def test_no_state_in_the_ball_exceeds_a_constant(name):
    structure = case(name)
    for radius in (natural_radius(structure, "layer"), 2.0):
        found = bounds(structure, radius=radius)
        for claim, ratio in claims(structure, found).items():
            worst = climb(structure, radius, ratio)
            assert 0.02 < worst <= 1.0 + 1e-9, (claim, radius, worst)  # 1e-9: rounding of the sampled value


def test_with_one_example_and_linear_units_the_constants_are_attained():
    """x = 1, target 2, M = v w: L1 = (1 - v w)^2 / 2. The worst weights are (R, -R) / sqrt(2)."""
    structure = Structure(network(inputs=[[1.0]], targets=[[2.0]], activation="identity", weight_decay=0.3))
    found, product = bounds(structure, radius=1.4), 0.98
    assert np.isclose(found.unit_slope, 1.0 + product, rtol=1e-11)
    assert np.isclose(found.norm_slope * 1.4, product + product**2 / 2, rtol=1e-11)
    assert np.isclose(found.drift, 0.3 * product**2, rtol=1e-11)
    worst = 1.4 / np.sqrt(2.0) * np.array([[1.0, -1.0]])
    for claim, ratio in claims(structure, found).items():
        attained = (1.0 + product / 2) / (1.0 + product) if claim == "kappa 4.2" else 1.0  # its gradients are the worst
        assert np.isclose(ratio(worst), attained, rtol=1e-9), claim


@pytest.mark.parametrize("name", ["identity", "linear unit"])
def test_linear_units_attain_the_slope_near_zero(name):
    """There b = -w_out' (mean e0 x') w_in, averaged over the gates of the others: the spectral norm is its maximum."""
    structure = case(name)
    found = bounds(structure, radius=1e-3)
    assert climb(structure, 1e-3, claims(structure, found)["kappa 4.2"]) > 0.999


@KINDS
def test_rounding_is_paid_for_where_the_loss_derivative_cancels(kind):
    """The output of the rest meets the target to the last digits, so that floats know no digit of e0."""
    if kind == "layer":
        structure, rest = Structure(network(inputs=[[0.3]], targets=[[0.3]], activation="identity")), Fraction(0)
    else:
        structure = Structure(
            network(**TWO, inputs=[[0.3]], targets=[[0.321]], activation="identity"), 0, [0.0, 0.1, 0.0, 0.7, 0.0, 1.0]
        )
        rest = Fraction(0.1) * Fraction(0.3) * Fraction(0.7)
    x, target = (Fraction(getattr(structure.network, name)[0][0]) for name in ("inputs", "targets"))
    exact = abs(x + rest - target) * x
    first, square = structure.moments()[:2]
    assert exact <= Fraction(first) <= exact + Fraction(1e-11)
    assert x * x <= Fraction(square)


@EVERY
@pytest.mark.parametrize("name", ["tanh", "identity", "logistic", "unit"])
def test_the_comparison_system_bounds_the_real_speeds(name, coordinates):
    structure, h = case(name), 1e-5
    found = bounds(structure, coordinates)
    w = ball(structure, found.radius * (1.0 - h), 300)
    theta = np.random.default_rng(2).random(300)
    velocity = structure.field(np.column_stack([w, theta]))
    size = {
        "layer": lambda w: np.linalg.norm(w, axis=1),
        "unit": lambda w: np.sum(w**2, axis=1),
        "benefit": lambda w: structure.benefit(structure.embed(w, theta)),
    }[coordinates]
    growth = (size(w + h * velocity[:, :-1]) - size(w - h * velocity[:, :-1])) / (2.0 * h)
    limit = found.system.field(np.stack([size(w), theta], axis=-1))
    assert np.all(growth <= limit[:, 0] + 1e-8)
    assert np.all(velocity[:, -1] <= limit[:, 1] + 1e-12)


@CASE
def test_the_natural_ball_is_just_filled_by_the_domain(name):
    structure = case(name)
    system = bounds(structure, "layer").system
    mu, lam = system.growth_rate, system.weight_decay
    assert np.isclose(
        system.price / system.benefit_slope * (mu + lam) / mu, natural_radius(structure, "layer"), rtol=1e-6
    )
    assert np.isclose(bounds(structure, "unit").system.saddle[0], natural_radius(structure, "unit") ** 2, rtol=1e-6)
    found = bounds(structure, "benefit")
    theta = found.system.saddle[1]
    assert not found.system.empty
    assert theta >= 0.5 * found.decay * found.system.price / found.gain * (1.0 - 1e-6)
    shares = [
        bounds(structure, "unit", radius=f * natural_radius(structure, "unit")).share(50) for f in (0.5, 1.0, 2.0)
    ]
    assert shares[1] == max(shares) > 0.0


# --- the domains ---------------------------------------------------------------------------------------------------


def check_domains(structure, seed=0):
    """Starts at the edge of each domain go, inside the ball; returns the bounds and the starts in benefit coordinates."""
    founds = [bounds(structure, coordinates) for coordinates in COORDINATES]
    starts = [edge(found, 20, seed) for found in founds]
    assert [len(some) for some in starts] == [20, 20, 20]
    runs = follow(structure, np.concatenate(starts))
    assert np.all(runs.labels == 1)
    assert np.all(runs.widest <= np.repeat([found.radius for found in founds], 20) * (1.0 + 1e-6))
    return founds[-1], starts[-1]


@CASE
def test_starts_at_the_edge_of_the_domain_are_pruned_inside_the_ball(name):
    structure = case(name)
    found, starts = check_domains(structure)
    state = np.stack([structure.benefit(starts), starts[:, structure.theta]], axis=-1)
    for start, limit in list(zip(starts, found.system.time_to_zero(state), strict=True))[:2]:
        path = integrate(structure, start[[*structure.weights, structure.theta]], 1e3, rtol=1e-6)
        assert path.status == "pruned"
        assert path.times[-1] <= limit  # when theta first meets 0


@FEW
@given(SEEDS, st.sampled_from(["layer", "unit"]), st.floats(1.0, 10.0))
def test_bounds_and_domains_hold_in_networks_drawn_at_random(seed, kind, wait):
    """`wait` is the time 1 / (rho g) in which a useless structure goes: in `draw` it may be 200."""
    structure = draw(seed, kind, width=1 + seed % 2)
    rate_ratio = 1.0 / (wait * structure.price)
    structure = dataclasses.replace(structure, network=dataclasses.replace(structure.network, rate_ratio=rate_ratio))
    found = check_domains(structure, seed)[0]
    for claim, ratio in claims(structure, found).items():
        assert climb(structure, found.radius, ratio, rounds=10) <= 1.0 + 1e-9, claim


@pytest.mark.parametrize("name", ["tanh", "no decay", "unit"])
def test_they_converge_to_the_pruned_equilibrium_and_stay(name):
    structure = case(name)
    starts = edge(bounds(structure), 3)
    runs = follow(structure, starts, 400.0, settle=False)
    assert np.all(runs.ends[:, structure.theta] == 0.0)
    if structure.network.weight_decay > 0.0:
        assert np.all(structure.norm(runs.ends) < 1e-4)  # steps have an error of 1e-5
    else:
        assert np.all(structure.benefit(runs.ends) < structure.price)
    still = np.setdiff1d(np.arange(starts.shape[1]), [*structure.weights, structure.theta])
    assert np.array_equal(runs.ends[:, still], starts[:, still])


@pytest.mark.parametrize("name", ["tanh", "logistic", "linear unit"])
def test_batches_agree_with_the_integrator_that_treats_the_faces_exactly(name):
    structure, rng = case(name), np.random.default_rng(3)
    w = ball(structure, usual_norm(structure), 6, seed=4)
    theta = rng.random(6)
    runs = follow(structure, structure.embed(w, theta))
    assert set(runs.labels) <= {0, 1}
    for i in range(3):
        exact = integrate(structure, [*w[i], theta[i]], 300.0, events=False, rtol=1e-6, atol=1e-8)
        assert (exact.status == "pruned") == (runs.labels[i] == 1)
    same = follow(structure, structure.embed(w, theta), 3.0, rtol=1e-8, settle=False)
    exact = integrate(structure, [*w[0], theta[0]], 3.0, events=False)
    assert np.allclose(same.ends[0, [*structure.weights, structure.theta]], exact.end, atol=1e-5)


@KINDS
def test_in_most_networks_the_domain_is_at_least_a_hundredth_of_the_box(kind):
    """The box knows neither data nor bounds: 0 <= theta <= 1 and norms up to twice that of Glorot's initialisation."""
    shares = np.array([bounds(draw(seed, kind)).share(100) for seed in range(40)])
    assert np.mean(shares >= 0.01) >= 0.5
    assert np.all(shares > 0.0)


def test_the_box_holds_the_trained_state():
    """Kept equilibria of the flow from the corner of the box, theta = 1."""
    inside = []
    for name in ("tanh", "logistic", "identity", "unit"):
        structure = case(name)
        starts = structure.embed(ball(structure, usual_norm(structure), 10), np.ones(10))
        ends = follow(structure, starts, 60.0, settle=False).ends
        inside += list(structure.norm(ends) <= usual_norm(structure))
    assert np.all(inside)


@pytest.mark.parametrize("name", ["tanh", "logistic", "linear unit"])
def test_coverage_is_positive_never_above_one_and_without_violations(name):
    structure = case(name)
    results = {"layer": coverage(bounds(structure, "layer"), n=10)}
    starts = results["layer"].starts
    for coordinates in ("unit", "benefit"):  # the same runs on trial against other bounds
        results[coordinates] = results["layer"].under(bounds(structure, coordinates))
    for result in results.values():
        assert result.violations == 0
        assert result.undecided_share == 0.0
        assert 0.0 < result.ratio <= 1.0
        assert result.certified_share <= result.pruned_share < 1.0  # not everything goes by itself
        assert abs(result.certified_share - result.bounds.share(100)) < 0.05
    assert starts.shape == (100, len(structure.network.state))
    assert results["unit"].certified_share > results["layer"].certified_share  # u knows that M is of degree 2


def test_the_domain_holds_while_everything_else_moves():
    """A unit beside another whose weights and gate move too: the cost bounds them all, |W|^2 <= 2 level / lambda."""
    structure = Structure(network(**TWO, weight_decay=0.3, prices=0.1))
    level = 0.5
    found, rng = bounds(structure, level=level), np.random.default_rng(5)
    starts = np.column_stack([rng.normal(size=(4000, 4)) * rng.choice([0.05, 0.3, 0.6], 4), rng.random((4000, 2))])
    starts = starts[found.certifies(starts)]
    starts = starts[np.argsort(starts[:, structure.theta])[-40:]]
    runs = follow(structure, starts, 500.0)
    assert np.all(structure.network.value(starts) <= level)
    assert np.all(runs.labels == 1)
    assert np.all(runs.widest <= found.radius)
    assert np.all(np.sum(runs.ends[:, :4] ** 2, axis=1) <= 2.0 * level / 0.3)
    assert np.all(runs.ends[:, 1] != starts[:, 1])
    assert found.unit_slope > bounds(dataclasses.replace(structure, frozen=np.zeros(6)), radius=found.radius).unit_slope
    with pytest.raises(ValueError, match="`structure` must stand alone for benefit coordinates"):
        bounds(structure, "benefit", radius=1.0, level=level).certifies(starts)


def test_the_benchmark_writes_its_tables_and_picture(tmp_path, monkeypatch, capsys):
    for where in (benchmark, _common):
        monkeypatch.setattr(where, "RESULTS", tmp_path)
    benchmark.main(["--quick", "--networks", "1", "--points", "3", "--write"])
    text = (tmp_path / "networks.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    trials = {row[0]: row for row in rows if row[0].endswith("coordinates")}
    assert len(trials) >= 8 and all(row[-2].startswith("0 of ") for row in trials.values())
    block = draw(0).network
    assert trials[f"activation {block.activation}, own coordinates"][1] in ("1", "2")
    share = f"{100 * bounds(draw(0)).share(100):.1f}"
    assert trials["block, layer coordinates"][2] == f"{share} ({share}-{share}), {share} to {share}"
    assert "- yes: certified starts that did not converge: 0" in text
    assert (tmp_path / "networks.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="`networks` must be an integer of at least 1; got networks=0"):
        benchmark.main(["--networks", "0"])


# --- Theorem 3.1 ---------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_a_vertex_is_never_dearer(seed):
    """Theorem 3.1, also after minimising over W: from any W and Theta a vertex and its own W are at least as cheap."""
    net = draw(seed, "unit").network
    rng, k = np.random.default_rng(seed), len(net.weights)

    def train(weights, theta):
        def cost(w):
            state = np.append(w, theta)
            return float(net.value(state)), -net.field(state)[:k]

        return minimize(cost, weights, jac=True, method="L-BFGS-B", options={"maxiter": 40}).x

    theta = rng.random(len(net.keep_probs))
    weights = train(rng.normal(size=k), theta)
    interior = net.value(np.append(weights, theta))
    for i in range(len(theta)):
        ends = np.stack([np.append(weights, [*theta[:i], end, *theta[i + 1 :]]) for end in (0.0, 1.0)])
        values = net.value(ends)
        mixed = (1.0 - theta[i]) * values[0] + theta[i] * values[1]
        assert np.isclose(mixed, net.value(np.append(weights, theta)), rtol=1e-10)  # affine: no strict interior minimum
        theta[i] = float(np.argmin(values))
    vertex = net.value(np.append(weights, theta))
    assert vertex <= interior + 1e-12
    assert net.value(np.append(train(weights, theta), theta)) <= vertex + 1e-12


@FEW
@given(SEEDS)
def test_the_flow_of_all_weights_and_gates_ends_at_a_vertex(seed):
    """An equilibrium inside a face is never attracting (THEORY section 2)."""
    net = draw(seed, "unit", width=1 + seed % 2).network
    assume(net.activation != "relu")  # thousands of steps along its kinks
    net = dataclasses.replace(net, rate_ratio=1.0 / net.prices[0])  # a useless gate closes in a time of 1
    rng, k = np.random.default_rng(seed), len(net.weights)
    theta = net.keep_probs
    starts = np.column_stack([rng.normal(size=(6, k)), rng.random((6, len(theta)))])
    runs = follow(Structure(net), starts, 100.0, settle=False, rtol=1e-4)
    assert np.all(net.value(runs.ends) <= net.value(starts))
    ends = runs.ends[:, k:]
    assert np.mean((ends == 0.0) | (ends == 1.0)) > 0.9


# --- values and bad input ------------------------------------------------------------------------------------------


def test_draws_repeat_and_differ():
    one, other = draw(3, "unit"), draw(3, "unit")
    assert one.network == other.network
    assert np.array_equal(one.frozen, other.frozen)
    assert draw(4, "unit").network != one.network
    networks = [draw(seed).network for seed in range(30)]
    assert all(net.rate_ratio * net.prices[0] >= 1.0 / 200.1 for net in networks)
    assert any(net.rate_ratio > 3.0 for net in networks) and any(0.3 <= net.rate_ratio <= 3.0 for net in networks)
    assert {net.activation for net in networks} == {"identity", "tanh", "relu"}
    assert {net.loss for net in networks} == {"squared", "logistic"}
    assert {net.widths for net in networks} == {(1,), (2,), (3,)}


PLAIN = functools.cache(lambda: Structure(network(**TWO)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Structure(network(activation="square")), "`activation` must be one of .*Lipschitz"),
        (lambda: Structure(network(gated="both")), "`gated` must be one of 'layers', 'units'; got gated='both'. Gate"),
        (lambda: Structure(network(widths=(1, 1))), r"`widths` must describe one block; got widths=\(1, 1\)"),
        (lambda: Structure(network(**TWO), 2), r"`gate` must be an integer in \[0, 1\]; got gate=2"),
        (lambda: Structure(network(**TWO), 0, [0.0] * 5), r"`frozen` must have shape \(..., 6\)"),
        (lambda: Structure(network(**TWO), 0, [0.0] * 5 + [2.0]), r"`frozen` must hold keep .*; got frozen\[5\]=2.0"),
        (lambda: Structure(network(**TWO), 0, [[0.0] * 6]), r"`frozen` must have shape \(6,\)"),
        (lambda: bounds(case("tanh"), "norm"), "`coordinates` must be one of 'layer', 'unit', 'benefit'"),
        (lambda: bounds(case("tanh"), radius=0.0), "`radius` must be positive"),
        (lambda: bounds(case("tanh"), level=1.0), "`level` must be None where nothing else moves"),
        (lambda: bounds(PLAIN()), "`level` must be a number where the rest moves"),
        (lambda: bounds(PLAIN(), level=-1.0), "`level` must be positive"),
        (
            lambda: bounds(Structure(network(**TWO, weight_decay=0.0)), level=1.0),
            "`weight_decay` must be positive where",
        ),
        (lambda: bounds(case("tanh")).share(0), "`n` must be an integer of at least 1"),
        (lambda: bounds(case("tanh")).certifies([0.0, 0.0]), r"`states` must have shape \(..., 3\)"),
        (lambda: PLAIN().embed([0.0, 0.0], 0.5), "`frozen` must be a state of the network here"),
        (lambda: follow(case("tanh"), [0.0, 0.0, 0.5]), r"`states` must have shape \(n, 3\)"),
        (lambda: follow(case("tanh"), [[0.0, 0.0, 1.5]]), r"`states` must hold keep .*; got states\[0, 2\]=1.5"),
        (lambda: follow(case("tanh"), [[0.0, 0.0, 0.5]], -1.0), "`horizon` must be positive"),
        (lambda: follow(case("tanh"), [[0.0, 0.0, 0.5]], rtol=0.0), "`rtol` must be positive"),
        (lambda: coverage(bounds(PLAIN(), level=1.0)), "`found` must bound a structure with nothing else that moves"),
        (lambda: coverage(bounds(case("tanh")), n=0), "`n` must be an integer of at least 1"),
        (lambda: coverage(bounds(case("tanh")), seed=-1), "`seed` must be an integer of at least 0"),
        (lambda: draw(-1), "`seed` must be an integer of at least 0"),
        (lambda: draw(0, "block"), "`kind` must be one of 'layer', 'unit'"),
        (lambda: draw(0, width=4), r"`width` must be an integer in \[1, 3\]"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(module).failed == 0
