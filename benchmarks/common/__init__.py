"""Shared by all benchmarks: the machine in one line, Markdown tables, intervals, settings, and short trainings.

`pool` trains many runs side by side, `training` such that need another network or trainer than `catode.train` has.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import t as student

from catode.prune.devices.timing import processor
from catode.train import loop
from catode.train.settings.config import Config, ConfigError, settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # the package of the GPU's checks runs where it is not installed

HOME = Path(__file__).resolve().parents[1]
"""The folder of all benchmarks."""
RESULTS = HOME / "results"
CONFIDENCE = 0.95
NEVER = ("resume", "dry_run")
"""Settings that no benchmark admits: each trains its runs from the start."""


def hardware(device: str = "cpu") -> str:
    """The machine of this process, its PyTorch and threads, in one line."""
    return machine(
        {
            "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        }
    )


def machine(env: dict[str, Any]) -> str:
    """The machine of a run, from its env.json, in one line."""
    return (
        f"{env['processor']}, {env['cores']} cores, torch {env['torch']}, {env['threads']} threads, "
        f"Python {env['python']}"
    )


def load() -> str:
    """Load of the machine over the last minute; timings on a busy machine are unreliable."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "load unknown"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    sides = [str.ljust] + [str.rjust] * (len(header) - 1)
    lines = ["| " + " | ".join(s(c, w) for s, c, w in zip(sides, row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval of independent values, such as differences paired by seed.

    Args:
        values: Shape (n,).

    Returns:
        Mean, lower and upper end; both ends are NaN for n = 1.
    """
    values = np.asarray(values, dtype=float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(student.ppf((1.0 + CONFIDENCE) / 2.0, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def spread(values: Sequence[float], form: str = "{:.2f}", factor: float = 1.0) -> str:
    """``mean [low, high], n = N`` of `factor` times the values, with the 95 % t-interval of the mean."""
    n = len(values)
    mean, low, high = (form.format(number) for number in mean_interval(factor * np.asarray(values, dtype=float)))
    return f"{mean} [{low}, {high}], n = {n}" if n > 1 else f"{mean}, n = 1, no interval"


def each(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean and, in brackets, every value; a single value alone."""
    mean = form.format(float(np.mean(values)))
    return f"{mean} ({', '.join(map(form.format, values))})" if len(values) > 1 else mean


def quartiles(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median with quartiles."""
    low, middle, high = (form.format(v) for v in np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)))
    return f"{middle} ({low}-{high})"


def overrides(pairs: Iterable[str], *, flags: Iterable[str] = (), fixed: Iterable[str] = ()) -> dict[str, Any]:
    """Settings of `Config` from strings ``name=value``.

    Args:
        pairs: The strings.
        flags: Settings that have a flag of their own in the command.
        fixed: Settings that the command sets itself, apart from `NEVER`.

    Raises:
        ConfigError: if a string has another form, names a setting not allowed, or has no valid number; `Config` checks
            the rest.
    """
    values, known = {}, settings()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ConfigError(f"`set` must be name=value, a setting's name; got {pair!r}. See catode.train --help.")
        if name in flags:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"`set` must leave out {name}, which has a flag of its own; got {pair!r}. Use {flag}.")
        if name in (*fixed, *NEVER):
            raise ConfigError(f"`set` must leave out {name}, which this command sets itself; got {pair!r}. Remove it.")
        setting = known[name]
        if setting.optional and text.lower() == "none":
            values[name] = None
        elif setting.kind is tuple:
            values[name] = tuple(text.split(","))
        elif setting.kind is bool:
            if text.lower() not in ("true", "false"):
                raise ConfigError(f"`{name}` must be true or false; got {name}={text!r}. Use one of the two.")
            values[name] = text.lower() == "true"
        else:
            try:
                values[name] = setting.kind(text)
            except ValueError:
                raise ConfigError(f"`{name}` must be a number; got {name}={text!r}. Write {name}=NUMBER.") from None
    return values


QUICK: dict[str, Any] = {"arch": "resnet14", "epochs": 1, "warmup_epochs": 0.0, "batch_size": 16, "threads": 1}
QUICK |= {"memory": 10, "check_every": 2}
QUICK_IMAGES = 64
"""Settings of any training under `--quick`: a command takes seconds, shows that it runs, and measures nothing."""


def add_quick(parser: argparse.ArgumentParser) -> None:
    """Give a command the flag `--quick`."""
    parser.add_argument(
        "--quick", action="store_true", help="smallest sizes: shows in seconds that it runs, measures nothing"
    )


def subset(setup: loop.Setup, number: int | None) -> loop.Setup:
    """The same run on the first images alone.

    Args:
        setup: A prepared run, its images in memory.
        number: Training images; a fifth as many validation and test images. None: all.
    """
    if number is None or number >= len(setup.images.train_labels):
        return setup
    images, config = setup.images, setup.config
    splits = {"train": number, "test": number // 5} | ({"validation": number // 5} if images.validated else {})
    names = {f"{split}_{what}": count for split, count in splits.items() for what in ("images", "labels")}
    images = dataclasses.replace(images, **{name: getattr(images, name)[:count] for name, count in names.items()})
    steps = number // config.batch_size
    # settings derived from the run's length are derived again
    config = dataclasses.replace(config, **dict.fromkeys(config.derived), derived=())
    config = config.resolved(steps * config.epochs, setup.group.size)
    schedule = loop.learning_rates(config.schedule, config.lr, steps * config.epochs)
    return dataclasses.replace(setup, config=config, images=images, steps_per_epoch=steps, schedule=schedule)


def run_quick(config: Config, *, progress: bool = False) -> Path:
    """Train on the first `QUICK_IMAGES` images; replaces `catode.train.run` under `--quick`."""
    return loop.train(subset(loop.prepare(config), QUICK_IMAGES), progress=progress)


FORMER = {"memory": 200, "check_every": 50}
"""Defaults of older records; runs as short as those still have these values."""


def differences(config: dict[str, Any]) -> str:
    """Settings of a resolved configuration that change what is computed and differ from the preset, as "a=1, b=x".

    Records from before there were validation images are not marked: `benchmarks.cifar.table` refuses to mix them with others.
    The number of epochs is not among them, nor those named in its `derived`, which follow from the run's length, nor, where
    nothing is pruned, the pruner's settings.
    """
    groups = {"data", "training"} | ({"pruning", "gates"} if config["nu"] > 0 else set())
    names = {name for name, setting in settings().items() if setting.identity and setting.group in groups}
    names -= {"derive_tol", "epochs"}
    base = Config.from_presets(
        dataset=config["dataset"],
        arch=config["arch"],
        epochs=config["epochs"],
        data_dir=None if config["dataset"] == "digits" else "unused",
    )
    names -= set(config.get("derived", ()))
    if config.get("validation_share", 0.0) == 0:
        names -= {"validation_share"}
    names -= {n for n, value in FORMER.items() if config.get(n) == value and getattr(base, n) is None}
    changed = {n: config[n] for n in sorted(names) if n in config and config[n] != getattr(base, n)}
    return ", ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in changed.items())


def commands() -> list[str]:
    """Names of the benchmarks, each the command ``python -m benchmarks.NAME``: modules, and packages with a ``__main__``."""
    packages = (path.parent.name for path in HOME.glob("*/__main__.py"))
    return sorted({*packages, *(path.stem for path in HOME.glob("[a-z]*.py"))})


def check_name(name: str, own: str) -> str:
    """The name of a result file that overwrites no other benchmark's.

    Args:
        name: The name requested.
        own: The benchmark that asks.

    Raises:
        ConfigError: if it is not a plain name, is another benchmark's, or begins like one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(
            f"`write` must be a plain name of letters, digits, - and _; got write={name!r}. Use --write {own}."
        )
    for other in sorted({*commands()} - {own}):
        if name == other or name.startswith(f"{other}_"):
            raise ConfigError(
                f"`write` must not be the name of another benchmark's results; got write={name!r}, of benchmarks.{other}. "
                f"Use --write {own}."
            )
    return name


def publish(name: str, text: str, write: bool) -> None:
    """Print a result, and put it into ``benchmarks/results/NAME.md`` if asked to."""
    print(text)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text + "\n")
        print(f"written: benchmarks/results/{name}.md", file=sys.stderr)


def publish_picture(name: str, figure: Figure) -> None:
    """Put a figure into ``benchmarks/results/NAME.png``."""
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=150)
    print(f"written: benchmarks/results/{name}.png", file=sys.stderr)


def guarded(main: Callable[[], None]) -> None:
    """Run a command; bad input is one line and exit status 2, a loss that is not finite one line and exit status 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except loop.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
