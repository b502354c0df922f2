"""Saving and loading of networks (model.pt, structure.json) and of checkpoints."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import nn

from catode import _checksums
from catode.prune.describe.protect import described
from catode.prune.gated import cut
from catode.records import read_json
from catode.structures.description import Block
from catode.structures.inventory import Inventory
from catode.train.models import sources, weights
from catode.train.models.answer import alike, answer

if TYPE_CHECKING:
    from catode.train.data import ImageData
    from catode.train.settings.config import Config

PART = ".part"  # suffix of a file that is being written
STRUCTURE = dict(
    arch=str,
    in_channels=int,
    classes=list,
    hidden_scale=(int, float),
    image_shape=list,
    mean=list,
    std=list,
    blocks=dict,
)
_NAME = re.compile(r"checkpoint-(\d+)\.pt")  # a checkpoint and the step after which it was written
FORMAT = 12  # of a checkpoint; increase it when its content changes


def write_text(path: Path, text: str) -> None:
    """Write a small file by an atomic rename."""
    os.replace(_write_part(path, lambda file: file.write(text.encode())), path)


def _write_part(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file under a temporary name and flush it to disk; returns the path, to be renamed by the caller.

    Raises:
        OSError: if it cannot be written, as on a full disk; the partial file is deleted.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises a RuntimeError instead
        if not isinstance(cause, OSError):
            raise
        part.unlink(missing_ok=True)
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    return part


def _flush_folder(folder: Path) -> None:
    """Flush renames and deletions in a folder to disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save_state(folder: Path, state: dict, keep: int = 2) -> None:
    """Write a checkpoint, checkpoint-STEP.pt.

    It is flushed to disk and atomically renamed, so a killed process always leaves a complete checkpoint.

    Args:
        folder: The run's folder.
        state: What to write, of types that `torch.load` reads with weights_only; "step" is the STEP.
        keep: Checkpoints to keep, including this one; those of later steps, from before a resume, are deleted.
    """
    path = folder / f"checkpoint-{state['step']}.pt"
    os.replace(_write_part(path, lambda file: torch.save({**state, "format": FORMAT}, file)), path)
    _flush_folder(folder)
    found = states(folder)
    kept = found[found.index(path) :][:keep]
    for stale in (*folder.glob("checkpoint-*" + PART), *(other for other in found if other not in kept)):
        stale.unlink()


def load_state(folder: Path, check: Callable[[dict], None] = lambda state: None) -> tuple[dict | None, dict[str, str]]:
    """The newest valid checkpoint in a run's folder; deletes nothing.

    Args:
        folder: The run's folder.
        check: Raises a ValueError that says why a complete checkpoint cannot be used.

    Returns:
        The checkpoint, None if there is none yet; and the reason why each newer file was skipped, by file name.

    Raises:
        ValueError: if there are only invalid ones.
    """
    bad = {}
    for path in states(folder):
        try:
            state = _read_state(path)
            check(state)
            if state.get("step") != int(_NAME.fullmatch(path.name)[1]):
                raise ValueError(f"it is of step {state.get('step')}")
        except Exception as error:  # unpickling damaged bytes can raise anything
            bad[path.name] = _reason(error)
        else:
            return state, bad
    if bad:
        raise ValueError(
            f"`resume` must name a run with a valid checkpoint; got {str(folder)!r}, where "
            f"{'; '.join(f'{name}: {reason}' for name, reason in bad.items())}. Restore the files of one run, or start "
            "a new run in another folder."
        )
    return None, {}


def _reason(error: Exception) -> str:
    """Why a file cannot be used, in one line."""
    if isinstance(error, zipfile.BadZipFile):
        return "it is truncated, or not a file of torch.save"
    if isinstance(error, pickle.UnpicklingError):  # its own message recommends an unsafe load
        return "it holds more than tensors, numbers and text"
    if type(error) is ValueError:
        return str(error)
    return f"it cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def _read_state(path: Path) -> dict:
    weights.check_archive(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError("it is not a checkpoint of catode")
    if state["format"] != FORMAT:
        raise ValueError(f"it is in format {state['format']}, this version of catode reads format {FORMAT}")
    return state


def states(folder: Path) -> list[Path]:
    """The files of a folder with a checkpoint's name, the newest first."""
    steps = {path: _NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_file()}
    return sorted((p for p, found in steps.items() if found), key=lambda path: int(steps[path][1]), reverse=True)


def drop_states(folder: Path) -> None:
    """Delete the checkpoints of a finished run, the newest last, so that it can be resumed until then."""
    for path in (*folder.glob("checkpoint-*" + PART), *reversed(states(folder))):
        path.unlink()


def whole_state(model: nn.Module, blocks: Sequence[Block]) -> tuple[dict[str, torch.Tensor], dict]:
    """State dict, and entry "blocks" of structure.json, of a network from which nothing was removed."""
    inventory = Inventory(blocks)
    return model.state_dict(), inventory.record(np.ones(inventory.size, dtype=bool))


def structure(config: Config, images: ImageData, blocks: dict) -> dict:
    """The content of structure.json.

    Args:
        config: The run's configuration.
        images: Its images.
        blocks: The kept blocks and units, `catode.structures.inventory.Inventory.record`.
    """
    own = {name: getattr(config, name) for name in ("shortcut", "stem", "keep") if getattr(config, name) is not None}
    return {
        "arch": config.arch,
        "in_channels": images.train_images.shape[1],
        "classes": list(images.classes),
        "hidden_scale": config.hidden_scale,
        **own,
        "image_shape": list(images.train_images.shape[1:]),
        "mean": list(images.mean),
        "std": list(images.std),
        "blocks": blocks,
    }


def save(folder: Path, state: dict[str, torch.Tensor], structure: dict) -> None:
    """Write model.pt and structure.json, each by an atomic rename, and their checksums.

    Args:
        folder: The run's folder.
        state: State dict of the compact network without gates.
        structure: Content of structure.json: architecture, its arguments, and the kept blocks and units.
    """
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    files = {
        folder / "model.pt": lambda file: torch.save(state, file),
        folder / "structure.json": lambda file: file.write((json.dumps(structure, indent=1) + "\n").encode()),
    }
    # all are renamed only after all are written, so that they match except between the renames
    parts = {_write_part(path, write): path for path, write in files.items()}
    sums = _sums({path.name: part for part, path in parts.items()}, _checksums.listed(folder))
    parts[_write_part(folder / _checksums.FILE, lambda file: file.write(sums.encode()))] = folder / _checksums.FILE
    for part, path in parts.items():
        os.replace(part, path)


def note_answer(folder: Path, told: list[float]) -> None:
    """Add what the network of a finished run answers to its structure.json, to which `load` compares it.

    Args:
        folder: The run's folder.
        told: The answer, see `catode.train.models.answer`.
    """
    write_text(folder / "structure.json", json.dumps({**read_structure(folder), "answer": told}, indent=1) + "\n")
    seal(folder, "structure.json")


def seal(folder: Path, *names: str, anew: bool = False) -> None:
    """Write the checksums of files of a run's folder, those of them that there are.

    Args:
        folder: The run's folder.
        *names: Names of the files.
        anew: Forget the checksums of all others.
    """
    files = {name: folder / name for name in names if (folder / name).exists()}
    write_text(folder / _checksums.FILE, _sums(files, {} if anew else _checksums.listed(folder)))


def _sums(files: dict[str, Path], others: dict[str, str]) -> str:
    """Content of checksums.json: of files by their names in the end, and of others."""
    found = {}
    for name, path in files.items():
        with path.open("rb") as file:
            found[name] = _checksums.of(file)
    return _checksums.text({**others, **found})


def read_structure(folder: Path) -> dict:
    """The content of structure.json in a run's folder.

    Raises:
        FileNotFoundError: if the folder holds no network.
        ValueError: if the file is damaged.
    """
    for name in ("structure.json", "model.pt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"`folder` must be a run's folder; got {str(folder)!r} without {name}. Pass the --out of a run."
            )
    try:
        structure = read_json(folder / "structure.json")
        missing = [key for key, kind in STRUCTURE.items() if not isinstance(structure.get(key), kind)]
        missing = missing or _bad_images(structure)
    except ValueError as error:
        missing = [str(error)]
    if missing:
        raise ValueError(
            f"`folder` must hold a complete structure.json; got {str(folder)!r}, where it is missing or invalid at {missing[0]}. "
            "Restore the file from the run."
        )
    return structure


def _bad_images(structure: dict) -> list[str]:
    """Which of the lists of structure.json do not describe the network's images."""
    channels, shape = structure["in_channels"], structure["image_shape"]
    bad = (
        []
        if len(shape) == 3 and shape[0] == channels and all(type(n) is int and n > 0 for n in shape)
        else ["image_shape"]
    )
    for name in ("mean", "std"):
        values = structure[name]
        if len(values) != channels or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            bad.append(name)
    return bad


def fresh(structure: dict) -> nn.Module:
    """A newly initialised, unpruned network of the architecture in structure.json.

    Raises:
        ValueError: if it cannot be built here, in one line.
    """
    return sources.build(
        structure["arch"],
        channels=structure["in_channels"],
        classes=len(structure["classes"]),
        size=tuple(structure["image_shape"][1:]),
        own={name: structure[name] for name in ("hidden_scale", "shortcut", "stem") if name in structure},
    )


def load(folder: str | os.PathLike, *, model: nn.Module | None = None) -> nn.Module:
    """The compact network of a finished run, in eval mode on the CPU.

    Args:
        folder: A run's folder.
        model: A newly made, whole network of the run's architecture, which is cut and filled, and returned; None: one is made by
            the name that the run was given, which runs the code of a file if it was one.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if its files are damaged or do not match, or the network cannot be made here.
    """
    folder = Path(folder)
    structure = read_structure(folder)
    try:
        with (folder / "model.pt").open("rb") as file:
            _checksums.check(folder / "model.pt", file)
    except OSError as error:
        raise ValueError(f"{folder / 'model.pt'} must be a file that can be read; got: {error.strerror}.") from None
    given = model is not None
    try:
        weights.check_archive(folder / "model.pt")
        model = model if given else fresh(structure)
        example = torch.zeros(1, *structure["image_shape"], device=next(model.parameters()).device)
        blocks = described(model, example, structure.get("keep", ()))
        cut.restrict(model, blocks, structure["blocks"])
        model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    except sources.SourceError as error:
        raise ValueError(f"{error} Or pass model=, a newly made network of that architecture.") from error
    except Exception as error:  # damaged files can raise anything
        other = ", and `model` be of its architecture" if given else ""
        raise ValueError(
            f"`folder` must hold a complete model.pt and a matching structure.json{other}; got {str(folder)!r}, which cannot "
            f"be read ({_reason(error)}). Restore the files from the run."
        ) from error
    told = structure.get("answer")
    if isinstance(told, list) and told and not alike(answer(model, structure["image_shape"]), told):
        code = "`model`" if given else "the code behind its name"
        raise ValueError(
            f"`folder` must be read with the network that it was made by; got {str(folder)!r}, whose {structure['arch']} returns "
            f"something else than at the end of its run: {code}, or a package, has changed. Restore it."
        )
    return model.eval()
