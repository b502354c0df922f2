"""Time and memory of describing ResNet-50, ViT-B/16 and ConvNeXt-T at 224 pixels, without any check.

    python -m benchmarks.prunability.cost [--repeats N] [--write]

Every repeat has a process of its own with one thread. Memory is the peak of the process above what it held before, in units of the
model's parameters and buffers.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from benchmarks.common import add_quick, guarded, hardware, markdown, publish
from benchmarks.prunability.models import declare_operators
from catode._validate import check_int
from catode.prune.describe.trial import bytes_of
from catode.train.settings.commandline import CommandLine

MODELS = ("resnet50", "vit_b_16", "convnext_tiny")
HEADER = ["model", "parameters, M", "CPU time, s", "wall time, s", "memory / model"]


def _measure(name: str, to: Connection) -> None:
    """Send CPU and wall seconds, memory over the model's, and millions of parameters."""
    declare_operators()
    import torchvision

    from catode.prune.describe.trace import describe

    torch.set_num_threads(1)
    model, image = torchvision.models.get_model(name), torch.zeros(1, 3, 224, 224)
    describe(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)), torch.zeros(2, 4))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    describe(model, image)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    to.send((sum(p.numel() for p in model.parameters()) / 1e6, cpu, wall, more / bytes_of(model)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandLine(prog="python -m benchmarks.prunability.cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes for each model")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/describing.md")
    add_quick(parser)
    args = parser.parse_args(argv)
    check_int("repeats", args.repeats, low=1)
    context, rows = multiprocessing.get_context("spawn"), []
    for name in MODELS[:1] if args.quick else MODELS:
        found = []
        for _ in range(1 if args.quick else args.repeats):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(name, sender), daemon=True)
            process.start()
            sender.close()
            found.append(receiver.recv())
            process.join()
        size, *spans = np.array(found).T
        rows.append([name, f"{size[0]:.1f}", *(f"{x.min():.1f} to {x.max():.1f}" for x in spans)])
    text = [markdown(HEADER, rows), "", f"Least and most of {len(found)} processes.", "", hardware()]
    publish("describing", "\n".join(text), args.write)


if __name__ == "__main__":
    guarded(main)
