"""Export the compact network of a run: ``python -m catode.export FOLDER --format torch-export|onnx``.

The exported program computes what the network of `catode.train.load` computes: logits from *normalised* images,
``(pixel / 255 - mean) / std`` channel by channel. Normalisation is not part of the program; `mean`, `std`, `classes` and
`image_shape` are in its metadata.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from catode._output import out_of_memory, run
from catode._validate import check_int, expanded, fail
from catode.train.settings.commandline import CommandLine
from catode.train.settings.run import check_device

if TYPE_CHECKING:  # PyTorch is imported where it is used, so that --help is fast
    import torch
    from torch import nn

    from catode.prune.describe.costs import Counts

__all__ = ["TOLERANCE", "Mismatch", "main", "measure", "write"]

SUFFIX = {"torch-export": ".pt2", "onnx": ".onnx"}
NEEDS = {"torch-export": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE = 1e-4  # largest difference between program and network, relative to the largest logit where that is above 1
OPSET = 18
METADATA = ("arch", "classes", "mean", "std", "image_shape")  # keys of structure.json
EXTRA_FILE = "catode.json"  # file of the metadata in a torch.export program


class Mismatch(RuntimeError):
    """The outputs of the exported program differ from the network's; the file was deleted."""


def write(
    model: nn.Module,
    example: torch.Tensor,
    path: Path,
    *,
    format: str,
    batch: int | None = None,
    opset: int = OPSET,
    metadata: dict | None = None,
) -> float:
    """Export a network and compare the program with it on random images.

    Args:
        model: A plain network on the CPU.
        example: Input batch, shape (n, C, H, W); only C, H and W are used.
        path: The file to write; not left behind if the comparison fails.
        format: `torch-export` or `onnx`.
        batch: Batch size of the program; None for any.
        opset: ONNX operator set.
        metadata: Values to store in the file, as JSON.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        Mismatch: if it is above `TOLERANCE`, or PyTorch cannot write a program of the network.
        ValueError: if a package for the format is missing.
    """
    import torch

    _check_packages(format)
    model.eval()
    metadata = metadata or {}
    part = path.with_name(path.stem + ".part" + path.suffix)
    try:
        with torch.no_grad(), _quiet():
            images = torch.zeros(batch or 2, *example.shape[1:])
            shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
            with _exporting(format):
                program = torch.export.export(model, (images,), dynamic_shapes=shapes)
            if format == "onnx":
                with _exporting(format):
                    _save_onnx(program, images, part, opset, metadata)
                run = _onnx_runner(part)
            else:
                with part.open("wb") as file, _exporting(format):  # given a path, torch.export hides the OSError
                    torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(metadata)})
                run = torch.export.load(part).module()
            difference, scale = _compare(model, run, images, (batch,) if batch else (1, 2, 7))
        if not difference <= TOLERANCE * max(1.0, scale):
            raise Mismatch(
                f"the exported program must equal the network within {TOLERANCE:g}; got a difference of "
                f"{difference:.3g} in outputs up to {scale:.3g}. The file was deleted; try another --format or --opset."
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return difference


def _compare(model: nn.Module, run: Callable, images: torch.Tensor, sizes: Sequence[int]) -> tuple[float, float]:
    """Largest absolute difference and largest absolute logit on random images, over the batch sizes `sizes`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    differences, outputs = [], []
    for size in sizes:
        x = torch.randn(size, *images.shape[1:], generator=generator)
        expected = model(x)
        differences.append((run(x) - expected).abs().max())
        outputs.append(expected.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(outputs).max())


def _save_onnx(program, images: torch.Tensor, path: Path, opset: int, metadata: dict) -> None:
    import torch

    names = dict(input_names=["images"], output_names=["logits"])
    written = torch.onnx.export(program, (images,), dynamo=True, verbose=False, opset_version=opset, **names)
    if written.model.opset_imports[""] != opset:  # the converter fails silently
        fail("opset", "be one that PyTorch can convert to", opset, hint=f"Leave it out for {OPSET}.")
    written.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    written.save(path)


def _onnx_runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@contextmanager
def _exporting(format: str):
    """What PyTorch's exporters raise of a network that they cannot write, as a `Mismatch`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or out_of_memory(error) or str(error).startswith("`"):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(
            "."
        )
        raise Mismatch(
            f"`format` must be one in which PyTorch can write this network; got {format}: {reason}. Try another --format, or "
            "a fixed --batch."
        ) from error


@contextmanager
def _quiet():
    """Silence the exporters' warnings about optional packages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _check_packages(format: str) -> None:
    missing = [name for name in NEEDS[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`format` must be one that can be written here; got format={format!r} without the package {missing[0]}. "
            "Install it: pip install 'catode[export]'."
        )


def measure(folder: Path, device: str = "cpu", seconds: float = 0.5) -> tuple[list[Counts], list[list[float]]]:
    """Counts and latencies of a run's dense and compact network on a device.

    Args:
        folder: The run's folder.
        device: Where to measure.
        seconds: Measuring time for each batch size; see `latency_ms`.

    Returns:
        MACs and parameters of [dense, compact]; milliseconds of [dense, compact] at batch size 1, and at 128.
    """
    import torch

    from catode.prune.describe.costs import count
    from catode.prune.devices.timing import latency_ms
    from catode.train.loop import checkpoint

    structure = checkpoint.read_structure(folder)
    networks = [checkpoint.fresh(structure).to(device), checkpoint.load(folder).to(device)]
    example = torch.zeros(1, *structure["image_shape"], device=device)
    return [count(model, example) for model in networks], latency_ms(networks, example, seconds=seconds)


def latency_table(folder: Path, device: str = "cpu") -> str:
    """MACs and measured latencies of a run's dense and compact network on a device, as text."""
    counts, (small, large) = measure(folder, device)
    lines = [f"{device:<12} {'MACs':>14} {'parameters':>12} {'ms, batch 1':>12} {'ms, batch 128':>14}"]
    for name, counted, one, many in zip(("dense", "compact"), counts, small, large, strict=True):
        lines.append(f"{name:<12} {counted.macs:>14,} {counted.params:>12,} {one:>12.3f} {many:>14.3f}")
    shares = [counts[1].macs / counts[0].macs, counts[1].params / counts[0].params]
    shares += [small[1] / small[0], large[1] / large[0]]
    widths = (14, 12, 12, 14)
    lines.append(" ".join([f"{'share':<12}", *(f"{v:>{w}.3f}" for v, w in zip(shares, widths, strict=True))]))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m catode.export``."""
    parser = CommandLine(
        prog="python -m catode.export",
        description="Export the compact network of a run and compare the program with it, or measure its latency on this machine. "
        "The program takes normalised float images, (pixel / 255 - mean) / std, and returns logits; mean, std, classes and "
        "image_shape are in its metadata.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", help="folder of a run, finished or interrupted")
    parser.add_argument("--format", metavar="{torch-export,onnx}", help="file format; onnx needs catode[export]")
    parser.add_argument(
        "--out", metavar="FILE", help="output file, overwritten if it exists [default: FOLDER/model.pt2, .onnx]"
    )
    parser.add_argument("--batch", default="dynamic", help="dynamic, or a fixed batch size [default: dynamic]")
    parser.add_argument("--opset", help=f"ONNX operator set, {OPSET} or newer [default: {OPSET}]")
    parser.add_argument(
        "--latency",
        action="store_true",
        help="measure dense and compact network alternately, batch 1 and 128, on --device",
    )
    parser.add_argument("--device", default="cpu", help="where to measure: cpu, cuda, cuda:N or mps [default: cpu]")
    return parser


def _checked(given: argparse.Namespace) -> tuple[Path, int | None, int]:
    """File, batch size and opset from the arguments.

    Raises:
        ValueError: if one is invalid, or two cannot be combined.
    """
    if given.folder is None:
        fail("folder", "be given", None, hint="Name the folder of a run, its --out.")
    if given.format is None and not given.latency:
        fail(
            "format",
            "be given unless --latency is",
            None,
            hint="Add --format torch-export, --format onnx or --latency.",
        )
    if given.format is not None and given.format not in SUFFIX:
        fail("format", "be torch-export or onnx", given.format, hint="Use one of the two.")
    for name in ("out", "opset"):
        if getattr(given, name) is not None and given.format is None:
            fail(name, "be left out without --format", getattr(given, name), hint="Add --format, or leave it out.")
    if given.opset is not None and given.format != "onnx":
        fail("opset", "be left out unless format='onnx'", given.opset, hint="Leave it out.")
    check_device(given.device)
    if given.format is None:
        return Path(), None, OPSET
    path = Path(given.out or Path(given.folder) / f"model{SUFFIX[given.format]}")
    if path.suffix != SUFFIX[given.format]:
        fail("out", f"end in {SUFFIX[given.format]}", given.out, hint="Other tools rely on the suffix; rename it.")
    if not path.parent.is_dir() or path.is_dir():
        fail("out", "be a file in an existing folder", str(path), hint="Create the folder first.")
    batch = None if given.batch == "dynamic" else _integer("batch", given.batch, 1, "Use dynamic, or a size such as 1.")
    opset = OPSET if given.opset is None else _integer("opset", given.opset, OPSET, f"Leave it out for {OPSET}.")
    _check_packages(given.format)
    return path, batch, opset


def _integer(name: str, text: str, low: int, hint: str) -> int:
    return check_int(name, int(text) if text.lstrip("-").isdecimal() else text, low=low, hint=hint)


def _run(given: argparse.Namespace, path: Path, batch: int | None, opset: int) -> None:
    """Export and measure as the checked arguments say, and print the results."""
    import torch

    from catode.train.loop import checkpoint

    folder = Path(given.folder)
    model, structure = checkpoint.load(folder), checkpoint.read_structure(folder)
    if given.format is not None:
        example = torch.zeros(1, *structure["image_shape"])
        metadata = {name: structure[name] for name in METADATA}
        settings = dict(format=given.format, batch=batch, opset=opset, metadata=metadata)
        difference = write(model, example, path, **settings)
        print(f"{path}: {given.format}, batch {given.batch}, largest difference {difference:.2g}")
    if given.latency:
        print(latency_table(folder, given.device))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, 1 if the exported program differs from the network)."""
    try:
        given = build_parser().parse_args(argv)
        for name in ("folder", "out"):
            if getattr(given, name) is not None:
                setattr(given, name, expanded(name, getattr(given, name)))
        _run(given, *_checked(given))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"error: `batch` must be a size whose images fit into the memory; got batch={given.batch} of images in "
            f"{given.folder!r}. Use a smaller one.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
