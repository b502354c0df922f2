"""Preparation of a run: resolve the settings, load the images, build the network; nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import nn

from catode.decisions.motion import rate_ratios
from catode.decisions.target import Target
from catode.prune.describe import steptime
from catode.prune.describe.costs import describe
from catode.prune.describe.executed import executed_by, uncounted
from catode.prune.describe.protect import described
from catode.prune.describe.trace.description import Description
from catode.prune.devices import distributed
from catode.prune.devices.timing import check_compile, keep_freed_memory
from catode.records import read_json
from catode.train import data
from catode.train.loop import board, checkpoint, contents, layout, lock, restoring
from catode.train.loop.layout import memory_format
from catode.train.loop.optimization import AMP
from catode.train.loop.result import environment
from catode.train.loop.tables import TABLES, checksum
from catode.train.models import sources, weights
from catode.train.models.answer import alike, answer_of_any
from catode.train.settings.config import Config
from catode.train.settings.pruning import least_units
from catode.train.settings.run import check_out
from catode.train.settings.training import AUTO, LAYOUTS, learning_rates, ode_time

PROGRESS = (
    "epochs_done",
    "step",
    "time",
    "seconds",
    "cpu_seconds",
    "history",
    "executed",
    "over",
)  # attributes of `Trainer`


@dataclass(frozen=True)
class Setup:
    """Everything a run needs before its first step, in each of its processes.

    Attributes:
        config: The configuration, with all derived settings.
        images: The data set.
        model: The unpruned network, on its device.
        blocks: What can go of it.
        example: Input of one image, zeros, shape (1, C, H, W).
        steps_per_epoch: Training steps in an epoch.
        schedule: Learning rate of every step, shape (steps,).
        state: Checkpoint of a resumed run, if it has one.
        notes: Messages for the user, one line each.
        lock: Lock file of a resumed run's folder, in rank 0.
        step_times: Measured step times, if they are what the prices count.
        answer: What the network answers with random weights, see `catode.train.models.answer`.
        group: The processes of the run.
    """

    config: Config
    images: data.ImageData
    model: nn.Module
    blocks: Description
    example: torch.Tensor
    steps_per_epoch: int
    schedule: np.ndarray
    state: dict | None = None
    notes: tuple[str, ...] = ()
    lock: TextIO | None = None
    step_times: list[steptime.Table] | None = None
    answer: tuple[float, ...] = ()
    group: distributed.Group = field(default_factory=distributed.Group)

    def alike(self) -> tuple:
        """What must be the same in all processes."""
        images = self.images.classes, self.images.fingerprint
        return self.config.to_json(), self.steps_per_epoch, images, self.state and self.state["step"]

    @property
    def ode_time(self) -> float:
        """Length of the run in ODE time, sum of lr/(1 - momentum); of lr for AdamW."""
        return ode_time(self.schedule, self.config.momentum)

    @property
    def warmup_steps(self) -> int:
        """Steps before any theta changes."""
        return round(self.config.warmup_epochs * self.steps_per_epoch)

    @property
    def decide_steps(self) -> int:
        """Step at which the deciding phase ends."""
        return round(self.config.decide_until * len(self.schedule))


def prepare(config: Config) -> Setup:
    """Load the data and build the network; writes nothing, but locks the folder of a resumed run.

    Raises:
        ValueError: for invalid data or settings, in one line.
    """
    state, held, group = None, None, distributed.current()
    group.place(config.device)
    parts = group.size * config.accumulate
    if config.batch_size % parts or config.batch_size < 2 * parts:
        times, each = (" times accumulate", " part") if config.accumulate > 1 else ("", "")
        raise ValueError(
            f"`batch_size` must be a multiple of the number of processes{times}, at least two images for each{each}; got "
            f"batch_size={config.batch_size} with {group.size} processes{f' and accumulate={config.accumulate}' if times else ''}. "
            f"Use {2 * parts}, {4 * parts}, ..."
        )
    for name, value, other in (("cost", "latency", "macs"), ("layout", AUTO, " or ".join(LAYOUTS))):
        if getattr(config, name) == value and group.size > 1:  # each process would measure times of its own
            raise ValueError(
                f"`{name}` must be {other} for several processes; got {name}={value!r} with {group.size}. Use one process."
            )
    if config.resume is None:
        check_out(config)
    else:
        _check_unfinished(config)  # or the lock would stay behind
        held = lock.hold(Path(config.resume), "resume") if group.leads else None
        state = _load_state(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    if config.compile:
        check_compile(config.device)
    if config.tensorboard:
        board.check_package()
    sources.check(config.arch)
    initial = weights.read(config.init) if config.init is not None and state is None else None
    images = data.load(
        config.dataset,
        config.data_dir,
        validation_share=config.validation_share,
        split_seed=config.split_seed,
        image_size=config.image_size,
        augment=config.augment,
        array_bytes=None if config.array_gib is None else int(min(config.array_gib * 2**30, sys.maxsize)),
        download=config.download,
    )
    steps = len(images.train_labels) // config.batch_size
    if steps < 1:
        raise data.DataError(
            f"`batch_size` must be at most the number of training images; got batch_size={config.batch_size} with "
            f"{len(images.train_labels)} images. Choose a smaller one."
        )
    torch.manual_seed(config.seed)
    model = build_model(config, images)
    example = torch.zeros(1, *images.train_images.shape[1:], device=config.device)
    if sources.is_foreign(config.arch):
        sources.check_output(config.arch, model, example, len(images.classes))
    blocks = described(model, example, config.keep or (), least_units(config.least))
    told = tuple(answer_of_any(model, images.train_images.shape[1:]))
    notes = list(images.notes)
    if sources.is_foreign(config.arch) and (left_out := uncounted(model, executed_by(model, example))):
        notes.append(left_out)
    if config.device == "cpu" and torch.cuda.is_available():
        notes.append("the run uses the CPU, though PyTorch finds a CUDA device. For that, give --device cuda.")
    if config.layout == AUTO:
        config, fastest = _fastest(config, images, blocks)
        notes.append(fastest)
        model = model.to(memory_format=memory_format(config))
    _share_norms(config, model, group)
    notes += weights.fill(model, initial, config.init) if initial is not None else ()
    if config.nu > 0 and round(config.decide_until * steps * config.epochs) <= round(config.warmup_epochs * steps):
        raise data.DataError(
            f"`warmup_epochs` must end before the deciding phase does; got warmup_epochs={config.warmup_epochs:g} with "
            f"{steps * config.epochs} steps in all. Shorten the warm-up or train longer."
        )
    schedule = learning_rates(config.schedule, config.lr, steps * config.epochs)
    if state is not None:
        _check_data(state, images, steps, group, config)
        if not alike(told, state["answer"]):
            raise ValueError(
                "`resume` must find the network that the run began with; got one that returns something else for the same images: "
                f"the code of {config.arch}, or a package, has changed. Restore it, or start anew."
            )
        notes += _of_environment(config)
    config = config.resolved(steps * config.epochs, group.size)
    step_times = _step_times(config, model, blocks, example, state)
    setup = Setup(
        config, images, model, blocks, example, steps, schedule, state, tuple(notes), held, step_times, told, group
    )
    if config.nu > 0:  # raise the pruner's errors before anything is written
        complexity = describe(model, blocks, example)
        Target.choose(complexity, config.target_macs, config.target_params)
        if step_times is not None:
            complexity = steptime.MeasuredComplexity(complexity, step_times)
        rate_ratios(complexity, nu=config.nu, alpha=config.alpha, beta=config.beta, theta_speed=config.rate_ratio)
    return setup if state is None else _with_what_fits(setup)


def _check_data(state: dict, images: data.ImageData, steps: int, group: distributed.Group, config: Config) -> None:
    """Check that a checkpoint is of a run on these images with as many processes.

    Raises:
        ValueError: if not.
    """
    if state["classes"] != list(images.classes) and len(state["classes"]) == len(images.classes):
        then, now = next((a, b) for a, b in zip(state["classes"], images.classes, strict=True) if a != b)
        raise ValueError(
            f"`data_dir` must hold the images that the run started with; got the class {now!r} instead of {then!r}. Restore "
            "them, or start a new run."
        )
    if (state["steps_per_epoch"], state["classes"]) != (steps, list(images.classes)):
        raise ValueError(
            f"`data_dir` must hold the images that the run started with; got {steps} steps an epoch and {len(images.classes)} "
            f"classes instead of {state['steps_per_epoch']} and {len(state['classes'])}. Restore them, or start a new run."
        )
    if state["images"] != images.fingerprint:
        raise ValueError(
            "`data_dir` must hold the images that the run began with; got others. Restore them, or start anew."
        )
    if state["processes"] != group.size and not config.sync_bn:
        raise ValueError(
            f"`resume` must use as many processes as the run started with, {state['processes']}; got {group.size}. Without "
            "sync_bn the batch norms' statistics, and so the results, depend on that number."
        )


def _of_environment(config: Config) -> list[str]:
    """Notes for a run that goes on with other versions, on another device, or on a CPU with another number of threads."""
    try:
        before = read_json(Path(config.resume) / "env.json")
    except (ValueError, OSError):  # damaged; it is written anew
        return []
    now, notes = environment(config), []
    for name in ("catode", "python", "torch", "numpy", "device", "accelerator", "processor"):
        if isinstance(before.get(name), str) and before[name] != now.get(name):
            notes.append(
                f"the run had {name} {before[name]} and goes on with {now.get(name)}: its results will not be those of an "
                "uninterrupted run bit by bit."
            )
    threads = before.get("threads")
    if config.device == "cpu" and type(threads) is int and threads != now["threads"]:
        notes.append(
            f"the run had {threads} CPU threads and goes on with {now['threads']}: sums are rounded in another order, so its "
            f"results will not be those of an uninterrupted run bit by bit. For that, give --threads {threads}."
        )
    return notes


def _with_what_fits(setup: Setup) -> Setup:
    """A resumed run's setup with the newest checkpoint that its network and pruner can take up.

    Raises:
        ValueError: if none can be.
    """
    config, images, group = setup.config, setup.images, setup.group

    def fits(state: dict) -> None:
        restoring.check(setup, _network(config, images, group), state)

    def check(state: dict) -> None:
        _check_state(config, Path(config.resume), state)
        _check_data(state, images, setup.steps_per_epoch, group, config)
        fits(state)

    try:
        fits(setup.state)
    except ValueError:
        return replace(setup, state=_newest(Path(config.resume), check))
    return setup


def _network(config: Config, images: data.ImageData, group: distributed.Group) -> nn.Module:
    """A newly initialised network as the run trains it."""
    model = build_model(config, images)
    _share_norms(config, model, group)
    return model


def _share_norms(config: Config, model: nn.Module, group: distributed.Group) -> None:
    """Make a network's norms those over all processes, if there are several that share them."""
    if config.sync_bn and group.size > 1:
        distributed.synchronise_norms(model)


def _step_times(
    config: Config, model: nn.Module, blocks: Description, example: torch.Tensor, state: dict | None
) -> list[steptime.Table] | None:
    """Measured step times for cost = latency: read from a resumed run's folder, or measured now; else None."""
    if config.cost != "latency" or config.nu == 0:
        return None
    complexity = describe(model, blocks, example)
    if state is not None:
        return steptime.read(Path(config.resume) / steptime.FILE, model, complexity)
    settings = dict(amp=AMP[config.amp], channels_last=config.channels_last)
    part = config.batch_size // config.accumulate
    return steptime.measure(model, complexity, example, batch=part, **settings)


def _fastest(config: Config, images: data.ImageData, blocks: Description) -> tuple[Config, str]:
    """The configuration with the layout and widths with which steps take the least time here, and what was measured, as text."""
    shape, classes = tuple(images.train_images.shape[1:]), len(images.classes)
    times = layout.trial(config, lambda own: build_model(own, images), blocks, shape, classes)
    best, *others = sorted(times, key=times.__getitem__)
    both = len({multiple for _, multiple in times}) > 1

    def name(case: tuple[str, int]) -> str:
        widths = "any widths" if case[1] == 1 else f"widths in multiples of {case[1]}"
        return f"{case[0]} with {widths}" if both else case[0]

    what = "a step of the network and one of half of it" if config.nu > 0 else "a step"
    rest = ", ".join(f"{name(other)} {times[other]:.4g} ms" for other in others)
    told = f"layout {name(best)}: {what} took {times[best]:.4g} ms, {rest}."
    return replace(config, layout=best[0], width_multiple=best[1]), told


def build_model(config: Config, images: data.ImageData) -> nn.Module:
    """A newly initialised, unpruned network for the images, on its device."""
    shape = images.train_images.shape
    model = sources.build(
        config.arch,
        channels=shape[1],
        classes=len(images.classes),
        size=tuple(shape[2:]),
        own=dict(hidden_scale=config.hidden_scale, shortcut=config.shortcut, stem=config.stem),
    )
    return model.to(config.device, memory_format=memory_format(config))


def _check_unfinished(config: Config) -> None:
    folder = Path(config.resume)
    if (folder / "result.json").exists() and not checkpoint.states(folder):
        raise ValueError(
            f"`resume` must be the folder of an interrupted run; got {config.resume!r}, which is finished."
        )


def _load_state(config: Config) -> dict | None:
    """Checkpoint of the run to resume; None if it has none yet.

    Raises:
        ValueError: if the run is finished, or its files do not match.
    """
    _check_unfinished(config)
    folder = Path(config.resume)
    state = _newest(folder, lambda state: _check_state(config, folder, state))
    metrics = folder / "metrics.csv"
    # the first epoch's row may have been written before its checkpoint
    if state is None and metrics.exists() and metrics.read_bytes().count(b"\n") > 2:
        raise ValueError(
            f"`resume` must be the folder of a run with a checkpoint; got {config.resume!r}, which has epochs in metrics.csv "
            "but neither a checkpoint nor, if it was finished, result.json. Restore them, or start a new run in another folder."
        )
    return state


def _newest(folder: Path, check: Callable[[dict], None]) -> dict | None:
    """The newest checkpoint that passes a check; a warning for each that does not.

    Raises:
        ValueError: if there are checkpoints, but none passes.
    """
    state, skipped = checkpoint.load_state(folder, check)
    for name, reason in skipped.items() if distributed.current().leads else ():
        print(f"warning: {name} is skipped: {reason}", file=sys.stderr)
    return state


def _check_state(config: Config, folder: Path, state: dict) -> None:
    """Check that a checkpoint is complete and of this run, and that the run's tables are as long as they were then.

    Raises:
        ValueError: if not.
    """
    contents.check(state, gated=config.nu > 0, averaged=config.ema > 0, validated=config.validation_share > 0)
    own = config.identity()
    then = {name: getattr(Config, name, None) for name in own} | state[
        "config"
    ]  # what it does not know had its default
    other = sorted(name for name in own | then if own.get(name) != then.get(name))
    if other:
        raise ValueError(f"it is of a run with another {', '.join(other)}")
    for name, length, expected in zip(TABLES, state["lengths"], state["checksums"], strict=True):
        if not (folder / name).is_file() or (folder / name).stat().st_size < length:
            raise ValueError(f"{name} is shorter than it was then")
        if checksum(folder / name, length) != expected:
            raise ValueError(f"{name} is damaged, its first {length} bytes are not what they were then")
    with (folder / TABLES[0]).open("rb") as file:
        rows = file.read(state["lengths"][0]).count(b"\n") - 1
    if rows != state["epochs_done"] or not state["lengths"][1]:
        raise ValueError(f"the tables it goes on with have {max(rows, 0)} epochs instead of {state['epochs_done']}")
