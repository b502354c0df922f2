"""Networks of given widths, trained from scratch: the structure that pruning found, or one shaped like it stage by stage.

A structure is what structure.json has at "blocks": for each block whether it is kept, and for each site the units that are.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from catode.prune.describe.costs import count
from catode.prune.gated import cut
from catode.train.models import build
from catode.train.models.catalogue import ARCHITECTURES
from catode.train.models.resnets import ResNet

Blocks = Mapping[str, Mapping[str, Any]]
STAGE = re.compile(r"layer(\d+)\.")
FACTORS = [i / 200 for i in range(100, 321)]
"""Common factors on the mean widths that are tried, .5 to 1.6, to meet the MACs."""
HIDDEN = (0.9, 0.95, 1.0, 1.05, 1.1)
"""Factors on hidden widths that are tried, to meet the MACs between two widths of the stream."""


def restricted(model: nn.Module, blocks: Blocks) -> nn.Module:
    """Cut a freshly initialised network to a structure, in place, and draw its convolutions anew for their own widths.

    Args:
        model: The whole network.
        blocks: The structure.

    Raises:
        ValueError: if it is of another network.
    """
    cut.restrict(model, model.structures(), blocks)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def macs(arch: str, blocks: Blocks, image_shape: Sequence[int], classes: int) -> int:
    """MACs of a structure on one image of shape (C, H, W)."""
    model = build(arch, in_channels=image_shape[0], classes=classes)
    cut.restrict(model, model.structures(), blocks)
    return count(model, torch.zeros(1, *image_shape)).macs


def stages(blocks: Blocks) -> dict[int, list[str]]:
    """Names of the blocks of each stage, in order."""
    found = defaultdict(list)
    for name in blocks:
        found[int(STAGE.match(name)[1])].append(name)
    return dict(found)


def means(kept: Sequence[Blocks]) -> tuple[dict[int, float], dict[int, float]]:
    """Mean number of kept blocks, and mean width of the sites in kept blocks, of each stage over structures.

    Returns:
        Depths and widths by stage; a stage without kept blocks has no width.
    """
    depths, widths = {}, {}
    for stage, names in stages(kept[0]).items():
        alive = [own[name] for own in kept for name in names if own[name]["kept"]]
        sizes = [len(units) for block in alive for units in block["sites"].values()]
        depths[stage] = len(alive) / len(kept)
        if sizes:
            widths[stage] = sum(sizes) / len(sizes)
    return depths, widths


def shaped(whole: Blocks, depths: Mapping[int, int], widths: Mapping[int, int]) -> dict[str, Any]:
    """The structure with the first `depths` blocks of every stage, all their sites of the stage's width."""
    blocks = copy.deepcopy({name: dict(block) for name, block in whole.items()})
    for stage, names in stages(whole).items():
        for i, name in enumerate(names):
            stays = i < depths[stage]
            sites = whole[name]["sites"]
            blocks[name] = {"kept": stays, "sites": {s: list(range(widths[stage])) if stays else [] for s in sites}}
    return blocks


def stage_shaped(
    arch: str, kept: Sequence[Blocks], goal: float, image_shape: Sequence[int] = (3, 32, 32), classes: int = 10
) -> dict[str, Any]:
    """The structure with the rounded mean depth and mean widths of each stage, its widths scaled to meet the MACs.

    Args:
        arch: Architecture of the structures.
        kept: Structures that pruning found.
        goal: MACs to meet.
        image_shape: Of one image, (C, H, W).
        classes: Number of classes.

    Returns:
        Of all common factors on the widths, the one whose MACs are nearest to the goal. Where the widths reach the whole
        network's, its MACs may stay below it.
    """
    depths, wide = means(kept)
    depths = {stage: round(depth) if stage in wide else 0 for stage, depth in depths.items()}
    full = {
        site.name: site.width for block in build(arch, in_channels=3, classes=10).structures() for site in block.sites
    }
    most = {stage: full[next(iter(kept[0][names[0]]["sites"]))] for stage, names in stages(kept[0]).items()}
    tried = {}
    for factor in FACTORS:
        widths = {stage: min(most[stage], max(1, round(factor * width))) for stage, width in wide.items()}
        key = tuple(sorted(widths.items()))
        if key not in tried:
            blocks = shaped(kept[0], depths, {stage: widths.get(stage, 0) for stage in depths})
            tried[key] = abs(macs(arch, blocks, image_shape, classes) - goal), blocks
    return min(tried.values(), key=lambda one: one[0])[1]


def narrow(arch: str, width: int, hidden: float, in_channels: int, classes: int) -> ResNet:
    """A residual network all of whose widths are narrower, freshly initialised.

    Args:
        arch: Architecture of the whole one.
        width: Channels of the first stage's stream, doubled at each further stage.
        hidden: Factor on the hidden widths.
        in_channels: Channels of an image.
        classes: Number of classes.
    """
    return ResNet(replace(ARCHITECTURES[arch], width=width), in_channels, classes, hidden)


def narrowed(
    arch: str, share: float, image_shape: Sequence[int] = (3, 32, 32), classes: int = 10
) -> dict[str, int | float]:
    """Arguments `width` and `hidden` of the `narrow` network whose MACs are nearest to a share of the whole one's.

    Of several the one whose hidden widths are nearest to the stream's.
    """
    example = torch.zeros(1, *image_shape)
    whole = ARCHITECTURES[arch].width
    goal = share * count(narrow(arch, whole, 1.0, image_shape[0], classes), example).macs

    def off(case: tuple[int, float]) -> tuple[float, float]:
        return abs(count(narrow(arch, *case, image_shape[0], classes), example).macs - goal), abs(case[1] - 1.0)

    near = sorted(range(1, whole + 1), key=lambda width: abs((width / whole) ** 2 - share))[:3]
    width, hidden = min(product(near, HIDDEN), key=off)
    return {"width": width, "hidden": hidden}
