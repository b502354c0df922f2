"""Which entries of which parameters belong to a structure, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import slices
from catode.prune.devices.transfer import exact, upload
from catode.structures.inventory import Inventory

Sums = list[torch.Tensor]  # of a parameter's entries: by unit of each axis; of all where no axis is of units


class Owned:
    """The weights of the structures of a network.

    Args:
        model: The network, plain.
        inventory: Numbering of its structures.
        kept: Structures in the network, shape (n,).
        present: Numbers of the units physically present at each site.

    Attributes:
        parameters: Parameters with an entry that belongs to a structure, each once for every block that has it.
        places: Places of each of them in `parameters`.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, kept: NDArray[np.bool_], present: Sequence[NDArray[np.int64]]
    ):
        self.size = inventory.size
        self.device = next(model.parameters()).device
        self.parameters: list[nn.Parameter] = []
        self._layer: list[int] = []
        self._axes: list[list[tuple[int, torch.Tensor]]] = []
        units: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for place in inventory.standing(kept):
            for part in slices(model, place.site):
                numbers = upload(torch.from_numpy(np.repeat(present[place.number], part.each)), self.device)
                units.setdefault(part.tensor, []).append((part.dim, numbers))
        for layer, block in enumerate(inventory.blocks):
            if not kept[layer]:
                continue
            for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
                if any(name == f or name.startswith(f + ".") for f in block.fixed):
                    continue
                for key, parameter in sorted(module.named_parameters(recurse=False)):
                    self.parameters.append(parameter)
                    self._layer.append(layer)
                    self._axes.append(units.get(f"{name}.{key}", []))
        self.places: dict[nn.Parameter, list[int]] = {}
        for place, parameter in enumerate(self.parameters):
            self.places.setdefault(parameter, []).append(place)

    def flat(self, found: dict[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """All entries in order; 0 for parameters that were not found."""
        parts = [found[p] if p in found else torch.zeros_like(p.detach()) for p in self.parameters]
        return torch.cat([part.reshape(-1) for part in parts])

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """What `flat` made, by parameter."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def reduce(self, place: int, values: torch.Tensor) -> Sums:
        """Sums of the values of one parameter, by structure."""
        values, found = values.to(exact(values.device)), []  # at once: a sum that converts is several times slower
        for axis, _ in self._axes[place]:
            other = [k for k in range(values.dim()) if k != axis]
            found.append(values.sum(other) if other else values)
        return found or [values.sum()]

    def gather(self, sums: dict[int, Sums]) -> torch.Tensor:
        """Sums over the weights of each structure, shape (n,); in the same order every time.

        Args:
            sums: What `reduce` made of parameters, by their places.
        """
        found = torch.zeros(self.size, dtype=exact(self.device), device=self.device)
        for place in sorted(sums):
            found[self._layer[place]] += sums[place][0].sum()
            for (_, numbers), part in zip(self._axes[place], sums[place], strict=False):
                found.index_add_(0, numbers, part)
        return found

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """Sums over the weights of each structure, shape (n,), of what `flat` made."""
        parts = self.split(flat.to(exact(flat.device)))
        return self.gather({place: self.reduce(place, part) for place, part in enumerate(parts)})

    def owners(self, parameters: Sequence[nn.Parameter]) -> NDArray[np.bool_]:
        """Structures with an entry in one of some parameters, shape (n,)."""
        found = np.zeros(self.size, dtype=bool)
        for place, parameter in enumerate(self.parameters):
            if any(parameter is p for p in parameters):
                found[self._layer[place]] = True
                for _, numbers in self._axes[place]:
                    found[numbers.cpu().numpy()] = True
        return found
