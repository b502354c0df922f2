"""Residual branches: what lies between a fork and an addition and serves nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from catode.prune.describe.protocol import within
from catode.prune.describe.trace.maps import Maps
from catode.prune.describe.trace.recording import Operation, Recording, Value
from catode.prune.describe.trace.rules import BATCH_NORMS, PRODUCTS
from catode.prune.describe.trace.shapes import VIEWS
from catode.prune.gated.remainder import ADDITIONS, trace

MULTIPLES = (
    "mul",
    "mul_",
    "div",
    "div_",
    "neg",
    "clone",
    "_to_copy",
    "view",
    "_unsafe_view",
    "permute",
    "transpose",
    "expand",
)
MULTIPLES += ("squeeze", "unsqueeze", "native_dropout", "contiguous", "detach", "alias", "slice", "roll", "cat")
"""Operators that map a multiple of their one argument that depends on the input to the same multiple."""


@dataclass(eq=False)
class Branch:
    """A residual branch.

    Attributes:
        addition: The operation that ends it.
        addend: What is added to the shortcut.
        shortcut: What it is added to.
        operations: Operations that serve the branch alone.
        parameters: Names of the parameters that it alone uses.
        module: Path of the smallest module that holds it and its addition.
        node: Name of the addend's node in the module's own graph.
        output: Path of the module that a gate scales.
        reader: Path of the module that reads its weight without calling it, or "".
        paths: Modules and parameters that go with it.
        absent: Modules whose places something that returns 0 takes, where the module around cannot be traced; with how many things
            each of them returns.
        reason: Why it cannot go, or "".
        untraced: Why the module that holds it cannot be replaced by the rest of its graph, or "".
    """

    addition: Operation
    addend: Value
    shortcut: Value
    operations: set[Operation]
    parameters: set[str]
    module: str = ""
    node: str = ""
    output: str = ""
    reader: str = ""
    paths: tuple[str, ...] = ()
    absent: tuple[tuple[str, int], ...] = ()
    reason: str = ""
    untraced: str = ""

    @property
    def name(self) -> str:
        """Its name where its module holds several: with that of its addend, or the path of what goes and ends it."""
        if self.node:
            return f"{self.module}:{self.node}"
        return next(path for path, _ in self.absent if within(self.output, path))


@dataclass
class _Flow:
    """Who depends on whom in a pass."""

    recording: Recording
    maps: Maps
    bases: dict[Value, Value] = field(default_factory=dict)
    idle: set[Operation] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Find the operations whose results nobody reads, such as the last state of a recurrent layer."""
        results = set(self.recording.results)
        for op in reversed(self.recording.operations):
            made = [*op.outputs, *(after for _, after in op.aliases)]
            read = any(user not in self.idle for value in made for user in value.users)
            if not read and not results & set(made) and not op.name.endswith("_"):
                self.idle.add(op)

    def exclusive(self, value: Value, reader: Operation) -> set[Operation]:
        """Operations whose every result serves `value` as `reader` reads it, and nothing else."""
        results = set(self.recording.results)
        found: set[Operation] = set()
        others = [user for user in value.users if user is not reader and user not in self.idle]
        if value.op is None or value in results or others:
            return found
        waiting = {value.op}
        while waiting:
            op = max(waiting, key=lambda op: op.number)
            waiting.discard(op)
            made = [*op.outputs, *(after for _, after in op.aliases)]
            users = {user for output in made for user in output.users} - self.idle
            if any(output in results for output in made):
                continue
            if not any(output in reader.inputs for output in made):
                users.discard(reader)  # it adds in place to a view of it
            if op is not value.op and not users <= found:
                continue
            if op is value.op and not users <= {reader}:
                continue
            if any(not self.maps.active[source] and source.tensor and op.name.endswith("_") for source in op.inputs):
                continue
            found.add(op)
            waiting |= {source.op for source in (*op.inputs, *(b for b, _ in op.aliases)) if source.op is not None}
        return found

    def depends(self, value: Value, source: Value) -> bool:
        """Whether a value is computed from another one."""
        seen, waiting = set(), [value]
        while waiting:
            here = waiting.pop()
            if here is source:
                return True
            if here.op is None or here in seen or here.number < source.number:
                continue
            seen.add(here)
            waiting += [*here.op.inputs, *(before for before, _ in here.op.aliases)]
        return False

    def entries(self, operations: set[Operation]) -> set[Value]:
        """Values that depend on the input and that operations read from outside."""
        return {
            value for op in operations for value in op.inputs if self.maps.active[value] and value.op not in operations
        }

    def stream(self, value: Value) -> list[Value]:
        """A value and those that it is the sum of a shortcut with, back to the first."""
        found = [value]
        while found[-1] in self.bases:
            found.append(self.bases[found[-1]])
        return found


def branches(maps: Maps, recording: Recording) -> list[Branch]:
    """Residual branches of a network, none of which holds another one, in the order of their additions.

    Args:
        maps: Index maps, which know what depends on the input.
        recording: A pass in eval mode.
    """
    flow, found = _Flow(recording, maps), []
    for op in recording.operations:
        if op.name not in ("add", "add_") or len(op.inputs) != 2:
            continue
        one, other = op.inputs
        if one is other or one.shape != other.shape or not (maps.active[one] and maps.active[other]):
            continue
        branch = _branch(flow, op, one, other)
        if branch is not None:
            flow.bases[op.outputs[0]] = branch.shortcut
            found.append(branch)
    for branch in found:
        inner = [other for other in found if other is not branch and other.operations < branch.operations]
        if inner:
            branch.reason = f"holds the branch that is added in `{inner[0].addition.path}`"
        _place(branch, flow)
        others = (op for op in recording.operations if op not in branch.operations and op not in flow.idle)
        outside = _used(others) & branch.parameters
        if not branch.reason and outside:
            branch.reason = f"`{min(outside)}` is used outside of it too"
    return found


def _branch(flow: _Flow, op: Operation, one: Value, other: Value) -> Branch | None:
    """The branch that ends in an addition of two values, if one of them is that of a shortcut."""
    regions = {value: flow.exclusive(value, op) for value in (one, other)}
    weights = {value: _used(region) for value, region in regions.items()}
    choices = []
    for addend, shortcut in ((other, one), (one, other)):
        if not weights[addend] or not flow.entries(regions[addend]):
            continue
        base = next((value for value in flow.stream(shortcut) if flow.depends(addend, value)), None)
        if base is not None:
            return Branch(op, addend, shortcut, regions[addend], weights[addend])
        choices.append((_products(flow, regions[addend]), addend, shortcut))
    for products, addend, shortcut in choices:
        there = _products(flow, regions[shortcut])
        forked = flow.entries(regions[addend]) & flow.entries(regions[shortcut]) or shortcut in flow.entries(
            regions[addend]
        )
        if there <= 1 and products > there and (forked or not regions[shortcut]):
            return Branch(op, addend, shortcut, regions[addend], weights[addend])
    return None


def _products(flow: _Flow, operations: set[Operation]) -> int:
    """Number of operations with a weight."""
    return sum(op.name in PRODUCTS and any(not flow.maps.active[value] for value in op.inputs) for op in operations)


def _used(operations: Iterable[Operation], maps: Maps | None = None) -> set[str]:
    """Parameters and buffers that operations read; with `maps`, those that they read a view of."""
    found = {value.tensor for op in operations for value in op.inputs}
    if maps is not None:
        found |= {maps.origin.get(value, "") for op in operations for value in op.inputs}
    return found - {""}


def _place(branch: Branch, flow: _Flow) -> None:
    """Find the smallest module that holds a branch and its addition, and the modules that go with it."""
    stacks = [op.stack for op in (*branch.operations, branch.addition)]
    depth = 0
    while all(len(stack) > depth for stack in stacks) and len({stack[depth] for stack in stacks}) == 1:
        depth += 1
    path = stacks[0][depth - 1][0] if depth else ""
    branch.module = path
    if sum(call[0] == path for call in flow.recording.calls) > 1:
        branch.reason = branch.reason or f"`{path}` is used several times"
    if not path:
        branch.untraced = "it spans the whole network's own forward pass"
    elif branch.addition.path != path:
        branch.untraced = f"its addition is inside `{branch.addition.path}`, a part of `{path}`"
    gone, stays = set(), set()
    for op in flow.recording.operations:
        names = [name for name, _ in op.stack[depth:]]
        if not op.inputs or op in flow.idle:
            continue
        (gone if op in branch.operations else stays).update(names)
    gone -= stays
    paths = [name for name in gone if not any(name.startswith(f"{other}.") for other in gone)]
    rest = [name for name in branch.parameters if not any(name.startswith(f"{other}.") for other in paths)]
    branch.paths = (*sorted(paths), *sorted(rest))


def name_nodes(found: Sequence[Branch], recording: Recording, again: Recording, graphs: dict[str, fx.Graph]) -> None:
    """Find the nodes of the branches' addends in the graphs of the modules that hold them.

    Args:
        found: The branches; changed in place.
        recording: The pass that they were found in.
        again: The same, in which the graphs ran.
        graphs: Graph of each module.
    """
    for branch in found:
        if branch.reason or branch.untraced:
            continue
        one, other = (_inside(one, branch.module) for one in (recording, again))
        if [op.name.rstrip("_") for op in one] != [
            op.name.rstrip("_") for op in other
        ]:  # but for how tensors are taken apart
            branch.untraced = f"the graph of `{branch.module}` does not compute the same"
            continue
        nodes = {node.name: node for node in graphs[branch.module].nodes}
        node = nodes[other[one.index(branch.addition)].nodes[branch.module]]
        position = branch.addition.inputs.index(branch.addend)
        arguments = [part for part in node.args if isinstance(part, fx.Node)]
        if node.target not in ADDITIONS or len(arguments) != 2:
            branch.untraced = f"it is added by `{node.target}` in `{branch.module}`"
            continue
        addend = arguments[position]
        if len(addend.users) != 1:
            branch.untraced = f"what it adds is used several times in `{branch.module}`"
            continue
        branch.node = addend.name


def _inside(recording: Recording, path: str) -> list[Operation]:
    """Operations of a module that compute something."""
    ops = (op for op in recording.operations if any(name == path for name, _ in op.stack))
    return [op for op in ops if op.inputs and op.name not in (*VIEWS, "clone", "alias", "detach", "_to_copy", "copy_")]


def output_of(model: nn.Module, maps: Maps, branch: Branch, graph: fx.Graph | None, whole: Recording) -> str:
    """Path of the module that a branch's gate scales: what the addend is a multiple of.

    Args:
        model: The network.
        maps: Index maps.
        branch: The branch.
        graph: Graph of the module that holds it; None if that cannot be traced.
        whole: The network's pass in eval mode.

    Returns:
        Path of its last affine; if a function that is not linear follows that, of a module that scales what it returns by a
        parameter, or of one without parameters which returns the addend; empty if there is none of them.
    """
    value = _multiple_of(maps, branch.addend)
    shift = _shift(maps, value)  # a layer may add its bias after the product
    if shift:
        value = _multiple_of(maps, next(source for source in value.op.inputs if maps.active[source]))
    if value.op is not None and value.op.name in (*PRODUCTS, *BATCH_NORMS, "native_layer_norm", "native_group_norm"):
        owners = {name.rpartition(".")[0] for name in _used([value.op], maps)}
        path = next(iter(owners)) if len(owners) == 1 else ""
        read = bool(path) and path.startswith(
            f"{value.op.path}."
        )  # without being called, as torch's own attention does
        own = model.get_submodule(path)._parameters if path and (read or path == value.op.path) else {}
        if own.get("weight") is not None and set(own) <= {"weight", "bias"} and shift in ("", f"{path}.bias"):
            branch.reader = value.op.path if read else ""
            return path
    scale = _scale(model, maps, branch.addend, whole)
    if scale or graph is None:
        return scale
    node = next(node for node in graph.nodes if node.name == branch.node)
    if node.op == "call_module":
        path = f"{branch.module}.{node.target}"
        once = sum(name == path for name, _ in whole.calls) == 1
        if once and not any(True for _ in model.get_submodule(path).parameters(recurse=False)):
            return path
    return ""


def _scale(model: nn.Module, maps: Maps, value: Value, whole: Recording) -> str:
    """Path of a module, called once, that multiplies with its only parameter what a value is a multiple of, or ""."""
    while value.op is not None and value.op.name in MULTIPLES:
        active = [source for source in value.op.inputs if maps.active[source]]
        if len(active) != 1:
            break
        owned = {f"{value.op.path}.{name}" for name in model.get_submodule(value.op.path)._parameters}
        factors = {maps.origin.get(source, "") for source in value.op.inputs if source is not active[0]}
        if value.op.name in ("mul", "mul_") and owned and factors == owned and not _holds(model, value.op.path):
            return value.op.path if sum(name == value.op.path for name, _ in whole.calls) == 1 else ""
        value = active[0]
    return ""


def _holds(model: nn.Module, path: str) -> bool:
    """Whether a module holds others."""
    return any(True for _ in model.get_submodule(path).children())


def _multiple_of(maps: Maps, value: Value) -> Value:
    """What a value is a multiple of, as far back as that is so."""
    while value.op is not None and value.op.name in MULTIPLES:
        active = [source for source in value.op.inputs if maps.active[source]]
        if len(active) != 1:
            break
        value = active[0]
    return value


def _shift(maps: Maps, value: Value) -> str:
    """Name of the parameter that a value's operation adds to what depends on the input, or ""."""
    if value.op is None or value.op.name not in ("add", "add_") or len(value.op.inputs) != 2:
        return ""
    names = [maps.origin.get(source, "") for source in value.op.inputs if not maps.active[source]]
    return names[0] if len(names) == 1 else ""


def graph_of(module: nn.Module) -> fx.Graph:
    """Graph of a module's own forward pass in eval mode.

    Raises:
        ValueError: if it cannot be traced.
    """
    before = module.training
    module.training = False
    try:
        return trace(module)
    finally:
        module.training = before
