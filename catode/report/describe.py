"""The command ``catode describe ARCH``: what can go of a network, what each part of it costs, and what cannot go and why."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catode._output import out_of_memory, run
from catode._validate import check_int, fail
from catode.structures.complexity import Complexity
from catode.structures.description import PRODUCER, Block, Site
from catode.train.models import sources
from catode.train.models.catalogue import ARCHITECTURES
from catode.train.settings.commandline import CommandLine
from catode.train.settings.pruning import least_units

if TYPE_CHECKING:  # PyTorch and matplotlib are imported where they are used, so that --help is fast
    from matplotlib.figure import Figure
    from torch import nn

    from catode.prune.describe.trace.description import Description, Refusal

__all__ = ["Part", "figure", "grouped", "main", "parts", "table"]

_PATH = re.compile(r"`[^`]*`")


@dataclass(frozen=True)
class Part:
    """A branch or a width that can go.

    Args:
        name: Name of its block or site.
        kind: ``branch``, ``width`` of channels or hidden units, or ``heads``.
        units: Units of a width; 0 for a branch.
        macs: Share of the network's MACs that go with the branch, or with all units of the width.
        params: The same of the parameters.
        least: Units that stay at least; 0 for no limit.
    """

    name: str
    kind: str
    units: int
    macs: float
    params: float
    least: int = 0


def parts(model: nn.Module, blocks: Description, cost: Complexity) -> list[Part]:
    """Branches and widths in the order in which the network holds them, with their shares.

    Args:
        model: The network.
        blocks: Its description.
        cost: Its complexity.
    """
    ones = np.ones(cost.size)
    macs, params = cost.macs(ones), cost.params(ones)
    places = {name: number for number, name in enumerate(model.state_dict())}
    found = []

    def add(where: float, name: str, kind: str, units: int, gone: np.ndarray | int, least: int = 0) -> None:
        without = ones.copy()
        without[gone] = 0.0
        shares = 1.0 - cost.macs(without) / macs, 1.0 - cost.params(without) / params
        found.append((where, Part(name, kind, units, *shares, least)))

    for number, block in enumerate(blocks):
        if block.removable:
            add(_place(places, *(block.branch or (block.name,))) - 0.5, block.name, "branch", 0, number)
    for place in cost.inventory.places:
        least = getattr(blocks, "least", {}).get(place.site.name, 0 if place.block.removable else 1)
        where = _place(places, *(part.tensor for part in place.site.parts), *place.site.producers)
        add(where, place.site.name, _kind(place.site), place.site.width, place.units, least)
    return [part for _, part in sorted(found, key=lambda pair: pair[0])]


def _place(places: dict[str, int], *paths: str) -> int:
    """Position of the first tensor of some modules or of some tensors."""
    return min((n for name, n in places.items() for p in paths if name == p or name.startswith(f"{p}.")), default=0)


def _kind(site: Site) -> str:
    heads = any(part.each > 1 and part.role == PRODUCER for part in site.parts)
    return "heads" if heads else "width"


def grouped(refused: Sequence[Refusal]) -> list[str]:
    """What was refused, one line for each reason, whatever modules it names."""
    groups: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in refused:
        groups.setdefault((refusal.kind, _PATH.sub("``", refusal.reason)), []).append(refusal)
    lines = []
    for (kind, _), members in groups.items():
        first, units = members[0], sum(member.units for member in members)
        many = f"{len(members)} {kind if len(members) == 1 else 'branches' if kind == 'branch' else f'{kind}s'}"
        many += f" ({units:,} units)" if units else ""
        others = " and others" if len(members) > 1 else ""
        lines.append(f"{many}, `{first.name}`{others}: {first.reason}")
    return lines


def table(title: str, found: Sequence[Part], refused: Sequence[Refusal]) -> str:
    """The table of structures, and below it what was refused and why.

    Args:
        title: First line.
        found: What can go.
        refused: What cannot.
    """
    width = max([len(part.name) for part in found] + [9])
    lines = [
        title,
        "",
        f"{'structure':<{width}} {'kind':<7} {'units':>6} {'MACs':>8} {'params':>8} {'MACs a unit':>12}",
    ]
    for part in found:
        each = f"{part.macs / part.units:>12.4%}" if part.units else f"{'':>12}"
        least = f"  at least {part.least} stay{'s' if part.least == 1 else ''}" if part.least else ""
        units = part.units or ""
        lines.append(
            f"{part.name:<{width}} {part.kind:<7} {units:>6} {part.macs:>8.2%} {part.params:>8.2%} {each}{least}"
        )
    if refused:
        lines += ["", "cannot go:", *(f"  {line}" for line in grouped(refused))]
    return "\n".join(lines)


def figure(title: str, found: Sequence[Part]) -> Figure:
    """Shares of the MACs and numbers of units along the network.

    Args:
        title: Title.
        found: What can go.
    """
    from catode.theory.plotting import PALETTE, house_style
    from catode.theory.plotting.style import new_figure

    colors = {"branch": PALETTE["vermillion"], "width": PALETTE["blue"], "heads": PALETTE["green"]}
    names = {"branch": "branch, as a whole", "width": "all channels or hidden units", "heads": "all attention heads"}
    with house_style():
        drawn = new_figure(float(np.clip(2.0 + 0.2 * len(found), 7.0, 18.0)), 5.6)
        costs, units = drawn.subplots(2, 1, sharex=True)
        for kind, color in colors.items():
            at = [n for n, part in enumerate(found) if part.kind == kind]
            if not at:
                continue
            costs.bar(at, [100 * found[n].macs for n in at], color=color, width=0.8, label=names[kind])
            if kind != "branch":
                units.bar(at, [found[n].units for n in at], color=color, width=0.8)
        costs.set_ylabel("% of the MACs")
        units.set_ylabel("units")
        if max((part.units for part in found), default=0) > 50 * min((p.units for p in found if p.units), default=1):
            units.set_yscale("log")
            units.set_ylim(bottom=0.5)
        costs.set_title("\n".join(textwrap.wrap(title, int(11 * drawn.get_figwidth()))))
        every = max(1, len(found) // 60)
        units.set_xticks(range(0, len(found), every), [p.name for p in found[::every]], rotation=90, fontsize=7)
        units.set_xlim(-0.8, len(found) - 0.2)
        for ax in (costs, units):
            ax.grid(visible=False, axis="x")
        drawn.legend(title="what goes", loc="outside lower center", ncols=3, frameon=False)
    return drawn


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="catode describe",
        description="Print what can go of a network, what share of its MACs and parameters each branch and width has, and what "
        "cannot go and why. Nothing is trained.",
        allow_abbrev=False,
    )
    parser.add_argument("arch", metavar="ARCH", help=f"a network, as --arch of catode train takes it: {sources.FORMS}")
    parser.add_argument(
        "--image-size", metavar="INT", help="side of the images in pixels [default: 224; 32 for networks for CIFAR]"
    )
    parser.add_argument("--channels", metavar="INT", default="3", help="channels of the images [default: 3]")
    parser.add_argument("--classes", metavar="INT", default="10", help="number of classes [default: 10]")
    parser.add_argument(
        "--keep", nargs="+", metavar="PATTERN", default=[], help="modules that stay whole, paths or glob patterns"
    )
    parser.add_argument("--least", nargs="+", metavar="PATTERN=NUMBER", default=[], help="fewest units that stay")
    parser.add_argument("--draw", metavar="FILE", help="draw it into a .png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    try:
        given = build_parser().parse_args(argv)
        least = least_units(given.least)
        own = ARCHITECTURES.get(given.arch)
        size = _integer("image_size", given.image_size or ("32" if own and own.stem == "cifar" else "224"))
        channels, classes = (_integer(name, getattr(given, name)) for name in ("channels", "classes"))
        draw = None if given.draw is None else Path(given.draw)
        if draw is not None and (draw.suffix != ".png" or not draw.absolute().parent.is_dir()):
            fail("draw", "be a .png in an existing folder", given.draw, hint="Write --draw structures.png.")
        sources.check(given.arch)
        _describe(given.arch, size, channels, classes, given.keep, least, draw)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: `image_size` must fit into the memory; got {size}. Use a smaller one.", file=sys.stderr)
        return 1
    return 0


def _integer(name: str, text: str) -> int:
    return check_int(name, int(text) if text.isdecimal() else text, low=1, hint="Use a number such as 32.")


def _describe(
    arch: str, size: int, channels: int, classes: int, keep: Sequence[str], least: dict[str, int], draw: Path | None
) -> None:
    import torch

    from catode.prune.describe import costs
    from catode.prune.describe.protect import described

    model = sources.build(arch, channels=channels, classes=classes, size=(size, size))
    example = torch.zeros(1, channels, size, size)
    if sources.is_foreign(arch):
        sources.check_output(arch, model, example, classes)
    blocks = described(model, example, keep, least)
    cost = costs.describe(model, list[Block](blocks), example)
    found = parts(model, blocks, cost)
    ones = np.ones(cost.size)
    macs, params, floor = cost.macs(ones), cost.params(ones), np.zeros(cost.size)
    counts = {kind: sum(part.kind == kind for part in found) for kind in ("branch", "width", "heads")}
    units = sum(part.units for part in found)
    title = f"{arch}: {channels} x {size} x {size}, {macs:,.0f} MACs, {params:,.0f} parameters"
    summary = (
        f"{counts['branch']} branches and {units:,} units in {counts['width'] + counts['heads']} widths can go: "
        f"{1 - cost.macs(floor) / macs:.1%} of the MACs and {1 - cost.params(floor) / params:.1%} of the parameters"
    )
    print(table(f"{title}\n{summary}", found, blocks.refused))
    if draw is not None:
        figure(title, found).savefig(draw)
        print(f"\ndrawn: {draw}")


if __name__ == "__main__":
    sys.exit(run(main))
