"""Writing a network with its structure, and a run's whole state, and getting them back."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import torch
from torch import nn

from catode.train import compact, models

STATE, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def save_state(folder: Path, state: dict) -> None:
    """Write a run's whole state for `load_state`; the state before it is kept too.

    Written beside, flushed to the disk and moved into place: whatever kills the process, one whole state is there.
    """
    part = folder / f"{STATE}.part"
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if (folder / STATE).exists():
        os.replace(folder / STATE, folder / PREVIOUS)
    os.replace(part, folder / STATE)


def load_state(folder: Path) -> dict | None:
    """The newest whole state in a run's folder; None if there is none yet.

    Raises:
        ValueError: if there are only damaged ones.
    """
    damaged = []
    for name in (STATE, PREVIOUS):
        try:
            return torch.load(folder / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            damaged.append(f"{name}: {str(error).splitlines()[0]}")
    if damaged:
        raise ValueError(
            f"`resume` must name a run with a readable checkpoint; got {str(folder)!r}, where {'; '.join(damaged)}. "
            "Start the run anew."
        )
    return None


def drop_state(folder: Path) -> None:
    """Delete the states of a run that is finished."""
    for name in (STATE, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


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
