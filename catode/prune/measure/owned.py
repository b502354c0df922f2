"""Which entries of which parameters belong to a structure, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import branch, slices, tensor_of
from catode.prune.devices.transfer import exact, upload
from catode.structures.inventory import Inventory
from catode.structures.layout import layout_of

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
        self._layer: list[int] = []  # size for none, as for entries of no unit
        self._axes: list[list[tuple[int, torch.Tensor]]] = []
        layout, units = layout_of(inventory, present), {}
        for place in inventory.standing(kept):
            for part in slices(model, place.site):
                numbers = units.setdefault(part.tensor, {}).get(part.dim)
                if numbers is None:
                    numbers = np.full(tensor_of(model, part.tensor).shape[part.dim], self.size)
                    units[part.tensor][part.dim] = numbers
                here = present[place.number]
                numbers[layout.entries(part, np.arange(len(here)))] = np.repeat(here, part.each)
        axes = {
            name: [(dim, upload(torch.from_numpy(numbers), self.device)) for dim, numbers in by_dim.items()]
            for name, by_dim in units.items()
        }
        listed: set[nn.Parameter] = set()
        for layer, block in enumerate(inventory.blocks):
            if kept[layer] and block.removable:
                for name, parameter in _by_module(branch(model, block)):
                    self._list(parameter, layer, axes.get(name, []))
                    listed.add(parameter)
        for name, own in axes.items():  # weights of units outside all branches
            parameter = tensor_of(model, name)
            if isinstance(parameter, nn.Parameter) and parameter not in listed:
                self._list(parameter, self.size, own)
                listed.add(parameter)
        self.places: dict[nn.Parameter, list[int]] = {}
        for place, parameter in enumerate(self.parameters):
            self.places.setdefault(parameter, []).append(place)

    def _list(self, parameter: nn.Parameter, layer: int, axes: list[tuple[int, torch.Tensor]]) -> None:
        self.parameters.append(parameter)
        self._layer.append(layer)
        self._axes.append(axes)

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
        found = torch.zeros(self.size + 1, dtype=exact(self.device), device=self.device)
        for place in sorted(sums):
            found[self._layer[place]] += sums[place][0].sum()
            for (_, numbers), part in zip(self._axes[place], sums[place], strict=False):
                found.index_add_(0, numbers, part)
        return found[: self.size]

    def of_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """Sums over the weights of each structure, shape (n,), of what `flat` made."""
        parts = self.split(flat.to(exact(flat.device)))
        return self.gather({place: self.reduce(place, part) for place, part in enumerate(parts)})

    def owners(self, parameters: Sequence[nn.Parameter]) -> NDArray[np.bool_]:
        """Structures with an entry in one of some parameters, shape (n,)."""
        found = np.zeros(self.size + 1, dtype=bool)
        for place, parameter in enumerate(self.parameters):
            if any(parameter is p for p in parameters):
                found[self._layer[place]] = True
                for _, numbers in self._axes[place]:
                    found[numbers.cpu().numpy()] = True
        return found[: self.size]


def _by_module(parameters: dict[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Parameters module by module, those of each by their names."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    order = {path: number for number, path in enumerate(modules)}
    return sorted(parameters.items(), key=lambda item: (order[item[0].rpartition(".")[0]], item[0]))
