"""What a description must fulfil before anything is run: names, owners and kinds of the modules, and shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.utils import parametrize

from catode.prune.describe.protocol import slices
from catode.structures.description import Block, Site


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
    _unique([block.output for block in blocks], "output")
    for part in ("producers", "consumers"):
        every = [name for block in blocks for site in block.sites for name in getattr(site, part)]
        _unique(every, part.removesuffix("s"))
    for block in blocks:
        where = f"block `{block.name}`"
        module = _module(model, block.name, where)
        outer = next((other.name for other in blocks if block.name.startswith(f"{other.name}.")), None)
        if outer is not None:
            raise ValueError(
                f"{where} must not lie inside another one; got it inside `{outer}`. Leave one of them out."
            )
        if not callable(getattr(module, "shortcut_only", None)):
            raise ValueError(
                f"{where} must have a method shortcut_only(), what is left without its branch; {type(module).__name__} has "
                "none. See catode.structures.description.Block."
            )
        for path in block.fixed:
            _module(model, path, f"`fixed` of {where}")
        _check_member(model, block, block.output, f"`output` of {where}", names)
        if model.get_submodule(block.output)._parameters.get("weight") is None:
            raise ValueError(
                f"`output` of {where} must have a weight for the layer's gate; `{block.output}` has none. Use affine=True, or "
                "the module before it."
            )
        _unique([site.name for site in block.sites], f"site of {where}")
        for site in block.sites:
            _check_site(model, block, site, names)
    _check_shared(model, [site for block in blocks for site in block.sites])


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
                    f"{where} must be made and read by plain convolutions; `{name}` is {kind} one. Leave the site out."
                )
    for name in site.consumers:
        module = model.get_submodule(name)
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            raise ValueError(
                f"{where} must be read by convolutions or linear layers; `{name}` is a {type(module).__name__}. Name what "
                "follows it in `consumers`."
            )


def _check_member(model: nn.Module, block: Block, name: str, where: str, names: dict[int, list[str]]) -> None:
    """Make sure that a module lies in a block's branch, holds its own weight and has one name."""
    module = _module(model, name, where)
    inside = name.startswith(f"{block.name}.") or name == block.name
    if not inside or any(name == path or name.startswith(f"{path}.") for path in block.fixed):
        raise ValueError(
            f"{where} must use modules of the branch of `{block.name}` alone; got `{name}`, which stays without it."
        )
    if parametrize.is_parametrized(module) or not set(module._parameters) <= {"weight", "bias"}:
        raise ValueError(
            f"{where} must use modules that hold their weight as it is; `{name}` computes it from other parameters. Remove "
            "weight_norm or the parametrization, or leave the site out."
        )
    if len(names[id(module)]) > 1:
        raise ValueError(
            f"{where} must use modules that have one place each; `{name}` is `{names[id(module)][1]}` too. Leave it out."
        )


def _check_shared(model: nn.Module, sites: Sequence[Site]) -> None:
    """Make sure that a parameter of several names is cut in all of them alike."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others = {name: several for several in names.values() if len(several) > 1 for name in several}
    for site in sites:
        cuts = {part.tensor: (part.dim, part.offset, part.each) for part in slices(model, site)}
        for name, how in cuts.items():
            for other in others.get(name, ()):
                if cuts.get(other) != how:
                    raise ValueError(
                        f"site `{site.name}` must name all modules that share a parameter; `{name}` is `{other}` too, which it "
                        "does not cut. Add that module to the site, or leave the site out."
                    )
        for other in sites:
            if other is not site and (tied := set(cuts) & {part.tensor for part in slices(model, other)}):
                _refuse_two(model, site, other, tied)


def _refuse_two(model: nn.Module, site: Site, other: Site, tied: set[str]) -> None:
    """Refuse a parameter that two sites would cut along one dimension."""
    dims = [{part.tensor: part.dim for part in slices(model, one)} for one in (site, other)]
    for name in sorted(tied):
        if dims[0][name] == dims[1][name]:
            raise ValueError(
                f"sites `{site.name}` and `{other.name}` must have tensors of their own; both cut `{name}`."
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
