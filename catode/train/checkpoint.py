"""Writing a network with its structure, and a run's whole state, and getting them back."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import torch
from torch import nn

from catode.train import compact, models

STATE, PREVIOUS, PART = "checkpoint.pt", "checkpoint-previous.pt", "checkpoint.pt.part"
FORMAT = 3  # of a state; raise it when what is in one changes


def write_text(path: Path, text: str) -> None:
    """Write a small file in one move."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def save_state(folder: Path, state: dict) -> None:
    """Write a run's whole state for `load_state`; the state before it is kept too.

    Written beside, flushed to the disk and moved into place: whatever kills the process, one whole state is there.
    """
    with (folder / PART).open("wb") as file:
        torch.save({**state, "format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())
    if (folder / STATE).exists():
        os.replace(folder / STATE, folder / PREVIOUS)
    os.replace(folder / PART, folder / STATE)
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load_state(folder: Path) -> dict | None:
    """The newest whole state in a run's folder; None if there is none yet. A damaged newest one is deleted.

    Raises:
        ValueError: if there are only damaged ones.
    """
    damaged = {}
    for name in (STATE, PREVIOUS, PART):
        try:
            state = _whole_state(folder / name)
        except FileNotFoundError:
            continue
        except Exception as error:  # unpickling damaged bytes can raise anything
            damaged[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        if STATE in damaged:  # or it would be kept as the good one before the next
            (folder / STATE).unlink()
        return state
    if damaged:
        raise ValueError(
            f"`resume` must name a run with a readable checkpoint; got {str(folder)!r}, where "
            f"{'; '.join(f'{name}: {reason}' for name, reason in damaged.items())}. Start the run anew in another folder."
        )
    return None


def _whole_state(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"checksum of {broken} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ValueError(f"it is in format {state['format']}, this version of catode reads format {FORMAT}")
    return state


def has_state(folder: Path) -> bool:
    """Whether a run's folder holds a state, whole or not."""
    return any((folder / name).exists() for name in (STATE, PREVIOUS, PART))


def drop_state(folder: Path) -> None:
    """Delete the states of a run that is finished."""
    for name in (STATE, PREVIOUS, PART):
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
