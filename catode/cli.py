"""The command ``catode``: one word chooses a program, what follows is that program's own command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from catode import __version__
from catode._output import run

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("catode.train.__main__", "train a network once, pruning on the way, and keep the compact network"),
    "theory": ("catode.theory.__main__", "derive a tolerance, say why, and draw it"),
    "export": ("catode.export", "the compact network of a run as a program for elsewhere, or its latency here"),
    "report": ("catode.report.__main__", "the report of a finished run, made again"),
    "compare": ("catode.report.compare", "what became of every decision, over one or many runs"),
}
"""Module, whose ``main(argv)`` returns the exit status, and summary of each command; ``python -m`` runs the same."""


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
            "catode COMMAND --help says more.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; only its own imports are loaded.

    Args:
        argv: Arguments without the program's name; None for those of the process.

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
