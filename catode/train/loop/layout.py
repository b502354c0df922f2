"""Which memory layout of images and weights trains faster here, and whether dead channels that round up widths do: a short
trial of steps before the run (``--layout auto``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.trace.description import Description
from catode.prune.devices.timing import passing_ms
from catode.prune.gated.cut import restrict
from catode.structures.inventory import Inventory
from catode.train.loop.optimization import AMP, autocast
from catode.train.settings.config import Config
from catode.train.settings.training import LAYOUTS

ROUNDS = 5  # steps of every case, in turns; the first warms up


def memory_format(config: Config) -> torch.memory_format:
    """The layout of a configuration as PyTorch's."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def trial(
    config: Config, build: Callable[[Config], nn.Module], blocks: Description, shape: tuple[int, ...], classes: int
) -> dict[tuple[str, int], float]:
    """Milliseconds that forward and backward pass of one step take, whole network and half one together.

    The half one has lost about half the units of every site (of layers alone, every second one), as a run will; without
    gates to train there is only the whole one. Random images and labels; the global random state stays as it is.

    Returns:
        By layout, and by the multiple that the half one's widths are rounded up to: the configuration's `width_multiple` and, where
        that makes a difference, 1.

    Args:
        config: The run's configuration; its layout is not looked at.
        build: Makes its network, whole, on its device, in a layout.
        blocks: The network's description.
        shape: Shape of an image.
        classes: Number of classes.
    """
    device, part = torch.device(config.device), config.batch_size // config.accumulate
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        images, labels = torch.randn(part, *shape, device=device), torch.randint(classes, (part,), device=device)
        cases = []
        for layout in LAYOUTS:
            own = replace(config, layout=layout)
            x = images.contiguous(memory_format=memory_format(own))
            halves = [(m, _half(Inventory(blocks), replace(config, width_multiple=m))) for m in multiples(config)]
            for multiple, kept in [(None, None), *(halves if config.nu > 0 else ())]:
                model = build(own).train()
                if kept is not None:
                    restrict(model, list(blocks), Inventory(blocks).record(kept))
                cases.append((layout, multiple, model, x, []))
        for _ in range(ROUNDS):
            for *_, model, x, times in cases:
                times.append(passing_ms(lambda m=model, x=x: _step(m, x, labels, config), device))
    found = {(layout, multiple): 0.0 for layout in LAYOUTS for multiple in multiples(config)}
    for layout, multiple, _, _, times in cases:
        for own in multiples(config) if multiple is None else (multiple,):
            found[layout, own] += min(times[1:])
    return found


def multiples(config: Config) -> tuple[int, ...]:
    """Multiples to try for widths while training: that of the configuration, and 1 where units can go and it is larger."""
    own = config.width_multiple
    return (own, 1) if config.nu > 0 and config.alpha < 1 and own > config.round_to else (own,)


def _step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, config: Config) -> None:
    model.zero_grad(set_to_none=True)
    with autocast(config.device, AMP[config.amp]):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()


def _half(inventory: Inventory, config: Config) -> NDArray[np.bool_]:
    """Which structures a network has that lost about half of them, shape (n,); widths are such as the run will have."""
    kept, rng = np.ones(inventory.size, dtype=bool), np.random.default_rng(0)
    if config.alpha == 1:
        kept[: inventory.layers : 2] = False
    else:
        multiple = max(config.width_multiple, config.round_to)
        for units in inventory.units:
            left = round(len(units) * rng.uniform(0.4, 0.6))
            kept[units[max(-(-left // multiple) * multiple, 1) :]] = False
    return inventory.close(kept)
