"""Initial weights from a file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping

import torch
from torch import nn

WRAPPERS = ("state_dict", "model")  # keys of the state dict in files that hold more
LISTED = 3  # names listed in a message


def check_archive(path: str | os.PathLike) -> None:
    """Compare the checksums in a file of `torch.save`, which `torch.load` does not.

    Raises:
        zipfile.BadZipFile: if the file is no whole archive.
        ValueError: if a checksum is wrong.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"checksum of {broken} is wrong")


def read(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`, on the CPU; loads tensors only (weights_only=True).

    The state dict may be under the key ``state_dict`` or ``model``; the prefix ``module.`` of a distributed run is removed.

    Raises:
        ValueError: if there is no such file or no state dict in it.
    """
    path = os.fspath(path)
    try:
        if zipfile.is_zipfile(path):  # older files of torch.save are no archives and hold no checksums
            check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(
            f"`init` must be a file that can be read; got init={path!r}: {reason}. Pass a file of weights."
        ) from None
    except Exception as error:  # unpickling damaged bytes can raise anything
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"`init` must be a file of tensors that torch.load reads with weights_only=True; got init={path!r}, where it "
            f"fails ({reason}). Save the state dict again with torch.save(model.state_dict(), FILE)."
        ) from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(_is_entry(*item) for item in content.items()):
        raise ValueError(
            f"`init` must hold a state dict, tensors by name; got init={path!r}, which holds something else. "
            "Save one with torch.save(model.state_dict(), FILE)."
        )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _is_entry(name: object, tensor: object) -> bool:
    return isinstance(name, str) and isinstance(tensor, torch.Tensor)


def fill(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> list[str]:
    """Load a state dict into an unpruned network, except a classifier for another number of classes.

    The batch norms' ``num_batches_tracked``, which old files lack, may be missing.

    Args:
        model: The network, changed in place.
        state: The weights, tensors by name.
        source: Name of the file, for messages.

    Returns:
        Notes for the user about what was not loaded, one line each.

    Raises:
        ValueError: if the weights do not match the network or are not finite; the model is then unchanged.
    """
    own, notes = model.state_dict(), []
    _refuse(source, "lacks", [n for n in own if n not in state and not n.endswith("num_batches_tracked")])
    _refuse(source, "also has", [name for name in state if name not in own])
    head = _classifier(model)
    theirs, mine = (tensors.get(f"{head}weight", torch.empty(0)) for tensors in (state, own))
    if theirs.shape[1:] == mine.shape[1:] and len(theirs) != len(mine):
        notes.append(
            f"the classifier in {source} is for {len(theirs)} classes, these images have {len(mine)}: "
            "it starts from random weights"
        )
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    wrong = [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    first = next((name for name, p in model.named_parameters() if p.dim() == 4), None)
    if wrong == [first] and state[first].shape[2:] == own[first].shape[2:]:
        raise ValueError(
            f"`init` must hold weights for images of {own[first].shape[1]} channels; got init={source!r} for "
            f"{state[first].shape[1]}. Convert the images, or leave --init out."
        )
    shapes = [f"{name} of shape {_shape(state[name])} instead of {_shape(own[name])}" for name in wrong]
    _refuse(source, "has", shapes)
    _refuse(source, "has values that are not finite in", [n for n, t in state.items() if not t.isfinite().all()])
    model.load_state_dict(state, strict=False)
    return notes


def _classifier(model: nn.Module) -> str:
    """Beginning of the names of the last layer's parameters."""
    matrices = [name for name, p in model.named_parameters() if p.dim() > 1 and name.rpartition(".")[2] == "weight"]
    return matrices[-1].removesuffix("weight") if matrices else ""


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


def _refuse(source: str, verb: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        raise ValueError(
            f"`init` must hold the weights of this network; got init={source!r}, which {verb} "
            f"{', '.join(names[:LISTED])}{more}. Choose the --arch, --shortcut, --stem and --hidden-scale of the file, or "
            "leave --init out."
        )
