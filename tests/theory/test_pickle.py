"""Everything that a sweep over processes sends or returns can be pickled, and is the same on the other side."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import pickle

import numpy as np
import pytest
import sympy

from catode.theory import BoxSystem, LayerSystem, basins_of_attraction, certify, integrate, integrate_batch
from catode.theory.basins.equilibria import find
from catode.theory.flow.stochastic import NORMAL, skewed, student_t
from catode.theory.networks import GatedNetwork
from catode.theory.systems.box import as_box

X = sympy.Symbol("x", positive=True)
LAYER = LayerSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
SYSTEMS = {
    "text": BoxSystem.from_expressions("x, y", "y - 1/4, x/2 - y", lower=(0, 0), upper=(1, 1)),
    "symbols with assumptions": BoxSystem.from_expressions([X], [1 - X], lower=(0,), upper=(2,)),
    "transcendental": BoxSystem.from_expressions(
        "a, b, c", "sin(b) - a, -b, exp(-c) - a", lower=(0,) * 3, upper=(1,) * 3
    ),
    "comparison system as a box": as_box(LAYER),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_survives_pickle_and_deep_copies(name):
    system = SYSTEMS[name]
    states = np.random.default_rng(0).uniform(0.1, 0.9, (5, system.dimension))
    before = system.field(states), system.jacobian(states)
    for again in (pickle.loads(pickle.dumps(system)), copy.deepcopy(system)):
        assert np.array_equal(again.field(states), before[0]) and np.array_equal(again.jacobian(states), before[1])
        assert again.names == system.names and again.expressions == system.expressions
        assert not again.lower.flags.writeable and not again.upper.flags.writeable
        assert np.array_equal(integrate_batch(again, states, 3.0).ends, integrate_batch(system, states, 3.0).ends)


def _ends(system, start):
    return integrate(system, start, 2.0).states[-1].tolist()


def test_a_sweep_over_processes_gives_what_one_process_gives():
    system, starts = SYSTEMS["text"], [[0.1, 0.2], [0.5, 0.9]]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(functools.partial(_ends, system), starts)
    assert there == [_ends(system, start) for start in starts]


@pytest.mark.parametrize(
    "noise", [NORMAL, student_t(5.0), skewed(0.1), student_t(3.0).clipped(2.0)], ids=lambda n: n.name
)
def test_noises_draw_the_same_on_the_other_side(noise):
    again = pickle.loads(pickle.dumps(noise))
    draws = [n.sample(np.random.default_rng(3), (4, 2)) for n in (noise, again)]
    assert again.name == noise.name and np.array_equal(*draws)


def test_a_network_that_was_evaluated_and_all_results_survive():
    network = GatedNetwork(inputs=[[1.0]], targets=[[2.0]], widths=(1,), prices=0.1, activation="tanh", gated="layers")
    speed = network.field([0.5, 0.5, 0.5])
    again = pickle.loads(pickle.dumps(network))
    assert again == network and np.array_equal(again.field([0.5, 0.5, 0.5]), speed)
    proof = certify(LAYER)
    assert proof.rate > 0
    assert pickle.loads(pickle.dumps(proof)) == proof
    basins = basins_of_attraction(LAYER, ([0.1, 0.5], [0.1, 0.9]))
    assert np.array_equal(pickle.loads(pickle.dumps(basins)).labels, basins.labels)
    points = find(LAYER)
    assert [e.stability for e in pickle.loads(pickle.dumps(points))] == [e.stability for e in points]
