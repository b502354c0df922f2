"""Networks drawn at random, Theorem 3.1 in them, and their structures' bad input."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from catode.theory.networks import GatedNetwork, Structure, draw

# No shrinking: a seed has no simpler form, and each takes a second.
FEW = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
SEEDS = st.integers(0, 10**6)
KINDS = pytest.mark.parametrize("kind", ["layer", "unit"])


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
PLAIN = functools.cache(lambda: Structure(network(**TWO)))


@functools.cache
def case(name):
    return CASES[name]()


def ball(structure, radius, n, seed=0):
    """Weights of the structure in a ball, many of them at its surface."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, len(structure.weights)))
    return w * (radius * np.minimum(2.0 * rng.random(n), 1.0) / np.linalg.norm(w, axis=1))[:, None]


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
        (lambda: PLAIN().embed([0.0, 0.0], 0.5), "`frozen` must be a state of the network here"),
        (lambda: draw(-1), "`seed` must be an integer of at least 0"),
        (lambda: draw(0, "block"), "`kind` must be one of 'layer', 'unit'"),
        (lambda: draw(0, width=4), r"`width` must be an integer in \[1, 3\]"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
