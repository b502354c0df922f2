"""Training runs that the trainer's command line has no settings for: another network, or a trainer with one more step.

An interrupted run goes on where it stopped, as those of `benchmarks.common.pool.complete` do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from benchmarks.common import QUICK_IMAGES, pool, subset
from catode.prune.checking import PruningWarning
from catode.prune.describe.protect import described
from catode.train import run
from catode.train.loop import Setup, Trainer, checkpoint, lock, prepare
from catode.train.loop.layout import memory_format
from catode.train.settings.config import Config, ConfigError

Change = Callable[[nn.Module, Setup], nn.Module]


def complete(
    config: Config,
    *,
    change: Change | None = None,
    kind: type[Trainer] = Trainer,
    flag: str = "runs",
    quick: bool = False,
    images: int | None = None,
) -> Path:
    """Train one run, resume it if it was interrupted, or do nothing if it is finished.

    Args:
        config: The run; `resume` is set here.
        change: Makes the network that is trained of the fresh one, before the first step; the same one every time, up to the
            values of its tensors. None trains the fresh one.
        kind: The trainer.
        flag: Command-line flag of the folder, for messages.
        quick: Train on the first `QUICK_IMAGES` images alone.
        images: Train on so many, see `benchmarks.common.subset`; None for all.

    Returns:
        Its folder.

    Raises:
        ValueError: if the folder holds another run than the planned one, or the configuration cannot be run.
    """
    folder = Path(config.out)
    if pool.finished(config, flag):
        return folder
    resumed = (folder / "config.json").exists()
    images = QUICK_IMAGES if quick else images
    if change is None and kind is Trainer and images is None:
        return run(replace(config, resume=config.out) if resumed else config, progress=False)
    setup = _prepared(config, folder, images)
    if change is not None:
        own = setup.config
        changed = change(setup.model, setup).train().to(own.device, memory_format=memory_format(own))
        setup = replace(setup, model=changed, blocks=described(changed, setup.example))
    if resumed:
        state, _ = checkpoint.load_state(folder)
        setup = replace(setup, config=replace(setup.config, resume=config.out), state=state)
    return _train(kind, setup, folder)


def _prepared(config: Config, folder: Path, images: int | None) -> Setup:
    """A prepared run from its start, whether or not its folder exists."""
    unused = folder.with_name(f"{folder.name}.new")
    if unused.exists():
        raise ConfigError(f"`out` must have no folder beside it named {unused.name}; got {str(unused)!r}. Delete it.")
    setup = subset(prepare(replace(config, out=str(unused))), images)
    return replace(setup, config=replace(setup.config, out=str(folder)))


def _train(kind: type[Trainer], setup: Setup, folder: Path) -> Path:
    """`catode.train.loop.train` of one process, with any trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock.released(lock.hold(folder)):
        trainer = kind(setup, folder, False)
        try:
            with trainer.stop.heeded(), warnings.catch_warnings():
                warnings.simplefilter("ignore", PruningWarning)  # printed as lines of the run
                trainer.train()
        finally:
            trainer.close()
        checkpoint.drop_states(folder)
        lock.drop(folder)
    return folder
