"""One training run, from configuration to folder.

The loop owns data, optimizer, schedule and files; everything about gates, measuring and removing is in
`catode.train.prune.Pruner`, whose ``step()`` follows the optimizer's.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from catode import __version__
from catode.train import board, checkpoint, data, distributed, lock, models, report, shadow, steptime, transfer, weights
from catode.train.config import Config, check_out
from catode.train.device import check_compile, keep_freed_memory, latency_ms, processor
from catode.train.gates import plain_name
from catode.train.prune import ROW_FIELDS, Pruner, rate_ratios
from catode.train.stop import Stop, Stopped
from catode.train.structure import Counts, count, describe
from catode.train.target import Target

METRIC_FIELDS = [
    "epoch",
    "step",
    "time",
    "lr",
    "loss",
    "train_accuracy",
    "test_accuracy",
    "expected_complexity",
    "macs",
    "params",
    "layers_kept",
    "units_kept",
    "undecided",
    "seconds",
    "wait_share",
]
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLES = ("metrics.csv", "structures.csv")
_PROGRESS = ("epochs_done", "step", "time", "seconds", "cpu_seconds", "history")  # of a trainer
STATE_FIELDS = (
    *_PROGRESS,
    "config",
    "processes",
    "steps_per_epoch",
    "classes",
    "images",
    "sums",
    "lengths",
    "momentum",
    "scaler",
    "pruner",
    "model",
    "rng",
)


LEAST_MEMORY = 200
SHORT_RUN = 6240  # steps of a deciding phase for which the least memory does: 20 epochs of CIFAR-10


class NotFinite(RuntimeError):
    """The loss stopped being finite; the last good state was kept."""


@dataclass(frozen=True)
class Setup:
    """Everything a run needs before its first step, in each of its processes.

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
        return float(self.schedule.sum() / (1.0 - self.config.momentum))

    @property
    def warmup_steps(self) -> int:
        """Steps before any theta moves."""
        return round(self.config.warmup_epochs * self.steps_per_epoch)

    @property
    def decide_steps(self) -> int:
        """Steps after which the deciding phase ends."""
        return round(self.config.decide_until * len(self.schedule))

    @property
    def memory(self) -> int:
        """Steps over which measurements are pooled.

        How fast benefits change is known to within memory^(-3/2) and is extrapolated over the rest of the run, so that a
        memory in proportion to length^(2/3) leaves a run of any length in the same doubt.
        """
        if self.config.memory is not None:
            return self.config.memory
        return max(LEAST_MEMORY, round(LEAST_MEMORY * (self.decide_steps / SHORT_RUN) ** (2 / 3)))

    @property
    def check_every(self) -> int:
        """Steps from one check to the next."""
        return self.memory // 4 if self.config.check_every is None else self.config.check_every

    @property
    def rate_ratio(self) -> float:
        """Speed of every theta at zero benefit, 1/time."""
        if self.config.rate_ratio is not None:
            return self.config.rate_ratio
        return 1.0 / (self.config.sink_share * self.ode_time)


def learning_rates(schedule: str, peak: float, steps: int) -> np.ndarray:
    """Learning rate of every step, shape (steps,).

    Args:
        schedule: `one-cycle` (linear rise over 15 % of the steps, linear fall to 0), `cosine` or `constant`.
        peak: Largest learning rate.
        steps: Number of steps.
    """
    position = (np.arange(steps) + 0.5) / steps
    if schedule == "one-cycle":
        return peak * np.minimum(position / 0.15, (1.0 - position) / 0.85)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + np.cos(np.pi * position))
    return np.full(steps, peak)


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
    step_times = _step_times(config, model, example, state)
    setup = Setup(config, images, model, example, steps, schedule, state, tuple(notes), held, step_times, group)
    if config.nu > 0:  # what the pruner would refuse is told before anything is written
        complexity = describe(model, model.structures(), example)
        Target.choose(complexity, config.target_macs, config.target_params)
        if step_times is not None:
            complexity = steptime.MeasuredComplexity(complexity, step_times)
        rate_ratios(complexity, nu=config.nu, alpha=config.alpha, beta=config.beta, clock=setup.rate_ratio)
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
    model = models.build(
        config.arch,
        in_channels=images.train_images.shape[1],
        classes=len(images.classes),
        hidden_scale=config.hidden_scale,
        shortcut=config.shortcut,
        stem=config.stem,
    )
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(config.device, memory_format=memory_format)


def _state_of(config: Config) -> dict | None:
    """State of the run to go on with; None if it had none yet.

    Raises:
        ValueError: if the run is finished, or its files do not fit each other.
    """
    folder = Path(config.resume)
    if (folder / "result.json").exists() and not checkpoint.states(folder):
        raise ValueError(
            f"`resume` must be the folder of a run that was cut off; got {config.resume!r}, which is finished."
        )
    state, passed_over = checkpoint.load_state(folder, lambda state: _check_state(config, folder, state))
    for name, reason in passed_over.items() if distributed.current().leads else ():
        print(f"warning: {name} is passed over: {reason}", file=sys.stderr)
    metrics = folder / "metrics.csv"
    # one epoch's row may have been written before its state was
    if state is None and metrics.exists() and metrics.read_text().count("\n") > 2:
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
    missing = [name for name in STATE_FIELDS if name not in state]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    own = config.identity()
    other = sorted(name for name in own | state["config"] if own.get(name) != state["config"].get(name))
    if other:
        raise ValueError(f"it is of a run with another {', '.join(other)}")
    for name, length in zip(TABLES, state["lengths"], strict=True):
        if not (folder / name).is_file() or (folder / name).stat().st_size < length:
            raise ValueError(f"{name} is shorter than it was then")


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD whose weight decay reaches every parameter, the norm layers' affine too (the theory needs it).

    With fp16 it is the fused one, which skips a step whose gradient overflowed without asking the host.
    """
    fp16 = config.amp == "fp16"
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True if fp16 else None,
    )
    if fp16 and config.momentum > 0:
        for parameter in model.parameters():  # a first step that is skipped would leave them without a value
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """Automatic mixed precision in `dtype`; none with None."""
    return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)


def make_pruner(setup: Setup, optimizer: torch.optim.Optimizer) -> Pruner | None:
    """The pruner of a run; None for the ungated network (nu = 0)."""
    config = setup.config
    if config.nu == 0:
        return None
    return Pruner(
        setup.model,
        setup.example,
        optimizer=optimizer,
        nu=config.nu,
        alpha=config.alpha,
        beta=config.beta,
        risk=config.risk,
        tolerance=config.tol,
        prior=config.prior,
        images=len(setup.images.train_labels),
        target_macs=config.target_macs,
        target_params=config.target_params,
        rate_ratio=setup.rate_ratio,
        steps=setup.decide_steps,
        warmup=setup.warmup_steps,
        initial_keep_prob=config.initial_keep_prob,
        estimator=config.estimator,
        layer_estimator=config.layer_estimator,
        per_example=config.per_example_gates,
        probe_size=config.probe_size,
        layers_per_probe=config.layers_per_probe,
        measure_every=config.measure_every,
        check_every=setup.check_every,
        read_every=config.read_every,
        memory=setup.memory,
        width_multiple=config.width_multiple,
        round_to=config.round_to,
        shadow=len(setup.schedule) if config.shadow else None,
        step_times=setup.step_times,
        seed=config.seed,
        group=setup.group,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, batches, amp: torch.dtype | None = None, group: distributed.Group | None = None
) -> float:
    """Share of correct predictions in eval mode, where theta stands in place of the gates; NaN if a logit is not finite.

    Args:
        model: The network.
        batches: Images and labels; with several processes, those of this one's share.
        amp: Type of automatic mixed precision; None for none.
        group: Processes that evaluate together.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    right, total, finite = torch.zeros((), dtype=torch.long, device=device), 0, torch.ones((), dtype=torch.bool)
    finite = finite.to(device)
    for x, y in batches:
        with autocast(x.device, amp):
            logits = model(x)
        right += (logits.argmax(1) == y).sum()
        finite &= logits.isfinite().all()
        total += len(y)
    model.train(training)
    counts = torch.stack([right, torch.full_like(right, total), (~finite).long()])
    right, total, bad = (group or distributed.Group()).sum(counts).cpu().tolist()
    return math.nan if bad else right / total


class CsvTable:
    """A CSV file written row by row.

    Args:
        folder: Where it is; None for a process that writes none.
        name: Its name.
        fields: Its columns.
        length: Bytes of an earlier file to go on from; the rest of it is cut off.
    """

    def __init__(self, folder: Path | None, name: str, fields, length: int | None = None):
        path = Path(os.devnull) if folder is None else folder / name
        self._file = path.open("w" if length is None else "r+", newline="")
        self._writer = csv.DictWriter(self._file, fields)
        if length is None:
            self._writer.writeheader()
        else:
            self._file.truncate(length)
            self._file.seek(length)

    def length(self) -> int:
        """Bytes on the disk."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def add(self, rows: list[dict]) -> None:
        with self._named():
            self._writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
            )
            self._file.flush()

    def close(self) -> None:
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What goes wrong with a file that is open does not say with which."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None


def run(config: Config, *, progress: bool = True, with_report: bool = True) -> Path:
    """Train, prune while training, and leave a folder as documented in the README.

    Args:
        config: The resolved configuration.
        progress: Show a progress bar on standard error.
        with_report: Write report.md and its pictures, which takes seconds.

    Returns:
        The run's folder.

    Raises:
        ValueError: for bad input, a folder that is in use or a checkpoint that cannot be read, before anything is written.
        NotFinite: if the loss stops being finite; the folder then holds the last good network.
        Stopped: a KeyboardInterrupt, if a signal asked for it; the run can go on where it stopped.
    """
    return train(prepare(config), progress=progress, with_report=with_report)


def train(setup: Setup, *, progress: bool = True, with_report: bool = True) -> Path:
    """The same for a prepared run; see `run`."""
    folder = Path(setup.config.out)
    group = setup.group
    if group.leads:
        folder.mkdir(parents=True, exist_ok=True)
    with (setup.lock or lock.hold(folder)) if group.leads else nullcontext():
        if group.leads and setup.config.resume is None:
            check_out(setup.config)  # another process may have begun and ended here meanwhile
        trainer = Trainer(setup, folder, progress)
        try:
            with trainer.stop.heeded() if group.size == 1 else nullcontext():
                trainer.train()
        finally:
            trainer.close()
        if group.leads:
            if with_report:
                report.write(folder)
            checkpoint.drop_states(folder)
            lock.drop(folder)
    return folder


@dataclass
class _Sums:
    """What an epoch has added up so far: its row in metrics.csv is made of it.

    Attributes:
        right: Correct predictions, a count on the device.
        losses: Loss of each step, on the device.
        waited: Seconds spent waiting for batches.
        seconds: Seconds spent on steps, the waiting included.
    """

    right: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    waited: float = 0.0
    seconds: float = 0.0

    def state(self) -> dict:
        """The same for a checkpoint."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0)
        return {"right": self.right.cpu(), "losses": losses.cpu(), "waited": self.waited, "seconds": self.seconds}

    @classmethod
    def of(cls, state: dict, device: str) -> _Sums:
        """The sums of a `state`."""
        tensors = {"right": state["right"].to(device, copy=True), "losses": list(state["losses"].to(device).unbind())}
        return cls(**{**state, **tensors})


class Trainer:
    """A run in progress: `train` takes it to its end, `advance` one epoch further; a benchmark takes two of them in turn.

    Args:
        setup: What to train.
        folder: Where the run's files go.
        progress: Whether to show a bar.
    """

    def __init__(self, setup: Setup, folder: Path, progress: bool):
        config = setup.config
        self.setup, self.config, self.folder, self.group, self.stop = setup, config, folder, setup.group, Stop()
        self.model, self.amp = setup.model, AMP[config.amp]
        self.dense = count(self.model, setup.example)
        blocks = self.model.structures()
        self.total = len(blocks), sum(site.width for b in blocks for site in b.sites)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp == "fp16")
        if self.scaler.is_enabled():  # the scaler tells its optimizer on the device, and takes it back after the step
            self.optimizer.register_step_pre_hook(lambda sgd, *_: setattr(self, "skipped", sgd.found_inf.clone()))
        self.pruner = make_pruner(setup, self.optimizer)
        self.compiled = torch.compile(self.model) if config.compile else self.model
        images = setup.images
        common = dict(mean=images.mean, std=images.std, device=config.device, channels_last=config.channels_last)
        self.batches = data.Batches(
            images.train_images,
            images.train_labels,
            config.batch_size,
            augment=config.augment,
            mixup=config.mixup,
            classes=len(images.classes),
            workers=config.workers,
            shard=(self.group.rank, self.group.size),
            **common,
        )
        state = setup.state
        if self.group.leads:
            if config.resume is None:
                checkpoint.write_text(folder / "config.json", config.to_json() + "\n")
            environment = {**_environment(config), "processes": self.group.size}
            (folder / "env.json").write_text(json.dumps(environment, indent=2) + "\n")
            if setup.step_times is not None and state is None:
                checkpoint.write_text(folder / steptime.FILE, steptime.text(setup.step_times))
        lengths = state["lengths"] if state and self.group.leads else [None, None]
        tables = folder if self.group.leads else None
        self.metrics = CsvTable(tables, TABLES[0], METRIC_FIELDS, lengths[0])
        self.structures = CsvTable(tables, TABLES[1], ROW_FIELDS, lengths[1])
        self.history: list[float] = []
        self.unread: list[torch.Tensor] = []
        self.loss = math.nan  # of the last step that was read
        self.epochs_done, self.step, self.time, self.good_step = 0, 0, 0.0, 0
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self.mark = time.perf_counter(), time.process_time()
        self.sums = self.no_sums()
        if state:
            self.restore(state)
        self.board = board.Board(folder, self.step) if config.tensorboard and self.group.leads else None
        self.bar = tqdm(
            total=len(setup.schedule),
            initial=self.step,
            unit="step",
            disable=not (progress and self.group.leads),
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 60.0,  # a line in a log file only grows
        )
        for note in setup.notes if self.group.leads else ():
            self.bar.write(f"note: {note}", file=sys.stderr)
        self.save()

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        self.structures.close()
        if self.board is not None:
            self.board.close()

    def train(self) -> None:
        """Train the epochs that are left and write the result."""
        self.mark = time.perf_counter(), time.process_time()
        while self.epochs_done < self.config.epochs:
            self.advance()
            if self.stop and self.epochs_done < self.config.epochs:
                self.leave()
        executed = count(self.model, self.setup.example).macs
        if self.pruner is not None:
            self.pruner.finish()
        if self.group.leads:
            self.result(executed)

    def advance(self) -> dict:
        """Train one epoch, or what is left of it, and save; returns its row of metrics.csv."""
        row = self.epoch(self.epochs_done)
        self.epochs_done += 1
        self.sums = self.no_sums()
        self.tick()
        row["seconds"] = self.seconds
        self.metrics.add([row])
        if self.board is not None:
            self.board.add(row, self.pruner.keep_prob_by_kind() if self.pruner else {})
        self.save_state()
        return row

    def epoch(self, epoch: int) -> dict:
        self.model.train()
        sums, losses = self.sums, self.sums.losses
        mark = time.perf_counter()
        rate = self.config.lr
        for x, y in self.batches.epoch(epoch, self.config.seed, start=len(losses)):
            sums.waited += time.perf_counter() - mark
            rate = float(self.setup.schedule[self.step])
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            gated = self.pruner is not None and self.pruner.started and not self.pruner.finished
            forward = self.model if gated else self.compiled
            with autocast(x.device, self.amp):
                logits = forward(x)
                loss = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            checksum = self.pruner.checksum() if self.pruner and self.group.size > 1 else 0
            losses.append(self.group.join(self.model.parameters(), loss, checksum=checksum, step=self.step + 1))
            self.unread.append(losses[-1])
            scale, skipped = self.update()
            sums.right += (logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
            self.step += 1
            self.time += rate / (1.0 - self.config.momentum)
            if self.step % self.config.read_every == 0:
                self.read()
            if self.pruner is not None:
                self.prune(scale, skipped)
            self.bar.update()
            if self.step % max(10, self.config.read_every) == 0:
                self.show()
            due = self.stop or len(losses) % self.config.checkpoint_every == 0
            if due and len(losses) < self.setup.steps_per_epoch:
                self.catch_up()
                self.group.settle(self.model, step=self.step)
                self.save_state()
                if self.stop:
                    self.leave()
            mark, before = time.perf_counter(), mark
            sums.seconds += mark - before
        self.catch_up()
        sums.seconds += time.perf_counter() - mark
        self.group.settle(self.model, step=self.step)
        accuracy = evaluate(self.model, self.test_batches(), self.amp, self.group)
        if math.isnan(accuracy):  # the last loss was finite, the step after it ruinous
            self.not_finite(self.step)
        self.history.append(accuracy)
        self.save()
        self.show()
        seen = len(losses) * self.config.batch_size
        counts = self.counts()
        layers, units, undecided = self.left()
        return {
            "epoch": epoch + 1,
            "step": self.step,
            "time": self.time,
            "lr": rate,
            "loss": float(torch.stack(losses).mean()),
            "train_accuracy": float(self.group.sum(sums.right)) / seen,
            "test_accuracy": accuracy,
            "expected_complexity": self.pruner.expected_complexity if self.pruner else 1.0,
            "macs": counts.macs,
            "params": counts.params,
            "layers_kept": layers,
            "units_kept": units,
            "undecided": undecided,
            "wait_share": sums.waited / sums.seconds,
        }

    def leave(self) -> NoReturn:
        """End as a signal asked for, now that everything is kept."""
        raise Stopped(self.stop.number, f"stopped after step {self.step}")

    def no_sums(self) -> _Sums:
        return _Sums(torch.zeros((), dtype=torch.long, device=self.config.device))

    def tick(self) -> None:
        """Add the time since the last tick to that of the run."""
        mark, self.mark = self.mark, (time.perf_counter(), time.process_time())
        self.seconds += self.mark[0] - mark[0]
        self.cpu_seconds += self.mark[1] - mark[1]

    def test_batches(self):
        images = self.setup.images
        if len(images.test_labels) <= self.group.rank:  # there are more processes than images
            return []
        return self.batches.evaluation(images.test_images, images.test_labels, max(self.config.batch_size, 256))

    def update(self) -> tuple[float | torch.Tensor, bool | torch.Tensor]:
        """One step of the optimizer; the loss scale of its gradients, and whether they overflowed so that it was skipped."""
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return 1.0, False
        scale = self.scaler.scale(torch.ones((), device=self.config.device))
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return scale, self.skipped

    def read(self) -> None:
        """Read the losses of the steps since the last time; the host waits for the device."""
        values = [float(loss) for loss in transfer.read(self.unread)]
        first = self.step - len(values) + 1
        self.unread = []
        for step, loss in enumerate(values, start=first):
            self.loss = loss
            if not math.isfinite(loss):
                self.not_finite(step)

    def catch_up(self) -> None:
        """Read all that is unread, in every process alike; the thetas then stand where they do at this step."""
        self.read()
        if self.pruner is not None:
            self.pruner.read()

    def prune(self, scale: float | torch.Tensor, skipped: bool | torch.Tensor) -> None:
        """One step of the pruner, its checks logged; ends the deciding phase when its time has come."""
        check = self.pruner.step(scale, skipped)
        if check is not None:
            self.structures.add(check.rows)
            for warning in check.warnings if self.group.leads else []:
                self.bar.write(f"warning: {warning}", file=sys.stderr)

    def not_finite(self, step: int) -> None:
        raise NotFinite(
            f"`loss` must stay finite; got a non-finite loss or logit at step {step} "
            f"(lr {self.optimizer.param_groups[0]['lr']:.3g}). "
            f"The state after step {self.good_step} is kept in {self.folder}; lower --lr or turn --amp off."
        )

    def counts(self) -> Counts:
        """Counted MACs and parameters of the network as it physically stands."""
        return self.pruner.counts() if self.pruner else self.dense

    def left(self) -> tuple[int, int, int]:
        """Layers and units left, and how many structures are undecided."""
        if self.pruner is not None:
            return self.pruner.layers_kept, self.pruner.units_kept, self.pruner.undecided
        return *self.total, 0

    def show(self) -> None:
        layers, units, undecided = self.left()
        expected = self.pruner.expected_macs if self.pruner else self.dense.macs
        self.bar.set_postfix_str(
            f"loss {self.loss:.3f}, accuracy {self.history[-1] if self.history else 0:.3f}, "
            f"expected MACs {expected / self.dense.macs:.0%}, {layers} layers, {units} units, {undecided} undecided",
            refresh=False,
        )

    def save(self) -> None:
        """Keep the network as it stands as the last good one."""
        self.good_step = self.step
        if not self.group.leads:
            return
        state, structure = (
            self.pruner.snapshot() if self.pruner else (self.model.state_dict(), checkpoint.whole(self.model))
        )
        images = self.setup.images
        checkpoint.save(
            self.folder,
            state,
            {
                "arch": self.config.arch,
                "in_channels": images.train_images.shape[1],
                "classes": list(images.classes),
                "hidden_scale": self.config.hidden_scale,
                "shortcut": self.config.shortcut,
                "stem": self.config.stem,
                "image_shape": list(images.train_images.shape[1:]),
                "mean": list(images.mean),
                "std": list(images.std),
                "blocks": structure,
            },
        )

    def save_state(self) -> None:
        """Keep everything that `restore` needs to go on as if nothing had happened, between any two steps."""
        self.tick()
        right = self.group.sum(self.sums.right)
        if not self.group.leads:
            return
        names = {parameter: plain_name(name) for name, parameter in self.model.named_parameters()}
        momentum = {
            names[parameter]: own["momentum_buffer"]
            for parameter, own in self.optimizer.state.items()
            if own.get("momentum_buffer") is not None
        }
        checkpoint.save_state(
            self.folder,
            {
                "config": self.config.identity(),
                "processes": self.group.size,
                "steps_per_epoch": self.setup.steps_per_epoch,
                "classes": list(self.setup.images.classes),
                "images": self.setup.images.fingerprint,
                **{name: getattr(self, name) for name in _PROGRESS},
                "sums": {**self.sums.state(), "right": right.cpu()},
                "lengths": [self.metrics.length(), self.structures.length()],
                "momentum": momentum,
                "scaler": self.scaler.state_dict(),
                "pruner": self.pruner.state_dict() if self.pruner else None,
                "model": None if self.pruner else self.model.state_dict(),
                "rng": _random_state(self.config.device),
            },
            keep=self.config.keep_checkpoints,
        )

    def restore(self, state: dict) -> None:
        """Take up a state of `save_state`."""
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        else:
            self.model.load_state_dict(state["model"])
        parameters = {plain_name(name): parameter for name, parameter in self.model.named_parameters()}
        for name, buffer in state["momentum"].items():
            buffer = buffer.to(parameters[name].device, copy=True)
            self.optimizer.state[parameters[name]] = {"momentum_buffer": buffer}
        self.scaler.load_state_dict(state["scaler"])
        for name in _PROGRESS:
            setattr(self, name, state[name])
        self.sums = _Sums.of(state["sums"], self.config.device)
        if not self.group.leads:  # those of all processes are with the first one
            self.sums.right.zero_()
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and torch.device(self.config.device).type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.config.device)

    def result(self, executed: int) -> None:
        """Write result.json; `executed` are the MACs of the last training step's forward pass, dead channels included."""
        counts = self.counts()
        layers, units, _ = self.left()
        dense = build_model(self.config, self.setup.images)
        latencies = latency_ms([dense, self.model] if self.pruner else [dense], self.setup.example)
        content = {
            "accuracy": self.history[-1],
            "accuracy_history": self.history,
            "macs": counts.macs,
            "macs_executed": executed,
            "macs_dense": self.dense.macs,
            "params": counts.params,
            "params_dense": self.dense.params,
            "expected_complexity": self.pruner.expected_complexity if self.pruner else 1.0,
            "layers_kept": layers,
            "layers_total": self.total[0],
            "units_kept": units,
            "units_total": self.total[1],
            "units_kept_for_rounding": self.pruner.kept_for_rounding if self.pruner else 0,
            "decisions": self.pruner.decisions() if self.pruner else {},
            "macs_removed_by_tolerance": self.pruner.macs_removed("pruned_tolerance") if self.pruner else 0,
            "decided_by_rule": self.pruner.decided_by_rule if self.pruner else None,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "latency_ms": latencies[0][-1],
            "latency_dense_ms": latencies[0][0],
            "latency_ms_128": latencies[1][-1],
            "latency_dense_ms_128": latencies[1][0],
            "seed": self.config.seed,
        }
        if self.pruner is not None and self.pruner.shadow is not None:
            table = CsvTable(self.folder, shadow.FILE, shadow.FIELDS)
            table.add(self.pruner.shadow.rows(self.pruner.names()))
            table.close()
        checkpoint.write_text(self.folder / "result.json", json.dumps(content, indent=2) + "\n")


def _random_state(device: str) -> dict[str, torch.Tensor]:
    """State of PyTorch's own generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _environment(config: Config) -> dict:
    return {
        "catode": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": config.device,
        **({"accelerator": torch.cuda.get_device_name()} if config.device.startswith("cuda") else {}),
    }
