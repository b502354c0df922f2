"""What each operator does with the indices of its tensors: elementwise, by sums of products, by a norm, over them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from catode.prune.describe.trace.axes import Axis, Mismatch, product, split_product, unify
from catode.prune.describe.trace.maps import Maps, Use
from catode.prune.describe.trace.recording import Operation, Value
from catode.prune.describe.trace.shapes import VIEWS


def _names(text: str, form: str = "{}") -> tuple[str, ...]:
    return tuple(form.format(name) for name in text.split())


ATTENTION = (
    "scaled_dot_product_attention",
    *_names(
        "flash_attention_for_cpu flash_attention efficient_attention cudnn_attention fused_attention_overrideable attention_math "
        "attention_math_for_mps",
        "_scaled_dot_product_{}",
    ),
)
MULTIPLICATIONS = _names("mm addmm bmm baddbmm mv addmv linear")
CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution")
PRODUCTS = frozenset((*MULTIPLICATIONS, *CONVOLUTIONS, *ATTENTION, "embedding"))
"""Operators that make new numbers of the numbers that they read, over a dimension or a table."""
BATCH_NORMS = _names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
    "_batch_norm_no_update cudnn_batch_norm"
)
LIKE = _names("empty zeros ones rand randn full", "{}_like")
ACTIVATIONS = _names(
    "relu relu6 gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh softplus softshrink hardshrink threshold "
    "sigmoid tanh logit log_sigmoid_forward clamp"
)
OTHERS = _names(
    "clone copy copy_ _to_copy to detach detach_ alias lift_fresh lift contiguous fill fill_ zero_ bernoulli bernoulli_ uniform_ "
    "normal_ random_ exponential_ erfinv_ native_dropout dropout _prelu_kernel rrelu_with_noise where masked_fill masked_fill_ "
    "fmod real imag conj _conj resolve_conj nan_to_num requires_grad_"
)
ELEMENTWISE = frozenset((*OTHERS, *LIKE, *(name + end for name in ACTIVATIONS for end in ("", "_"))))
"""Elementwise operators that may have no tag which says so."""
MULTIPLES = frozenset(_names("mul mul_ div div_ neg clone _to_copy detach alias contiguous to lift_fresh"))
"""Elementwise operators that leave a parameter a multiple of itself."""
REDUCTIONS = frozenset(
    _names(
        "sum mean amax amin max min var std var_mean std_mean prod any all argmax argmin logsumexp linalg_vector_norm norm nansum "
        "median aminmax"
    )
)
ALONG = frozenset(
    _names(
        "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumsum_ cumprod cummax logcumsumexp sort flip roll"
    )
)
SPATIAL = ("pool", "upsample", "reflection_pad", "replication_pad", "grid_sampler", "_adaptive", "interpolate")


def rule(maps: Maps, op: Operation) -> None:
    """Set the axes of the outputs of an operation, and note what it forbids."""
    name, target = op.name, op.target
    if name in VIEWS:
        VIEWS[name](maps, op)
    elif name in CONVOLUTIONS:
        convolution(maps, op)
    elif name in MULTIPLICATIONS:
        multiplication(maps, op)
    elif name in ATTENTION:
        attention(maps, op)
    elif name in BATCH_NORMS:
        batch_norm(maps, op)
    elif name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
        layer_norm(maps, op)
    elif name == "native_group_norm":
        group_norm(maps, op)
    elif name == "glu":
        glu(maps, op)
    elif name == "_weight_norm_interface":
        weight_norm(maps, op)
    elif name in REDUCTIONS and op.inputs and not (name in ("max", "min") and len(op.inputs) > 1):
        reduction(maps, op)
    elif name in ALONG:
        along(maps, op)
    elif any(part in name for part in SPATIAL):
        spatial(maps, op)
    elif torch.Tag.pointwise in target.tags or name in ELEMENTWISE:
        elementwise(maps, op)
    elif op.inputs:
        unknown(maps, op)


def unknown(maps: Maps, op: Operation) -> None:
    """An operator that no rule is known for forbids everything."""
    reason = f"{op.name}, an operator without a rule here,"
    for value in op.inputs:
        maps.forbid(maps.of(value), reason, op)
    for value in op.outputs:
        maps.forbid(maps.of(value), reason, op)


def elementwise(maps: Maps, op: Operation) -> None:
    """Every number by itself, broadcast."""
    axes = maps.spread(op.inputs, op) if op.inputs else []
    for number, output in enumerate(op.outputs):
        if len(axes) == len(output.shape) and tuple(axis.size for axis in axes) == output.shape:
            maps.make(op, axes, number)
    if op.name in ("add", "add_", "sub", "sub_", "rsub"):
        _merge(maps, op)
    owned = [value for value in op.inputs if value in maps.origin]
    if owned and op.name in MULTIPLES and not any(maps.active[value] for value in op.inputs):
        largest = max(owned, key=lambda value: len(value.shape))
        if not (op.name in ("div", "div_") and op.inputs[0] is not largest):
            for output in op.outputs:
                maps.origin[output] = maps.origin[largest]


def _merge(maps: Maps, op: Operation) -> None:
    """The widths of two paths that are added belong to a residual stream."""
    values = [value for value in op.inputs if maps.active[value]]
    if len(values) < 2 or maps.sources[values[0]] == maps.sources[values[1]]:
        return
    one, other = (list(maps.of(value))[::-1] for value in values[:2])
    both = [here for here, there in zip(one, other, strict=False) if here.size == there.size]
    maps.forbid(both, "the residual stream, added", op)


def _sum_over(maps: Maps, op: Operation, x: Value, axis: Axis, weight: Value, other: Axis) -> None:
    """A sum over an axis of products of `x` and `weight`."""
    maps.join(axis, other, op)
    origins = [maps.origin.get(value) for value in (x, weight)]
    if axis.size == 1:
        return
    if all(origins) or not any(origins):
        computed = not (maps.active[x] and maps.active[weight]) and not all(origins)
        reason = "a product with a weight that is computed" if computed else "a product of two activations over it"
        maps.forbid([axis], "a product of two parameters over it" if all(origins) else reason, op)
        return
    maps.reads.append(Use(axis, origins[0] or origins[1], op, op.outputs[0]))


def _made(maps: Maps, op: Operation, value: Value | None, axes: Iterable[Axis]) -> None:
    """Note the weight, or bias, that makes axes."""
    if value is not None and value in maps.origin:
        maps.makes += [Use(axis, maps.origin[value], op, op.outputs[0]) for axis in axes if axis.size != 1]


def multiplication(maps: Maps, op: Operation) -> None:
    """Products of matrices, the first of which may be added."""
    added, name = None, op.name
    values = list(op.inputs)
    if name in ("addmm", "baddbmm", "addmv"):
        added = values.pop(0)
    if name == "linear" and len(values) > 2:
        added = values.pop()
    one, other = values
    left, right = list(maps.of(one)), list(maps.of(other))
    if name == "linear":
        right = right[::-1]
    rows, inner = left[:-1], left[-1]
    columns = right[-1:] if len(right) > 1 else []
    batch: list[Axis] = []
    if len(right) > 2:
        batch = [maps.join(a, b, op) for a, b in zip(left[:-2], right[:-2], strict=True)]
        rows = left[-2:-1]
    _sum_over(maps, op, one, inner, other, right[-2] if len(right) > 1 else right[-1])
    found = [*batch, *rows, *columns]
    _made(maps, op, other, columns)
    _made(maps, op, one, rows)
    if added is not None:
        extra = [Axis(1)] * (len(found) - len(added.shape)) + list(maps.of(added))
        for here, there in zip(found, extra, strict=True):
            maps.join(here, there, op)
        _made(maps, op, added, extra)
    maps.make(op, found)


def convolution(maps: Maps, op: Operation) -> None:
    """A convolution, plain, grouped or transposed."""
    x, weight, groups = op.inputs[0], op.inputs[1], op.argument("groups", 1)
    bias, output = op.argument("bias"), op.outputs[0]
    axes, kernel = maps.of(x), maps.of(weight)
    channels = axes[1]
    new = None
    maps.forbid((*axes[2:], *kernel[2:]), "a convolution along it", op)
    try:
        if op.argument("transposed", False):
            group, inner = split_product(channels, groups) if groups > 1 else (Axis(1), channels)
            new = kernel[1]
            maps.join(channels, kernel[0], op)
            _sum_over(maps, op, x, inner, weight, inner)
            made = product([group, kernel[1]])
        else:
            made, inner = kernel[0], channels
            if groups > 1:
                group, inner = split_product(channels, groups)
                there, new = split_product(made, groups)
                unify(group, there)
            _sum_over(maps, op, x, inner, weight, kernel[1])
    except Mismatch:
        maps.forbid((channels, *kernel[:2]), f"a convolution of {groups} groups that do not fit", op)
        made, group = Axis(output.shape[1]), Axis(1)
        maps.forbid([made], f"a convolution of {groups} groups that do not fit", op)
    if groups > 1 and weight in maps.origin:
        maps.grouped.append(Use(group, maps.origin[weight], op, output))
    _made(maps, op, weight, [new or made])
    if isinstance(bias, Value):
        maps.join(made, maps.of(bias)[0], op)
        _made(maps, op, bias, [new or made])
    positions = [Axis(size) for size in output.shape[2:]]
    maps.forbid(positions, "positions of a convolution", op)
    maps.make(op, [axes[0], made, *positions])


def attention(maps: Maps, op: Operation) -> None:
    """Fused attention: softmax of products of queries and keys, times values."""
    query, key, value = op.inputs[:3]
    q, k, v = (list(maps.of(tensor)) for tensor in (query, key, value))
    batch = []
    for place, (a, b, c) in enumerate(zip(q[:-2], k[:-2], v[:-2], strict=True)):
        maps.join(b, c, op)
        if a.size != b.size and b.size != 1 and place:
            try:
                maps.join(split_product(a, b.size)[0], b, op)
            except Mismatch:
                maps.forbid((a, b), "grouped queries that do not fit", op)
        else:
            maps.join(a, b, op)
        batch.append(a)
    maps.join(q[-1], k[-1], op)
    maps.join(k[-2], v[-2], op)
    maps.forbid((q[-1], k[-1]), "a product of two activations over it", op)
    maps.forbid((k[-2], v[-2]), "a softmax over it", op)
    for mask in op.inputs[3:]:
        whole = [*batch, q[-2], k[-2]]
        for here, there in zip(whole[::-1], list(maps.of(mask))[::-1], strict=False):
            maps.join(here, there, op)
    maps.make(op, [*batch, q[-2], v[-1]])
    if len(op.outputs) > 1 and op.outputs[1].shape == (*query.shape[:-2], query.shape[-2]):
        maps.make(op, [*batch, q[-2]], 1)


def batch_norm(maps: Maps, op: Operation) -> None:
    """A norm by channel, with statistics over all other dimensions."""
    x, *others = op.inputs
    axes = list(maps.of(x))
    maps.forbid([axes[0], *axes[2:]], "a batch norm over it", op)
    for value in others:
        maps.join(axes[1], maps.of(value)[0], op)
    for number, output in enumerate(op.outputs):
        if output.shape == x.shape:
            maps.make(op, axes, number)
        elif output.shape == (axes[1].size,):
            maps.make(op, [axes[1]], number)


def layer_norm(maps: Maps, op: Operation) -> None:
    """A norm over the last dimensions."""
    x, *others = op.inputs
    axes = list(maps.of(x))
    over = axes[-len(op.argument("normalized_shape")) :]
    maps.forbid(over, "a layer norm over it" if "layer" in op.name else "an RMS norm over it", op)
    for value in others:
        for here, there in zip(over, maps.of(value), strict=True):
            maps.join(here, there, op)
    maps.make(op, axes)


def group_norm(maps: Maps, op: Operation) -> None:
    """A norm over groups of channels."""
    x, *others = op.inputs
    axes, groups = list(maps.of(x)), op.argument("group")
    maps.forbid(axes[2:], "a group norm over it", op)
    for value in others:
        maps.join(axes[1], maps.of(value)[0], op)
    try:
        outer, inside = split_product(axes[1], groups)
        maps.grouped += [Use(outer, maps.origin[value], op, op.outputs[0]) for value in others if value in maps.origin]
    except Mismatch:
        inside = axes[1]
    maps.forbid([inside], f"a group norm over it (groups of {axes[1].size // groups})", op)
    maps.make(op, axes)


def glu(maps: Maps, op: Operation) -> None:
    """The first half of a dimension times a function of the second."""
    value = op.inputs[0]
    axes, dim = list(maps.of(value)), op.argument("dim", -1) % len(value.shape)
    half = value.shape[dim] // 2
    axes[dim] = maps.join(axes[dim], product([Axis(2), Axis(half)]), op)
    axes[dim] = split_product(axes[dim], 2)[1]
    maps.make(op, axes)


def weight_norm(maps: Maps, op: Operation) -> None:
    """A direction scaled to the norm that another parameter says, for every index of one dimension by itself."""
    direction, length = (list(maps.of(value)) for value in op.inputs)
    dim = op.argument("dim", 0)
    maps.forbid([axis for place, axis in enumerate(direction) if place != dim], "a weight norm over it", op)
    maps.join(direction[dim], length[dim], op)
    maps.make(op, direction)
    for value in op.inputs:
        if value in maps.origin:
            maps.makes.append(Use(direction[dim], maps.origin[value], op, op.outputs[0]))


def _dims(op: Operation, value: Value) -> set[int]:
    """Dimensions that an operator names, all of them where it names none."""
    dims = op.argument("dim")
    if dims is None:
        dims = op.argument("dims")
    if dims is None or dims == []:
        return set(range(len(value.shape)))
    return {dim % max(len(value.shape), 1) for dim in ([dims] if isinstance(dims, int) else dims)}


def reduction(maps: Maps, op: Operation) -> None:
    """One number of all along some dimensions."""
    value = op.inputs[0]
    axes, dims = maps.of(value), _dims(op, value)
    maps.forbid([axes[dim] for dim in dims if value.shape], f"{op.name} over it", op)
    kept = [Axis(1) if dim in dims else axis for dim, axis in enumerate(axes)]
    left = [axis for dim, axis in enumerate(axes) if dim not in dims]
    for number, output in enumerate(op.outputs):
        for found in (kept, left):
            if tuple(axis.size for axis in found) == output.shape:
                maps.make(op, found, number)
                break


def along(maps: Maps, op: Operation) -> None:
    """Numbers along a dimension depend on each other, or change places."""
    value = op.inputs[0]
    axes = maps.of(value)
    maps.forbid([axes[dim] for dim in _dims(op, value) if value.shape], f"{op.name.strip('_')} over it", op)
    for number in range(len(op.outputs)):
        maps.make(op, axes, number)


def spatial(maps: Maps, op: Operation) -> None:
    """Pooling and resizing of the last dimensions, every channel by itself."""
    value = op.inputs[0]
    count = next((int(digit) for digit in "123" if f"{digit}d" in op.name), 2)
    axes = list(maps.of(value))
    maps.forbid(axes[-count:], f"{op.name} over it", op)
    for number, output in enumerate(op.outputs):
        if len(output.shape) != len(axes):
            continue
        new = [Axis(size) for size in output.shape[-count:]]
        maps.forbid(new, f"{op.name} over it", op)
        maps.make(op, [*axes[:-count], *new], number)
