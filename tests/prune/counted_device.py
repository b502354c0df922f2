"""A device that computes on the CPU and counts how often a program would let the host wait for it. Prints JSON.

Every tensor of it is a wrapper of a CPU tensor whose ``device`` is ``counted:0``; operators are computed inside. What
hands data or a shape that depends on data to the host is a wait, and so is a copy to the device that blocks. In a process
of its own, because PyTorch takes up a further kind of device only once.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from catode.prune.devices import transfer
from catode.prune.pruner import Pruner
from catode.train import loop
from catode.train.models import DenseResNet
from catode.train.settings import config, run

SHAPED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "repeat_interleave"}
CHECKED_BY_DATA = {"_local_scalar_dense", "equal", "is_nonzero", "multinomial", "item"}
READ_EVERY = 3
waits: list[str] = []


class Counted(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="counted:0"
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Lets tensors come to the device."""


def compute_everywhere(self, operator, types, args=(), kwargs=None):
    return compute(operator, args, kwargs or {})


Everywhere.__torch_dispatch__ = compute_everywhere  # put into the class itself, PyTorch would load its compiler


def compute(operator, args, kwargs):
    """One operator, on the CPU; a wait is noted."""
    given = tree_leaves((args, kwargs))
    ours = [x for x in given if isinstance(x, Counted)]
    name, target = operator.overloadpacket.__name__, kwargs.get("device")
    strangers = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, Counted) and x.dim() > 0]
    if ours and strangers and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{name} of tensors on two devices")
    there = bool(ours) if target is None else torch.device(target).type == "counted"
    if there and target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if ours and (name in SHAPED_BY_DATA | CHECKED_BY_DATA or (target is not None and not there)):
        waits.append(name)
    if ours and name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
        waits.append("index by a mask")
    crosses = (name == "_to_copy" and there and not ours) or (name == "copy_" and len(ours) == 1)
    if crosses and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
        waits.append(f"blocking {name}")
    args, kwargs = tree_map_only(Counted, lambda x: x.inner, (args, kwargs))
    result = operator(*args, **kwargs)
    if not there:
        return result
    own = {id(x.inner): x for x in ours}
    return tree_map_only(torch.Tensor, lambda x: own.get(id(x)) if id(x) in own else Counted(x), result)


class Backend:
    """What PyTorch asks the module of a device."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class Generator(torch.Generator):
    """Random numbers of the device come from the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def steps(device, read_every, number, **changes):
    """Thetas and gains of a pruner after some steps, and what the host waited for in each of them."""
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=2, width=8, hidden=6)
    x, y = torch.randn(24, 1, 8, 8), torch.randint(10, (24,))
    model, x, y = model.to(device).train(), x.to(device), y.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    given = dict(nu=5.0, rate_ratio=0.05, steps=10**6, memory=20, check_every=10**6, probe_size=12, measure_every=2)
    given |= dict(initial_keep_prob=0.8, read_every=read_every)
    pruner = Pruner(model, x[:1], optimizer=optimizer, **given, **changes)
    counts = []
    for _ in range(number):
        waits.clear()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        counts.append(list(waits))
    pruner.read()
    return pruner.keep_prob.tolist(), pruner.limits().gain.tolist(), counts


def epoch(setup, device, folder):
    """Thetas and losses of the trainer's first epoch, and what the host waited for in each of its steps."""
    settings = dataclasses.replace(setup.config, device=device, out=folder)
    model, example = copy.deepcopy(setup.model).to(device), setup.example.to(device)
    setup = dataclasses.replace(setup, config=settings, model=model, example=example)
    Path(folder).mkdir()
    trainer, counts, inner = loop.Trainer(setup, Path(folder), progress=False), [], loop.Trainer.prune

    def prune(self, *args):
        inner(self, *args)
        counts.append(list(waits))
        waits.clear()

    loop.Trainer.prune = prune
    waits.clear()
    try:
        loss = trainer.epoch(0)["loss"]
    finally:
        trainer.close()
        loop.Trainer.prune = inner
    return trainer.pruner.keep_prob.tolist(), [loss], counts


def mixed():
    """Numbers of which every third is on the device, and what the host waited for to have them."""
    numbers = [torch.tensor(k / 8).to("counted:0") if k % 3 == 0 else k / 8 for k in range(9)]
    numbers[1] = torch.tensor(0.125)
    waits.clear()
    return transfer.floats(numbers), list(waits)


def main():
    torch.Generator = Generator
    backend_registration._setup_privateuseone_for_python_backend("counted", Backend())
    run.check_device = lambda device: None
    loop.result.latency_ms = lambda *_: [0.0, 0.0]
    changes = {"default": {}, "per example": {"per_example": True}, "curvature": {"layer_estimator": "curvature"}}
    given = dict(arch="resnet14", hidden_scale=0.25, batch_size=200, epochs=2, memory=10, check_every=10**6)
    given |= dict(validation_share=0.0, initial_keep_prob=0.9, layers_per_probe=6, read_every=READ_EVERY, out="unused")
    setup = loop.prepare(config.Config(**given))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", "counted:0"):
            with nullcontext() if device == "cpu" else Everywhere():
                found[device] = {name: steps(device, READ_EVERY, 9, **own) for name, own in changes.items()}
                found[device]["trainer"] = epoch(setup, device, f"{folder}/{device}")
        with Everywhere():
            found["mixed"] = mixed()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
