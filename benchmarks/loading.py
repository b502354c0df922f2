"""Whether loading keeps up with training: decoding with 0, 1, 2 ... workers against the step of a network.

    python -m benchmarks.loading --data-dir DIR [--image-size 64] [--workers 0 1 2] [--quick] [--write]

DIR holds images in class folders, such as Tiny-ImageNet. Every row takes the first batches of an epoch twice: with nothing
else to do, and with a training step after each batch, as the trainer does. The wait is the time from the end of a step to
the next batch. The first batch of a pass, for which workers have to start, is timed separately. The first row is the
upper limit: as many images, already in memory.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import copies
from benchmarks.common import add_quick, guarded, hardware, load, markdown, publish, quartiles
from catode.prune.devices.timing import keep_freed_memory
from catode.train import data, models
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import settings

HEADER = ["images", "first batch, ms", "images/s, no steps", "ms a step", "ms of it waiting", "wait share"]


def stepper(arch: str, classes: int, device: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A training step of a fresh network, complete when it returns."""
    torch.manual_seed(0)
    model = models.build(arch, in_channels=3, classes=classes).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def measure(
    batches: data.Batches, number: int, step: Callable[[torch.Tensor, torch.Tensor], None] | None
) -> tuple[float, list[float], list[float]]:
    """Seconds until the first batch, then of each wait and each step of the batches after it; a first step is not timed."""
    waits, steps = [], []
    mark = time.perf_counter()
    for x, y in itertools.islice(batches.epoch(0, 0), number + 1):
        waits.append(time.perf_counter() - mark)
        mark = time.perf_counter()
        if step is not None:
            step(x, y)
        steps.append(time.perf_counter() - mark)
        mark = time.perf_counter()
    return waits[0], waits[1:], steps[1:]


def row(name: str, batches: data.Batches, number: int, step: Callable[[torch.Tensor, torch.Tensor], None]) -> list[str]:
    """One line of the table."""
    first, alone, _ = measure(batches, number, None)
    _, waits, steps = measure(batches, number, step)
    both = np.add(waits, steps)
    return [
        name,
        f"{1e3 * first:.0f}",
        f"{batches.batch_size * len(alone) / sum(alone):,.0f}",
        quartiles(1e3 * both, "{:.0f}"),
        quartiles(np.multiply(waits, 1e3), "{:.1f}"),
        f"{sum(waits) / both.sum():.1%}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="folder with train/<class>/... and val/ or test/")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels (default: 64)")
    parser.add_argument(
        "--arch", choices=settings()["arch"].choices, default="resnet20", help="network that is trained"
    )
    parser.add_argument("--augment", choices=tuple(data.AUGMENTATIONS), default="crop-flip", help="default: crop-flip")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers to try (default: 0 1 2)")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step (default: 128)")
    parser.add_argument("--batches", type=int, default=30, help="batches in each pass (default: 30)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of the step")
    add_quick(parser)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/loading.md")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.arch, args.batch_size, args.batches, args.workers = "resnet14", 4, 2, args.workers[:2]
    keep_freed_memory()
    before, rows = load(), []
    files = data.load("folder", args.data_dir, image_size=args.image_size, augment=args.augment, array_bytes=0)
    if (args.batches + 1) * args.batch_size > len(files.train_labels):
        raise ValueError(
            f"`batches` must leave an epoch of {len(files.train_labels)} images; got batches={args.batches}. "
            "Take fewer, or smaller ones."
        )
    step = stepper(args.arch, len(files.classes), args.device)
    common = dict(mean=files.mean, std=files.std, augment=args.augment, device=args.device, channels_last=True)
    sources = [(f"files, {workers} workers", files.train_images, workers) for workers in args.workers]
    array = files.train_images.array(np.arange((args.batches + 1) * args.batch_size))
    sources.insert(0, ("array in memory", array, 0))
    for source, images, workers in sources:
        batches = data.Batches(images, files.train_labels[: len(images)], args.batch_size, workers=workers, **common)
        rows.append(row(source, batches, args.batches, step))
        print(markdown(HEADER, rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    name = copies.name("folder", args.data_dir, copies.fingerprint(files))
    noted = [note + "\n" for note in copies.notes([name])]
    title = (
        f"{name}, {args.arch}, {len(files.classes)} classes, {args.image_size} x {args.image_size}, batch {args.batch_size}, "
        f"{args.augment}, {args.batches} batches a row; {hardware(args.device)}; {before} at the start, {load()} at the end. "
        "Medians (quartiles)."
    )
    publish("loading", "\n".join([title, "", *noted, markdown(HEADER, rows)]), args.write)


if __name__ == "__main__":
    guarded(main)
