"""The command ``catode``: its first argument names a program, the others are passed to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from catode import __version__
from catode._output import run

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("catode.train.__main__", "train a network once, prune it while training, and save the compact network"),
    "describe": ("catode.report.describe", "print what can go of a network, what it costs, and what cannot go and why"),
    "theory": ("catode.theory.__main__", "derive a tolerance, say why, and draw it"),
    "export": ("catode.export", "export the compact network of a run, or measure its latency on this machine"),
    "report": ("catode.report.__main__", "write the report of a finished run again"),
    "compare": ("catode.report.compare", "compare the pruning decisions of one or many runs with their outcomes"),
}
"""Module and summary of each command; the module's ``main(argv)`` returns the exit status."""


def _help() -> str:
    lines = [f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: catode COMMAND ...",
            "       catode --version",
            "",
            "commands:",
            *lines,
            "",
            "See catode COMMAND --help for the options of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; only that command's modules are imported.

    Args:
        argv: Arguments without the program's name; None for `sys.argv`.

    Returns:
        The exit status; 2 for bad input.
    """
    return run(_command, argv)


def _command(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print("error: `command` must be given; got none. See catode --help.", file=sys.stderr)
        return 2
    command, *rest = argv
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"catode {__version__}")
        return 0
    if command not in COMMANDS:
        from catode.train.settings.setting import nearest

        near = nearest(command, COMMANDS)
        hint = f"Did you mean {near}?" if near else "See catode --help."
        print(f"error: `command` must be one of {', '.join(COMMANDS)}; got {command!r}. {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
