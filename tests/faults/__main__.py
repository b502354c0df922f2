"""What if the disk fails? Lets every call of a run to the operating system fail once, and damages every file of a run.

    python -m tests.faults --jobs 2            everything
    python -m tests.faults --quick             a sample, in less than a minute
    python -m tests.faults --only damage       one of the two parts
    python -m tests.faults --write             everything, with the figures written to docs/testing.md

The exit status is 1 if a case ends in a traceback, in a wrong result that nobody is told of, in a lost run, or in a message
that does not say what to do or which file is meant; each is printed. Calls fail through a library that is compiled with `cc`
and loaded before all others: on Linux alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from . import calls, damage, runs
from .runs import Tally

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- figures of python -m tests.faults -->", "<!-- end of the figures -->"
QUICK = {"calls": 257, "damage": 127}
LOADED = "CATODE_TESTS_SHIM"  # set in the process that has the library


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    found.add_argument("--quick", action="store_true", help="a sample, in less than a minute")
    found.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th case [default: 1]")
    found.add_argument("--only", choices=tuple(QUICK), help="one part: failing calls, or damaged files")
    found.add_argument("--jobs", type=int, default=1, help="processes at a time [default: 1]")
    found.add_argument("--write", action="store_true", help="write the figures to docs/testing.md")
    return found


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given = parser().parse_args(arguments)
    if given.write and (given.quick or given.every > 1 or given.only):
        print("error: `write` must stand without quick, every and only; figures are of everything", file=sys.stderr)
        return 2
    if LOADED in os.environ:
        return work(given)
    if sys.platform != "linux" or calls.compiler() is None:
        print("error: `python -m tests.faults` must run on Linux with a C compiler; got none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        shim = calls.build(Path(folder))
        env = {
            **os.environ,
            "LD_PRELOAD": str(shim),
            LOADED: str(shim),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-u", "-m", "tests.faults", *arguments]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                print(line, end="", flush=True)
    return child.returncode


def work(given: argparse.Namespace) -> int:
    """The campaign, in a process that has the library."""
    runs.prepare()
    begun, tables, offenders = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as made:
        for part in (given.only,) if given.only else QUICK:
            folder = Path(made).resolve() / part
            folder.mkdir()
            every = QUICK[part] if given.quick else given.every
            if part == "calls":
                tally = calls.campaign(folder, given.jobs, every)
                found = [("call: error", tally, calls.GOOD, calls.BAD)]
            else:
                by = damage.campaign(folder, given.jobs, every)
                tally = by["file"]
                found = [(name, by[name], damage.GOOD, damage.BAD) for name in ("file", "tool")]
            offenders += tally.offenders
            tables += [table(*each) for each in found]
    text = "\n\n".join([*tables, conditions(given.jobs, time.monotonic() - begun)])
    print(f"\n{text}\n\n{len(offenders)} cases that must not be")
    if given.write:
        write(text)
    return int(bool(offenders))


def table(first: str, tally: Tally, good: Iterable[str], bad: Iterable[str]) -> str:
    """A table of the good outcomes that occur and of all bad ones."""
    seen = {verdict for counts in tally.counts.values() for verdict in counts}
    return tally.table(first, [*(verdict for verdict in good if verdict in seen), *bad])


def conditions(jobs: int, seconds: float) -> str:
    """Machine, versions and duration, in one line."""
    import torch

    import catode
    from catode.prune.devices.timing import processor

    return (
        f"catode {catode.__version__}, {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}; {seconds:.0f} s with `--jobs {jobs}`."
    )


def write(text: str) -> None:
    """Put the figures between their marks in docs/testing.md."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE} must have the marks {BEGIN} and {END}; got a page without")
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
