"""Networks that nobody here wrote, to half their MACs while they are trained, and their dense twins.

    python -m benchmarks.anymodel --runs DIR --data-dir DIR [--only GLOB ...] [--table] [--quick] [--write]

The rows are in `benchmarks.anymodel.rows`; each is trained twice on CIFAR-10 with the same settings and seed, with
``target_macs`` and without gates (nu = 0). Finished runs in --runs are kept and interrupted ones go on; each finished one leaves
a record in benchmarks/records/anymodel, of which the table and the picture are made. --table trains nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from benchmarks import copies
from benchmarks.anymodel import picture, table
from benchmarks.anymodel.rows import ROWS, Row
from benchmarks.common import HOME, QUICK_IMAGES, add_quick, guarded, publish, publish_picture, training
from benchmarks.prunability.models import declare_operators
from catode.report import report
from catode.train import data
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

RECORDS = HOME / "records" / "anymodel"


def train(row: Row, kind: str, runs: Path, data_dir: str | None, quick: bool) -> Path:
    """Train one run, or go on with it; returns its folder, with its report."""
    given = row.settings(kind, quick) | ({} if quick else {"data_dir": data_dir})
    config = Config.from_presets(**given, out=str(runs / f"{row.name}-{kind}"))
    folder = training.complete(config, images=QUICK_IMAGES if quick else row.images)
    report.write(folder)
    return folder


@cache
def _pixels(data_dir: str) -> str | None:
    """Fingerprint of the images, at their own size."""
    return copies.fingerprint(data.load("cifar10", data_dir))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.anymodel", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/anymodel"), help="folder of the runs")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that holds CIFAR-10")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="names of runs, such as 'mobilenet*'")
    parser.add_argument("--table", action="store_true", help="train nothing: table and picture of the records")
    add_quick(parser)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/anymodel.md and .png")
    args = parser.parse_args(argv)
    declare_operators()
    records = args.runs / "records" if args.quick else RECORDS
    for row in () if args.table else ROWS:
        for kind in ("half", "dense"):
            if any(fnmatchcase(f"{row.name}-{kind}", pattern) for pattern in args.only):
                folder = train(row, kind, args.runs, args.data_dir, args.quick)
                size = table.record(folder, records, None if args.quick else _pixels(args.data_dir))
                print(f"{folder.name}: record of {size / 1024:.0f} KiB", file=sys.stderr, flush=True)
    if args.write and not args.quick:
        publish_picture("anymodel", picture.draw(records))
    publish("anymodel", table.text(records), args.write and not args.quick)


if __name__ == "__main__":
    guarded(main)
