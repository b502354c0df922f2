"""Gradient products against closed forms: what belongs to whom, and what they are an unbiased estimate of."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catode.prune.gated.cut import keep_units
from catode.prune.measure.growth import GradientProducts
from catode.structures.inventory import Inventory
from catode.train.models import BasicBlock, DenseResNet, build


def attached(model, window=1e6, **given):
    inventory = Inventory(model.structures())
    products = GradientProducts(inventory.size, window, **given)
    products.attach(model, inventory, np.ones(inventory.size, dtype=bool), inventory.units)
    return products, inventory.size


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
    model = DenseResNet(6, 3, blocks=2, width=4, hidden=5)
    blocks = model.structures()
    keep_units(model, blocks[1].sites[0], [1, 4])
    products, inventory = GradientProducts(12, 1e6), Inventory(blocks)
    kept = np.isin(np.arange(12), [1, 8, 11])
    products.attach(model, inventory, kept, [np.array([], dtype=np.int64), np.array([8, 11])])
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


def epoch_of_batches(model, count, seed):
    """Gradients of the batches of one epoch, and their mean: what all images together give."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3 for n, p in model.named_parameters()}
        for _ in range(count)
    ]
    return batches, {n: sum(batch[n] for batch in batches) / count for n in batches[0]}


@pytest.mark.parametrize("count", [3, 5, 8])
@pytest.mark.parametrize("per_example", [False, True])
def test_law_batches_of_one_epoch_are_corrected_exactly(count, per_example):
    """Over all orders of an epoch the corrected product is |G|^2 to rounding, the plain one lower by tr S / (nb - 1)."""
    torch.manual_seed(0)
    model = OneBlock().double()
    batches, whole = epoch_of_batches(model, count, seed=count)
    products, size = attached(model, window=1e12, epoch_steps=count)
    draw = np.full(size, 0.8 if per_example else 1.0)  # a gated weight's gradient carries the gate
    for order in itertools.permutations(range(count), 3):
        for place in order:
            for n, p in model.named_parameters():
                p.grad = batches[place][n] * draw[0]
            products.add(draw)
    names = {id(p): n for n, p in model.named_parameters()}
    exact = by_hand(model.block, lambda p: whole[names[id(p)]].square())
    spread = sum(by_hand(model.block, lambda p, b=b: (b - whole)[names[id(p)]].square()) for b in map(Shifted, batches))
    np.testing.assert_allclose(products.gain.mean, exact, rtol=1e-9)
    np.testing.assert_allclose(products.gain_below.mean, exact - spread / count / (count - 1), rtol=1e-9)
    assert (products.gain_below.mean < exact).all()


def test_law_the_truth_lies_between_where_batches_vary_for_other_reasons_too():
    """Noise of its own on every batch, as augmentation adds: from below and from above, both in expectation."""
    torch.manual_seed(0)
    model = OneBlock().double()
    count, generator = 6, torch.Generator().manual_seed(1)
    batches, whole = epoch_of_batches(model, count, seed=2)
    products, size = attached(model, window=1e12, epoch_steps=count)
    for _ in range(400):
        order = torch.randperm(count, generator=generator)[:3]
        for place in order.tolist():
            for n, p in model.named_parameters():
                p.grad = batches[place][n] + torch.randn(p.shape, generator=generator, dtype=p.dtype)
            products.add(np.ones(size))
    names = {id(p): n for n, p in model.named_parameters()}
    exact = by_hand(model.block, lambda p: whole[names[id(p)]].square())
    assert (products.gain_below.mean - 4 * products.gain_below.error < exact).all()
    assert (products.gain.mean - 4 * products.gain.error > exact).all()


def test_independent_batches_need_no_correction():
    model = OneBlock().double()
    products, size = attached(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(3):
        products.add(np.ones(size))
    assert products.gain.mean.tolist() == products.gain_below.mean.tolist()


class Shifted(dict):
    """Gradients by name that can be subtracted."""

    def __sub__(self, other):
        return {name: value - other[name] for name, value in self.items()}


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
    inventory = Inventory(model.structures())
    products.attach(model, inventory, np.ones(size, dtype=bool), inventory.units)
    products.add(np.ones(size))
    assert not products.gain.count.any()


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), arch=st.sampled_from(["resnet14", "resnet50"]))
def test_law_homogeneity_is_no_assumption_here_but_exact(seed, arch):
    """Degree 1 in what makes a unit behind its norm and in what reads it: both have the same w . grad L.

    Source: docs/mathematics.md section 4.
    """
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
