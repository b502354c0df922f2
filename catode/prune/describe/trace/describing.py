"""Describing a network that nobody here wrote: its widths and residual branches, found by tracing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from catode._validate import check_int, fail
from catode.prune.describe.consistency import site_fault
from catode.prune.describe.protocol import Prunable, within
from catode.prune.describe.trace.absence import replace_modules
from catode.prune.describe.trace.branches import Branch, branches, graph_of, name_nodes, output_of
from catode.prune.describe.trace.description import Description, Refusal, check_patterns, matches
from catode.prune.describe.trace.fitting import misfits
from catode.prune.describe.trace.maps import Maps
from catode.prune.describe.trace.recording import Failed, Recording, doubled, fake_copy, record
from catode.prune.describe.trace.rules import PRODUCTS, rule
from catode.prune.describe.trace.sites import Width, as_sites, known_attributes, selected, variants, widths
from catode.structures.description import Block, Site

REST = "rest of the network"
"""Name of the block of all widths that lie in no branch."""
PLAIN = ("an output of the network", "no weight reads it")
"""Reasons that go without saying."""
NUMBERS = {
    "DataDependent": "asks for one",
    "DynamicOutputShape": "computes a shape from them",
    ".numpy() is not supported": "hands them to NumPy",
}
"""Errors of tensors without numbers, and what the network did."""
Shares = dict[tuple[str, str], int]


def describe(
    model: nn.Module,
    example: Any,
    keep: Sequence[str] = (),
    least: Mapping[str, int] | None = None,
) -> Description:
    """Find what can be removed from any network.

    The network is neither changed nor run: a copy without numbers is. Widths and branches are exact: with the gates of units
    closed in every weight that reads them, the network computes what it does without them.

    Args:
        model: The network.
        example: One input batch: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter.
        keep: Paths of modules, or glob patterns of them, that stay whole with everything inside them.
        least: Fewest units that stay of the widths that modules make, by path or glob pattern; the last pattern counts. The
            branch around a width may still go as a whole: `keep` protects it.

    Returns:
        The blocks, and in `refused` what cannot go and why.

    Raises:
        ValueError: in one line: if the network does not run on the example, holds no branch and no width that can go, or a
            pattern names no module.
    """
    paths = [name for name, _ in model.named_modules()]
    keep, least = _listed(keep), dict(least or {})
    check_patterns("keep", keep, paths)
    check_patterns("least", least, paths)
    for pattern, count in least.items():
        check_int(f"least[{pattern!r}]", count, low=1)
    trace = _Trace(model, example)
    found = trace.description(keep, least)
    if not any(block.removable or block.sites for block in found):
        why = "; ".join(str(refusal) for refusal in found.refused[:3]) or "no weight reads what another one makes"
        raise ValueError(
            f"`model` must have a branch or a width that can go; {type(model).__name__} has none: {why}. "
            "Describe it by hand in structures(), see catode.prune.describe.protocol."
        )
    return found


def blocks_of(model: nn.Module, example: Any) -> Sequence[Block]:
    """What a network says can go, or, if it says nothing, what `describe` finds.

    Args:
        model: The network.
        example: One input batch; only shapes matter.

    Raises:
        ValueError: as `describe` does.
    """
    return model.structures() if isinstance(model, Prunable) else describe(model, example)


def _listed(keep: Sequence[str]) -> list[str]:
    if isinstance(keep, str):
        fail("keep", "be a list of patterns", keep, hint=f"Write keep=[{keep!r}].")
    return list(keep)


class _Trace:
    """A network's passes and what follows from them."""

    def __init__(self, model: nn.Module, example: Any):
        _check_model(model)
        _check_example(model, example)
        self.model, self.example = model, doubled(example)
        self.refused: list[Refusal] = []
        self.maps, self.passes = Maps(), {}
        for training in (False, True):
            try:
                self.passes[training] = self._record(training)
            except Failed as error:
                where = f"`{error.path or type(model).__name__}`"
                said = str(error).rstrip(".")
                asked = next((what for word, what in NUMBERS.items() if word in str(error)), None)
                if asked is not None:
                    raise ValueError(
                        f"`model` must not depend on the numbers that it computes; {where} {asked} in its forward pass "
                        f"({said.partition(': ')[2]}). Take that out of forward(), or describe the network by hand in structures()."
                    ) from error
                if not training:
                    raise ValueError(
                        f"`example` must be an input that the network runs on; {where} fails: {said}. Give a batch as in training."
                    ) from error
                self.refused.append(Refusal(error.path, "train mode", 0, f"not looked at: {error}"))
                continue
            self.maps.follow(self.passes[training], rule, PRODUCTS)
        self.widths = widths(self.maps, self.passes.values(), _other_names(model))
        used = {value.tensor for value in self.passes[False].tensors.values() if value.users}
        for width in self.widths:
            if width.making and not width.making & used:  # such as an auxiliary classifier's: they have no price
                width.reasons.insert(0, "it runs in train mode alone")

    def _record(self, training: bool, graphs: Mapping[str, fx.Graph] | None = None) -> Recording:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            copied = fake_copy(self.model, mode)
        except RuntimeError as error:
            old = "graph leaves" in str(error)  # what torch.nn.utils.weight_norm leaves in a module
            why = "holds a computed tensor, as the old weight_norm does" if old else str(error).splitlines()[0]
            hint = "Use torch.nn.utils.parametrizations." if old else "Describe it by hand in structures()."
            raise ValueError(
                f"`model` must be one that can be copied; {type(self.model).__name__} {why}. {hint}"
            ) from error
        return record(copied, self.example, mode, training, graphs)

    def description(self, keep: Sequence[str], least: Mapping[str, int]) -> Description:
        """The blocks."""
        sites = self._sites(keep)
        found = self._branches(keep)
        blocks: list[Block] = []
        taken: set[Width] = set()
        names = [branch.module for branch in found] + [""]  # the network itself is no name
        for branch in found:
            inside = {w: s for w, s in sites.items() if w not in taken and all(_goes(branch, t) for t in w.tensors)}
            taken |= set(inside)
            name = branch.module if names.count(branch.module) == 1 else branch.name
            blocks.append(
                Block(
                    name,
                    branch.output,
                    tuple(inside.values()),
                    module=branch.module,
                    addend=branch.node,
                    absent=branch.absent,
                    branch=branch.paths,
                    reader=branch.reader,
                )
            )
        rest = tuple(site for width, site in sites.items() if width not in taken)
        if rest:
            blocks.append(Block(REST, "", rest, removable=False))
        blocks = [self._acceptable(block) for block in blocks]
        blocks = [self._apart(block, blocks) for block in blocks]
        blocks = [block for block in blocks if block.removable or block.sites]
        return Description(blocks, self.refused, _fewest(sites, least))

    def _acceptable(self, block: Block) -> Block:
        """A block without the sites that the pruner would refuse, such as those of weights that are computed."""
        faults = {site: site_fault(self.model, block, site) for site in block.sites}
        self.refused += [Refusal(site.name, "width", site.width, fault) for site, fault in faults.items() if fault]
        return replace(block, sites=tuple(site for site in block.sites if not faults[site]))

    def _apart(self, block: Block, blocks: Sequence[Block]) -> Block:
        """A block without the sites that rewrite a module's number which is fixed once another branch of the module has gone."""
        kept = []
        for site in block.sites:
            places = {part.module for part in site.attributes}
            other = next((b for b in blocks if b is not block and b.addend and b.place in places), None)
            if other is None:
                kept.append(site)
            else:
                why = f"a cut rewrites a number of `{other.place}`, which is fixed once the branch of `{other.name}` has gone"
                self.refused.append(Refusal(site.name, "width", site.width, why))
        return replace(block, sites=tuple(kept))

    def _sites(self, keep: Sequence[str]) -> dict[Width, Site]:
        """Sites of all widths that fit, the others refused."""
        candidates = []
        for width in self.widths:
            guard = next((p for p in keep for t in width.tensors if matches(p, t.rpartition(".")[0])), None)
            if guard is not None and not width.reasons:
                width.reasons.append(f"kept by {guard!r}")
            if not width.reasons:
                candidates.append(width)
        options = {width: variants(self.model, width) for width in candidates}
        while True:
            chosen = selected(candidates)
            sites = self._as_sites(chosen, options)
            bad, why = self._misfits(sites)
            if not bad:
                break
            for width in {other for one in bad for other in self._alike(one, candidates)}:
                options[width].pop(0)
                if not options[width]:
                    width.reasons.append(why if width in bad else f"as in `{min(other.first for other in bad)}`: {why}")
                    candidates.remove(width)
        cut = {(tensor, dim) for width in chosen for tensor, dim, _ in width.places}
        for width in self.widths:
            divided = {(tensor, dim) for tensor, dim, _ in width.places} <= cut  # by units that can go
            if width.reasons and width.making and width.reasons[0] not in PLAIN and not divided:
                self.refused.append(Refusal(width.first, "width", width.leaf.size, width.reasons[0]))
        return sites

    def _alike(self, width: Width, candidates: Sequence[Width]) -> list[Width]:
        """A width, and if modules that reshape by themselves hold it, those at the same place of other such modules."""

        def place(one: Width) -> list[tuple] | None:
            kinds = [(type(self.model.get_submodule(path)), path) for path in sorted(one.reshaped)]
            if len(kinds) != 1 or not kinds[0][1]:
                return None
            kind, path = kinds[0]
            return [kind, *((t.removeprefix(path), dim, run.each > 1) for t, dim, run in one.places[:1])]

        mine = place(width)
        return [width] if mine is None else [other for other in candidates if place(other) == mine]

    def _as_sites(self, chosen: Sequence[Width], options: Mapping[Width, list[Shares]]) -> dict[Width, Site]:
        pairs = [(width, {**known_attributes(self.model, width), **options[width][0]}) for width in chosen]
        return as_sites(self.model, pairs)

    def _misfits(self, sites: Mapping[Width, Site]) -> tuple[set[Width], str]:
        parts = [(width, site.parts, site.attributes) for width, site in sites.items()]
        for training, whole in self.passes.items():
            bad, why = misfits(self.model, self.example, self.maps, whole, parts, training) if parts else (set(), "")
            if bad:
                return bad, why
        return set(), ""

    def _branches(self, keep: Sequence[str]) -> list[Branch]:
        """Branches that can go, the others refused."""
        whole = self.passes[False]
        found = branches(self.maps, whole)
        for branch in found:
            guard = next((p for p in keep for t in branch.parameters if matches(p, t.rpartition(".")[0])), None)
            if guard is not None and not branch.reason:
                branch.reason = f"kept by {guard!r}"
        graphs = self._graphs([branch for branch in found if not (branch.reason or branch.untraced)])
        for branch in found:
            if branch.reason:
                continue
            graph = None if branch.untraced else graphs[branch.module]
            branch.output = output_of(self.model, self.maps, branch, graph, whole)
            if not branch.output:
                here = f" in `{branch.module}`" if branch.module else ""
                branch.reason = branch.untraced or f"no module's output{here} is its addend, which a gate could scale"
        untraced = [branch for branch in found if branch.untraced and not branch.reason]
        if untraced:
            replace_modules(self.model, self.example, untraced, self.passes)
        self.refused += [Refusal(branch.addition.path, "branch", 0, branch.reason) for branch in found if branch.reason]
        return [branch for branch in found if not branch.reason]

    def _graphs(self, found: Sequence[Branch]) -> dict[str, fx.Graph]:
        """Graphs of the modules that hold branches, which learn the names of their addends there."""
        graphs: dict[str, fx.Graph] = {}
        untraced: dict[str, str] = {}
        for branch in found:
            if branch.module not in graphs and branch.module not in untraced:
                try:
                    graphs[branch.module] = graph_of(self.model.get_submodule(branch.module))
                except ValueError as error:
                    untraced[branch.module] = str(error)
        again = None
        while graphs and again is None:
            try:
                again = self._record(False, graphs)
            except Failed as error:  # such as the graph of a module that asks whether an argument is None
                kind = type(self.model.get_submodule(max((p for p in graphs if within(error.path, p)), key=len)))
                for path in [path for path in graphs if type(self.model.get_submodule(path)) is kind]:
                    del graphs[path]
                    untraced[path] = f"the graph of a {kind.__name__} fails: {error}"
        for branch in found:
            branch.untraced = branch.untraced or untraced.get(branch.module, "")
        if again is not None:
            name_nodes(found, self.passes[False], again, graphs)
        return graphs


def _fewest(sites: Mapping[Width, Site], least: Mapping[str, int]) -> dict[str, int]:
    """Fewest units of sites by name; a width below what its pattern says stays whole.

    Raises:
        ValueError: if all widths of a pattern are.
    """
    found: dict[str, int] = {}
    for pattern, count in least.items():
        makers = {width: [tensor.rpartition(".")[0] for tensor in width.making] for width in sites}
        named = [sites[width] for width, paths in makers.items() if any(matches(pattern, path) for path in paths)]
        most = max((site.width for site in named), default=count)
        if count > most:
            hint = f"Use keep=[{pattern!r}] to leave it whole."
            fail(f"least[{pattern!r}]", f"be at most {most}, the largest of its widths", count, hint=hint)
        found |= {site.name: min(count, site.width) for site in named}
    return found


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """Further names of parameters and buffers that several modules share; a module of two names counts once."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{name}" if path else name
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                found.setdefault(first[id(tensor)], []).append(name)
    return found


def _goes(branch: Branch, tensor: str) -> bool:
    return any(tensor == path or tensor.startswith(f"{path}.") for path in branch.paths)


def _check_model(model: nn.Module) -> None:
    """Make sure that a network can be looked at."""
    if isinstance(model, torch.jit.ScriptModule):
        fail("model", "be a plain nn.Module", type(model).__name__, hint="Describe the module that was scripted.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            fail("model", "have all its parameters", f"{name} without a shape", hint="Call it once with the example.")


def _check_example(model: nn.Module, example: Any) -> None:
    """Make sure that there is a tensor on the network's device."""
    tensors: Iterable[torch.Tensor] = [
        part
        for part in tree_flatten(dict(example) if isinstance(example, Mapping) else example)[0]
        if isinstance(part, torch.Tensor)
    ]
    if not tensors:
        fail("example", "hold a tensor", type(example).__name__, hint="Give one input batch.")
    if any(tensor.dim() and not len(tensor) for tensor in tensors):
        fail(
            "example", "hold at least one example", [tuple(tensor.shape) for tensor in tensors], hint="Give one batch."
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    for tensor in tensors:
        if device is not None and tensor.device != device:
            fail("example", f"be on the network's device {device}", str(tensor.device), hint="Move one of them.")
