"""Command line of the report: ``python -m catode.report FOLDER`` makes report.md and its pictures again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from catode._output import run
from catode._validate import expanded
from catode.train.settings.commandline import CommandLine

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    parser = CommandLine(
        prog="python -m catode.report",
        description="Make the report of a finished run again, from the files of its folder alone.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a finished run")
    try:
        folder = expanded("folder", parser.parse_args(argv).folder)
        from catode.report import report

        print(f"report {report.write(Path(folder))}")
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
