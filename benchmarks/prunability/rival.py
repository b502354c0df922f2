"""Torch-Pruning on the same models and inputs: which of them still run when half of every width is asked to go.

    python -m benchmarks.prunability.rival [--only PATTERN] [--limit SECONDS]

Its magnitude pruner is asked for half of the channels of every layer but the classifier, set up as in its own script for
torchvision's models (`benchmarks/prunability/torchvision_pruning.py` of its repository): layers that attention modules read without
calling them are left out, widths of vision transformers are rounded to their heads, and `hidden_dim` is rewritten for them. A model
counts as taken if it runs afterwards with fewer parameters. Nothing is asked of what it computes then, as removing by magnitude
claims no exactness. Each model has a process of its own, which is stopped at the limit. Results are kept, one file for each model,
and `python -m benchmarks.prunability --recorded --write` puts them into its table.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import HOME, add_quick, guarded
from benchmarks.prunability.models import LISTS, models
from catode._validate import check_positive
from catode.train.settings.commandline import CommandLine

RECORDS = HOME / "records" / "prunability" / "rival"
CLASSES, SHARE = 1000, 0.5


def taken(name: str) -> dict[str, Any]:
    """What Torch-Pruning makes of a model.

    Args:
        name: Name of a model of torchvision's list.
    """
    import torch_pruning

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, example = next(model for model in models(LISTS[0]) if model.name == name).build()
    network.eval()
    before = sum(parameter.numel() for parameter in network.parameters())
    transformer = type(network).__name__ == "VisionTransformer"
    ignored = [
        module
        for module in network.modules()
        if (isinstance(module, nn.Linear) and module.out_features == CLASSES)
        or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]
    began = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
        network,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=SHARE,
        ignored_layers=ignored,
        round_to=network.encoder.layers[0].num_heads if transformer else None,
    )
    pruner.step()
    if transformer:
        network.hidden_dim = network.conv_proj.out_channels
    with torch.no_grad():
        network(example)
    left = sum(parameter.numel() for parameter in network.parameters())
    return {"seconds": time.perf_counter() - began, "parameters": before, "left": left}


def _answer(name: str, to: Connection) -> None:
    """Send what a model comes to, or the first line of the error."""
    warnings.simplefilter("ignore")
    try:
        to.send(taken(name))
    except Exception as error:  # part of the result
        lines = str(error).strip().splitlines()
        to.send({"error": f"{type(error).__name__}: {lines[0][:150] if lines else ''}"})


def measured(name: str, limit: float) -> dict[str, Any]:
    """The result of a model, in a process of its own.

    Args:
        name: Name of a model of torchvision's list.
        limit: Seconds after which it is stopped.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(limit) else {"error": f"not done in {limit:g} s"}
    except EOFError:
        found = {"error": "its process ended without an answer"}
    process.kill()
    process.join()
    return {"model": name, **found}


def takes(record: dict[str, Any]) -> bool:
    """Whether a model ran afterwards with fewer parameters."""
    return "error" not in record and record["left"] < record["parameters"]


def records(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Results by model."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: for a pattern that no model has, or without Torch-Pruning.
    """
    parser = CommandLine(prog="python -m benchmarks.prunability.rival", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of models, a glob pattern")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="time of a model")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER", help="where results are kept")
    add_quick(parser)
    args = parser.parse_args(argv)
    check_positive("limit", args.limit)
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        raise ValueError("torch_pruning must be installed. Use pip install --no-deps torch-pruning.") from None
    chosen = [model.name for model in models(LISTS[0]) if fnmatchcase(model.name, args.only)]
    if not chosen:
        raise ValueError(f"`only` must be a pattern of names of torchvision's models; got {args.only!r}.")
    for name in chosen[:1] if args.quick else chosen:
        path = args.records / f"{name}.json"
        if path.exists() and not (args.again or args.quick):
            continue
        found = measured(name, args.limit)
        if not args.quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
        print(name, "taken" if takes(found) else found.get("error", "no fewer parameters"), file=sys.stderr, flush=True)
    print(f"{sum(map(takes, records(args.records).values()))} of {len(records(args.records))} taken.")


if __name__ == "__main__":
    guarded(main)
