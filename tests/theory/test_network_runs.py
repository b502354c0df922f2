"""The real flow of small networks: it converges from the domains that the bounds give, and ends at a vertex."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_network_bounds import claims, climb
from test_networks import CASE, FEW, PLAIN, SEEDS, TWO, ball, case, network

from benchmarks import common
from benchmarks import networks as benchmark
from catode.theory.flow import integrate
from catode.theory.networks import Structure, draw, usual_norm
from catode.theory.networks.bounds import COORDINATES, bounds
from catode.theory.networks.runs import coverage, follow


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
    monkeypatch.setattr(common, "RESULTS", tmp_path)
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


@FEW
@given(SEEDS)
def test_the_flow_of_all_weights_and_gates_ends_at_a_vertex(seed):
    """An equilibrium inside a face is never attracting (docs/mathematics.md section 2)."""
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: follow(case("tanh"), [0.0, 0.0, 0.5]), r"`states` must have shape \(n, 3\)"),
        (lambda: follow(case("tanh"), [[0.0, 0.0, 1.5]]), r"`states` must hold keep .*; got states\[0, 2\]=1.5"),
        (lambda: follow(case("tanh"), [[0.0, 0.0, 0.5]], -1.0), "`horizon` must be positive"),
        (lambda: follow(case("tanh"), [[0.0, 0.0, 0.5]], rtol=0.0), "`rtol` must be positive"),
        (lambda: coverage(bounds(PLAIN(), level=1.0)), "`found` must bound a structure with nothing else that moves"),
        (lambda: coverage(bounds(case("tanh")), n=0), "`n` must be an integer of at least 1"),
        (lambda: coverage(bounds(case("tanh")), seed=-1), "`seed` must be an integer of at least 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
