"""Rules of the operators that move indices: views, permutations, concatenations, slices, repetitions, look-ups."""

from __future__ import annotations

import math

from catode.prune.describe.trace.axes import Axis, Mismatch, factors, product, split_product, split_sum, total
from catode.prune.describe.trace.maps import Maps
from catode.prune.describe.trace.recording import Operation, Value


def _place(dim: int, value: Value) -> int:
    return dim % max(len(value.shape), 1)


def _same_origin(maps: Maps, op: Operation, value: Value) -> None:
    """An output that is a view of a parameter counts as that parameter."""
    if value in maps.origin:
        for output in op.outputs:
            maps.origin[output] = maps.origin[value]


def view(maps: Maps, op: Operation) -> None:
    """Reshape: in every run of dimensions that keeps its number of indices, the list of all factors is partitioned anew."""
    value, shape = op.inputs[0], op.outputs[0].shape
    _same_origin(maps, op, value)
    axes, found = list(maps.of(value)), []
    for before, after in _groups(value.shape, shape):
        whole, rest = [axes[dim] for dim in before], [shape[dim] for dim in after]
        sizes = [axis.size for axis in whole]
        if [size for size in sizes if size != 1] == [size for size in rest if size != 1]:
            same = iter([axis for axis in whole if axis.size != 1])
            found += [Axis(1) if size == 1 else next(same) for size in rest]
            continue
        try:
            found += _partitioned(factors(whole), rest)
        except Mismatch:
            new = [Axis(size) for size in rest]
            maps.forbid((*whole, *new), f"a reshape from {sizes} to {rest}", op)
            found += new
    maps.make(op, found)


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions before and after a reshape that hold the same number of indices."""
    if not math.prod(before):
        return [(list(range(len(before))), list(range(len(after))))]
    found, one, other = [], 0, 0
    while one < len(before) or other < len(after):
        these, those, left, right = [], [], 1, 1
        while not (these or those) or left != right:
            if left <= right and one < len(before):
                these.append(one)
                left *= before[one]
                one += 1
            else:
                those.append(other)
                right *= after[other]
                other += 1
        found.append((these, those))
    return found


def _partitioned(rest: list[Axis], sizes: list[int]) -> list[Axis]:
    """The factors of axes, put together to others of given sizes."""
    found = []
    for size in sizes:
        whole, rest = _taken(rest, size)
        found.append(whole)
    return found


def _taken(rest: list[Axis], size: int) -> tuple[Axis, list[Axis]]:
    """The first factors whose product has a size, and the others."""
    taken, done = [], 1
    while done < size:
        here, need = rest[0], size // done
        if size % done:
            raise Mismatch
        rest = rest[1:]
        if here.size > need:
            here, behind = split_product(here, need)
            rest = [*factors([behind]), *rest]
        taken.append(here)
        done *= here.size
    if done != size:
        raise Mismatch
    return product(taken), rest


def permute(maps: Maps, op: Operation) -> None:
    """Any exchange of dimensions."""
    value = op.inputs[0]
    _same_origin(maps, op, value)
    axes, count = maps.of(value), len(value.shape)
    if op.name in ("t", "numpy_T"):
        order = list(range(count))[::-1]
    elif op.name == "permute":
        order = [dim % count for dim in op.argument("dims")]
    else:
        order = list(range(count))
        one, other = _place(op.argument("dim0"), value), _place(op.argument("dim1"), value)
        order[one], order[other] = other, one
    maps.make(op, [axes[dim] for dim in order])


def unsqueeze(maps: Maps, op: Operation) -> None:
    """A new dimension of one index."""
    value = op.inputs[0]
    _same_origin(maps, op, value)
    axes = list(maps.of(value))
    axes.insert(op.argument("dim") % (len(axes) + 1), Axis(1))
    maps.make(op, axes)


def squeeze(maps: Maps, op: Operation) -> None:
    """Dimensions of one index are dropped."""
    value = op.inputs[0]
    _same_origin(maps, op, value)
    dims = op.argument("dim")
    dims = range(len(value.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {_place(dim, value) for dim in dims if value.shape and value.shape[dim] == 1}
    maps.make(op, [axis for dim, axis in enumerate(maps.of(value)) if dim not in gone])


def expand(maps: Maps, op: Operation) -> None:
    """Repetition of dimensions of one index."""
    value, shape = op.inputs[0], op.outputs[0].shape
    axes = [Axis(1)] * (len(shape) - len(value.shape)) + list(maps.of(value))
    maps.make(op, [axis if axis.size == size else Axis(size) for axis, size in zip(axes, shape, strict=True)])


def repeat(maps: Maps, op: Operation) -> None:
    """Repetition of whole dimensions, one copy behind another."""
    value, shape = op.inputs[0], op.outputs[0].shape
    axes = [Axis(1)] * (len(shape) - len(value.shape)) + list(maps.of(value))
    found = []
    for axis, size in zip(axes, shape, strict=True):
        times = size // axis.size if axis.size else 0
        found.append(axis if times == 1 else product([Axis(times), axis]) if size else Axis(0))
    maps.make(op, found)


def select(maps: Maps, op: Operation) -> None:
    """One index of a dimension."""
    value = op.inputs[0]
    _same_origin(maps, op, value)
    axes = list(maps.of(value))
    maps.forbid([axes.pop(_place(op.argument("dim"), value))], "one index picked", op)
    maps.make(op, axes)


def unbind(maps: Maps, op: Operation) -> None:
    """Every index of a dimension by itself."""
    value = op.inputs[0]
    _same_origin(maps, op, value)
    axes = list(maps.of(value))
    maps.forbid([axes.pop(_place(op.argument("dim", 0), value))], "taken apart index by index", op)
    for output in range(len(op.outputs)):
        maps.make(op, axes, output)


def _piece(maps: Maps, op: Operation, axis: Axis, start: int, length: int) -> Axis:
    """A range of an axis."""
    if length == axis.size:
        return axis
    try:
        if start:
            axis = split_sum(axis, start)[1]
        return split_sum(axis, length)[0] if length < axis.size else axis
    except Mismatch:
        piece = Axis(length)
        maps.forbid((axis, piece), "a slice across index maps", op)
        return piece


def slice_(maps: Maps, op: Operation) -> None:
    """A range of a dimension."""
    value, output = op.inputs[0], op.outputs[0]
    _same_origin(maps, op, value)
    axes, dim = list(maps.of(value)), _place(op.argument("dim", 0), value)
    size, length = value.shape[dim], output.shape[dim]
    start = op.argument("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if (op.argument("step") or 1) != 1 or not length:
        maps.forbid([axes[dim]], "a slice with a step", op)
        axes[dim] = Axis(length)
        maps.forbid([axes[dim]], "a slice with a step", op)
    else:
        axes[dim] = _piece(maps, op, axes[dim], start, length)
    maps.make(op, axes)


def split(maps: Maps, op: Operation) -> None:
    """A dimension in ranges."""
    value = op.inputs[0]
    _same_origin(maps, op, value)
    axes, dim, start = list(maps.of(value)), _place(op.argument("dim", 0), value), 0
    for number, output in enumerate(op.outputs):
        length = output.shape[dim]
        piece = _piece(maps, op, axes[dim], start, length)
        maps.make(op, [*axes[:dim], piece, *axes[dim + 1 :]], number)
        start += length


def cat(maps: Maps, op: Operation) -> None:
    """Tensors behind each other along a dimension."""
    values = [value for value in op.inputs if value.shape != (0,)] or op.inputs
    dim = _place(op.argument("dim", 0), values[0])
    found = list(maps.of(values[0]))
    for value in values[1:]:
        for place, axis in enumerate(maps.of(value)):
            if place != dim:
                found[place] = maps.join(found[place], axis, op)
    found[dim] = total([maps.of(value)[dim] for value in values])
    maps.make(op, found)


def stack(maps: Maps, op: Operation) -> None:
    """Tensors side by side along a new dimension."""
    found = maps.spread(op.inputs, op)
    new = Axis(len(op.inputs))
    maps.forbid([new], "stacked tensors", op)
    found.insert(op.argument("dim", 0) % (len(found) + 1), new)
    maps.make(op, found)


def pad(maps: Maps, op: Operation) -> None:
    """Constants before and behind the indices of some dimensions."""
    value, widths = op.inputs[0], list(op.argument("pad"))
    axes = list(maps.of(value))
    for number in range(len(widths) // 2):
        before, behind = widths[2 * number : 2 * number + 2]
        if before < 0 or behind < 0:
            axes[-1 - number] = Axis(op.outputs[0].shape[-1 - number])
            maps.forbid([axes[-1 - number], maps.of(value)[-1 - number]], "cropped", op)
        elif before or behind:
            sides = [Axis(before), Axis(behind)]
            maps.forbid(sides, "padding", op)
            axes[-1 - number] = total([sides[0], axes[-1 - number], sides[1]])
    maps.make(op, axes)


def table(maps: Maps, op: Operation) -> None:
    """Rows of a table that are looked up."""
    weight, index = op.inputs[0], op.inputs[1]
    rows, *columns = maps.of(weight)
    maps.forbid([rows], "rows that are looked up", op)
    maps.make(op, [*maps.of(index), *columns])


def index(maps: Maps, op: Operation) -> None:
    """Indices given by tensors."""
    value, places = op.inputs[0], op.argument("indices")
    axes = maps.of(value)
    chosen = [dim for dim, place in enumerate(places) if place is not None]
    count = max(len(places[dim].shape) for dim in chosen)
    rest = [axis for dim, axis in enumerate(axes) if dim not in chosen]
    at = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
    shape = op.outputs[0].shape
    new = [Axis(size) for size in shape[at : at + count]]
    maps.forbid((*new, *(axes[dim] for dim in chosen)), "indices that are looked up", op)
    found = [*rest[:at], *new, *rest[at:]]
    if tuple(axis.size for axis in found) != shape:
        maps.forbid(axes, "indices that are looked up", op)
        found = [Axis(size) for size in shape]
        maps.forbid(found, "indices that are looked up", op)
    maps.make(op, found)


def picked(maps: Maps, op: Operation) -> None:
    """Some indices along one dimension: `index_select`, `gather` of the others' full size, `topk`."""
    value = op.inputs[0]
    dim = _place(op.argument("dim", -1), value)
    axes = list(maps.of(value))
    maps.forbid([axes[dim]], "indices that are looked up", op)
    for number, output in enumerate(op.outputs):
        new = [
            Axis(size) if place == dim or size != axes[place].size else axes[place]
            for place, size in enumerate(output.shape)
        ]
        maps.forbid([new[dim]], "indices that are looked up", op)
        maps.make(op, new, number)


VIEWS = dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"), view)
VIEWS |= dict.fromkeys(("permute", "transpose", "t", "numpy_T", "swapaxes"), permute)
VIEWS |= {"unsqueeze": unsqueeze, "squeeze": squeeze, "expand": expand, "repeat": repeat, "select": select}
VIEWS |= {"unbind": unbind, "slice": slice_, "cat": cat, "stack": stack, "constant_pad_nd": pad, "embedding": table}
VIEWS |= dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), split)
VIEWS |= {"index": index, "index_select": picked, "gather": picked, "topk": picked}
