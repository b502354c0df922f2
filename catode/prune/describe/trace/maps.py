"""What the operations of a network do with every index of every dimension: axes of all values, and notes about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from catode.prune.describe.trace.axes import Axis, Mismatch, unify
from catode.prune.describe.trace.recording import Operation, Recording, Value


@dataclass(frozen=True, eq=False)
class Note:
    """Why the indices of an axis cannot go one by one."""

    axis: Axis
    reason: str
    op: Operation | None = None

    @property
    def text(self) -> str:
        """The reason with its place."""
        if self.op is None:
            return self.reason
        return f"{self.reason} in {f'`{self.op.path}`' if self.op.path else 'the network itself'}"


@dataclass(frozen=True, eq=False)
class Use:
    """A weight that makes the indices of an axis, or reads them by a sum over it."""

    axis: Axis
    tensor: str
    op: Operation
    value: Value
    """The operation's output."""


class Maps:
    """Axes of all values of several passes of one network, whose parameters are the same in all of them.

    Attributes:
        axes: Axes of each value, one for each dimension.
        tensors: Axes of each parameter and buffer.
        notes: Axes that cannot be cut, and why.
        reads: Weights that sum over an axis.
        makes: Weights whose products have an axis.
        grouped: Weights of convolutions and norms whose groups an axis counts.
        origin: The parameter that a value is a view or a multiple of.
        active: Whether a value depends on the input.
        sources: Operations that made the numbers of a value: products, tables, inputs.
        unruled: Outputs whose axes no rule has set.
    """

    def __init__(self) -> None:
        self.axes: dict[Value, tuple[Axis, ...]] = {}
        self.tensors: dict[str, tuple[Axis, ...]] = {}
        self.notes: list[Note] = []
        self.reads: list[Use] = []
        self.makes: list[Use] = []
        self.grouped: list[Use] = []
        self.origin: dict[Value, str] = {}
        self.active: dict[Value, bool] = {}
        self.sources: dict[Value, frozenset[int]] = {}
        self.unruled: set[Value] = set()

    def of(self, value: Value) -> tuple[Axis, ...]:
        """Axes of a value."""
        if value not in self.axes:
            self._begin(value)
        return self.axes[value]

    def _begin(self, value: Value) -> None:
        """Axes of a value that no operation made."""
        self.axes[value] = axes = tuple(Axis(size) for size in value.shape)
        self.active[value], self.sources[value] = value.is_input, frozenset([-1 - value.number])
        if value.tensor:
            self.axes[value] = self.tensors.setdefault(value.tensor, axes)
            self.origin[value] = value.tensor
        elif value.is_input:
            self.forbid(axes, "an input of the network")
        elif value.op is None:
            self.forbid(axes, "a tensor that is neither parameter nor buffer")

    def forbid(self, axes: Iterable[Axis], reason: str, op: Operation | None = None) -> None:
        """Note that axes cannot be cut."""
        self.notes += [Note(axis, reason, op) for axis in axes if axis.find().size != 1]

    def join(self, one: Axis, other: Axis, op: Operation) -> Axis:
        """Unify two axes, or one with another of one index, which is repeated along it; returns the longer."""
        if one.find().size == 1 or other.find().size == 1:
            return other if one.find().size == 1 else one
        try:
            unify(one, other)
        except Mismatch:
            self.forbid((one, other), "index maps that do not fit each other", op)
        return one

    def spread(self, values: Iterable[Value], op: Operation) -> list[Axis]:
        """Axes of values that are broadcast together."""
        found: list[Axis] = []
        for value in values:
            axes = list(self.of(value))
            ahead = len(axes) - len(found)
            found = [Axis(1)] * ahead + found
            for place in range(1, len(axes) + 1):
                found[-place] = self.join(found[-place], axes[-place], op)
        return found

    def make(self, op: Operation, axes: Iterable[Axis], output: int = 0) -> None:
        """Set the axes of an operation's output."""
        value = op.outputs[output]
        axes = tuple(axes)
        assert tuple(axis.size for axis in axes) == value.shape, (op.target, [axis.size for axis in axes], value.shape)
        self.axes[value] = axes

    def follow(self, recording: Recording, rule: Callable[[Maps, Operation], None], products: frozenset[str]) -> None:
        """Take a pass along.

        Args:
            recording: The pass.
            rule: Sets the axes of an operation's outputs.
            products: Names of the operators that make new numbers, sums of products.
        """
        for value in recording.tensors.values():
            self.of(value)
        for op in recording.operations:
            active = False
            sources: frozenset[int] = frozenset()
            for value in op.inputs:
                self.of(value)
                active = active or self.active[value]
                sources |= self.sources[value]
            if op.name in products:
                sources = frozenset([op.number])
            rule(self, op)
            for value in (*op.outputs, *(after for _, after in op.aliases)):
                self.active[value], self.sources[value] = active, sources
            for before, after in op.aliases:
                self.axes[after] = self.of(before)
                self.active[after] = active or self.active[before]
            for value in op.outputs:
                if value not in self.axes:
                    self.forbid(self.of(value), f"an output of {op.name} without a rule here", op)
                    self.unruled.add(value)
        for value in recording.results:
            self.forbid(self.of(value), "an output of the network")
