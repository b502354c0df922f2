"""On PyTorch's device without contents: nothing may mix devices, or read a value where the host need not wait for it.

Tensors of the device ``meta`` have shapes and types alone: operators on tensors of two devices are refused, and so are
``float``, ``bool`` and copies to the host. tests/prune/counted_device.py has whole steps; here is what these do not reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catode.prune.gated import cut
from catode.prune.gated.gates import Gates
from catode.prune.gated.network import Cut, SiteCut
from catode.prune.measure import bounds
from catode.prune.measure.capture import RandomStates
from catode.prune.measure.curvature import Curvature
from catode.prune.measure.growth import GradientProducts
from catode.prune.measure.probes import Probe
from catode.prune.optimizers import Updates
from catode.structures.inventory import Inventory
from catode.train import data
from catode.train.loop import evaluation
from catode.train.loop.average import Average
from catode.train.models import build

DEVICE = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses operators on tensors of two devices, as not all of the device's own do."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()}
        if len(found) > 1 and operator.overloadpacket.__name__ not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{operator} of tensors on more than one device: {found}")
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> Iterator[None]:
    """Keep devices apart; the device has no random number generators."""
    monkeypatch.setattr(RandomStates, "now", classmethod(lambda cls, device: cls(None, None, None, None)))
    monkeypatch.setattr(RandomStates, "set", lambda self: None)
    monkeypatch.setattr(Probe, "_normal", lambda self, like: torch.randn(like.shape, device=like.device))
    with OneDevice():
        yield


@contextmanager
def made(arch: str = "resnet14", **settings):
    """A network on the device in train mode, and a batch."""
    with torch.device(DEVICE):
        model = build(arch, in_channels=3, classes=10, **settings).train()
        x, y = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    model.to(memory_format=torch.channels_last)
    yield model, x.contiguous(memory_format=torch.channels_last), y


def on_device(*tensors: torch.Tensor) -> bool:
    return all(tensor.device == DEVICE for tensor in tensors)


def gated(model):
    """Gates of everything in a model."""
    inventory = Inventory(model.structures())
    gates = Gates(model, inventory)
    gates.install([True] * inventory.layers, [torch.from_numpy(units) for units in inventory.units])
    return gates, inventory


def test_two_devices_are_told():
    for mix in (torch.add, lambda a, b: a.index_select(0, b.long())):
        with pytest.raises(RuntimeError, match="device"):
            mix(torch.ones(2, device=DEVICE), torch.ones(2))


def test_gates_and_their_derivative_stay_on_the_device():
    with made() as (model, x, y):
        gates, inventory = gated(model)
        gates.set(None, torch.ones(inventory.size, device=DEVICE))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert on_device(gates.draw.grad, loss, *(p.grad for p in model.parameters()))
        assert gates.draw.grad.shape == (inventory.size,) and gates.draw.grad.dtype == torch.float32
        gates.rows = torch.ones(8, inventory.size, device=DEVICE, requires_grad=True)
        F.cross_entropy(model(x), y).backward()
        assert on_device(gates.rows.grad)
        model.eval()
        assert on_device(*gates.folded_state().values(), model(x))


@pytest.mark.parametrize("softmax", [True, False])
def test_probes_stay_on_the_device(monkeypatch, softmax):
    monkeypatch.setattr(Curvature, "_all", lambda self, flag: softmax)
    with made() as (model, x, y):
        gates, inventory = gated(model)
        probe = Probe(model, gates, lambda net: F.cross_entropy(net(x).float(), y), 8, torch.Generator())
        assert on_device(probe.curvature(True), probe.curvature(False))
        gates.draw = torch.ones(inventory.size, device=DEVICE, requires_grad=True)
        paired = probe.paired([0, inventory.layers])
        assert on_device(paired) and paired.shape == (2,)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "fused"])
def test_growth_is_summed_on_the_device(kind):
    with made() as (model, x, y):
        make = torch.optim.AdamW if kind == "AdamW" else torch.optim.SGD
        more = {} if kind == "AdamW" else {"momentum": 0.9}
        optimizer = make(model.parameters(), lr=0.1, weight_decay=0.01, **more)
        read = []
        products = GradientProducts(
            (inventory := Inventory(model.structures())).size,
            20.0,
            put=lambda take, *tensors: read.extend(tensors),
            epoch_steps=300.0,
            updates=Updates(optimizer),
        )
        products.attach(model, inventory, np.ones(inventory.size, dtype=bool), list(inventory.units))
        scale = torch.full((), 8.0, device=DEVICE) if kind == "fused" else 1.0
        products.followed = 1000
        for step in range(4):
            products.listen(weights=step > 0)
            loss = F.cross_entropy(model(x), y) * scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            products.add(np.ones(inventory.size), scale)
        assert len(read) >= 4 and on_device(*read)


def test_cuts_keep_everything_on_the_device_and_in_its_memory_format():
    with made() as (model, x, y):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        average = Average(model, 0.9)
        blocks = model.structures()
        site = blocks[1].sites[0]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        fold = np.linspace(0.5, 1.0, site.width)
        made_cut = Cut((blocks[3],), (SiteCut(site, fold, [1], [0, 1, 4]),))
        made_cut.apply(model).follow(optimizer)
        average.cut(made_cut)
        average.update(1)
        for tensor in (*model.parameters(), *model.buffers(), *average.model.parameters()):
            assert on_device(tensor)
        for parameter in model.parameters():
            assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
            assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        state = dict(model.state_dict())
        cut.keep_units_of_state(model, state, site, np.array([0, 2]))
        assert on_device(*state.values()) and state[f"{site.name}.weight"].shape[0] == 2
        kept = np.ones(Inventory(blocks).size, dtype=bool)
        kept[3] = False
        bounds.project(model, blocks, kept, 1.0)
        assert on_device(*bounds.norms(model, blocks, kept))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("augment", "mixup"), [("crop-flip", 0.0), ("crop-flip", 0.3), ("resized-crop", 0.0)])
def test_batches_of_images_that_are_held_on_the_device(channels_last, augment, mixup):
    images, labels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.long)
    batches = data.Batches(
        images, labels, 8, (0.5,) * 3, (0.2,) * 3, augment=augment, mixup=mixup, classes=10, device=DEVICE,
        channels_last=channels_last,
    )  # fmt: skip
    found = list(batches.epoch(0, 0))
    assert len(found) == 2 and all(on_device(*pair) and pair[0].shape == (8, 3, 32, 32) for pair in found)
    assert all(on_device(*pair) for pair in batches.evaluation(images, labels, 7))


def test_scores_are_counted_on_the_device(monkeypatch):
    read = []
    monkeypatch.setattr(evaluation, "read", lambda found: read.extend(found) or [np.ones((1, 3)), np.ones(1)])
    monkeypatch.setattr(evaluation, "autocast", lambda device, dtype: nullcontext())  # the device has none
    with made() as (model, x, y):
        evaluation.evaluate(model, [(x, y), (x[:3], y[:3])])
    assert on_device(*read) and [t.dtype for t in read] == [torch.int64, torch.float64]
