"""Writing a network with its structure, and getting it back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from catode.train import compact, models


def whole(model: nn.Module) -> dict:
    """Record of a structure from which nothing was removed."""
    return {
        block.name: {"kept": True, "sites": {site.name: list(range(site.width)) for site in block.sites}}
        for block in model.structures()
    }


def save(folder: Path, state: dict[str, torch.Tensor], structure: dict) -> None:
    """Write model.pt and structure.json, each replaced in one move.

    Args:
        folder: The run's folder.
        state: State dict of the compact, plain network.
        structure: What structure.json holds: architecture, its arguments, and the kept blocks and units.
    """
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    # both are moved into place only after both are written, so that they always fit each other closely in time
    torch.save(state, folder / "model.pt.part")
    (folder / "structure.json.part").write_text(json.dumps(structure, indent=1) + "\n")
    os.replace(folder / "model.pt.part", folder / "model.pt")
    os.replace(folder / "structure.json.part", folder / "structure.json")


def load(folder: str | os.PathLike) -> nn.Module:
    """The compact network of a finished run, in eval mode on the CPU.

    Args:
        folder: A run's folder.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if its files do not fit each other.
    """
    folder = Path(folder)
    for name in ("structure.json", "model.pt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"`folder` must be a run's folder; got {str(folder)!r} without {name}. Pass the --out of a run."
            )
    structure = json.loads((folder / "structure.json").read_text())
    model = models.build(
        structure["arch"],
        in_channels=structure["in_channels"],
        classes=len(structure["classes"]),
        hidden_scale=structure["hidden_scale"],
    )
    compact.restrict(model, model.structures(), structure["blocks"])
    state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"`folder` must hold a model.pt that fits its structure.json; got {str(folder)!r}: {error}"
        ) from error
    return model.eval()
