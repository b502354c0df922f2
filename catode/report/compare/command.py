"""The command line of the comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from catode import _validate
from catode.report.compare.pictures import picture
from catode.report.compare.runs import groups, read_all
from catode.report.compare.tables import text
from catode.train.settings.commandline import CommandLine

ABOUT = "Compare the pruning decisions of one or many runs with their outcomes."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(prog="python -m catode.report.compare", description=ABOUT)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a finished run, or its record"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for compare.md (also printed) and, for shadow runs (catode.train --shadow), compare.png",
    )
    try:
        args = parser.parse_args(argv)
        args.folders = [Path(_validate.expanded("folders", folder)) for folder in args.folders]
        args.out = args.out and Path(_validate.expanded("out", args.out))
        if args.out is not None and args.out.exists() and not args.out.is_dir():
            _validate.fail("out", "be a folder", str(args.out), hint="Choose another --out.")
        runs = read_all(args.folders)
        report = text(runs)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "compare.md").write_text(report, encoding="utf-8")
            if groups(runs):
                picture(runs, args.out / "compare.png")
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report, end="")
    return 0
