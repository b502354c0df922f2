"""What a run needs before its first step: settings resolved, images loaded, the network built; nothing is written."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import nn

from catode.decisions.motion import rate_ratios
from catode.decisions.target import Target
from catode.prune.describe import steptime
from catode.prune.describe.costs import describe
from catode.prune.devices import distributed
from catode.prune.devices.timing import check_compile, keep_freed_memory
from catode.train import data
from catode.train.loop import board, checkpoint, contents, lock
from catode.train.loop.optimization import AMP
from catode.train.loop.tables import TABLES, checksum
from catode.train.models import resnets, weights
from catode.train.settings.config import Config
from catode.train.settings.run import check_out
from catode.train.settings.training import learning_rates, ode_time

PROGRESS = ("epochs_done", "step", "time", "seconds", "cpu_seconds", "history")  # of a trainer


@dataclass(frozen=True)
class Setup:
    """Everything a run needs before its first step, in each of its processes; no setting of `config` is left to be derived.

    Of a run that goes on, `state` is what it had reached, if it got so far, and `lock` keeps other runs out of it.
    `step_times` are what it prices by, if not by MACs; `notes` are what its user should know, one line each.
    """

    config: Config
    images: data.ImageData
    model: nn.Module
    example: torch.Tensor
    steps_per_epoch: int
    schedule: np.ndarray
    state: dict | None = None
    notes: tuple[str, ...] = ()
    lock: TextIO | None = None
    step_times: list[steptime.Table] | None = None
    group: distributed.Group = field(default_factory=distributed.Group)

    def alike(self) -> tuple:
        """What must be the same in all processes."""
        images = self.images.classes, self.images.fingerprint
        return self.config.to_json(), self.steps_per_epoch, images, self.state and self.state["step"]

    @property
    def ode_time(self) -> float:
        """Length of the whole run in ODE time, sum of lr/(1 - momentum)."""
        return ode_time(self.schedule, self.config.momentum)

    @property
    def warmup_steps(self) -> int:
        """Steps before any theta moves."""
        return round(self.config.warmup_epochs * self.steps_per_epoch)

    @property
    def decide_steps(self) -> int:
        """Steps after which the deciding phase ends."""
        return round(self.config.decide_until * len(self.schedule))


def prepare(config: Config) -> Setup:
    """Load the data and build the network; writes nothing, but locks the folder of a run that goes on.

    Raises:
        ValueError: for data or settings that do not fit, one line each.
    """
    state, held, group = None, None, distributed.current()
    group.place(config.device)
    if config.batch_size % group.size or config.batch_size < 2 * group.size:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of processes, at least two images for each; got "
            f"batch_size={config.batch_size} with {group.size} processes. Use {2 * group.size}, {4 * group.size}, ..."
        )
    if config.cost == "latency" and group.size > 1:
        raise ValueError(
            f"`cost` must be macs for several processes; got cost='latency' with {group.size}. Step times are measured by one."
        )
    if config.resume is None:
        check_out(config)
    else:
        _check_unfinished(config)  # or the lock would stay behind
        held = lock.hold(Path(config.resume), "resume") if group.leads else None
        state = _state_of(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    if config.compile:
        check_compile(config.device)
    if config.tensorboard:
        board.check_package()
    images = data.load(
        config.dataset,
        config.data_dir,
        seed=config.seed,
        image_size=config.image_size,
        augment=config.augment,
        array_bytes=None if config.array_gib is None else int(config.array_gib * 2**30),
        download=config.download,
    )
    initial = weights.read(config.init) if config.init is not None and state is None else None
    steps = len(images.train_labels) // config.batch_size
    if steps < 1:
        raise data.DataError(
            f"`batch_size` must be at most the number of training images; got batch_size={config.batch_size} with "
            f"{len(images.train_labels)} images. Choose a smaller one."
        )
    torch.manual_seed(config.seed)
    model = build_model(config, images)
    notes = weights.fill(model, initial, config.init) if initial is not None else []
    if config.sync_bn and group.size > 1:
        distributed.synchronise_norms(model)
    if config.nu > 0 and round(config.decide_until * steps * config.epochs) <= round(config.warmup_epochs * steps):
        raise data.DataError(
            f"`warmup_epochs` must end before the deciding phase does; got warmup_epochs={config.warmup_epochs:g} with "
            f"{steps * config.epochs} steps in all. Shorten the warm-up or train longer."
        )
    example = torch.zeros(1, *images.train_images.shape[1:], device=config.device)
    schedule = learning_rates(config.schedule, config.lr, steps * config.epochs)
    if state is not None and (state["steps_per_epoch"], state["classes"]) != (steps, list(images.classes)):
        raise ValueError(
            f"`data_dir` must hold the images that the run began with; got {steps} steps an epoch and {len(images.classes)} "
            f"classes instead of {state['steps_per_epoch']} and {len(state['classes'])}. Restore them, or start anew."
        )
    if state is not None and state["images"] != images.fingerprint:
        raise ValueError(
            "`data_dir` must hold the images that the run began with; got other files or other labels. Restore them, or start "
            "anew."
        )
    if state is not None and state["processes"] != group.size and not config.sync_bn:
        raise ValueError(
            f"`resume` must go on with as many processes as the run began with, {state['processes']}; got {group.size}. Without "
            "sync_bn each normalises its own share of a batch, so that another number would be another training."
        )
    config = config.resolved(steps * config.epochs, group.size)
    step_times = _step_times(config, model, example, state)
    setup = Setup(config, images, model, example, steps, schedule, state, tuple(notes), held, step_times, group)
    if config.nu > 0:  # what the pruner would refuse is told before anything is written
        complexity = describe(model, model.structures(), example)
        Target.choose(complexity, config.target_macs, config.target_params)
        if step_times is not None:
            complexity = steptime.MeasuredComplexity(complexity, step_times)
        rate_ratios(complexity, nu=config.nu, alpha=config.alpha, beta=config.beta, theta_speed=config.rate_ratio)
    return setup


def _step_times(
    config: Config, model: nn.Module, example: torch.Tensor, state: dict | None
) -> list[steptime.Table] | None:
    """Measured step times of a run priced by them: those that it began with, or new ones."""
    if config.cost != "latency" or config.nu == 0:
        return None
    complexity = describe(model, model.structures(), example)
    if state is not None:
        return steptime.read(Path(config.resume) / steptime.FILE, model, complexity)
    settings = dict(amp=AMP[config.amp], channels_last=config.channels_last)
    return steptime.measure(model, complexity, example, batch=config.batch_size, **settings)


def build_model(config: Config, images: data.ImageData) -> nn.Module:
    """A fresh, whole network for the images, on its device."""
    model = resnets.build(
        config.arch,
        in_channels=images.train_images.shape[1],
        classes=len(images.classes),
        hidden_scale=config.hidden_scale,
        shortcut=config.shortcut,
        stem=config.stem,
    )
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(config.device, memory_format=memory_format)


def _check_unfinished(config: Config) -> None:
    folder = Path(config.resume)
    if (folder / "result.json").exists() and not checkpoint.states(folder):
        raise ValueError(
            f"`resume` must be the folder of a run that was cut off; got {config.resume!r}, which is finished."
        )


def _state_of(config: Config) -> dict | None:
    """State of the run to go on with; None if it had none yet.

    Raises:
        ValueError: if the run is finished, or its files do not fit each other.
    """
    _check_unfinished(config)
    folder = Path(config.resume)
    state, passed_over = checkpoint.load_state(folder, lambda state: _check_state(config, folder, state))
    for name, reason in passed_over.items() if distributed.current().leads else ():
        print(f"warning: {name} is passed over: {reason}", file=sys.stderr)
    metrics = folder / "metrics.csv"
    # one epoch's row may have been written before its state was
    if state is None and metrics.exists() and metrics.read_bytes().count(b"\n") > 2:
        raise ValueError(
            f"`resume` must be the folder of a run with a checkpoint; got {config.resume!r}, which has epochs but none. "
            "Start the run anew in another folder."
        )
    return state


def _check_state(config: Config, folder: Path, state: dict) -> None:
    """Make sure that a state is complete, of this run, and that the run's tables reach as far as it.

    Raises:
        ValueError: if not.
    """
    contents.check(state, gated=config.nu > 0)
    own = config.identity()
    other = sorted(name for name in own | state["config"] if own.get(name) != state["config"].get(name))
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
