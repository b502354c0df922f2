"""Dead channels: whether those that round up a width would stay dead while a network trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from catode.prune.describe.protocol import slices, tensor_of
from catode.prune.gated import cut
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout


def check(model: nn.Module, inventory: Inventory, outputs: Callable[[], list[torch.Tensor]], multiple: int) -> None:
    """Make sure that no gradient reaches the weights of dead channels, whose weights in and out are all 0.

    Args:
        model: A copy of the whole network with random weights; half of every width is dead afterwards.
        inventory: Numbering of its structures.
        outputs: Runs it, for a derivative.
        multiple: Multiple that dead channels are to round up widths to.

    Raises:
        ValueError: if one does, since an activation does not map 0 to 0.
    """
    sites = [place.site for place in inventory.places]
    layout = Layout(sites)
    dead = {site: np.arange((site.width + 1) // 2) for site in sites}
    for site in sites:
        cut.silence_units(model, site, dead[site], cut.Change(), layout)
    model.requires_grad_(True)
    with torch.enable_grad():
        value = sum((end * torch.randn_like(end)).sum() for end in outputs() if end.requires_grad)
    if isinstance(value, torch.Tensor):
        value.backward()
    model.requires_grad_(False)
    for site in sites:
        for part in slices(model, site):
            gradient = tensor_of(model, part.tensor).grad
            if gradient is None:
                continue
            where = torch.from_numpy(layout.entries(part, dead[site])).to(gradient.device)
            if gradient.index_select(part.dim, where).any():
                raise ValueError(
                    f"`width_multiple` must be 1 where an activation does not map 0 to 0, as behind site `{site.name}`, or dead "
                    f"channels would come back to life; got {multiple}. Pass width_multiple=1."
                )
    model.zero_grad(set_to_none=True)
