"""One forward pass of a network as a list of operations, of any model that runs: nothing of its code is read.

The pass runs on a copy whose parameters have shapes but no numbers (fake tensors), so that it takes neither memory nor the
time of the arithmetic; a model that looks at the numbers it computes cannot be looked at so.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from catode.prune.describe.executed import called, plain_attention
from catode.prune.gated.heads import convert

IGNORED = ("prim::device", "aten::sym_size", "aten::is_same_size")


@dataclass(eq=False)
class Value:
    """A tensor at one moment: an operation in place makes a new value.

    Attributes:
        number: Its position in the order in which values came to be.
        shape: Its shape.
        op: The operation that made it, None for a parameter, buffer, input, or a tensor from elsewhere.
        tensor: Name of the parameter or buffer that it is, or "".
        is_input: Whether it is part of the example.
        users: Operations that read it.
        integer: Whether it holds no floating-point numbers.
    """

    number: int
    shape: tuple[int, ...]
    op: Operation | None = None
    tensor: str = ""
    is_input: bool = False
    integer: bool = False
    users: list[Operation] = field(default_factory=list)


@dataclass(eq=False)
class Operation:
    """A call of an operator.

    Attributes:
        number: Its position in the order of execution.
        target: The operator, such as ``torch.ops.aten.add.Tensor``.
        args: Arguments, tensors as `Value`.
        kwargs: Keyword arguments, the same.
        inputs: All values among the arguments, in order.
        outputs: Values that it made or changed, in order.
        aliases: Other tensors on the storage of one that it changed, before and after.
        stack: Calls of modules that it ran in, from the outermost: (path, number of the call).
    """

    number: int
    target: Any
    args: tuple
    kwargs: dict[str, Any]
    inputs: list[Value]
    stack: tuple[tuple[str, int], ...]
    nodes: dict[str, str] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    aliases: list[tuple[Value, Value]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the operator without its overload, such as "add"."""
        return self.target._schema.name.partition("::")[2]

    @property
    def path(self) -> str:
        """Path of the innermost module that ran it."""
        return self.stack[-1][0] if self.stack else ""

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of the operator's schema with a name."""
        if name in self.kwargs:
            return self.kwargs[name]
        for position, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return default if argument.default_value is None else argument.default_value
        return default


@dataclass
class Recording:
    """A forward pass.

    Attributes:
        operations: In order of execution.
        values: In order.
        tensors: Parameters and buffers by name.
        results: Values that the network returned.
        calls: Modules called, as (path, number of the call), in the order in which they began.
    """

    operations: list[Operation] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    tensors: dict[str, Value] = field(default_factory=dict)
    results: list[Value] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)


class Failed(Exception):
    """A forward pass that ended with an error.

    Attributes:
        path: The innermost module that ran.
        recording: The pass up to there.
    """

    def __init__(self, path: str, recording: Recording, cause: Exception):
        super().__init__(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}")
        self.path, self.recording = path, recording


class _Recorder(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording, self.stack, self.nodes = recording, [], {}
        self._now: dict[int, Value] = {}  # by identity of the tensor
        self._held: list[torch.Tensor] = []  # so that no identity is used twice
        self._views: dict[int, list[torch.Tensor]] = {}  # tensors on one storage

    def value(self, tensor: torch.Tensor, /, **what: Any) -> Value:
        """The value that a tensor holds now."""
        if id(tensor) not in self._now:
            self._set(tensor, self._new(tensor, **what))
        return self._now[id(tensor)]

    def _new(self, tensor: torch.Tensor, /, **what: Any) -> Value:
        integer = not (tensor.is_floating_point() or tensor.is_complex())
        value = Value(len(self.recording.values), tuple(tensor.shape), integer=integer, **what)
        self.recording.values.append(value)
        return value

    def _set(self, tensor: torch.Tensor, value: Value) -> None:
        if id(tensor) not in self._now:
            self._held.append(tensor)
            self._views.setdefault(_storage(tensor), []).append(tensor)
        self._now[id(tensor)] = value

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in IGNORED:
            return function(*args, **kwargs)
        inputs: list[Value] = []

        def noted(tensor: torch.Tensor) -> Value:
            inputs.append(self.value(tensor))
            return inputs[-1]

        noted_args = tree_map_only(torch.Tensor, noted, args)
        noted_kwargs = tree_map_only(torch.Tensor, noted, kwargs)
        found = function(*args, **kwargs)
        op = Operation(
            len(self.recording.operations),
            function,
            noted_args,
            noted_kwargs,
            inputs,
            tuple(self.stack),
            dict(self.nodes),
        )
        self.recording.operations.append(op)
        for value in dict.fromkeys(inputs):
            value.users.append(op)
        changed = _mutated(function, args, kwargs)
        for tensor in tree_flatten(found)[0]:
            if isinstance(tensor, torch.Tensor) and not any(tensor is other for other in changed):
                op.outputs.append(self._new(tensor, op=op))
                self._set(tensor, op.outputs[-1])
        for tensor in changed:
            op.outputs.append(self._new(tensor, op=op))
            for other in self._views.get(_storage(tensor), ()):
                if other is not tensor and (before := self._now[id(other)]).op is not op:
                    after = self._new(other, op=op)
                    op.aliases.append((before, after))
                    before.users.append(op)
                    self._set(other, after)
            self._set(tensor, op.outputs[-1])
        return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if not tensor.is_sparse else id(tensor)


def _mutated(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operator changes in place."""
    found = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [tensor for tensor in tree_flatten(value)[0] if isinstance(tensor, torch.Tensor)]
    return found


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a network whose parameters and buffers have shapes but no numbers, and whose attention can lose heads."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = _plain(tensor.detach(), mode)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    found = copy.deepcopy(model, memo)
    convert(found)
    return found


def _plain(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A tensor without numbers, in the usual memory format: others make operators change strides in place."""
    with mode:
        fake = mode.from_tensor(tensor)
        usual = fake.new_empty(fake.shape)
    return fake if fake.stride() == usual.stride() else usual


def doubled(example: Any) -> Any:
    """An example of two examples where there is one, so that norms in train mode have something to average."""
    return tree_map_only(torch.Tensor, lambda x: torch.cat([x, x]) if x.dim() and len(x) == 1 else x, example)


class _ByNodes(fx.Interpreter):
    """Runs a module's own graph and tells the recorder which node runs."""

    def __init__(self, path: str, module: nn.Module, graph: fx.Graph, recorder: _Recorder):
        super().__init__(fx.GraphModule(module, graph))
        self.path, self.recorder, self.signature = path, recorder, inspect.signature(type(module).forward)

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.nodes[self.path] = n.name
        try:
            return super().run_node(n)
        finally:
            self.recorder.nodes.pop(self.path, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return self.run(*list(bound.arguments.values())[1:])


def record(
    copied: nn.Module,
    example: Any,
    mode: FakeTensorMode,
    training: bool = False,
    graphs: Mapping[str, fx.Graph] | None = None,
) -> Recording:
    """Run a copy of a network and note its operations.

    Args:
        copied: A copy, which may be changed; made by `fake_copy`.
        example: One input batch.
        mode: The mode of the copy's tensors.
        training: Whether in train mode.
        graphs: Graphs of modules by path, which run in place of the modules' own code.

    Raises:
        Failed: if the network raises an error.
    """
    recording = Recording()
    recorder, hooks, times = _Recorder(recording), [], {}
    copied.train(training)

    def enter(name: str):
        def hook(*_: Any) -> None:
            times[name] = times.get(name, -1) + 1
            recorder.stack.append((name, times[name]))
            recording.calls.append(recorder.stack[-1])

        return hook

    def leave(*_: Any) -> None:
        recorder.stack.pop()

    for path, graph in (graphs or {}).items():
        module = copied.get_submodule(path)
        module.forward = _ByNodes(path, module, graph, recorder)
    for name, module in copied.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave))
    example = tree_map_only(torch.Tensor, lambda tensor: _plain(tensor, mode), example)
    for kind in (copied.named_parameters, copied.named_buffers):
        for name, tensor in kind():
            recording.tensors[name] = recorder.value(tensor, tensor=name)
    for tensor in tree_flatten(example if not isinstance(example, Mapping) else dict(example))[0]:
        if isinstance(tensor, torch.Tensor):
            recorder.value(tensor, is_input=True)
    logger = logging.getLogger(
        "torch._subclasses.fake_tensor"
    )  # shapes that do not fit are expected, and named by the error
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with torch.no_grad(), plain_attention(), mode, recorder:
            found = called(copied, example)
    except Exception as error:  # whatever the model's own code raises
        raise Failed(recorder.stack[-1][0] if recorder.stack else "", recording, error) from error
    finally:
        logger.setLevel(level)
        for hook in hooks:
            hook.remove()
    flat = tree_flatten(dict(found) if isinstance(found, Mapping) else found)[0]
    recording.results = [recorder.value(tensor) for tensor in flat if isinstance(tensor, torch.Tensor)]
    return recording
