"""Networks that torch.compile compiled: pruned as if they were not, and compiled again only when something is removed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from catode.prune.pruner import Pruner
from catode.train.models import DenseResNet

BACKEND = "aot_eager"  # what the last stage, which generates code, would make of it is nothing of the pruner's
EXAMPLE = torch.zeros(1, 1, 8, 8)


def network():
    return DenseResNet(64, 10, blocks=2, width=16, hidden=12)


def compiled(thing):
    return torch.compile(thing, backend=BACKEND)


def run(how, steps=110):
    """One run; returns the model, the compiled call, thetas at the end, the checks that removed something, and all graphs."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = network()
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    call = model if how in ("eager", "blocks") else compiled(model)

    def loss_of(x, y):
        return F.cross_entropy((model if how == "step" else call)(x), y)

    step = compiled(loss_of) if how == "step" else loss_of
    if how == "late":  # compiled and called before there is a pruner
        step(x, y).backward()
        optimizer.zero_grad()
        model.load_state_dict(model.state_dict())
    given = call if how == "given" else model
    settings = dict(nu=0.5, steps=100, warmup=15, memory=10, check_every=8, rate_ratio=0.3)
    pruner = Pruner(given, EXAMPLE, optimizer=optimizer, **settings)
    if how == "blocks":  # without graph breaks
        for block in model.blocks:
            block.compile(backend=BACKEND, fullgraph=True)
    removals, thetas = 0, []
    for _ in range(steps):
        loss = step(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        check = pruner.step()
        removals += bool(check and check.removed)
        thetas.append(pruner.keep_prob.copy())
    assert pruner.finish() is model
    return model, call, np.array(thetas), removals, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def eager():
    return run("eager")


@pytest.fixture(scope="module")
def plain(eager):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*recompile.*")
        return run("plain")


@pytest.mark.parametrize("how", ["given", "step", "plain"])
def test_a_compiled_network_is_pruned_as_the_eager_one(how, eager, request):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*recompile.*")
        _, _, thetas, removals, graphs = request.getfixturevalue("plain") if how == "plain" else run(how)
    np.testing.assert_allclose(thetas, eager[2], atol=1e-4)
    assert removals == eager[3] >= 3
    per_time = 2 if how == "step" else 1  # the hooks at the root end a graph: before the network, and after it
    # before the gates, with them, after each check that decided something, and without them again
    assert removals < graphs <= per_time * (removals + 10)


def test_gates_are_gone_from_compiled_code_in_the_end(plain):
    """After the test before, which leaves the compiled code as it is."""
    model, call, *_, before = plain
    x = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(call.eval()(x), model.eval()(x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(model, backend=keep)(x)
    torch.compile(network().eval(), backend=keep)(x)
    scaled = [sum(node.name.startswith("mul") for node in graph.graph.nodes) for graph in graphs]
    assert scaled == [0, 0] and before > 0


def test_blocks_that_are_compiled_after_the_pruner_are_pruned_as_the_eager_ones(eager):
    """Probes run them as they are, or every tap would be compiled anew."""
    _, _, thetas, removals, _ = run("blocks")
    np.testing.assert_allclose(thetas, eager[2], atol=1e-4)
    assert removals == eager[3]


def test_what_was_compiled_before_the_gates_came_sees_them(eager):
    model, _, thetas, *_ = run("late")
    assert (thetas[-1] < 1).any()
    assert torch.isfinite(model(EXAMPLE.repeat(2, 1, 1, 1))).all()


def test_parts_that_are_compiled_by_themselves_are_refused():
    for change in (
        lambda model: model.compile(backend=BACKEND),
        lambda model: model.blocks[1].compile(backend=BACKEND),
        lambda model: setattr(model, "fc", compiled(model.fc)),
    ):
        model = network()
        change(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with pytest.raises(ValueError, match="must be compiled as a whole") as error:
            Pruner(model, EXAMPLE, optimizer=optimizer, nu=1.0, steps=100)
        assert "\n" not in str(error.value)
