"""Pools against direct formulas, and gradient products against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catode.decisions.evidence import Pool
from catode.prune.growth import GradientProducts
from catode.train.models import BasicBlock, DenseResNet, build

values = st.floats(-100, 100)


@settings(max_examples=80)
@given(st.lists(values, min_size=1, max_size=30), st.floats(1.0, 50.0))
def test_law_pool_agrees_with_the_weighted_formulas(observed, window):
    pool = Pool(1, window)
    for value in observed:
        pool.add(np.array([value]), np.array([True]))
    x = np.array(observed)
    w = (1 - 1 / window) ** np.arange(len(x))[::-1]
    w[-1] = 1.0
    mean, count = w @ x / w.sum(), w.sum() ** 2 / (w @ w)
    assert pool.mean[0] == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert pool.count[0] == pytest.approx(count, rel=1e-9)
    assert count <= len(x) + 1e-9 and pool.count[0] <= 2 * window - 1 + 1e-9
    if count > 1.5:
        unbiased = w @ (x - mean) ** 2 / w.sum() * count / (count - 1)
        assert pool.variance[0] == pytest.approx(unbiased, rel=1e-6, abs=1e-6)
        assert pool.error[0] == pytest.approx(math.sqrt(pool.variance[0] / count))
    else:
        assert pool.variance[0] == pool.error[0] == math.inf


def test_a_pool_without_forgetting_is_the_sample():
    pool, x = Pool(1, 1e12), np.random.default_rng(0).normal(3, 2, 200)
    for value in x:
        pool.add(np.array([value]), np.array([True]))
    assert pool.count[0] == pytest.approx(200)
    assert pool.mean[0] == pytest.approx(x.mean())
    assert pool.variance[0] == pytest.approx(x.var(ddof=1), rel=1e-6)


def test_nothing_seen_is_nothing_known():
    pool = Pool(2, 10.0)
    pool.add(np.array([5.0, np.nan]), np.array([True, False]))
    assert pool.count.tolist() == [1, 0] and pool.mean.tolist() == [5, 0]
    assert np.isinf(pool.variance).all() and np.isinf(pool.error).all()


@settings(max_examples=40)
@given(st.lists(st.tuples(values, values, st.booleans(), st.booleans()), max_size=25))
def test_law_quantities_are_pooled_independently(rows):
    both, single = Pool(2, np.array([5.0, 9.0])), (Pool(1, 5.0), Pool(1, 9.0))
    for a, b, seen_a, seen_b in rows:
        both.add(np.array([a, b]), np.array([seen_a, seen_b]))
        for pool, value, seen in zip(single, (a, b), (seen_a, seen_b), strict=True):
            pool.add(np.array([value]), np.array([seen]))
    for name in ("count", "mean", "variance", "error"):
        alone = np.concatenate([getattr(p, name) for p in single])
        np.testing.assert_allclose(getattr(both, name), alone, rtol=1e-12)


@pytest.mark.parametrize("window", [2.0, 7.5, 100.0])
def test_the_effective_count_saturates_at_twice_the_window(window):
    pool = Pool(1, window)
    for _ in range(int(30 * window)):
        pool.add(np.ones(1), np.array([True]))
    assert pool.count[0] == pytest.approx(2 * window - 1)
    assert pool.mean[0] == pytest.approx(1.0) and pool.variance[0] == pytest.approx(0.0, abs=1e-9)


def test_a_pool_follows_what_changes():
    pool = Pool(1, 10.0)
    for value in [0.0] * 200 + [1.0] * 50:
        pool.add(np.array([value]), np.array([True]))
    assert pool.mean[0] == pytest.approx(1 - 0.9**50)


# Gradient products


def present(blocks):
    """Every unit's number, as the pruner numbers them."""
    start, found = len(blocks), []
    for block in blocks:
        here = []
        for site in block.sites:
            here.append(np.arange(start, start + site.width))
            start += site.width
        found.append(here)
    return found, start


def attached(model, window=1e6):
    blocks = model.structures()
    units, size = present(blocks)
    products = GradientProducts(size, window)
    products.attach(model, list(enumerate(blocks)), units)
    return products, size


class OneBlock(nn.Module):
    """A basic block between a stem and nothing: what belongs to whom can be listed by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.block = BasicBlock(3, 4, 3, 1)

    def structures(self):
        return [self.block.structure("block")]


def by_hand(block, value):
    """Sum of `value(parameter)` over what each structure of `OneBlock` owns: the layer, then the four units."""
    weights = {n: value(p) for n, p in block.named_parameters()}
    layer = sum(v.sum() for v in weights.values())
    units = [
        weights["conv1.weight"][i].sum()
        + weights["bn1.weight"][i]
        + weights["bn1.bias"][i]
        + weights["conv2.weight"][:, i].sum()
        for i in range(4)
    ]
    return torch.stack([layer, *units]).numpy()


def test_ownership_of_every_single_weight():
    model = OneBlock().double()
    parameters = dict(model.block.named_parameters())
    for name, parameter in parameters.items():
        for place in range(parameter.numel()):
            products, size = attached(model)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            parameter.grad.view(-1)[place] = 2.0
            for _ in range(3):
                products.add(np.ones(size))
            index = np.unravel_index(place, parameter.shape)
            unit = {"conv1": index[0], "bn1": index[0], "conv2": index[-3] if len(index) == 4 else None}.get(
                name.split(".")[0]
            )
            expected = np.zeros(5)
            expected[0] = 4.0
            if unit is not None:
                expected[1 + unit] = 4.0
            assert products.gain.mean.tolist() == expected.tolist(), (name, index)


def test_gain_and_weight_gradient_by_hand():
    torch.manual_seed(0)
    model = OneBlock().double()
    products, size = attached(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    products.add(np.ones(size))
    products.note_weights()
    products.add(np.ones(size))
    products.add(np.ones(size))
    np.testing.assert_allclose(products.gain.mean, by_hand(model.block, lambda p: p.grad.square()), rtol=1e-12)
    expected = by_hand(model.block, lambda p: p.grad * p.detach())
    np.testing.assert_allclose(products.weight_gradient.mean, expected, rtol=1e-10, atol=1e-12)
    assert products.gain.count.tolist() == [1] * 5


def test_a_shortcut_that_stays_belongs_to_nobody(bottleneck_net):
    model = bottleneck_net()
    products, size = attached(model)
    for n, p in model.named_parameters():
        p.grad = torch.ones_like(p) * ("shortcut" in n or not n.startswith("blocks"))
    for _ in range(3):
        products.add(np.ones(size))
    assert not products.gain.mean.any() and products.gain.count.all()


def test_numbers_stay_the_original_ones_after_a_compaction():
    from catode.prune.cut import keep_units

    model = DenseResNet(6, 3, blocks=2, width=4, hidden=5)
    blocks = model.structures()
    keep_units(model, blocks[1], 0, [1, 4])
    products = GradientProducts(12, 1e6)
    products.attach(model, [(1, blocks[1])], [[np.array([8, 11])]])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.blocks[1].hidden.weight.grad[1] = 1.0  # now the second unit: number 11
    for _ in range(3):
        products.add(np.ones(12))
    assert products.gain.mean.nonzero()[0].tolist() == [1, 11] and products.gain.mean[11] == 4.0


def test_law_products_of_different_batches_are_unbiased_where_the_square_is_not():
    torch.manual_seed(0)
    model = OneBlock().double()
    products, size = attached(model)
    generator = torch.Generator().manual_seed(1)
    signal = {n: 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    noise, bursts = 0.5, 600
    for _ in range(3 * bursts):
        for n, p in model.named_parameters():
            p.grad = signal[n] + noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        products.add(np.ones(size))
    names = {id(p): n for n, p in model.named_parameters()}
    exact = by_hand(model.block, lambda p: signal[names[id(p)]].square())
    dimension = by_hand(model.block, torch.ones_like)
    assert products.gain.count == pytest.approx(np.full(size, bursts), rel=1e-3)
    assert (np.abs(products.gain.mean - exact) <= 4 * products.gain.error).all()
    assert (noise**2 * dimension > 20 * products.gain.error).all(), "the square's bias is far outside the error"


def test_only_steps_in_which_a_structure_was_on_count():
    model = OneBlock()
    products, size = attached(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    off = np.ones(size)
    off[2] = 0.0
    for draw in (np.ones(size), off, np.ones(size)):
        products.add(draw)
    assert products.gain.count.tolist() == [1, 1, 0, 1, 1]


def test_a_missing_gradient_skips_the_step():
    model = OneBlock()
    products, size = attached(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.block.conv1.weight.grad = None
    for _ in range(3):
        products.add(np.ones(size))
    assert not products.gain.count.any()


def test_attaching_starts_a_new_burst():
    """A burst must not mix gradients of the network before and after a compaction."""
    model = build("resnet14", in_channels=1, classes=10)
    products, size = attached(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    products.add(np.ones(size))
    products.add(np.ones(size))
    blocks = model.structures()
    products.attach(model, list(enumerate(blocks)), present(blocks)[0])
    products.add(np.ones(size))
    assert not products.gain.count.any()


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), arch=st.sampled_from(["resnet14", "resnet50"]))
def test_law_homogeneity_is_no_assumption_here_but_exact(seed, arch):
    """Degree 1 in what makes a unit behind its norm and in what reads it: both have the same w . grad L (THEORY 4)."""
    torch.manual_seed(seed)
    model = build(arch, in_channels=3, classes=10, stem="cifar", hidden_scale=0.25).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    images, labels = torch.randn(4, 3, 8, 8).double(), torch.randint(10, (4,))
    nn.functional.cross_entropy(model(images), labels).backward()
    for site in (site for block in model.structures() for site in block.sites):
        norm = [m for m in map(model.get_submodule, site.producers) if isinstance(m, nn.BatchNorm2d)]
        made = sum((p * p.grad for m in norm for p in m.parameters()), torch.zeros(()))
        read = sum(
            (m.weight * m.weight.grad).transpose(0, 1).flatten(1).sum(1)
            for m in map(model.get_submodule, site.consumers)
        )
        assert made.detach().numpy() == pytest.approx(read.detach().numpy(), rel=1e-6, abs=1e-12)
