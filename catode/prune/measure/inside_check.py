"""Check that the loss reads nothing of the model but what it returns, and that a gradient comes back to every unit.

Probes evaluate the loss on what the model returns, and pull its second derivative back from there. A term that reads the
model's inside, such as features that a hook keeps, would be in the gradient of training and not in theirs; units that
gradients do not reach would seem to be worth nothing.

Source: docs/theory.md section 3, "Any loss".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import gated_modules
from catode.prune.gated.gates import NO_GRADIENTS
from catode.prune.measure.capture import Call, Capture, Moment, differentiable
from catode.prune.measure.curvature import last
from catode.prune.measure.losses import Sample
from catode.prune.measure.probes import exchanged, outputs_of

SAME, HALF = 0.01, 0.05  # relative deviation up to which gradients are the same, in 32 bits and more, and in fewer


def check(capture: Capture, calls: Sequence[Call], sample: Sample, given: bool, estimators: tuple[str, str]) -> None:
    """Make sure that probes see what is trained on.

    Args:
        capture: The step's calls, with everything kept.
        calls: Those that were trained on.
        sample: A few of the step's examples, with the loss.
        given: Whether the loss was given.
        estimators: Estimators of the layers' and of the units' benefits.

    Raises:
        ValueError: if they do not.
    """
    _check_weights(capture, sample)
    other = by_other_ways(capture, calls)
    if other and not given:
        raise ValueError(
            "`loss` must be given where more is trained on than a loss of what the model returns; got a gradient that came to the "
            "model's inside by another way. Pass Pruner(..., loss=lambda model, batch: ...) and step(batch)."
        )
    if not other and set(estimators) == {"paired"}:
        return
    inside, blind = by_probe(capture, sample)
    if other and not inside:
        raise ValueError(
            "`loss` must be the loss that is trained on; got a gradient that came to the model's inside by another way, while "
            "the one given reads what the model returns alone. Give the whole loss."
        )
    if inside and "curvature" in estimators:
        raise ValueError(
            "`loss` must be computed from what the model returns; got one that reads the model's inside, too. Let the model "
            'return it, or choose estimator="paired" and layer_estimator="paired".'
        )
    inventory = capture.gates.inventory
    for number in np.flatnonzero(blind & (np.where(inventory.is_layer, *estimators) != "paired")):
        name = inventory.names()[number]
        raise ValueError(
            f"`model` must let gradients come back to its units; none comes to those of `{name['site'] or name['block']}`, as "
            'behind a detach(). Leave them out, or choose estimator="paired" and layer_estimator="paired".'
        )


def _check_weights(capture: Capture, sample: Sample) -> None:
    """Make sure that a probe can take the gradient in the weights, which the growth of benefits needs."""
    learning = [parameter for parameter in capture.model.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(sample.loss(capture.model), learning, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(NO_GRADIENTS) from None


def closeness(calls: Sequence[Call]) -> float:
    """Relative deviation of gradients that are the same, in the precision of some calls' outputs."""
    return HALF if any(z.element_size() < 4 for call in calls for z in call.outputs) else SAME


def by_other_ways(capture: Capture, calls: Sequence[Call]) -> bool:
    """Whether gradients came to the gates of a step by other ways than the model's outputs; no, where it cannot be told.

    The model is run again as it was in the step: with the same weights, inputs, gates and random numbers. It cannot be told
    of a model that returns something else each time even so, runs gated modules without gradients, has parameters of a type of
    their own, such as those that are spread over processes, or was compiled and has few bits, to which compiled code rounds at
    other places.

    Args:
        capture: The step's calls, with everything kept.
        calls: Those that were trained on.
    """
    if any(call.moment is None for call in calls) or any(
        type(p) is not nn.Parameter for p in capture.model.parameters()
    ):
        return False
    by_example = calls[0].rows is not None
    came = torch.cat([call.rows.grad for call in calls]) if by_example else capture.total
    close = closeness(calls)
    if capture.gates.traced and close == HALF:
        return False
    # shut as in a checkpoint with use_reentrant=True, through which no gradient can be followed
    with _shut(capture) as shut:
        pulled = _pulled(capture, calls)
    return not shut and _differ(came, pulled, close) and not _differ(pulled, _pulled(capture, calls), 0.1 * close)


@contextmanager
def _shut(capture: Capture) -> Iterator[list[nn.Module]]:
    """Gated modules that run without gradients inside this context."""
    found: list[nn.Module] = []

    def note(module: nn.Module, args: tuple) -> None:
        if not torch.is_grad_enabled():
            found.append(module)

    names = gated_modules(capture.gates.blocks)
    standing = dict(capture.model.named_modules())
    hooks = [standing[name].register_forward_pre_hook(note) for name in sorted(names & standing.keys())]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _pulled(capture: Capture, calls: Sequence[Call]) -> torch.Tensor:
    """What the gradients of the outputs make of the gates: of the draw, or of the rows of all calls."""
    gates, rows, pulled = capture.gates, capture.gates.rows, []
    try:
        for call in calls:
            gates.rows, leaf = call.rows, gates.draw if call.rows is None else call.rows
            kind, dtype = leaf.device.type, call.autocast
            precision = torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None)
            with _as_at(capture.model, call.moment), precision:
                outputs = differentiable(capture.model(*call.args, **call.kwargs))
                ends = [(z, g) for z, g in zip(outputs, call.gradients, strict=True) if g is not None]
                (found,) = torch.autograd.grad([z for z, _ in ends], leaf, [g for _, g in ends], allow_unused=True)
            pulled.append(torch.zeros_like(leaf) if found is None else found)
    finally:
        gates.rows = rows
    return sum(pulled) if calls[0].rows is None else torch.cat(pulled)


@contextmanager
def _as_at(model: nn.Module, moment: Moment) -> Iterator[None]:
    """The model with the weights, buffers and random numbers of another moment."""
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with exchanged([(now[name], then) for name, then in moment.tensors.items()]):
        moment.random.set()
        yield


def by_probe(capture: Capture, sample: Sample) -> tuple[bool, NDArray[np.bool_]]:
    """What a probe of a few examples shows.

    Args:
        capture: The model's hooks.
        sample: The examples and their loss.

    Returns:
        Whether the loss reads the model's inside, too; and which structures no gradient comes back to, shape (n,).
    """
    gates = capture.gates
    blind = np.zeros(gates.inventory.size, dtype=bool)
    with gates.tapped() as taps, outputs_of(capture.model) as outputs:
        value = sample.loss(capture.model)
        taps, nodes = list(taps), [tap.after for tap in taps]
        if not taps:
            return False, blind
        leaves = [leaf for _, leaf in outputs]
        places = last(value, leaves)
        gradients = torch.autograd.grad(value, [leaves[place] for place in places], retain_graph=True)
        every = torch.autograd.grad(value, nodes, retain_graph=True, allow_unused=True)
        ends = [outputs[place][0] for place in places]
        # a loss that the model returns comes behind its other outputs; any other one behind leaves
        own = [z is leaf for z, leaf in outputs]
        through = [None] * len(nodes)
        if any(own):
            through = torch.autograd.grad(ends, nodes, gradients, retain_graph=True, allow_unused=True)
        inside = any(_differ(one, other) for one, other in zip(every, through, strict=True))
        reached = torch.autograd.grad([z.sum() for z, _ in outputs], nodes, allow_unused=True)
    for tap, gradient in zip(taps, reached, strict=True):
        blind[tap.structures.cpu().numpy()] = gradient is None
    return inside, blind


def _differ(one: torch.Tensor | None, other: torch.Tensor | None, close: float = 1e-3) -> bool:
    if one is None or other is None:
        return one is not other and bool((other if one is None else one).any())
    return float((one - other).norm()) > close * float(one.norm())
