"""What a description must fulfil before anything is run: names, owners and kinds of the modules, ranges, shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.utils import parametrize

from catode.prune.describe.protocol import attributes, goes_with, owner, slices, tensor_of, within
from catode.prune.gated.remainder import without
from catode.structures.description import CONSUMER, PRODUCER, TIED, Attribute, Block, Site, Slice

MIXING = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def check(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Make sure that a description can be that of a model.

    Args:
        model: The network.
        blocks: Its description.

    Raises:
        ValueError: in one line, with the block, site or module at fault.
    """
    if not blocks:
        raise ValueError("`structures()` must describe at least one block; got none.")
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    _unique([block.name for block in blocks], "block")
    _unique([block.output for block in blocks if block.removable], "output")
    for part in ("producers", "consumers"):
        every = [name for block in blocks for site in block.sites for name in getattr(site, part)]
        _unique(every, part.removesuffix("s"))
    for block in blocks:
        where = f"block `{block.name}`"
        if block.removable:
            _check_branch(model, block, blocks, where, names)
        elif not block.sites:
            raise ValueError(f"{where} must hold a site, as it is not removable; got none. Leave it out.")
        _unique([site.name for site in block.sites], f"site of {where}")
        for site in block.sites:
            if type(site.least) is not int or not 0 <= site.least <= site.width:
                raise ValueError(
                    f"site `{site.name}` must keep 0 to {site.width} units, its width, as `least`; got {site.least}. Correct it."
                )
            (_check_parts if site.parts else _check_site)(model, block, site, names)
            _check_owners(model, block, site, blocks)
    sites = [site for block in blocks for site in block.sites]
    _check_shared(model, sites)
    _check_attributes(model, sites)
    for block in blocks:
        _check_numbers(block, blocks)


def site_fault(model: nn.Module, block: Block, site: Site) -> str:
    """Why the slices of a site cannot be cut or gated, in one line; empty if they can."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    try:
        _check_parts(model, block, site, names)
    except ValueError as error:
        return str(error)
    return ""


def _check_branch(
    model: nn.Module, block: Block, blocks: Sequence[Block], where: str, names: dict[int, list[str]]
) -> None:
    """Make sure that a block's branch can go and be gated."""
    module = _module(model, block.place, where)
    outer = next((other.name for other in blocks if other is not block and goes_with(other, block.place)), None)
    if outer is not None:
        raise ValueError(f"{where} must not lie inside another one; got it inside `{outer}`. Leave one of them out.")
    if block.absent:
        _check_absent(model, block, where)
    elif block.addend:
        _check_addend(model, block, module, where, names)
    elif not callable(getattr(module, "shortcut_only", None)):
        raise ValueError(
            f"{where} must have a method shortcut_only(), what is left without its branch; {type(module).__name__} has "
            "none. See catode.structures.description.Block."
        )
    for path in block.fixed:
        _module(model, path, f"`fixed` of {where}")
    _check_member(model, block, block.output, f"`output` of {where}", names)
    if block.reader and not (block.output.startswith(f"{block.reader}.") and goes_with(block, block.reader)):
        raise ValueError(
            f"`reader` of {where} must be a module of the branch that holds `{block.output}`; got `{block.reader}`. Correct it."
        )
    output = model.get_submodule(block.output)
    if isinstance(output, nn.modules.batchnorm._BatchNorm) and output.weight is None and not block.branch:
        raise ValueError(
            f"`output` of {where} must have a weight for the layer's gate; `{block.output}` has none. Use affine=True, or "
            "the module before it."
        )


def _check_addend(model: nn.Module, block: Block, module: nn.Module, where: str, names: dict[int, list[str]]) -> None:
    """Make sure that the module of a branch can be replaced by its remainder."""
    if not block.place:
        raise ValueError(f"{where} must end in a module of the network; got the network itself. Leave the block out.")
    if len(names[id(module)]) > 1:
        raise ValueError(f"{where} must have one place; `{block.place}` is `{names[id(module)][1]}` too. Leave it out.")
    if not block.branch:
        raise ValueError(f"{where} must name the modules and parameters that go in `branch`; got none. Add them.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in block.branch:
        if path not in parameters:
            _module(model, path, f"`branch` of {where}")
        if not path.startswith(f"{block.place}."):
            raise ValueError(f"`branch` of {where} must lie inside `{block.place}`; got `{path}`. Leave it out.")
    try:
        left = dict(without(module, block.addend).named_parameters(remove_duplicate=False))
    except ValueError as error:
        raise ValueError(f"{where} must be a branch of `{block.place}`: {error}") from None
    for name in parameters:
        inside = name.removeprefix(f"{block.place}.") if name.startswith(f"{block.place}.") else None
        if inside is not None and goes_with(block, name) == (inside in left):
            what = "stays" if inside in left else "goes"
            raise ValueError(
                f"`branch` of {where} must name what goes with `{block.addend}`, and no more; `{name}` {what}. Correct it."
            )


def _check_absent(model: nn.Module, block: Block, where: str) -> None:
    """Make sure that what goes can be taken out of a network."""
    if block.addend:
        raise ValueError(f"{where} must have an `addend`, or name what is `absent`; got both. Leave one out.")
    modules = {path for path, _ in block.absent}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in block.branch:
        if path not in parameters:
            _module(model, path, f"`branch` of {where}")
    if odd := sorted((modules ^ set(block.branch)) - parameters.keys()):
        raise ValueError(
            f"{where} must name every module of `branch` in `absent`, and no other; got `{odd[0]}` in one alone."
        )


def _check_site(model: nn.Module, block: Block, site: Site, names: dict[int, list[str]]) -> None:
    """Make sure that a site's modules can be cut."""
    where = f"site `{site.name}`"
    for part, of in (("producers", "makes"), ("consumers", "reads")):
        if not getattr(site, part):
            raise ValueError(f"{where} must name the module that {of} its units in `{part}`; got none.")
        for name in getattr(site, part):
            _check_member(model, block, name, where, names)
            module = model.get_submodule(name)
            if isinstance(module, nn.modules.conv._ConvNd) and (module.groups > 1 or module.transposed):
                kind = "a transposed" if module.transposed else "a grouped"
                raise ValueError(
                    f"{where} must be made and read by plain convolutions; `{name}` is {kind} one. Leave the site out, or "
                    "give its `parts`."
                )
    for name in site.consumers:
        module = model.get_submodule(name)
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            raise ValueError(
                f"{where} must be read by convolutions or linear layers; `{name}` is a {type(module).__name__}. Name what "
                "follows it in `consumers`."
            )


def _check_parts(model: nn.Module, block: Block, site: Site, names: dict[int, list[str]]) -> None:
    """Make sure that a site's slices are there, and that its consumers can be gated."""
    where = f"site `{site.name}`"
    if site.producers or site.consumers:
        raise ValueError(f"{where} must have `parts`, or `producers` and `consumers`; got both. Leave the latter out.")
    for role, of in ((PRODUCER, "makes"), (CONSUMER, "reads")):
        if not any(part.role == role for part in site.parts):
            raise ValueError(f"{where} must have a slice that {of} its units in `parts`; got none.")
    for part in site.parts:
        try:
            tensor = tensor_of(model, part.tensor)
        except AttributeError:
            raise ValueError(f"{where} names `{part.tensor}`, which is no parameter or buffer of the model.") from None
        if part.role not in (PRODUCER, CONSUMER, TIED):
            raise ValueError(f"{where} must have parts of the roles {PRODUCER}, {CONSUMER}, {TIED}; got {part.role!r}.")
        if not 0 <= part.dim < tensor.dim():
            raise ValueError(
                f"{where} must name a dimension of `{part.tensor}`, {tensor.dim()} of them; got {part.dim}."
            )
        module, name = owner(model, part.tensor)
        if part.role == CONSUMER:
            _check_consumer(module, part, where)
        end = part.offset + part.each * site.width
        if part.offset < 0 or part.each < 1 or site.width < 1 or end > tensor.shape[part.dim]:
            raise ValueError(
                f"{where} must lie within the {tensor.shape[part.dim]} entries of `{part.tensor}` along dimension {part.dim}; got "
                f"{part.offset} to {end}, {site.width} units of {part.each}. Correct the width, `offset` or `each`."
            )
        _check_plain(module, part.tensor.rpartition(".")[0], where, names)
        if name not in module._parameters and name not in module._buffers:
            raise ValueError(f"{where} names `{part.tensor}`, which is computed. Leave the site out.")
        if isinstance(module, MIXING) and not _whole_groups(module, part):
            raise ValueError(
                f"{where} must not pass `{part.tensor.rpartition('.')[0]}`, a {type(module).__name__}, which mixes the units: "
                "removing one would change the others. Use a batch norm, or leave the site out."
            )


def _whole_groups(module: nn.Module, part: Slice) -> bool:
    """Whether the units of a slice are whole groups of a group norm, which it normalises each by itself."""
    if not isinstance(module, nn.GroupNorm):
        return False
    channels = module.num_channels // module.num_groups
    return part.each % channels == 0 and part.offset % channels == 0


def _check_consumer(module: nn.Module, part: Slice, where: str) -> None:
    """Make sure that a slice that reads units can carry their gates."""
    path, _, name = part.tensor.rpartition(".")
    if name != "weight" or name not in module._parameters or module.weight.dim() < 2:
        raise ValueError(
            f"{where} must be read by the weight of a convolution or linear layer; got `{part.tensor}`. Name what follows it."
        )
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            raise ValueError(
                f"{where} must be read by plain convolutions; `{path}` is a grouped one. Give its rows the role {TIED!r}, and name "
                "what follows it."
            )
        expected = int(not module.transposed)
    else:
        expected = 1 if isinstance(module, nn.Linear) else part.dim
    if part.dim != expected:
        raise ValueError(f"{where} must be read along dimension {expected} of `{part.tensor}`; got {part.dim}.")


def _check_owners(model: nn.Module, block: Block, site: Site, blocks: Sequence[Block]) -> None:
    """Make sure that a site stays as long as its block: what makes it, and something that reads it."""
    leaving: dict[str, Block] = {}
    for part in slices(model, site):
        if block.removable and site.parts and not goes_with(block, part.tensor):
            raise ValueError(
                f"site `{site.name}` must lie in the branch of `{block.name}` alone; got `{part.tensor}`, which stays without it."
            )
        if block.removable and goes_with(block, part.tensor):
            continue
        other = next((other for other in blocks if other is not block and goes_with(other, part.tensor)), None)
        if other is not None:
            leaving[part.tensor] = other
    readers = [part for part in slices(model, site) if part.role == CONSUMER]
    makers = [part.tensor for part in slices(model, site) if part.role == PRODUCER]
    wrong = next((name for name in makers if name in leaving), None)
    if wrong is None and all(part.tensor in leaving for part in readers):
        wrong = readers[0].tensor
    if wrong is not None:
        raise ValueError(
            f"site `{site.name}` must not lie in the branch of another block; got `{wrong}`, which goes with "
            f"`{leaving[wrong].name}`. Make it a site of that block, or leave it out."
        )


def _check_member(model: nn.Module, block: Block, name: str, where: str, names: dict[int, list[str]]) -> None:
    """Make sure that a module lies in a block's branch, holds its own weight and has one name."""
    module = _module(model, name, where)
    inside = goes_with(block, name) if block.removable else within(name, block.place)
    inside |= bool(block.branch) and within(name, block.place) and not any(True for _ in module.parameters())
    if not inside:
        raise ValueError(
            f"{where} must use modules of the branch of `{block.name}` alone; got `{name}`, which stays without it."
        )
    if not set(module._parameters) <= {"weight", "bias"} and not block.branch:
        _refuse_computed(name, where)
    _check_plain(module, name, where, names)


def _check_plain(module: nn.Module, name: str, where: str, names: dict[int, list[str]]) -> None:
    """Make sure that a module holds its own weight and has one name."""
    if parametrize.is_parametrized(module) or "weight_g" in module._parameters or hasattr(module, "weight_u"):
        _refuse_computed(name, where)
    if len(names[id(module)]) > 1:
        raise ValueError(
            f"{where} must use modules that have one place each; `{name}` is `{names[id(module)][1]}` too. Leave it out."
        )


def _refuse_computed(name: str, where: str) -> None:
    raise ValueError(
        f"{where} must use modules that hold their weight as it is; `{name}` computes it from other parameters. Remove "
        "weight_norm or the parametrization, or leave the site out."
    )


def _check_shared(model: nn.Module, sites: Sequence[Site]) -> None:
    """Make sure that a parameter of several names is cut in all of them alike, and no entry by two sites."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others = {name: several for several in names.values() if len(several) > 1 for name in several}
    ranges: dict[tuple[int, int], dict[tuple[int, int, int], str]] = {}
    for number, site in enumerate(sites):
        cuts: dict[str, set[tuple[int, int, int]]] = {}
        for part in slices(model, site):
            cuts.setdefault(part.tensor, set()).add((part.dim, part.offset, part.each))
        for name, how in cuts.items():
            for other in others.get(name, ()):
                if cuts.get(other) != how:
                    raise ValueError(
                        f"site `{site.name}` must name all modules that share a parameter; `{name}` is `{other}` too, which it "
                        "does not cut. Add that module to the site, or leave the site out."
                    )
            tensor = tensor_of(model, name)
            for dim, offset, each in how:
                ranges.setdefault((id(tensor), dim), {})[offset, offset + each * site.width, number] = name
    for several in ranges.values():
        ordered = sorted(several)
        for one, other in pairwise(ordered):
            if other[0] < one[1]:
                first, second = sorted((one[2], other[2]))
                both = (
                    f"sites `{sites[first].name}` and `{sites[second].name}`"
                    if first != second
                    else f"slices of site `{sites[first].name}`"
                )
                raise ValueError(f"{both} must have tensors of their own; both cut `{several[one]}`.")


def _check_attributes(model: nn.Module, sites: Sequence[Site]) -> None:
    """Make sure that the numbers that a cut rewrites are what the sites make them."""
    found: dict[tuple[str, str], list[tuple[Site, Attribute]]] = {}
    for site in sites:
        for attribute in attributes(model, site):
            found.setdefault((attribute.module, attribute.name), []).append((site, attribute))
    for (path, name), several in found.items():
        site = several[0][0]
        value = getattr(_module(model, path, f"site `{site.name}`"), name, None)
        fixed = {attribute.fixed for s, attribute in several if attribute in s.attributes}
        total = sum(attribute.each * s.width for s, attribute in several)
        if not isinstance(value, int) or (fixed and (len(fixed) > 1 or value != total + max(fixed))):
            raise ValueError(
                f"site `{site.name}` must say what makes up `{path}.{name}`; got {sorted(fixed)} + {total} for {value}. Correct "
                "its `attributes`."
            )


def _check_numbers(block: Block, blocks: Sequence[Block]) -> None:
    """Make sure that what stays of a module without a branch, a graph of fixed numbers, is not cut by them."""
    for site in (site for other in blocks if other is not block for site in other.sites):
        own = next((attribute for attribute in site.attributes if attribute.module == block.place), None)
        if block.removable and block.addend and own is not None:
            raise ValueError(
                f"block `{block.name}` must leave a module whose numbers stay; got `{own.module}.{own.name}`, which a cut of site "
                f"`{site.name}` rewrites. Leave one of them out, or compute the site in a module of its own."
            )


def _module(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"`structures()` names `{name}`, which the model does not have, for {where}.") from None


def _unique(names: Sequence[str], what: str, key: Callable = str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`structures()` must name each {what} once; got `{twice}` twice.")
