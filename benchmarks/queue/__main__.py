"""The runs behind the results: what is done, make what is missing, tables from the records.

    python -m benchmarks.queue [status] [--runs DIR] [--to DIR]
    python -m benchmarks.queue run --runs DIR --data-dir DIR [--to DIR] [--threads N] [--jobs N] [--only GLOB ...] [--trial]
    python -m benchmarks.queue latency [--to DIR] [--seconds S]
    python -m benchmarks.queue table [--to DIR] [--write]

The rows and their order are data, in `benchmarks.queue.rows`; what they are for and how they are judged stands in
benchmarks/protocol.md. `run` works at low priority, each run in a process of its own. Whatever ends it, the same command goes on
where it stopped. A finished run is condensed into TO/records/queue/RUN, and the tables in TO/results are rewritten. `latency` times
all final networks in one sitting, ten seconds each, into TO/records/queue/latency.json: pause the queue for it.

It must be started in a clone whose catode/ is as its commit has it; the commit and the tree of catode/ are recorded. Runs of one
family (dense rows and rivals; pruned rows; premature pruning) must have one tree: in a clone with another one they are refused.

To stop it: kill PID, where PID stands in RUNS/queue.pid. Every run stops after the step at hand and writes a checkpoint.
To pause it for timings: kill -STOP -- -PID, which halts the queue and all its runs; kill -CONT -- -PID goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import add_quick, guarded
from benchmarks.queue import latency, scheduler, status, tables
from benchmarks.queue.book import Book
from benchmarks.queue.places import HOME, Places
from catode._validate import check_int, check_interval
from catode.train.settings.commandline import CommandLine


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(
        prog="python -m benchmarks.queue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(do=_status, runs=None, to=HOME)
    told = commands.add_parser("status", help="what is done, running and waiting, and the hours left (the default)")
    told.add_argument("--runs", type=Path, help="folder of the runs; without it, records alone are looked at")
    told.set_defaults(do=_status)
    make = commands.add_parser("run", help="make what is missing, in order")
    make.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    make.add_argument("--data-dir", help="folder that holds CIFAR-10")
    make.add_argument("--threads", type=int, help="CPU threads of each run (what the trial finds)")
    make.add_argument("--jobs", type=int, help="runs at a time (as many as the cores hold)")
    make.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="runs, rows or tables whose names match")
    make.add_argument("--trial", action="store_true", help="time precisions, memory formats and threads again")
    add_quick(make)
    make.set_defaults(do=_run)
    show = commands.add_parser("table", help="print all tables")
    show.add_argument("--write", action="store_true", help="write them and the picture to TO/results")
    show.set_defaults(do=_table)
    sitting = commands.add_parser("latency", help="time all final networks in one sitting, from their records")
    sitting.add_argument("--seconds", type=float, default=latency.SECONDS, help=f"time for each ({latency.SECONDS:g})")
    sitting.set_defaults(do=_latency)
    for command in (told, make, show, sitting):
        command.add_argument("--to", type=Path, default=HOME, help="folder of records/queue and results (benchmarks/)")
    args = parser.parse_args(argv)
    args.do(args)


def _status(args: argparse.Namespace) -> None:
    print(status.text(Places(args.runs, args.to)))


def _run(args: argparse.Namespace) -> None:
    for name in ("threads", "jobs"):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name), low=1, hint="Leave it out.")
    places = Places(args.runs.absolute(), args.to.absolute())
    data_dir = None if args.data_dir is None else str(Path(args.data_dir).expanduser().absolute())
    code = scheduler.make(
        places, data_dir, threads=args.threads, jobs=args.jobs, only=args.only, again=args.trial, quick=args.quick
    )
    if code:
        sys.exit(code)


def _latency(args: argparse.Namespace) -> None:
    seconds = check_interval("seconds", args.seconds, 0, 3600, low_open=True, hint="Use 10.")
    print(f"written: {latency.write(Places(None, args.to).records, seconds).relative_to(args.to)}")


def _table(args: argparse.Namespace) -> None:
    places = Places(None, args.to)
    book = Book(places.records)
    pages = [text for table in tables.TABLES if (text := tables.page(book, table)) is not None]
    print("\n\n".join(pages) if pages else "no run is finished yet")
    if args.write:
        for file in tables.write(book, places.results):
            print(f"written: {file.relative_to(args.to)}", file=sys.stderr)


if __name__ == "__main__":
    guarded(main)
