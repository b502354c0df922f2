"""Estimators of L1 - L0 against exact enumeration, closed forms, and the exact Gauss-Newton curvature."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catode.prune.gated.gates import Gates
from catode.prune.measure.losses import _targets, recovered_labels
from catode.prune.measure.probes import Probe, batch_statistics_only, curvature_corrected, straight_through
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory
from catode.train.models import build

CLASSES, LAYERS, WIDTHS = 3, 2, (2, 3)
SIZE = LAYERS + sum(WIDTHS)


class Branch(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.out(F.relu(self.hidden(x)))

    def shortcut_only(self):
        return nn.Identity()


class Tiny(nn.Module):
    """Two branches, five units, no norm: small enough to enumerate all 128 gate patterns."""

    def __init__(self):
        super().__init__()
        self.branches = nn.Sequential(*(Branch(4, w) for w in WIDTHS))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(self.branches(x))

    def structures(self):
        return [
            Block(
                f"branches.{i}",
                f"branches.{i}.out",
                (Site(f"s{i}", w, (f"branches.{i}.hidden",), (f"branches.{i}.out",)),),
            )
            for i, w in enumerate(WIDTHS)
        ]


PATTERNS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=SIZE)), dtype=torch.float64)


def tiny(seed=0, examples=6):
    torch.manual_seed(seed)
    model = Tiny().double()
    x = 1.5 * torch.randn(examples, 4, dtype=torch.float64)
    y = torch.randint(CLASSES, (examples,))
    gates = Gates(model, Inventory(model.structures()))
    gates.install([True] * LAYERS, [torch.tensor([2, 3]), torch.tensor([4, 5, 6])])
    return model, gates, x, y


def logits(model, x, xi):
    """The gated forward pass written out from the definition, one gate vector for all examples."""
    plain = dict(model.named_parameters())
    first = LAYERS
    for i, width in enumerate(WIDTHS):
        name = f"branches.{i}"
        units = (
            F.relu(x @ plain[f"{name}.hidden.weight"].T + plain[f"{name}.hidden.bias"]) * xi[..., first : first + width]
        )
        x = x + xi[..., i : i + 1] * (units @ plain[f"{name}.out.weight"].T + plain[f"{name}.out.bias"])
        first += width
    return x @ plain["fc.weight"].T + plain["fc.bias"]


def enumerate_losses(model, x, y):
    """Mean loss of every gate pattern, shape (2**SIZE,)."""
    with torch.no_grad():
        return torch.stack([F.cross_entropy(logits(model, x, xi), y) for xi in PATTERNS])


def benefits(losses, theta):
    """Exact L0 - L1 of every structure, all the others drawn from theta."""
    found = []
    for s in range(SIZE):
        others = theta.clone()
        others[s] = 0.5
        weight = torch.where(PATTERNS > 0.5, others, 1 - others).prod(1) / 0.5
        found.append((weight * losses * (1 - 2 * PATTERNS[:, s])).sum())
    return torch.stack(found)


def set_draw(gates, xi):
    gates.draw = xi.clone().requires_grad_()


def probe(model, gates, x, y, seed=0):
    return Probe(model, gates, cross_entropy(x, y), len(x), torch.Generator().manual_seed(seed))


def cross_entropy(x, y):
    return lambda model: F.cross_entropy(model(x), y)


def partner(pattern, s):
    """The index of the pattern with gate s the other way round."""
    other = pattern.clone()
    other[s] = 1 - other[s]
    return int((other == PATTERNS).all(1).nonzero())


@pytest.mark.parametrize("seed", [0, 1])
def test_law_paired_is_exactly_the_difference_at_every_draw_and_unbiased_over_them(seed):
    model, gates, x, y = tiny(seed)
    losses = enumerate_losses(model, x, y)
    theta = torch.rand(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mean = torch.zeros(SIZE, dtype=torch.float64)
    for k, xi in enumerate(PATTERNS):
        set_draw(gates, xi)
        found = probe(model, gates, x, y).paired(range(SIZE)).double()
        for s in range(SIZE):
            exact = (losses[partner(xi, s)] - losses[k]) * (1 if xi[s] else -1)
            assert found[s].item() == pytest.approx(exact.item(), abs=2e-6)
        mean += torch.where(xi > 0.5, theta, 1 - theta).prod() * found
    np.testing.assert_allclose(mean, benefits(losses, theta), atol=2e-6)


def test_paired_over_parts_of_the_examples_averages_to_the_whole():
    model, gates, x, y = tiny(2)
    set_draw(gates, PATTERNS[-1])
    whole = probe(model, gates, x, y).paired(range(SIZE))
    parts = [probe(model, gates, x[i : i + 1], y[i : i + 1]).paired(range(SIZE)) for i in range(len(x))]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-5, atol=1e-6)
    assert probe(model, gates, x, y).paired([]).shape == (0,)


def test_straight_through_has_the_stated_mean():
    """theta g(1) + (1 - theta) g(0), which is the benefit only for theta = 1/2 and a quadratic loss."""
    model, gates, x, y = tiny(3)
    theta = torch.full((SIZE,), 0.3, dtype=torch.float64)
    mean = torch.zeros(SIZE, dtype=torch.float64)
    ends = torch.zeros(2, SIZE, dtype=torch.float64)
    for xi in PATTERNS:
        set_draw(gates, xi)
        F.cross_entropy(model(x), y).backward()
        weight = torch.where(xi > 0.5, theta, 1 - theta)
        mean += weight.prod() * straight_through(gates.draw.grad, xi)
        ends[xi.long(), torch.arange(SIZE)] += weight.prod() / weight * gates.draw.grad
    torch.testing.assert_close(mean, theta * ends[1] + (1 - theta) * ends[0])
    assert (mean + benefits(enumerate_losses(model, x, y), theta)).abs().max() > 1e-3, "and it is biased"


@settings(max_examples=100)
@given(
    slope=st.floats(-10, 10),
    curvature=st.floats(-10, 10),
    draw=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
)
def test_law_curvature_corrected_is_exact_for_quadratics(slope, curvature, draw):
    """L(xi) = slope xi + curvature xi^2 / 2, so L1 - L0 = slope + curvature / 2 at every draw."""
    estimate = curvature_corrected(slope + curvature * draw, draw, curvature)
    assert estimate == pytest.approx(slope + curvature / 2, rel=1e-12, abs=1e-12)


@settings(max_examples=50)
@given(curvature=st.floats(1e-6, 1e6))
def test_straight_through_is_blind_at_an_open_gate_and_curvature_corrected_is_not(curvature):
    """L = curvature (1 - xi)^2 / 2: stationary at xi = 1, benefit curvature / 2."""
    xi = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad((curvature * (1 - xi) ** 2 / 2).sum(), xi)
    assert straight_through(derivative, xi.detach()).item() == 0.0
    assert curvature_corrected(derivative, xi.detach(), curvature).item() == pytest.approx(-curvature / 2)


def exact_curvature(model, x, xi):
    """Mean over examples of Var_p(dz/dxi), p the softmax of the logits z."""
    found = torch.zeros(len(x), SIZE, dtype=torch.float64)
    for i, example in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda v, e=example: logits(model, e, v), xi)
        p = logits(model, example, xi).softmax(0)
        found[i] = p @ jacobian.square() - (p @ jacobian).square()
    return found.mean(0).detach()


@pytest.mark.parametrize("pattern", [0b1111111, 0b1011011, 0b0111110])
def test_law_sampled_curvature_has_the_gauss_newton_mean(pattern):
    model, gates, x, y = tiny(4, examples=8)
    xi = PATTERNS[pattern]
    set_draw(gates, xi)
    exact = exact_curvature(model, x, xi)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [Probe(model, gates, cross_entropy(x, y), len(x), generator).curvature() for _ in range(500)]
    ).double()
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 4 * error + 1e-6).all()
    assert (error < 0.2 * exact.max()).all() and exact.max() > 1e-3


def test_curvature_does_not_look_at_the_targets():
    model, gates, x, y = tiny(5)
    set_draw(gates, PATTERNS[-1])
    assert torch.equal(probe(model, gates, x, y).curvature(), probe(model, gates, x, (y + 1) % CLASSES).curvature())


def test_law_a_probe_touches_neither_statistics_nor_gradients_nor_gates():
    torch.manual_seed(0)
    model = build("resnet14", in_channels=1, classes=10).train()
    blocks, start, sites = model.structures(), 6, []
    for site in (s for b in blocks for s in b.sites):
        sites.append(torch.arange(start, start + site.width))
        start += site.width
    gates = Gates(model, Inventory(blocks))
    gates.install([True] * 6, sites)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    F.cross_entropy(model(x), y).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    draw, draw_gradient = gates.draw.detach().clone(), gates.draw.grad.clone()
    made = Probe(model, gates, cross_entropy(x[:4], y[:4]), 4, torch.Generator().manual_seed(0))
    curvature, paired = made.curvature(), made.paired([0, 3, 20])
    assert curvature.shape == (start,) and (curvature >= 0).all() and curvature.any() and paired.shape == (3,)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(gates.draw, draw) and torch.equal(gates.draw.grad, draw_gradient) and gates.rows is None
    assert all(m.training for m in model.modules())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.track_running_stats for m in norms)


def test_a_failing_probe_leaves_the_model_as_it_was():
    model, gates, x, y = tiny()
    with pytest.raises(RuntimeError):
        probe(model, gates, x[:, :2], y).curvature()
    assert gates.rows is None
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError), batch_statistics_only(norm):
        raise ZeroDivisionError
    assert norm.track_running_stats


def gradient_of(loss, z):
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    return gradient


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 1024.0]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_law_labels_are_recovered(seed, scale, spread, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (spread * torch.randn(12, 5, generator=generator)).to(dtype)
    y = torch.randint(5, (12,), generator=generator)
    labels, fit = recovered_labels(z, gradient_of(lambda z: scale * F.cross_entropy(z.float(), y), z), 12 / scale)
    assert fit and torch.equal(labels, y)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.mse_loss(z, F.one_hot(y, 5).float()),
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: 3 * F.cross_entropy(z, y),
        lambda z, y: 0.1 * F.cross_entropy(z, y),
        lambda z, y: 0.5 * F.cross_entropy(z, y) + 0.01 * z.square().mean(),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.1, 0.1, 0.1, 0.1, 5.0])),
        lambda z, y: F.multi_margin_loss(z, y),
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 5).float()),
        lambda z, y: F.binary_cross_entropy_with_logits(z - 7.0, F.one_hot(y, 5).float()),
    ],
    ids=["mse", "sum", "scaled", "tenth", "auxiliary", "smoothing", "weights", "margin", "bce", "rare"],
)
def test_another_loss_is_refused(loss):
    torch.manual_seed(0)
    z, y = torch.randn(12, 5), torch.randint(5, (12,))
    _, fit = recovered_labels(z, gradient_of(lambda z: loss(z, y), z), 12.0)
    assert not fit


class Between(nn.Module):
    """Something in place behind every branch, or random inside."""

    def __init__(self, change, inside):
        super().__init__()
        self.branches = nn.ModuleList(Branch(4, w) for w in WIDTHS)
        for branch in self.branches:
            branch.out = nn.Sequential(branch.out, inside)
        self.change, self.fc = change, nn.Linear(4, CLASSES)

    def forward(self, x):
        for branch in self.branches:
            x = self.change(branch(x))
        return self.fc(x)

    def structures(self):
        sites = [Site(f"s{i}", w, (f"branches.{i}.hidden",), (f"branches.{i}.out.0",)) for i, w in enumerate(WIDTHS)]
        return [Block(f"branches.{i}", f"branches.{i}.out.0", (site,)) for i, site in enumerate(sites)]


@pytest.mark.parametrize(
    ("change", "inside"),
    [
        (lambda x: F.silu(x, inplace=True), nn.Identity()),
        (lambda x: F.leaky_relu(x, 0.2, inplace=True), nn.Identity()),
        (lambda x: x.add_(1.0), nn.Identity()),
        (lambda x: F.relu(x, inplace=True), nn.Identity()),
        (lambda x: x, nn.Dropout(0.4)),
        (lambda x: x.mul_(0.5), nn.Dropout(0.4)),
    ],
    ids=["silu", "leaky relu", "addition", "relu", "dropout", "dropout and product"],
)
@pytest.mark.parametrize("layers", [(1.0, 1.0), (1.0, 0.0)])
def test_paired_differences_are_those_of_whole_forward_passes_with_the_same_random_numbers(change, inside, layers):
    torch.manual_seed(4)
    model, x, y = (
        Between(change, inside).double().train(),
        torch.randn(40, 4, dtype=torch.float64),
        torch.arange(40) % CLASSES,
    )
    gates = Gates(model, Inventory(model.structures()))
    gates.install([True] * LAYERS, [torch.tensor([2, 3]), torch.tensor([4, 5, 6])])
    xi = torch.tensor([*layers, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    set_draw(gates, xi)
    torch.manual_seed(9)
    found = probe(model, gates, x.clone(), y).paired(range(SIZE))
    assert torch.equal(torch.get_rng_state(), (torch.manual_seed(9), torch.get_rng_state())[1])

    def loss(draw):
        gates.draw = draw
        torch.manual_seed(9)
        with torch.no_grad():
            return F.cross_entropy(model(x.clone()), y)

    for s in range(SIZE):
        other = xi.clone()
        other[s] = 1 - other[s]
        exact = (loss(other) - loss(xi)) * (1 if xi[s] else -1)
        assert found[s].item() == pytest.approx(exact.item(), abs=2e-6)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [(57, 7), (7, 57), (40, 20, 4)])
def test_labels_of_micro_batches_weighted_by_their_examples_are_right_however_sure_the_network_is(sizes):
    """Each loss times n / N: the gradient fits another scale than 1 / k, by which a sure mistake would look like its label."""
    generator = torch.Generator().manual_seed(0)
    for sure in (0.1, 3.0, 8.0):
        calls, expected = [], []
        for size in sizes:
            z = sure * torch.randn(size, 5, generator=generator)
            labels = torch.randint(5, (size,), generator=generator)
            z.requires_grad_()
            (F.cross_entropy(z, labels) * size / sum(sizes)).backward()
            calls.append(
                SimpleNamespace(outputs=[z.detach()], gradients=[z.grad], args=(torch.zeros(size, 1),), kwargs={})
            )
            expected.append(labels)
        for call, labels in zip(calls, expected, strict=True):
            found, fits = _targets(call, slice(None), calls, len(calls), 1.0)
            assert fits and torch.equal(found, labels)
