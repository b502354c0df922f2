"""Branches inside modules that cannot be traced: what takes the places of their own modules, tried by shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from catode.prune.describe.protocol import within
from catode.prune.describe.trace.branches import Branch
from catode.prune.describe.trace.recording import Failed, Operation, Recording, fake_copy, record
from catode.prune.describe.trace.rules import PRODUCTS
from catode.prune.gated.absent import outputs_of, remove
from catode.structures.description import Block


def replace_modules(model: nn.Module, example: Any, found: Sequence[Branch], passes: Mapping[bool, Recording]) -> None:
    """Find for each branch what its modules return, and try the network without all branches together.

    Args:
        model: The network; not changed.
        example: One input batch.
        found: The branches; learn what is `absent`, or the reason why they stay.
        passes: The whole network's passes, by whether in train mode.
    """
    called = {path for path, _ in passes[False].calls}
    for branch in found:
        branch.absent = tuple((path, 0) for path in branch.paths if path in called)
        if not any(within(branch.output, path) for path, _ in branch.absent):
            branch.reason = branch.untraced
    while left := [branch for branch in found if not branch.reason]:
        try:
            _learn(model, example, left)
            _try(model, example, left, passes)
            return
        except Failed as error:
            blamed = _blamed(left, error.recording)
            for branch in left if blamed is None else _alike(model, blamed, left):
                branch.reason = f"{branch.untraced}; without it `{error.path}` fails: {error}"


def _learn(model: nn.Module, example: Any, found: Sequence[Branch]) -> None:
    """Number of things that each module of the branches returns."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = fake_copy(model, mode)
    paths = list(dict.fromkeys(path for branch in found for path, _ in branch.absent))
    returned = dict(outputs_of(copied, paths, lambda: record(copied, example, mode)))
    for branch in found:
        branch.absent = tuple((path, returned[path]) for path, _ in branch.absent)


def _try(model: nn.Module, example: Any, found: Sequence[Branch], passes: Mapping[bool, Recording]) -> None:
    """Run the network without the branches, and compare what it does with what it did.

    Raises:
        Failed: if it fails, returns something else, or computes more or less than without the branches.
    """
    gone = {op for branch in found for op in branch.operations}
    for training, whole in passes.items():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copied = fake_copy(model, mode)
        for branch in found:
            remove(copied, Block(branch.module, branch.output, (), absent=branch.absent, branch=branch.paths))
        without = record(copied, example, mode, training)
        if [value.shape for value in without.results] != [value.shape for value in whole.results]:
            raise Failed("", without, ValueError("it returns other shapes"))
        if not training and _products(without.operations) != _products(op for op in whole.operations if op not in gone):
            raise Failed("", without, ValueError("what stays computes something else"))


def _products(operations: Iterable[Operation]) -> list[tuple]:
    """Sums of products, where they run and of which shapes."""
    return [(op.name, op.path, [value.shape for value in op.inputs]) for op in operations if op.name in PRODUCTS]


def _blamed(found: Sequence[Branch], recording: Recording) -> Branch | None:
    """The branch that a failed pass came to last."""
    owners = {path: branch for branch in found for path, _ in branch.absent}
    return next((owners[path] for path, _ in reversed(recording.calls) if path in owners), None)


def _alike(model: nn.Module, blamed: Branch, found: Sequence[Branch]) -> list[Branch]:
    """A branch, and those at the same place of modules of the same class."""

    def place(branch: Branch) -> tuple:
        return type(model.get_submodule(branch.module)), tuple(
            path.removeprefix(branch.module) for path, _ in branch.absent
        )

    return [branch for branch in found if place(branch) == place(blamed)]
