"""One training run, from configuration to folder.

The training loop handles data, optimizer, schedule and files; gates, measurements and removals are in
`catode.prune.pruner.Pruner`, whose ``step()`` is called after the optimizer's.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm

from catode.decisions import shadow
from catode.prune.checking import ROW_FIELDS
from catode.prune.describe import steptime
from catode.prune.describe.costs import Counts, count
from catode.prune.devices import transfer
from catode.prune.measure import measuring
from catode.prune.recalibration import recalibrate_norms
from catode.structures.inventory import Inventory
from catode.train import data
from catode.train.loop import board, checkpoint, lock, restoring, result
from catode.train.loop.average import Average
from catode.train.loop.evaluation import Score, evaluate, evaluated_at_once
from catode.train.loop.optimization import (
    AMP,
    autocast,
    make_optimizer,
    make_pruner,
    make_scaler,
    optimizer_state,
    refusals,
    said_in_lines,
    take_gradient,
)
from catode.train.loop.result import environments, random_state
from catode.train.loop.setup import PROGRESS, Setup, build_model, prepare
from catode.train.loop.tables import METRIC_FIELDS, TABLES, VALIDATION_FIELDS, CsvTable, Sums
from catode.train.models.answer import answer
from catode.train.settings.config import Config, ConfigError
from catode.train.settings.run import check_out
from catode.train.stop import Stop, Stopped, held_back

FORGOTTEN = 100  # steps after which running statistics no longer know what was decided
OLDER = 0.1  # share of averaged weights that may be from before the last decision
RECALIBRATION = 100  # batches from which they are computed anew


class NotFinite(RuntimeError):
    """The loss is not finite; the last good network was kept."""


def run(config: Config, *, progress: bool = True, at_end: Callable[[Path], object] | None = None) -> Path:
    """Train, prune while training, and write the run's folder (docs/conventions.md, "A run's folder").

    Args:
        config: The resolved configuration.
        progress: Show a progress bar on standard error.
        at_end: Called with the folder of the finished run before its checkpoints are deleted, such as `catode.report.write`.

    Returns:
        The run's folder.

    Raises:
        ValueError: for bad input, a locked folder or a checkpoint that cannot be read, before anything is written.
        NotFinite: if the loss stops being finite; the folder then holds the last good network.
        Stopped: a KeyboardInterrupt, after a signal; the run can be resumed.
    """
    return train(prepare(config), progress=progress, at_end=at_end)


def train(setup: Setup, *, progress: bool = True, at_end: Callable[[Path], object] | None = None) -> Path:
    """Like `run`, for a prepared run."""
    folder, group = Path(setup.config.out), setup.group
    if group.leads:
        folder.mkdir(parents=True, exist_ok=True)
    with lock.released(setup.lock or lock.hold(folder)) if group.leads else nullcontext(), said_in_lines():
        if group.leads and setup.config.resume is None:
            check_out(setup.config)  # another process may have started and ended a run here meanwhile
        try:
            trainer = Trainer(setup, folder, progress)
        except ConfigError:  # of the network; nothing was written
            if group.leads and setup.config.resume is None:
                lock.drop(folder)
                with suppress(OSError):  # it held something before
                    folder.rmdir()
            raise
        try:
            heeded = trainer.stop.heeded() if group.size == 1 else nullcontext()
            with data.folder.workers_watched(trainer.batches.workers), heeded:
                trainer.train()
        finally:
            trainer.close()
        if group.leads:
            if at_end is not None:
                at_end(folder)
            with held_back():  # a signal now is of no use: the run is finished
                checkpoint.drop_states(folder)
                lock.drop(folder)
    return folder


class Trainer:
    """A run in progress: `train` finishes it, `advance` trains one epoch (benchmarks alternate between two runs).

    Args:
        setup: The prepared run.
        folder: The run's folder.
        progress: Whether to show a progress bar.
    """

    def __init__(self, setup: Setup, folder: Path, progress: bool):
        config = setup.config
        self.setup, self.config, self.folder, self.group, self.stop = setup, config, folder, setup.group, Stop()
        self.model, self.amp = setup.model, AMP[config.amp]
        self.dense = count(self.model, setup.example)
        inventory = Inventory(setup.blocks)
        self.total = int((inventory.is_layer & inventory.removable).sum()), inventory.size - inventory.layers
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = make_scaler(config)
        if self.scaler.is_enabled():  # found_inf is set on the device, and only during the step
            self.optimizer.register_step_pre_hook(lambda own, *_: setattr(self, "skipped", own.found_inf.clone()))
        self.average = Average(self.model, config.ema) if config.ema else None
        self.pruner = make_pruner(setup, self.optimizer)
        if self.average and self.pruner:
            self.pruner.on_cut(self.average.cut)
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
            own = environments(config, self.group.size, images.fingerprint, folder)
            checkpoint.write_text(folder / "env.json", json.dumps(own, indent=2) + "\n")
            if setup.step_times is not None and state is None:
                checkpoint.write_text(folder / steptime.FILE, steptime.text(setup.step_times))
            checkpoint.seal(folder, "config.json", "env.json", steptime.FILE, anew=True)
        tables = folder if self.group.leads else None
        ends = [*zip(state["lengths"], state["checksums"], strict=True)] if state and self.group.leads else [(), ()]
        fields = [name for name in METRIC_FIELDS if images.validated or name not in VALIDATION_FIELDS]
        self.metrics = CsvTable(tables, TABLES[0], fields, *ends[0])
        self.structures = CsvTable(tables, TABLES[1], ROW_FIELDS, *ends[1])
        self.history: list[float] = []
        self.executed: int | None = None  # MACs of the last step's forward pass, dead channels included
        self.unread: list[torch.Tensor] = []
        self.loss = math.nan  # of the last step that was read
        self.epochs_done, self.step, self.time, self.good_step, self.over = 0, 0, 0.0, 0, False
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
            mininterval=0.5 if sys.stderr.isatty() else 60.0,  # in a log file every update is a new line
        )
        for note in setup.notes if self.group.leads else ():
            self.bar.write(f"note: {note}", file=sys.stderr)
        for line in self.pruner.warnings if self.pruner and self.group.leads and not state else ():
            self.bar.write(f"warning: {line}", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        self.structures.close()
        if self.board is not None:
            self.board.close()

    def train(self) -> None:
        """Train the remaining epochs and write the result."""
        self.save()
        self.mark = time.perf_counter(), time.process_time()
        while self.epochs_done < self.config.epochs:
            self.advance()
            if self.stop and self.epochs_done < self.config.epochs:
                self.leave()
        if self.finish():  # of a run that was stopped after its last step
            self.save()
        validation = self.scores(self.held_out("validation"), both=True) if self.setup.images.validated else None
        test = self.scores(self.held_out("test"), both=True)  # their one reading
        if self.group.leads:
            self.result(validation, test)

    def finish(self) -> bool:
        """End pruning after the last step, unless it was; compute running statistics anew that may still know what was decided
        last. Returns whether anything was done."""
        if self.over:
            return False
        self.over = True
        if self.executed is None:
            self.executed = count(self.model, self.setup.example).macs
        if self.pruner is None:
            return True
        last = self.pruner.state.cut_at if self.pruner.finished else self.step
        self.pruner.finish()
        stale = [nullcontext()] if last > max(self.step - FORGOTTEN, 0) else []
        if self.average and last and (stale or self.average.older(last, self.step) > OLDER):
            stale.append(self.average.applied())
        for weights in stale:
            again = islice(self.batches.epoch(self.config.epochs, self.config.seed), RECALIBRATION)
            parts = (part for images, _ in again for part in images.chunk(self.config.accumulate))
            with autocast(self.config.device, self.amp), weights:
                recalibrate_norms(self.model, parts, group=self.group)
        return True

    def advance(self) -> dict:
        """Train one epoch, or the rest of it, and write a checkpoint; returns its row of metrics.csv."""
        try:
            row = self.epoch(self.epochs_done)
        except measuring.NotFinite as error:  # the loss was finite, but not its gradient
            self.not_finite(error.step)
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
            self.optimizer.zero_grad(set_to_none=True)
            loss, right = take_gradient(forward, (x, y), self.scaler, self.config)
            checksum = self.pruner.checksum() if self.pruner and self.group.size > 1 else 0
            losses.append(self.group.join(self.model.parameters(), loss, checksum=checksum, step=self.step + 1))
            self.unread.append(losses[-1])
            scale, skipped = self.update()
            sums.right += right
            self.step += 1
            if self.average is not None:
                self.average.update(self.step)
            self.time += rate / (1.0 - self.config.momentum)
            if self.step % self.config.read_every == 0:
                self.read()
            if self.pruner is not None:
                self.prune((x, y), scale, skipped)
            self.bar.update()
            if self.step % max(10, self.config.read_every) == 0:
                self.show()
            due = self.stop or len(losses) % self.config.checkpoint_every == 0
            if due and len(losses) < self.setup.steps_per_epoch:
                self.catch_up()
                self.settle()
                self.save_state()
                if self.stop:
                    self.leave()
            mark, before = time.perf_counter(), mark
            sums.seconds += mark - before
        self.catch_up()
        sums.seconds += time.perf_counter() - mark
        self.settle()
        if self.step == len(self.setup.schedule):
            self.finish()
        scores = {}
        if self.setup.images.validated:
            [score] = self.scores(self.held_out("validation"))
            self.history.append(score.accuracy)
            scores = dict(zip(VALIDATION_FIELDS, (score.loss, score.accuracy), strict=True))
        else:  # the network is good if its logits are finite
            self.scores([(x, y if y.ndim == 1 else y.argmax(1))])
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
            **scores,
            "expected_complexity": self.pruner.expected_complexity if self.pruner else 1.0,
            "macs": counts.macs,
            "params": counts.params,
            "layers_kept": layers,
            "units_kept": units,
            "undecided": undecided,
            "wait_share": sums.waited / sums.seconds,
        }

    def leave(self) -> NoReturn:
        """Stop after a signal; a checkpoint has been written."""
        raise Stopped(self.stop.number, f"stopped after step {self.step}")

    def no_sums(self) -> Sums:
        return Sums(torch.zeros((), dtype=torch.long, device=self.config.device))

    def tick(self) -> None:
        """Add the time since the last call to the run's."""
        mark, self.mark = self.mark, (time.perf_counter(), time.process_time())
        self.seconds += self.mark[0] - mark[0]
        self.cpu_seconds += self.mark[1] - mark[1]

    def settle(self) -> None:
        """Make the network and its average the same in all processes."""
        for model in (self.model, self.average.model) if self.average else (self.model,):
            self.group.settle(model, step=self.step)

    def held_out(self, split: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the images of a split that is not trained on, "validation" or "test"."""
        images, labels = (getattr(self.setup.images, f"{split}_{what}") for what in ("images", "labels"))
        if len(labels) <= self.group.rank:  # there are more processes than images
            return []
        part = self.config.batch_size // self.config.accumulate // self.group.size
        return self.batches.evaluation(images, labels, evaluated_at_once(part))

    def scores(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], both: bool = False) -> list[Score]:
        """Score of the network, with averaged weights if there are any; with `both`, then without averaging."""
        averaged = [self.average.applied] if self.average else []
        weights = [*averaged, nullcontext] if both or not averaged else averaged
        scores = evaluate(self.model, batches, self.amp, self.group, weights)
        if any(
            math.isnan(score.accuracy) for score in scores
        ):  # the last loss was finite, but not the network after it
            self.not_finite(self.step)
        return scores

    def update(self) -> tuple[float | torch.Tensor, bool | torch.Tensor]:
        """One optimizer step; returns the loss scale of the gradients, and whether they overflowed and the step was skipped."""
        scale = 1.0
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), device=self.config.device))
            self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return scale, False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return scale, self.skipped

    def read(self) -> None:
        """Read the losses since the last call; synchronises with the device."""
        values = [float(loss) for loss in transfer.read(self.unread)]
        first = self.step - len(values) + 1
        self.unread = []
        for step, loss in enumerate(values, start=first):
            self.loss = loss
            if not math.isfinite(loss):
                self.not_finite(step)

    def catch_up(self) -> None:
        """Read everything pending, in every process; the thetas are then up to date at this step."""
        self.read()
        if self.pruner is not None:
            self.pruner.read()

    def prune(
        self, batch: tuple[torch.Tensor, torch.Tensor], scale: float | torch.Tensor, skipped: bool | torch.Tensor
    ) -> None:
        """One pruner step; writes the rows of its check and prints its warnings."""
        with refusals(f" At step {self.step}."):
            check = self.pruner.step(batch, grad_scale=scale, skipped=skipped)
        if check is not None:
            self.structures.add(check.rows)
            for warning in check.warnings if self.group.leads else []:
                self.bar.write(f"warning: {warning}", file=sys.stderr)

    def not_finite(self, step: int) -> NoReturn:
        raise NotFinite(
            f"`loss` must stay finite; got a non-finite loss, logit or gradient at step {step} "
            f"(lr {self.optimizer.param_groups[0]['lr']:.3g}). "
            f"The network after step {self.good_step} is kept in {self.folder}; lower --lr or turn --amp off."
        )

    def counts(self) -> Counts:
        """Counted MACs and parameters of the network at this step."""
        return self.pruner.counts() if self.pruner else self.dense

    def left(self) -> tuple[int, int, int]:
        """Numbers of layers kept, units kept and undecided structures."""
        if self.pruner is not None:
            return self.pruner.layers_kept, self.pruner.units_kept, self.pruner.undecided
        return *self.total, 0

    def show(self) -> None:
        layers, units, undecided = self.left()
        expected = self.pruner.expected_macs if self.pruner else self.dense.macs
        self.bar.set_postfix_str(
            f"loss {self.loss:.3f}, {f'validation accuracy {self.history[-1]:.3f}, ' if self.history else ''}"
            f"expected MACs {expected / self.dense.macs:.0%}, {layers} layers, {units} units, {undecided} undecided",
            refresh=False,
        )

    def save(self) -> None:
        """Save the current network as the last good one."""
        self.good_step = self.step
        if not self.group.leads:
            return
        with self.average.applied() if self.average else nullcontext():
            if self.pruner:
                state, structure = self.pruner.snapshot()
            else:
                state, structure = checkpoint.whole_state(self.model, self.setup.blocks)
        images = self.setup.images
        checkpoint.save(
            self.folder,
            state,
            checkpoint.structure(self.config, images, structure),
        )

    def save_state(self) -> None:
        """Write a checkpoint from which `restore` resumes bit-for-bit, between any two steps."""
        self.tick()
        right = self.group.sum(self.sums.right)
        if not self.group.leads:
            return
        checkpoint.save_state(
            self.folder,
            {
                "config": self.config.identity(),
                "processes": self.group.size,
                "steps_per_epoch": self.setup.steps_per_epoch,
                "classes": list(self.setup.images.classes),
                "images": self.setup.images.fingerprint,
                "answer": list(self.setup.answer),
                **{name: getattr(self, name) for name in PROGRESS},
                "sums": {**self.sums.state(), "right": right.cpu()},
                "lengths": [self.metrics.length(), self.structures.length()],
                "checksums": [self.metrics.checksum, self.structures.checksum],
                "optimizer": optimizer_state(self.model, self.optimizer),
                "scaler": self.scaler.state_dict(),
                "pruner": self.pruner.state_dict() if self.pruner else None,
                "model": None if self.pruner else self.model.state_dict(),
                "average": self.average.model.state_dict() if self.average else None,
                "rng": random_state(self.config.device),
            },
            keep=self.config.keep_checkpoints,
        )

    def restore(self, state: dict) -> None:
        """Restore a checkpoint of `save_state`."""
        restoring.restore(
            state, self.model, self.optimizer, self.scaler, self.pruner, self.config.device, average=self.average
        )
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.sums = Sums.of(state["sums"], self.config.device)
        if not self.group.leads:  # rank 0 has the sum over all processes
            self.sums.right.zero_()

    def result(self, validation: list[Score] | None, test: list[Score]) -> None:
        """Write result.json, and shadow.csv of a shadow run.

        Args:
            validation: Scores on the validation images, None for none: of the network, then of its weights without averaging.
            test: The same on the test images.
        """
        if self.pruner is not None and self.pruner.shadow is not None:
            table = CsvTable(self.folder, shadow.FILE, shadow.FIELDS)
            table.add(self.pruner.shadow.rows(self.pruner.inventory.names()))
            table.close()
        content = result.content(self, build_model(self.config, self.setup.images), validation, test)
        checkpoint.write_text(self.folder / "result.json", json.dumps(content, indent=2) + "\n")
        checkpoint.seal(self.folder, *TABLES, shadow.FILE, "result.json")
        with self.average.applied() if self.average else nullcontext():
            checkpoint.note_answer(self.folder, answer(self.model, self.setup.images.train_images.shape[1:]))
