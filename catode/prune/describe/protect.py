"""What can go of a network, without what its user keeps: found by tracing, or as the network says by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from catode.prune.describe.protocol import Prunable, branch, slices
from catode.prune.describe.trace.describing import describe
from catode.prune.describe.trace.description import Description, Refusal, check_patterns, matches
from catode.structures.description import CONSUMER, Block, Site

__all__ = ["described"]


def described(
    model: nn.Module, example: Any, keep: Sequence[str] = (), least: Mapping[str, int] | None = None
) -> Description:
    """The blocks of a network: those of its method ``structures()``, or, if it has none, what `catode.describe` finds.

    Args:
        model: The network.
        example: One input batch; only shapes matter.
        keep: Paths of modules, or glob patterns of them, that stay whole with everything inside them.
        least: Fewest units that stay of the widths that modules make, by path or glob pattern.

    Raises:
        ValueError: as `catode.describe` does.
    """
    if not isinstance(model, Prunable):
        return describe(model, example, keep, least)
    blocks, refused, fewest = model.structures(), [], {}
    paths = [name for name, _ in model.named_modules()]
    check_patterns("keep", keep, paths)
    check_patterns("least", least or {}, paths)
    if keep:
        blocks = [part for block in blocks if (part := _kept(model, block, keep, refused)) is not None]
    if keep and not blocks:
        raise ValueError(f"`keep` must leave something that can go; got keep={list(keep)}. Leave a pattern out.")
    for site in (site for block in blocks for site in block.sites):
        for pattern, count in (least or {}).items():
            if _pattern([pattern], _tensors(model, site, made=True)):
                fewest[site.name] = min(count, site.width)
    return Description(blocks, refused, fewest)


def _kept(model: nn.Module, block: Block, keep: Sequence[str], refused: list[Refusal]) -> Block | None:
    """What can still go of a block; None for nothing."""
    sites = []
    for site in block.sites:
        if guard := _pattern(keep, _tensors(model, site)):
            refused.append(Refusal(site.name, "width", site.width, f"kept by {guard!r}"))
        else:
            sites.append(site)
    guard = _pattern(keep, branch(model, block))
    if block.removable and guard:
        refused.append(Refusal(block.name, "branch", 0, f"kept by {guard!r}"))
    if not guard:
        return dataclasses.replace(block, sites=tuple(sites))
    return dataclasses.replace(block, output="", sites=tuple(sites), removable=False) if sites else None


def _tensors(model: nn.Module, site: Site, made: bool = False) -> list[str]:
    return [part.tensor for part in slices(model, site) if not (made and part.role == CONSUMER)]


def _pattern(patterns: Sequence[str], tensors: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The first pattern that names the module of a tensor."""
    return next((p for p in patterns for name in tensors if matches(p, name.rpartition(".")[0])), None)
