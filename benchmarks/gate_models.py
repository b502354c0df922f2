"""What gates and measuring cost on models that nobody here wrote, in a loop of one's own: every gate undecided.

    python -m benchmarks.gate_models [--only NAME] [--cycles N] [--threads N] [--clock wall|cpu] [--write]

Once with the default of a run of 450,000 steps, that is a probe every 8, and once with that of a run of a few thousand, every 2.
Random images; the plain network and the gated one take turns step by step. A cycle is as many steps as the pruner's measuring
takes to come round; its ratio is the time of its gated steps by that of its plain ones, and the interval is Student's over the
cycles. The goal is for steps without measuring, as in `benchmarks.gate_cost`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import add_quick, guarded, hardware, load, markdown, mean_interval, publish, quartiles
from benchmarks.gate_cost import CLOCKS, GATED, kind_of_next
from benchmarks.prunability.models import declare_operators
from catode._validate import check_int
from catode.prune.devices.timing import keep_freed_memory
from catode.prune.pruner import Pruner
from catode.train.models import sources
from catode.train.settings.commandline import CommandLine

CLASSES, FAR = 100, 10**9
LIMIT = 1.05
EVERY = (8, 2)
"""Steps between probes: the defaults of long and of short runs."""
HEADER = [
    "model",
    "steps a probe",
    "pixels",
    "batch",
    "optimizer",
    "cycles",
    "ms a plain step",
    "gated step/plain, mean [95 %]",
    "with all measuring, mean [95 %]",
    f"goal {LIMIT}",
]


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Args:
        arch: As ``--arch`` takes it.
        size: Height and width of the images.
        batch: Images in a step.
        optimizer: Makes it from the parameters.
    """

    arch: str
    size: int
    batch: int
    optimizer: Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


CASES = (
    Case("torchvision:resnet50", 64, 64, sgd),
    Case("torchvision:mobilenet_v2", 64, 128, sgd),
    Case("timm:vit_small_patch16_224", 64, 128, adamw),
)


def ratios(
    case: Case, every: int, cycles: int, clock: Callable[[], float]
) -> tuple[list[float], list[float], list[float]]:
    """Gated time by plain time of each cycle, of steps without measuring and of all; and seconds of the plain steps.

    Args:
        case: The model.
        every: Steps between probes.
        cycles: How many.
        clock: Returns the time in seconds.
    """
    torch.manual_seed(0)
    plain = sources.build(case.arch, channels=3, classes=CLASSES, size=(case.size, case.size))
    plain = plain.to(memory_format=torch.channels_last).train()
    gated = copy.deepcopy(plain)
    images = torch.randn(case.batch, 3, case.size, case.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (case.batch,))
    optimizers = {model: case.optimizer(model.parameters()) for model in (plain, gated)}
    pruner = Pruner(
        gated,
        images[:2],
        optimizer=optimizers[gated],
        nu=1.0,
        rate_ratio=1.0,
        steps=FAR,
        check_every=FAR,
        measure_every=every,
        epoch_steps=math.inf,
        self_check=False,
    )
    schedule = pruner.schedule
    cycle = math.lcm(schedule.burst_every, 2 * schedule.measure_every)

    def step(model: nn.Module) -> float:
        mark = clock()
        loss = F.cross_entropy(model(images), labels)
        optimizers[model].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[model].step()
        if model is gated:
            pruner.step()
        return clock() - mark

    bare, found, seconds = [], [], []
    for model in (plain, gated, plain, gated):
        step(model)
    for _ in range(cycles):
        kinds, pairs = [], np.empty((cycle, 2))
        for pair in pairs:
            kinds.append(kind_of_next(pruner))
            pair[:] = step(plain), step(gated)
        alone = pairs[[kind == GATED for kind in kinds]]
        bare.append(float(alone[:, 1].sum() / alone[:, 0].sum()))
        found.append(float(pairs[:, 1].sum() / pairs[:, 0].sum()))
        seconds += pairs[:, 0].tolist()
    return bare, found, seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandLine(prog="python -m benchmarks.gate_models", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="models with this in their name")
    parser.add_argument("--cycles", type=int, default=5, help="cycles of the pruner's measuring")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or CPU time on a shared machine")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gate_models.md")
    add_quick(parser)
    args = parser.parse_args(argv)
    check_int("cycles", args.cycles, low=2)
    declare_operators()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    before, rows = load(), []
    cases = [case for case in CASES if args.only in case.arch]
    if not cases:
        raise ValueError(f"`only` must be part of a model's name; got {args.only!r}. Use resnet50, mobilenet or vit.")
    if args.quick:
        cases = [Case("torchvision:mobilenet_v2", 32, 4, sgd)]
    for case, every in [(case, every) for every in EVERY for case in cases]:
        bare, found, seconds = ratios(case, every, 2 if args.quick else args.cycles, CLOCKS[args.clock])
        (mean, low, high), whole = mean_interval(bare), mean_interval(found)
        base = quartiles(np.multiply(seconds, 1e3), "{:.0f}")
        verdict = "met" if high <= LIMIT else "not met" if low > LIMIT else "not told apart"
        rows.append(
            [
                case.arch,
                every,
                case.size,
                case.batch,
                case.optimizer.__name__,
                len(found),
                base,
                f"{mean:.3f} [{low:.3f}, {high:.3f}]",
                "{:.3f} [{:.3f}, {:.3f}]".format(*whole),
                verdict,
            ]
        )
        print(rows[-1], flush=True)
    text = [
        markdown(HEADER, rows),
        "",
        f"{hardware()}; {before} at the start, {load()} at the end; {args.clock} time, fp32.",
    ]
    publish("gate_models", "\n".join(text), args.write)


if __name__ == "__main__":
    guarded(main)
