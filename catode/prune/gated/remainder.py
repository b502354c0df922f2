"""What is left of a module without one of its residual branches: the rest of its own traced graph."""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
FLAG = "training_flag"


class _NoSubmodules(fx.Tracer):
    """Follows no submodule, so that all of them keep their class and their name."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class TrainingFlag(nn.Module):
    """Returns whether it is in train mode: what stands for ``self.training`` in a traced graph."""

    def forward(self) -> bool:
        return self.training


def trace(module: nn.Module) -> fx.Graph:
    """Graph of a module's own forward pass, whose submodules are nodes; that of a remainder is the one it runs.

    Raises:
        ValueError: if the module cannot be traced.
    """
    if isinstance(module, fx.GraphModule):
        return copy.deepcopy(module.graph)
    try:
        return _NoSubmodules().trace(module)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"a {type(module).__name__} must be traceable to lose a branch; got {type(error).__name__}: "
            f"{lines[0][:150] if lines else ''}. Leave the branch out, or give the module a method shortcut_only()."
        ) from error


def without(module: nn.Module, addend: str) -> nn.Module:
    """A module without one of its branches; what stays is shared with the module, under the same names.

    Args:
        module: The module that holds the branch.
        addend: Name of the node of its `trace` that is added to what stays.

    Raises:
        ValueError: if the module cannot be traced, or the node is not added to something there.
    """
    graphs, before = [], module.training
    for mode in (True, False):
        module.training = mode  # of the module alone
        try:
            graphs.append(_shortened(module, addend))
        finally:
            module.training = before
    graph = _with_flag(module, *graphs)
    for node in graph.nodes:
        node.type = None  # annotations that are texts cannot be pickled with the graph
    found = fx.GraphModule(module, graph, type(module).__name__)
    if any(node.target == FLAG for node in graph.nodes):
        found._modules[FLAG].training = before
        if not isinstance(module, fx.GraphModule):
            del module._modules[FLAG]
    for kind in ("_modules", "_parameters", "_buffers"):
        own, old = getattr(found, kind), getattr(module, kind)
        order = [name for name in (*old, *own) if name in own]
        setattr(found, kind, {name: own[name] for name in dict.fromkeys(order)})
    found._non_persistent_buffers_set = {name for name in module._non_persistent_buffers_set if name in found._buffers}
    return found


def _shortened(module: nn.Module, addend: str) -> fx.Graph:
    """The module's graph without the branch and everything that only the branch used."""
    graph = trace(module)
    node = next((node for node in graph.nodes if node.name == addend), None)
    users = [] if node is None else list(node.users)
    if len(users) != 1 or users[0].target not in ADDITIONS or len(users[0].all_input_nodes) != 2:
        got = f"no node `{addend}`" if node is None else f"`{addend}` used by {', '.join(map(str, users)) or 'nothing'}"
        names = ", ".join(n.name for n in graph.nodes if n.op not in ("placeholder", "output"))
        raise ValueError(
            f"`addend` must be the node of a {type(module).__name__} that is added to its shortcut; got {got}. It has {names}."
        )
    (addition,) = users
    (other,) = (part for part in addition.all_input_nodes if part is not node)
    addition.replace_all_uses_with(other)
    graph.erase_node(addition)
    for part in reversed(graph.nodes):  # modules have no effect beside what they return
        if not part.users and part.op not in ("placeholder", "output"):
            graph.erase_node(part)
    return graph


def _with_flag(module: nn.Module, training: fx.Graph, evaluating: fx.Graph) -> fx.Graph:
    """One graph for both modes: arguments that are True in one and False in the other become the module's training flag."""
    nodes = list(zip(training.nodes, evaluating.nodes, strict=False))
    same = len(training.nodes) == len(evaluating.nodes) and all((a.op, a.target) == (b.op, b.target) for a, b in nodes)
    flags = []
    for one, other in nodes if same else ():
        pairs = [*zip(one.args, other.args, strict=False), *((v, other.kwargs.get(k)) for k, v in one.kwargs.items())]
        for a, b in pairs:
            if isinstance(a, bool) and a is not b:
                same &= a is True and b is False
                flags.append(one)
            else:
                same &= isinstance(a, fx.Node) or str(a) == str(b)
    if not same:
        raise ValueError(
            f"a {type(module).__name__} must do the same in train and eval mode to lose a branch; what stays does not. Leave the "
            "branch out, or give the module a method shortcut_only()."
        )
    if flags:
        module.add_module(FLAG, TrainingFlag())
        with training.inserting_before(next(node for node in training.nodes if node.op != "placeholder")):
            flag = training.call_module(FLAG)
        others = {id(one): other for one, other in nodes}
        for node in dict.fromkeys(flags):
            other = others[id(node)]
            args = [flag if a is True and b is False else a for a, b in zip(node.args, other.args, strict=True)]
            kwargs = {k: flag if v is True and other.kwargs[k] is False else v for k, v in node.kwargs.items()}
            node.args, node.kwargs = tuple(args), kwargs
    return training
