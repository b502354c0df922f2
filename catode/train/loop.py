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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from catode import __version__
from catode.train import checkpoint, data, models, report, transfer
from catode.train.config import Config, check_out
from catode.train.device import check_compile, keep_freed_memory, latency_ms
from catode.train.gates import plain_name
from catode.train.prune import ROW_FIELDS, Pruner
from catode.train.structure import Counts, count

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
AUGMENT = {"digits": "shift", "cifar10": "crop-flip", "cifar100": "crop-flip", "folder": "crop-flip"}


class NotFinite(RuntimeError):
    """The loss stopped being finite; the last good state was kept."""


@dataclass(frozen=True)
class Setup:
    """Everything a run needs before its first step; `state` is that of the run that goes on, if it got that far."""

    config: Config
    images: data.ImageData
    model: nn.Module
    example: torch.Tensor
    steps_per_epoch: int
    schedule: np.ndarray
    state: dict | None = None

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
    """Load the data and build the network; writes nothing.

    Raises:
        ValueError: for data or settings that do not fit, one line each.
    """
    state = None
    if config.resume is None:
        check_out(config)
    else:
        state = _state_of(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    if config.compile:
        check_compile(config.device)
    images = data.load(config.dataset, config.data_dir, seed=config.seed, image_size=config.image_size)
    steps = len(images.train_labels) // config.batch_size
    if steps < 1:
        raise data.DataError(
            f"`batch_size` must be at most the number of training images; got batch_size={config.batch_size} with "
            f"{len(images.train_labels)} images. Choose a smaller one."
        )
    torch.manual_seed(config.seed)
    model = models.build(
        config.arch,
        in_channels=images.train_images.shape[1],
        classes=len(images.classes),
        hidden_scale=config.hidden_scale,
    )
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(config.device, memory_format=memory_format)
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
    return Setup(config, images, model, example, steps, schedule, state)


def _state_of(config: Config) -> dict | None:
    """State of the run to go on with; None if it had none yet.

    Raises:
        ValueError: if the run is finished, or its files do not fit each other.
    """
    folder = Path(config.resume)
    if (folder / "result.json").exists() and not checkpoint.has_state(folder):
        raise ValueError(
            f"`resume` must be the folder of a run that was cut off; got {config.resume!r}, which is finished."
        )
    state = checkpoint.load_state(folder)
    tables = [folder / "metrics.csv", folder / "structures.csv"]
    if state is None:
        # one epoch's row may have been written before its state was
        if tables[0].exists() and tables[0].read_text().count("\n") > 2:
            raise ValueError(
                f"`resume` must be the folder of a run with a checkpoint; got {config.resume!r}, which has epochs but none. "
                "Start the run anew in another folder."
            )
        return None
    whole = all(
        table.is_file() and table.stat().st_size >= n for table, n in zip(tables, state["lengths"], strict=True)
    )
    if state["config"] != config.identity() or not whole:
        raise ValueError(
            f"`resume` must name a folder whose checkpoint, config.json and tables fit; got {config.resume!r}, where they do "
            "not. Restore the files of one run."
        )
    return state


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
        check_every=config.check_every,
        read_every=config.read_every,
        memory=config.memory,
        width_multiple=config.width_multiple,
        seed=config.seed,
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches, amp: torch.dtype | None = None) -> float:
    """Share of correct predictions in eval mode, where theta stands in place of the gates; NaN if a logit is not finite."""
    training = model.training
    model.eval()
    right, total, finite = 0, 0, torch.ones((), dtype=torch.bool)
    finite = finite.to(next(model.parameters()).device)
    for x, y in batches:
        with autocast(x.device, amp):
            logits = model(x)
        right += (logits.argmax(1) == y).sum()
        finite &= logits.isfinite().all()
        total += len(y)
    model.train(training)
    return float(right) / total if finite else math.nan


class _Table:
    """A CSV file written row by row.

    Args:
        path: The file.
        fields: Its columns.
        length: Bytes of an earlier file to go on from; the rest of it is cut off.
    """

    def __init__(self, path: Path, fields, length: int | None = None):
        self._file = path.open("w" if length is None else "r+", newline="")
        self._writer = csv.DictWriter(self._file, fields)
        if length is None:
            self._writer.writeheader()
        else:
            self._file.truncate(length)
            self._file.seek(length)

    def length(self) -> int:
        """Bytes on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def add(self, rows: list[dict]) -> None:
        self._writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def run(config: Config, *, progress: bool = True) -> Path:
    """Train, prune while training, and leave a folder as documented in the README.

    Args:
        config: The resolved configuration.
        progress: Show a progress bar on standard error.

    Returns:
        The run's folder.

    Raises:
        ValueError: for bad input or a checkpoint that cannot be read, before anything is written.
        NotFinite: if the loss stops being finite; the folder then holds the last good network.
    """
    return train(prepare(config), progress=progress)


def train(setup: Setup, *, progress: bool = True) -> Path:
    """The same for a prepared run; see `run`."""
    folder = Path(setup.config.out)
    trainer = _Trainer(setup, folder, progress)
    try:
        trainer.train()
    finally:
        trainer.close()
    report.write(folder)
    checkpoint.drop_state(folder)
    return folder


class _Trainer:
    """State of a run in progress."""

    def __init__(self, setup: Setup, folder: Path, progress: bool):
        config = setup.config
        self.setup, self.config, self.folder = setup, config, folder
        self.model, self.amp = setup.model, AMP[config.amp]
        self.dense = count(self.model, setup.example)
        self.dense_latency = latency_ms(self.model, setup.example)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp == "fp16")
        if self.scaler.is_enabled():  # the scaler tells its optimizer on the device, and takes it back after the step
            self.optimizer.register_step_pre_hook(lambda sgd, *_: setattr(self, "skipped", sgd.found_inf.clone()))
        self.pruner = make_pruner(setup, self.optimizer)
        self.compiled = torch.compile(self.model) if config.compile else self.model
        images = setup.images
        common = dict(mean=images.mean, std=images.std, device=config.device, channels_last=config.channels_last)
        self.batches = data.Batches(
            images.train_images, images.train_labels, config.batch_size, augment=AUGMENT[config.dataset], **common
        )
        folder.mkdir(parents=True, exist_ok=True)
        state = setup.state
        if config.resume is None:
            checkpoint.write_text(folder / "config.json", config.to_json() + "\n")
        (folder / "env.json").write_text(json.dumps(_environment(config), indent=2) + "\n")
        lengths = state["lengths"] if state else [None, None]
        self.metrics = _Table(folder / "metrics.csv", METRIC_FIELDS, lengths[0])
        self.structures = _Table(folder / "structures.csv", ROW_FIELDS, lengths[1])
        self.history: list[float] = []
        self.unread: list[torch.Tensor] = []
        self.loss = math.nan  # of the last step that was read
        self.epochs_done, self.step, self.time, self.good_step = 0, 0, 0.0, 0
        self.seconds, self.cpu_seconds = 0.0, 0.0
        if state:
            self.restore(state)
        self.bar = tqdm(
            total=len(setup.schedule),
            initial=self.step,
            unit="step",
            disable=not progress,
            file=sys.stderr,
            mininterval=0.5,
        )
        self.save()

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        self.structures.close()

    def train(self) -> None:
        mark, cpu_mark = time.perf_counter(), time.process_time()
        while self.epochs_done < self.config.epochs:
            row = self.epoch(self.epochs_done)
            self.epochs_done += 1
            mark, before = time.perf_counter(), mark
            cpu_mark, cpu_before = time.process_time(), cpu_mark
            self.seconds += mark - before
            self.cpu_seconds += cpu_mark - cpu_before
            self.metrics.add([{**row, "seconds": self.seconds}])
            self.save_state()
        executed = count(self.model, self.setup.example).macs
        if self.pruner is not None:
            self.pruner.finish()
        self.result(executed)

    def epoch(self, epoch: int) -> dict:
        self.model.train()
        losses, right, waited = [], torch.zeros((), dtype=torch.long, device=self.config.device), 0.0
        began = mark = time.perf_counter()
        rate = self.config.lr
        for x, y in self.batches.epoch(epoch, self.config.seed):
            waited += time.perf_counter() - mark
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
            scale, skipped = self.update()
            losses.append(loss.detach())
            self.unread.append(losses[-1])
            right += (logits.detach().argmax(1) == y).sum()
            self.step += 1
            self.time += rate / (1.0 - self.config.momentum)
            if self.step % self.config.read_every == 0:
                self.read()
            if self.pruner is not None:
                self.prune(scale, skipped)
            self.bar.update()
            if self.step % max(10, self.config.read_every) == 0:
                self.show()
            mark = time.perf_counter()
        self.read()
        if self.pruner is not None:
            self.pruner.read()
        seconds = time.perf_counter() - began
        accuracy = evaluate(self.model, self.test_batches(), self.amp)
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
            "train_accuracy": float(right) / seen,
            "test_accuracy": accuracy,
            "expected_complexity": self.pruner.expected_complexity if self.pruner else 1.0,
            "macs": counts.macs,
            "params": counts.params,
            "layers_kept": layers,
            "units_kept": units,
            "undecided": undecided,
            "wait_share": waited / seconds,
        }

    def test_batches(self):
        images = self.setup.images
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

    def prune(self, scale: float | torch.Tensor, skipped: bool | torch.Tensor) -> None:
        """One step of the pruner, its checks logged; ends the deciding phase when its time has come."""
        check = self.pruner.step(scale, skipped)
        if check is not None:
            self.structures.add(check.rows)
            for warning in check.warnings:
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
        blocks = self.model.structures()
        return len(blocks), sum(site.width for b in blocks for site in b.sites), 0

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
                "image_shape": list(images.train_images.shape[1:]),
                "mean": list(images.mean),
                "std": list(images.std),
                "blocks": structure,
            },
        )

    def save_state(self) -> None:
        """Keep everything that `restore` needs to go on as if nothing had happened."""
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
                "steps_per_epoch": self.setup.steps_per_epoch,
                "classes": list(self.setup.images.classes),
                "epochs_done": self.epochs_done,
                "step": self.step,
                "time": self.time,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "history": self.history,
                "lengths": [self.metrics.length(), self.structures.length()],
                "momentum": momentum,
                "scaler": self.scaler.state_dict(),
                "pruner": self.pruner.state_dict() if self.pruner else None,
                "model": None if self.pruner else self.model.state_dict(),
            },
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
        for name in ("epochs_done", "step", "time", "seconds", "cpu_seconds", "history"):
            setattr(self, name, state[name])

    def result(self, executed: int) -> None:
        """Write result.json; `executed` are the MACs of the last training step's forward pass, dead channels included."""
        counts = self.counts()
        layers, units, _ = self.left()
        blocks = models.build(
            self.config.arch, in_channels=1, classes=2, hidden_scale=self.config.hidden_scale
        ).structures()
        small = self.dense_latency if self.pruner is None else latency_ms(self.model, self.setup.example)
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
            "layers_total": len(blocks),
            "units_kept": units,
            "units_total": sum(site.width for b in blocks for site in b.sites),
            "decisions": self.pruner.decisions() if self.pruner else {},
            "macs_removed_by_tolerance": self.pruner.macs_removed("pruned_tolerance") if self.pruner else 0,
            "decided_by_rule": self.pruner.decided_by_rule if self.pruner else None,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "latency_ms": small[0],
            "latency_dense_ms": self.dense_latency[0],
            "latency_ms_128": small[1],
            "latency_dense_ms_128": self.dense_latency[1],
            "seed": self.config.seed,
        }
        checkpoint.write_text(self.folder / "result.json", json.dumps(content, indent=2) + "\n")


def _environment(config: Config) -> dict:
    return {
        "catode": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": config.device,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
