"""The command line of a run: one flag for each setting; `--help` lists ranges, choices and presets.

The project's other programs use `CommandLine` too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catode import _checksums
from catode.train.settings import presets
from catode.train.settings.config import Config, settings
from catode.train.settings.setting import GROUPS, ConfigError, Setting, nearest

__all__ = ["CommandLine", "build_parser", "parse"]


class CommandLine(argparse.ArgumentParser):
    """An argument parser that raises every error as a `ConfigError` in the package's message form."""

    def error(self, message: str) -> None:
        raise ConfigError(self._one_line(message))

    def _one_line(self, message: str) -> str:
        flags = [s[2:] for s in self._option_string_actions if s.startswith("--")]
        if message.startswith("unrecognized arguments: "):
            first = message.removeprefix("unrecognized arguments: ").split()[0]
            name = first.split("=")[0]
            if not name.startswith("-"):
                return f"`{name}` must follow a flag; got the argument {first!r}. Remove it, or see --help."
            near = nearest(name.lstrip("-"), flags)
            hint = f"Did you mean --{near}?" if near else "See --help for all flags."
            return f"`{name}` must be a known flag; got {first}. {hint}"
        if message.startswith("the following arguments are required: "):
            names = message.removeprefix("the following arguments are required: ").split(", ")
            name = names[0].split("/")[0].lstrip("-").replace("-", "_").lower()
            return f"`{name}` must be given; got no {', no '.join(names)}. See --help."
        if message.startswith("argument "):
            names, _, what = message.removeprefix("argument ").partition(": ")
            if what.startswith("`"):
                return what
            flag = names.split("/")[0]
            name = flag.lstrip("-").replace("-", "_").lower()
            if what.startswith("expected"):
                return f"`{name}` must have a value; got {flag} without one. Write {flag}=VALUE."
            if what.startswith("ignored explicit argument"):
                value = what.removeprefix("ignored explicit argument").strip()
                return f"`{name}` must be given without a value; got {flag}={value}. Write {flag} alone."
            if found := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", what):
                return f"`{name}` must be one of {found[2]}; got {name}={found[1]}. See --help."
            if found := re.fullmatch(r"invalid (int|float) value: (.*)", what):
                kind = {"int": "an integer", "float": "a number"}[found[1]]
                return f"`{name}` must be {kind}; got {name}={found[2]}. Write {flag} NUMBER."
        return message


def _convert(name: str, setting: Setting) -> Any:
    """The argparse type of a numeric setting."""

    def convert(text: str) -> float | int:
        try:
            return setting.kind(text)
        except ValueError:
            what = "an integer" if setting.kind is int else "a number"
            limit = f" {setting.range}" if setting.range else ""
            hint = f" {setting.hint}" if setting.hint else ""
            raise argparse.ArgumentTypeError(f"`{name}` must be {what}{limit}; got {name}={text!r}.{hint}") from None

    return convert


def _default_text(name: str, default: Any) -> str:
    """The default and the presets of a setting, for `--help`."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for (dataset, arch), preset in presets.PRESETS.items():
        if name in preset and (dataset, preset[name]) != ("*", default):
            groups.setdefault((dataset, preset[name]), []).append(arch)
    everywhere = all(name in presets.PRESETS.get((dataset, "*"), {}) for dataset in settings()["dataset"].choices)
    parts = [] if default is None or default is False or everywhere else [_shown(default)]
    for (dataset, value), archs in groups.items():
        where = [] if dataset == "*" else [dataset]
        where += [] if archs == ["*"] else [" ".join(archs)]
        parts.append(f"{' with '.join(where)} {_shown(value)}")
    parts += [f"{own} {_shown(values[name])}" for own, values in presets.OPTIMIZERS.items() if name in values]
    return "default: " + ", ".join(parts) if parts else ""


def _shown(value: Any) -> str:
    return (
        "on" if value is True else "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    )


_OTHER_FLAGS = {"init": ("--pretrained",)}
_METAVARS = {
    "data_dir": "DIR",
    "init": "FILE",
    "keep": "PATTERN",
    "least": "PATTERN=NUMBER",
    "device": "DEVICE",
    "out": "FOLDER",
    "resume": "FOLDER",
}
_EPILOG = """\
terms:
  unit, layer     a channel inside a residual block; a whole residual block
  theta           keep probability of a structure (unit or layer); fixed at 1: committed, fixed at 0: removed
  benefit, price  training loss (nats) that a structure saves; what it must save to be kept, its share of nu
  tolerance       theta below which a structure is removed, if the upper limit of its benefit is below its price
  ODE time        sum of lr / (1 - momentum) over the steps (adamw: of lr): the time variable of the theory

examples:
  python -m catode.train
  python -m catode.train --dataset cifar10 --data-dir DIR --download --target-macs 0.5
  python -m catode.train --dataset folder --data-dir DIR --arch resnet50 --image-size 64 --dry-run
  python -m catode.train --dataset cifar10 --data-dir DIR --arch torchvision:mobilenet_v2 --keep classifier --target-macs 0.5
  python -m catode.train --resume FOLDER
"""


def build_parser() -> argparse.ArgumentParser:
    """A parser with one flag for each setting; the namespace holds only the flags that are given.

    Returns:
        The parser; its `error` raises `ConfigError`.
    """
    parser = CommandLine(
        prog="python -m catode.train",
        description="Train a network once, prune units and layers while training, and save the compact network.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for name, setting in settings().items():
        notes = "; ".join(n for n in (setting.range, _default_text(name, getattr(Config, name))) if n)
        options: dict[str, Any] = {"help": (setting.help + (f" [{notes}]" if notes else "")).replace("%", "%%")}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction if setting.negatable else "store_true"
            options["default"] = argparse.SUPPRESS
        else:
            kind = _METAVARS.get(name, setting.kind.__name__.upper())
            options["metavar"] = "{" + ",".join(setting.choices) + "}" if setting.choices else kind
            if setting.kind in (int, float):
                options["type"] = _convert(name, setting)
            if setting.kind is tuple:
                options |= dict(nargs="+", action="extend")
        groups[setting.group].add_argument("--" + name.replace("_", "-"), *_OTHER_FLAGS.get(name, ()), **options)
    return parser


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read a command line.

    Args:
        argv: Arguments without the program's name; None for `sys.argv`.

    Returns:
        The configuration: flags override presets, presets override defaults.

    Raises:
        ConfigError: for any invalid argument; print it and exit with status 2.
    """
    given = vars(build_parser().parse_args(argv))
    return Config.from_presets(**given) if given.get("resume") is None else _resumed(**given)


_ALLOWED_WITH_RESUME = (
    "threads",
    "device",
    "compile",
    "tensorboard",
    "data_dir",
    "array_gib",
    "workers",
    "checkpoint_every",
    "keep_checkpoints",
)


def _resumed(resume: str, **given: Any) -> Config:
    """The configuration of a run that is resumed."""
    resume = settings()["resume"].check("resume", resume)
    for name, value in given.items():
        if name not in _ALLOWED_WITH_RESUME:
            raise ConfigError(
                f"`{name}` must be left out with resume; got {name}={value!r} and resume={resume!r}. "
                "A resumed run keeps its own settings."
            )
    file = Path(resume) / "config.json"
    if not file.exists():
        raise ConfigError(
            f"`resume` must be the folder of an interrupted run; got resume={resume!r}, which holds no config.json. "
            "Pass the --out of such a run."
        )
    try:
        with file.open("rb") as stream:
            _checksums.check(file, stream)
            text = stream.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"`config.json` must be a text that can be read; got: {reason}. Restore the file from the run. It is {file}."
        ) from None
    except ValueError as error:  # it was changed, or the checksums were
        raise ConfigError(f"{error} Settings that may change go on the command line, such as --threads.") from None
    try:
        return Config.from_json(text, **given, out=resume, resume=resume, dry_run=False)
    except ConfigError as error:
        if any(str(error).startswith(f"`{name}`") for name in given):
            raise
        raise ConfigError(f"{error} It stands in {file}.") from None
