"""Gates: derivatives at 0 and at 1, no effect at 1, and a plain network again when they go."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from catode.prune.gated.gates import Gates
from catode.structures.inventory import Inventory
from catode.train.models import Architecture, DenseResNet, ResNet, build

NAMES = ["resnet14", "dense", "bottleneck", "bottlenecks"]


def network(name, bottleneck_net):
    torch.manual_seed(0)
    model = {
        "resnet14": lambda: build("resnet14", in_channels=1, classes=10),
        "dense": lambda: DenseResNet(36, 10, blocks=3, width=8, hidden=6),
        "bottleneck": bottleneck_net,
        "bottlenecks": lambda: ResNet(Architecture("bottleneck", (1, 1), 4, "B", "cifar"), 1, 10),
    }[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model


def numbers(blocks):
    """The units of every site, numbered after the layers, and how many structures there are."""
    start, sites = len(blocks), []
    for site in (s for b in blocks for s in b.sites):
        sites.append(torch.arange(start, start + site.width))
        start += site.width
    return sites, start


def install(model, normalised=None):
    """Gates in every structure; `normalised` overrides the blocks' own word, for the sites it names or for all."""
    blocks = model.structures()
    if normalised is not None:
        blocks = [replace(b, sites=tuple(replace(s, normalised=s.name in normalised) for s in b.sites)) for b in blocks]
    sites, _ = numbers(blocks)
    gates = Gates(model, Inventory(blocks))
    gates.install([True] * len(blocks), sites)
    return gates


def data(size=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 6, 6, generator=generator).to(dtype), torch.randint(10, (size,), generator=generator)


def bernoulli(size, seed, theta=0.5):
    return torch.bernoulli(torch.full((size,), theta), generator=torch.Generator().manual_seed(seed))


def double(gates, values):
    """Gate values in double precision, for finite differences."""
    gates.draw = values.double().clone().requires_grad_()
    return gates.draw


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["ones", "zeros", "mixed"])
def test_law_gradient_of_the_draw_is_the_finite_difference(name, kind, training, bottleneck_net):
    model = network(name, bottleneck_net).double()
    gates = install(model)
    values = {
        "ones": torch.ones(gates.inventory.size),
        "zeros": torch.zeros(gates.inventory.size),
        "mixed": bernoulli(gates.inventory.size, 1, 0.7),
    }[kind]
    values[: len(gates.blocks)] = 1.0  # closed layers: see the next test
    x, y = data(dtype=torch.float64)
    model.train(training)

    def loss(values):
        leaf = double(gates, values)
        if not training:
            gates.keep_prob = leaf
        return F.cross_entropy(model(x), y), leaf

    total, leaf = loss(values)
    (gradient,) = torch.autograd.grad(total, leaf)
    chosen = torch.randperm(gates.inventory.size, generator=torch.Generator().manual_seed(2))[:12].tolist()
    chosen += list(range(len(gates.blocks)))
    with torch.no_grad():
        for k in chosen:
            step = torch.zeros(gates.inventory.size)
            step[k] = 1e-5
            slope = (loss(values.double() + step)[0] - loss(values.double() - step)[0]) / 2e-5
            assert gradient[k].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("resnet")])
def test_law_gradient_of_a_closed_layer_is_the_difference_towards_open(name, bottleneck_net):
    """dL/dxi of a layer at 0. Not so in a BasicBlock, whose last ReLU then sits on its kink: see test_prune."""
    model = network(name, bottleneck_net).double().train()
    gates = install(model)
    x, y = data(dtype=torch.float64)
    for k in range(len(gates.blocks)):
        values, step = torch.ones(gates.inventory.size).double(), torch.zeros(gates.inventory.size).double()
        values[k], step[k] = 0.0, 1e-6
        leaf = double(gates, values)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), leaf)
        with torch.no_grad():
            losses = []
            for t in (values, values + step):
                double(gates, t)
                losses.append(F.cross_entropy(model(x), y).item())
        assert gradient[k].item() == pytest.approx((losses[1] - losses[0]) / 1e-6, rel=1e-2, abs=1e-5), gates.blocks[
            k
        ].name


@settings(max_examples=10)
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), theta=st.floats(0.0, 1.0))
def test_law_weights_scaled_equal_activations_scaled(name, seed, theta, bottleneck_net):
    """One draw for all examples: rows mode gives the same loss, and its rows' gradients sum to the draw's."""
    model = network(name, bottleneck_net).double()
    gates = install(model, normalised=())
    x, y = data(dtype=torch.float64, seed=seed)
    values = bernoulli(gates.inventory.size, seed, theta)
    leaf = double(gates, values)
    state = copy.deepcopy(model.state_dict())
    one = F.cross_entropy(model(x), y)
    (by_weight,) = torch.autograd.grad(one, leaf)
    model.load_state_dict(state)
    gates.rows = values.double().expand(len(x), -1).clone().requires_grad_()
    other = F.cross_entropy(model(x), y)
    (by_row,) = torch.autograd.grad(other, gates.rows)
    assert one.item() == pytest.approx(other.item(), rel=1e-10)
    torch.testing.assert_close(by_row.sum(0), by_weight, rtol=1e-8, atol=1e-12)


@settings(max_examples=10)
@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), theta=st.floats(0.0, 1.0))
def test_law_taps_give_every_examples_derivative(name, layers, seed, theta, bottleneck_net):
    """The same loss as with the gates on the weights, and the derivatives that gates of single examples have."""
    model = network(name, bottleneck_net).double()
    gates = install(model, normalised=())
    x, y = data(dtype=torch.float64, seed=seed)
    values = bernoulli(gates.inventory.size, seed, theta)
    double(gates, values)
    state = copy.deepcopy(model.state_dict())
    expected = F.cross_entropy(model(x), y)
    model.load_state_dict(state)
    with gates.tapped(layers) as taps:
        loss = F.cross_entropy(model(x), y)
    found = torch.zeros(len(x), gates.inventory.size, dtype=torch.float64)
    for tap, gradient in zip(taps, torch.autograd.grad(loss, [tap.after for tap in taps]), strict=True):
        found.index_add_(1, tap.structures, tap.derivative(gradient))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    model.load_state_dict(state)
    gates.rows = values.double().expand(len(x), -1).clone().requires_grad_()
    (rows,) = torch.autograd.grad(F.cross_entropy(model(x), y), gates.rows)
    if not layers:
        rows[:, : len(gates.blocks)] = 0.0
    torch.testing.assert_close(found, rows, rtol=1e-8, atol=1e-12)


def by_parts(model, x):
    x = F.relu(model.bn1(model.conv1(x)))
    for stage in range(model.stages):
        x = getattr(model, f"layer{stage + 1}")(x)
    return model.fc(x.mean((2, 3)))


def checkpointed(reentrant):
    def call(model, x):
        for module in [m for m in model.modules() if hasattr(m, "shortcut_only")]:
            inner = module.forward
            module.forward = lambda z, inner=inner: checkpoint(inner, z, use_reentrant=reentrant)
        return model(x.requires_grad_())

    return call


def doubled_on_the_way(model, x):
    """A weight that changes in place when its module is about to run."""
    module, halved = model.layer1[0].conv2, []

    @torch.no_grad()
    def double_it(module, args):
        parameter = module._parameters["weight"]
        if not halved:
            halved.append(parameter.mul_(2.0))

    with torch.no_grad():
        module.weight.mul_(0.5)
    module.register_forward_pre_hook(double_it, prepend=True)
    return model(x)


def given_weights(model, x):
    """Other tensors in the parameters' place."""
    return functional_call(model, {name: p.view_as(p) for name, p in model.named_parameters()}, (x,))


@pytest.mark.parametrize(
    "way", [by_parts, checkpointed(False), checkpointed(True), doubled_on_the_way, given_weights, torch.compile]
)
def test_law_gates_act_alike_however_the_model_is_called(way):
    found = []
    for call in (way, lambda model, x: model(x)):
        model = network("resnet14", None)
        gates, (x, y) = install(model), data()
        gates.set(torch.ones_like(gates.draw), bernoulli(len(gates.draw), 3))
        output = torch.compile(model, backend="eager")(x) if call is torch.compile else call(model, x)
        F.cross_entropy(output, y).backward()
        found.append([gates.draw.grad, *(p.grad for p in model.parameters())])
    assert found[1][0].count_nonzero() > 40
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


def test_a_copy_that_was_made_for_inference_is_gated():
    model = network("resnet14", None)
    gates, (x, _) = install(model), data()
    gates.set(torch.full_like(gates.draw, 0.7), torch.ones_like(gates.draw))
    with torch.inference_mode():
        own = copy.deepcopy(model).eval()
        torch.testing.assert_close(own(x), model.eval()(x))


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), theta=st.floats(0.2, 1.0))
def test_law_closing_towards_the_mean_equals_scaling_where_a_batch_norm_follows(seed, theta, bottleneck_net):
    """One draw for all examples and a 1x1 consumer (no border): the norm takes the mean out, so the loss is the same."""
    model = network("bottleneck", bottleneck_net).double().train()
    gates = install(model, normalised={"blocks.0.conv2", "blocks.1.conv2"})
    x, y = data(dtype=torch.float64, seed=seed)
    values = bernoulli(gates.inventory.size, seed, theta)
    double(gates, values)
    one = F.cross_entropy(model(x), y)
    gates.rows = values.double().expand(len(x), -1)
    assert F.cross_entropy(model(x), y).item() == pytest.approx(one.item(), rel=1e-9)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("parts", [norms_of, lambda model: [model.get_submodule(b.name) for b in model.structures()]])
@pytest.mark.parametrize("name", NAMES)
def test_law_parts_in_eval_mode_are_gated_by_the_draw_when_the_model_trains(name, parts, bottleneck_net):
    """Frozen batch norms and frozen stages: a draw acts there as everywhere, on weights and on activations alike."""
    model = network(name, bottleneck_net).double().train()
    gates = install(model)
    for part in parts(model):
        part.eval()
    x, y = data(dtype=torch.float64)
    gates.keep_prob.fill_(0.5)
    values = bernoulli(gates.inventory.size, 1, 0.7)
    values[: len(gates.blocks)] = 1.0  # a closed layer leaves the ReLU behind it on its kink
    leaf = double(gates, values)
    one = F.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(one, leaf)
    with torch.no_grad():
        for k in range(gates.inventory.size):
            step, losses = torch.zeros_like(leaf), []
            step[k] = 1e-5
            for sign in (1, -1):
                double(gates, values.double() + sign * step)
                losses.append(F.cross_entropy(model(x), y).item())
            slope = (losses[0] - losses[1]) / 2e-5
            assert gradient[k].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert (gradient[: len(gates.blocks)] != 0).all()
    double(gates, values)
    gates.rows = values.double().expand(len(x), -1)
    torch.testing.assert_close(F.cross_entropy(model(x), y), one)


def test_a_useless_constant_unit_has_no_curvature_where_a_batch_norm_follows(bottleneck_net):
    """A unit that says the same of every image changes nothing; without the mean its gates would seem to matter."""
    model = network("bottleneck", bottleneck_net).double().train()
    with torch.no_grad():
        model.blocks[0].bn2.weight[1], model.blocks[0].bn2.bias[1] = 0.0, 3.0
    x, y = data(dtype=torch.float64)
    gradients = {}
    for normalised in (True, False):
        gates = install(model, normalised={"blocks.0.conv2"} if normalised else ())
        unit = len(gates.blocks) + 4 + 1
        gates.rows = torch.ones(len(x), gates.inventory.size, dtype=torch.float64, requires_grad=True)
        (rows,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), gates.rows)
        with gates.tapped() as taps:
            gates.rows = None
            loss = F.cross_entropy(model(x), y, reduction="sum")
        for tap, gradient in zip(taps, torch.autograd.grad(loss, [tap.after for tap in taps]), strict=True):
            if unit in tap.structures:
                torch.testing.assert_close(tap.derivative(gradient)[:, tap.structures == unit][:, 0], rows[:, unit])
        gradients[normalised] = rows[:, unit].abs().max().item()
        gates.remove()
    assert gradients[True] < 1e-12 < 1e-4 < gradients[False]


def test_gates_of_examples_work_in_mixed_precision(bottleneck_net):
    model = network("bottleneck", bottleneck_net)
    x, y = data()
    gates = install(model, normalised={"blocks.0.conv1"})
    gates.rows = torch.ones(len(x), gates.inventory.size, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    (rows,) = torch.autograd.grad(F.cross_entropy(logits.float(), y), gates.rows)
    gates.rows = None
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.05)
    assert rows.isfinite().all() and rows.any(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_gate_each_example_by_its_own_values(name, bottleneck_net):
    model = network(name, bottleneck_net).eval()
    gates = install(model)
    x, _ = data(4)
    rows = torch.stack([bernoulli(gates.inventory.size, seed) for seed in range(4)])
    with torch.no_grad():
        gates.rows = rows
        together = model(x)
        gates.rows = None
        for i in range(4):
            gates.set(rows[i], torch.ones(gates.inventory.size))
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_law_gates_at_one_change_nothing(name, training, bottleneck_net):
    model = network(name, bottleneck_net).train(training)
    plain = copy.deepcopy(model)
    install(model)
    x, _ = data()
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name", NAMES)
def test_law_remove_gives_back_the_same_plain_network(name, bottleneck_net):
    model = network(name, bottleneck_net)
    before = dict(model.named_parameters())
    types = [type(m) for m in model.modules()]
    x, _ = data()
    expected = model.eval()(x)
    gates = install(model)
    gates.set(bernoulli(gates.inventory.size, 0), bernoulli(gates.inventory.size, 1))
    assert not torch.equal(model(x), expected)
    gates.remove()
    assert torch.equal(model(x), expected)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert [type(m) for m in model.modules()] == types
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    gates.remove()  # a second time is harmless


@pytest.mark.parametrize("name", NAMES)
def test_gates_can_be_installed_again(name, bottleneck_net):
    model = network(name, bottleneck_net).eval()
    x, _ = data()
    gates = install(model)
    theta = bernoulli(gates.inventory.size, 3, 0.8)
    gates.set(theta, theta)
    first = model(x)
    gates.remove()
    sites, _ = numbers(gates.blocks)
    gates.install([True] * len(gates.blocks), sites)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_that_holds_the_parameters_trains_the_gated_network(name, bottleneck_net):
    model = network(name, bottleneck_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    named = dict(model.named_parameters())
    install(model)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(p.grad is not None for p in named.values())
    assert all(not torch.equal(named[n], originals[n]) for n in named if n.endswith("weight"))


@settings(max_examples=10)
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6))
def test_law_eval_mode_uses_theta_and_is_deterministic(name, seed, bottleneck_net):
    model = network(name, bottleneck_net).eval()
    gates = install(model)
    x, _ = data(seed=seed)
    theta = torch.rand(gates.inventory.size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gates.set(theta, bernoulli(gates.inventory.size, seed))
        first = model(x)
        gates.set(theta, 1 - bernoulli(gates.inventory.size, seed))  # another draw must not matter
        assert torch.equal(model(x), first)
        gates.rows = theta.expand(len(x), -1)  # theta on the activations, explicitly
        torch.testing.assert_close(model(x), first, rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6))
def test_law_folded_state_is_the_eval_mode_network(name, seed, bottleneck_net):
    model = network(name, bottleneck_net).train()
    gates = install(model)
    theta = torch.rand(gates.inventory.size, generator=torch.Generator().manual_seed(seed))
    gates.set(theta, bernoulli(gates.inventory.size, seed))
    state = gates.folded_state()
    assert model.training and all(m.training for m in model.modules()), "taking a snapshot must not change the mode"
    fresh = network(name, bottleneck_net)
    fresh.load_state_dict(state)
    x, _ = data(seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert not any(t.requires_grad for t in state.values())
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not own & {t.data_ptr() for t in state.values() if t.numel()}, "a snapshot must not share memory"


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_gate_still_feels_the_loss(name, bottleneck_net):
    """Scaling before a ReLU would give 0 here, since relu'(0) = 0, and erase half of every estimator."""
    model = network(name, bottleneck_net)
    gates = install(model)
    x, y = data(16)
    for k in range(gates.inventory.size):
        draw = torch.ones(gates.inventory.size)
        draw[k] = 0.0
        gates.set(torch.ones(gates.inventory.size), draw)
        F.cross_entropy(model(x), y).backward()
        assert gates.draw.grad[k] != 0.0
        if k > 40:
            break
    last = gates.blocks[-1].sites[-1].width
    draw = torch.ones(gates.inventory.size)
    draw[-last:] = 0.0
    gates.set(torch.ones(gates.inventory.size), draw)
    F.cross_entropy(model(x), y).backward()
    assert (gates.draw.grad[-last:] != 0.0).all()


def test_only_what_is_asked_for_is_gated(bottleneck_net):
    model = network("resnet14", bottleneck_net)
    blocks = model.structures()
    sites, size = numbers(blocks)
    gates = Gates(model, Inventory(blocks))
    gates.install([False, True] + [False] * 4, [sites[0], None, None, None, None, None])
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    touched = torch.zeros(size, dtype=torch.bool)
    touched[1] = True
    touched[sites[0]] = True
    assert torch.equal(gates.draw.grad != 0, touched)


def test_a_site_that_was_compacted_keeps_its_units_numbers(bottleneck_net):
    from catode.prune.gated.cut import keep_units

    model = network("resnet14", bottleneck_net)
    blocks = model.structures()
    sites, _ = numbers(blocks)
    keep_units(model, blocks[0].sites[0], [2, 5])
    gates = Gates(model, Inventory(blocks))
    gates.install([False] * 6, [sites[0][[2, 5]], *[None] * 5])
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    assert gates.draw.grad.nonzero()[:, 0].tolist() == [6 + 2, 6 + 5]
