"""Networks by name: the trainer's own, those of torchvision and timm, and functions in files of one's own.

A name is one of

    resnet20                                         a residual network of `catode.train.models.catalogue`
    torchvision:mobilenet_v2                         any of ``torchvision.models.list_models()``
    timm:vit_tiny_patch16_224                        any of ``timm.list_models()``
    path/to/file.py:make_model                       what a function in a file returns

and the last three may give arguments, ``timm:vit_tiny_patch16_224(patch_size=4, depth=6)``, Python literals by keyword. A
function in a file is called with these, and with those of `OFFERED` that it has parameters for. Its code is run.

Importing this module loads neither PyTorch nor any of these packages.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catode.train.models.catalogue import ARCHITECTURES

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["FORMS", "Source", "SourceError", "build", "check", "check_output", "folder_name", "is_foreign", "parse"]

FORMS = "torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
OFFERED = {
    "classes": "classes",
    "num_classes": "classes",
    "in_channels": "channels",
    "in_chans": "channels",
    "image_size": "size",
    "img_size": "size",
}
"""Parameters that a function in a file may have, and what they are given: number of classes, channels of the images, height
and width (one number for squares)."""
_SIZED = {"vit_": "image_size", "maxvit": "input_size"}  # torchvision's models that are made for one size of images
_EXTRA_HEADS = ("googlenet", "inception_v3")  # those with classifiers besides the last one
_SAID: set[str] = set()  # files of which it was said that their code is run


class SourceError(ValueError):
    """A name that is no network, or one that cannot be built; one line: argument, constraint, value, hint."""


@dataclass(frozen=True)
class Source:
    """A network's name, taken apart.

    Args:
        text: The whole name.
        kind: ``own``, ``torchvision``, ``timm`` or ``file``.
        name: Name of the model or function.
        file: Path of the file; empty for the other kinds.
        arguments: Keyword arguments that the name gives.
    """

    text: str
    kind: str
    name: str
    file: str
    arguments: dict[str, Any]


def is_foreign(text: object) -> bool:
    """Whether a name has the form of a network that is not the trainer's own."""
    return isinstance(text, str) and (text.startswith(("torchvision:", "timm:")) or ".py:" in text)


def parse(text: str) -> Source:
    """Take a name apart; imports nothing.

    Raises:
        SourceError: if its form is wrong, in one line.
    """
    if not is_foreign(text):
        return Source(text, "own", text, "", {})
    kind = next((kind for kind in ("torchvision", "timm") if text.startswith(f"{kind}:")), "file")
    place, _, call = text.partition(":") if kind != "file" else text.rpartition(".py:")
    name, bracket, rest = call.partition("(")
    word = r"[A-Za-z_]\w*" if kind == "file" else r"[A-Za-z_][\w.-]*"
    if not re.fullmatch(word, name):
        raise _error(f"be one of the known names, {FORMS}", text, "Check the name behind the colon.")
    try:
        call = ast.parse(f"f{bracket}{rest}", mode="eval").body if bracket else ast.Call(ast.Name("f"), [], [])
        named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        if not named or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _error(
            "give arguments as NAME(keyword=value, ...), values being numbers, texts, True, False, None, tuples or lists",
            text,
            "Put quotes around it in a shell.",
        ) from None
    return Source(text, kind, name, f"{place}.py" if kind == "file" else "", arguments)


def folder_name(text: str) -> str:
    """A name as a part of a folder's name: letters, digits, dots, dashes and underscores."""
    source = parse(text)
    place = {"own": "", "file": f"{Path(source.file).stem}-"}.get(source.kind, f"{source.kind}-")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", place + source.name)


def check(text: str) -> None:
    """Make sure that there is a network of a name: its package is installed and knows it, its file has the function.

    Imports the package, or runs the file's code.

    Raises:
        SourceError: if not, in one line.
    """
    source = parse(text)
    if source.kind == "own":
        if text not in ARCHITECTURES:
            raise _error(f"be one of {', '.join(ARCHITECTURES)}, {FORMS}", text, _near(text, ARCHITECTURES))
    elif source.kind == "file":
        _function(source)
    else:
        _known(source)


def build(
    text: str, *, channels: int, classes: int, size: tuple[int, int], own: dict[str, Any] | None = None
) -> nn.Module:
    """A newly initialised network.

    Args:
        text: Its name.
        channels: Channels of the images.
        classes: Number of classes.
        size: Height and width of the images.
        own: Further arguments of the trainer's own networks.

    Raises:
        SourceError: if it cannot be built, in one line.
    """
    source = parse(text)
    if source.kind == "own":
        from catode.train.models import resnets

        return resnets.build(text, in_channels=channels, classes=classes, **(own or {}))
    given = dict(classes=classes, channels=channels, size=size[0] if size[0] == size[1] else size)
    make = {"torchvision": _torchvision, "timm": _timm, "file": _from_file}[source.kind]
    from torch import nn

    try:
        model = make(source, given)
    except SourceError:
        raise
    except Exception as error:  # whatever a constructor raises
        raise SourceError(
            f"`arch` must be a network that can be built; got arch={text!r}, which fails: {_reason(error)}. "
            "Check its arguments and the size of the images."
        ) from error
    if not isinstance(model, nn.Module):
        raise _error("name a function that returns a torch.nn.Module", type(model).__name__, f"See {source.text}.")
    return model


def check_output(text: str, model: nn.Module, example: torch.Tensor, classes: int) -> None:
    """Make sure that a network returns one number for each class, in train and in eval mode; it is tried on a copy.

    Args:
        text: Its name.
        model: The network.
        example: One image, shape (1, C, H, W).
        classes: Number of classes.

    Raises:
        SourceError: if not, in one line.
    """
    import torch

    images = f"images of shape {'x'.join(map(str, example.shape[1:]))}"
    trial = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for training in (True, False):
            mode = "train" if training else "eval"
            try:
                logits = trial.train(training)(example.expand(2, *example.shape[1:]))
            except Exception as error:  # whatever a forward pass raises
                raise SourceError(
                    f"`arch` must be a network that takes {images}; got arch={text!r}, which fails in {mode} mode: "
                    f"{_reason(error)}. Choose another --image-size or network."
                ) from error
            if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
                what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
                raise SourceError(
                    f"`arch` must be a network that returns logits of shape (images, {classes}), one for each class; got "
                    f"arch={text!r}, which returns {what} for 2 {images} in {mode} mode. Return them alone, for as many classes as "
                    "it is given."
                )


def _error(requirement: str, value: object, hint: str) -> SourceError:
    return SourceError(f"`arch` must {requirement}; got arch={value!r}. {hint}")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(error).__name__


def _near(name: str, names: Iterable[str], prefix: str = "") -> str:
    from catode.train.settings.setting import nearest

    near = nearest(name, names)
    return f"Did you mean {prefix}{near}?" if near else "Check its spelling."


def _known(source: Source) -> Any:
    """The package of a source, once it is known to have the model.

    Raises:
        SourceError: if it is not installed, does not work here, or has no such model.
    """
    kind = source.kind
    if importlib.util.find_spec(kind) is None:
        raise _error(
            f"be a network whose package is installed, {kind} is not",
            source.text,
            "Install it: pip install 'catode[models]'.",
        )
    try:
        package = importlib.import_module(kind)
        models = importlib.import_module("torchvision.models") if kind == "torchvision" else package
    except (ImportError, RuntimeError, OSError) as error:
        raise _error(
            f"be a network whose package works with this PyTorch, {kind} does not ({_reason(error)})",
            source.text,
            f"Install the {'torchvision' if 'torchvision' in str(error) else kind} that belongs to it.",
        ) from None
    names = models.list_models(module=models) if kind == "torchvision" else models.list_models()
    found = source.name in names if kind == "torchvision" else models.is_model(source.name)
    if not found:
        raise _error(f"name a classifier of {kind}", source.text, _near(source.name, names, f"{kind}:"))
    return models


def _torchvision(source: Source, given: dict[str, Any]) -> nn.Module:
    models = _known(source)
    if given["channels"] != 3:
        raise _error(
            f"take images of {given['channels']} channels; torchvision's networks take 3",
            source.text,
            "Use timm:NAME, which takes any number, or a function in a file.",
        )
    arguments: dict[str, Any] = dict(num_classes=given["classes"], weights=None)
    if source.name in _EXTRA_HEADS:
        arguments |= dict(aux_logits=False, init_weights=True)
    for start, parameter in _SIZED.items():
        if source.name.startswith(start):
            size = given["size"]
            arguments[parameter] = (size, size) if start == "maxvit" and isinstance(size, int) else size
    return models.get_model(source.name, **arguments | source.arguments)


def _timm(source: Source, given: dict[str, Any]) -> nn.Module:
    timm = _known(source)
    arguments: dict[str, Any] = dict(num_classes=given["classes"], in_chans=given["channels"])
    if getattr(timm.get_pretrained_cfg(source.name), "fixed_input_size", False):
        arguments["img_size"] = given["size"]
    return timm.create_model(source.name, **arguments | source.arguments)


def _function(source: Source) -> Any:
    """The function in a file, whose code is run.

    Raises:
        SourceError: if there is no such file, its code fails, or it has no such function.
    """
    path = Path(source.file).expanduser()
    if not path.is_file():
        raise _error("name a function in a file that exists", source.text, "Check the path.")
    if source.file not in _SAID:
        _SAID.add(source.file)
        print(f"note: runs the code of {source.file}", file=sys.stderr)
    place = path.resolve()
    name = "catode_arch_" + re.sub(r"\W", "_", str(place))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, place)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # so that its classes can be pickled, and dataclasses in it work
        sys.path.insert(0, str(place.parent))  # as for a script: its neighbours can be imported
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise _error(
                f"name a file whose code runs, and it fails with {_reason(error)}",
                source.text,
                "Run it by itself to see where.",
            ) from error
        finally:
            sys.path.remove(str(place.parent))
    module = sys.modules[name]
    function = getattr(module, source.name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise _error(f"name a function in {source.file}", source.text, _near(source.name, names))
    return function


def _from_file(source: Source, given: dict[str, Any]) -> nn.Module:
    function = _function(source)
    parameters = inspect.signature(function).parameters
    arguments = {name: given[what] for name, what in OFFERED.items() if name in parameters} | source.arguments
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise _error(
            f"name a function that needs no other arguments than {', '.join(OFFERED)} and those in brackets",
            source.text,
            f"Give them, as in {source.name}(width=32): {error}.",
        ) from None
    return function(**arguments)
