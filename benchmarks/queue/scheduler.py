"""Starts the runs of the queue in order, each in a process of its own, at low priority, and stops them.

A run that is stopped by anything goes on where it stopped when the queue is started again.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.queue import tables, trial
from benchmarks.queue.book import Book
from benchmarks.queue.places import Places
from benchmarks.queue.program import NONE, ROOT, Program, program
from benchmarks.queue.rows import ROWS, Row
from catode.records import read_json
from catode.train.loop import lock

WORKER = ("-m", "benchmarks.queue.worker")
NICE = 15
"""Added to the niceness of the queue and of all its runs."""
POLL = 0.5
MOST_STARTS = 3
"""Starts of one run, within one start of the queue, that end neither finished nor failed."""


@dataclass(frozen=True)
class Task:
    """A run that may be started now."""

    row: Row
    seed: int

    @property
    def run(self) -> str:
        return self.row.run(self.seed)


def matches(row: Row, seed: int, only: Sequence[str]) -> bool:
    """Whether the name of a run, of its row or of its table matches one of the patterns."""
    names = (row.run(seed), row.name, row.table)
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in only)


def waiting(book: Book, only: Sequence[str] = ("*",)) -> list[Task]:
    """Runs that have not ended, in the order in which they are to be made; only those that match a pattern."""
    found = [
        (priority, Task(row, seed))
        for row in ROWS.values()
        for seed, priority in zip(row.seeds, row.priority, strict=True)
        if matches(row, seed, only) and seed in row.left(book)
    ]
    return [task for _, task in sorted(found, key=lambda one: one[0])]


def ready(book: Book, task: Task) -> bool:
    """Whether all that a run depends on has ended."""
    return all(book.all_ended(ROWS[name]) for name in task.row.after)


def plan(book: Book, task: Task, way: trial.Way, own: Program) -> dict[str, Any]:
    """What a run is started with.

    Raises:
        ValueError: if nothing can be derived from the records.
    """
    return {
        "run": task.run,
        "row": task.row.name,
        "kind": task.row.kind,
        "family": task.row.family,
        "seed": task.seed,
        "commit": own.commit,
        "tree": own.tree,
        "way": way.content(),
        "settings": task.row.given(book, task.seed),
    }


def chosen_way(
    places: Places, book: Book, threads: int | None, jobs: int | None, again: bool, quick: bool
) -> trial.Way:
    """The way to compute, from this folder's trial or a new one; its precision is that of the other runs."""
    if places.trial.exists() and not again:
        way = trial.Way(**read_json(places.trial)["way"])
        way = way if threads in (None, way.threads) else replace(way, threads=threads, step_seconds=None)
    else:
        timed = trial.measure(threads, quick)
        way = trial.best(timed, jobs, os.cpu_count() or 1, _precision(places, book))
        content = {"way": way.content(), "timed": [one.content() for one in timed]}
        places.trial.write_text(json.dumps(content, indent=2) + "\n")
    settled = _precision(places, book)
    if settled is not None and settled != way.amp:
        raise ValueError(
            f"`amp` must be that of the other runs, {settled}; got {way.amp} from {places.trial}. Use --trial to measure again."
        )
    return way


def _precision(places: Places, book: Book) -> str | None:
    """The precision that finished runs on CIFAR-10 have settled, or those under way here; None before the first."""
    plans = [read_json(file) for file in sorted(places.runs.glob("*-s*.json"))]
    begun = {plan["way"]["amp"] for plan in plans if plan["settings"]["dataset"] != "digits"}
    return book.precision() or next(iter(sorted(begun)), None)


class Scheduler:
    """A queue at work.

    Args:
        places: Its folders.
        data_dir: Folder that holds CIFAR-10; None where only the digits are trained.
        way: How to compute.
        own: The version of the package.
        jobs: Runs at a time.
        only: Patterns of names of runs, rows or tables.
        quick: Train every run for one epoch on a few digits.
    """

    def __init__(
        self,
        places: Places,
        data_dir: str | None,
        way: trial.Way,
        own: Program,
        *,
        jobs: int,
        only: Sequence[str] = ("*",),
        quick: bool = False,
    ):
        self.places, self.data_dir, self.way, self.own = places, data_dir, way, own
        self.jobs, self.only, self.quick = jobs, only, quick
        self.running: dict[str, subprocess.Popen] = {}
        self.starts: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.stopped: int | None = None

    def work(self) -> int:
        """Make all runs that can be made; returns the exit status, 128 + number of the signal that stopped it.

        Raises:
            ValueError: if there is nothing that can be made, for the reason of the first run that cannot.
        """
        done = 0
        with self._heeding():
            while True:
                book = Book(self.places.records)
                if self.stopped is None:
                    self._start(book)
                if not self.running:
                    break
                done += self._wait()
        if self.stopped is not None:
            print(f"stopped; go on with the same command. {done} runs were finished", file=sys.stderr)
            return 128 + self.stopped
        book = Book(self.places.records)
        left = waiting(book, self.only)
        if blocked := [task for task in left if not ready(book, task)]:
            first = next(name for name in blocked[0].row.after if not book.all_ended(ROWS[name]))
            print(f"{len(blocked)} runs wait for others that were not made, the first for {first}", file=sys.stderr)
        for run, reason in self.refused.items():
            print(f"not made: {run}: {reason}", file=sys.stderr)
        if left and not done and self.refused:
            raise ValueError(next(iter(self.refused.values())))
        print(f"{done} runs were finished; {len(left)} are left", file=sys.stderr)
        return 0

    def _start(self, book: Book) -> None:
        """Start runs until as many run as may."""
        for task in waiting(book, self.only):
            if len(self.running) >= self.jobs:
                return
            if task.run in self.running or task.run in self.refused or not ready(book, task):
                continue
            try:
                file = self._planned(book, task)
            except (ValueError, OSError) as error:
                self.refused[task.run] = str(error)
                continue
            self.starts[task.run] += 1
            words = [sys.executable, *WORKER, str(file), "--to", str(self.places.to)]
            words += ["--data-dir", self.data_dir] if self.data_dir else []
            words += ["--quick"] if self.quick else []
            environment = os.environ | {"OMP_NUM_THREADS": str(self.way.threads)}
            with self.places.log(task.run).open("a") as log:
                self.running[task.run] = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=environment)
            print(f"started: {task.run}", file=sys.stderr, flush=True)

    def _planned(self, book: Book, task: Task) -> Path:
        """The file of a run's plan, written if it is new.

        Raises:
            ValueError: if it was started by another version of the package, or needs images that are not there.
        """
        if task.row.common["dataset"] != "digits" and self.data_dir is None and not self.quick:
            raise ValueError("`data_dir` must be given for CIFAR-10; got no --data-dir. Give the folder of the images.")
        book.check(task.row.family, self.own)
        file = self.places.plan(task.run)
        if file.exists():
            before = read_json(file)
            if before["tree"] != self.own.tree:
                raise ValueError(
                    f"`commit` must have the package that the run was started with; got {self.own.commit[:12]}, whose catode/ "
                    f"differs from that of {before['commit'][:12]}. Run it in a clone of that commit, or delete {file.stem} and "
                    f"{file.name} in {self.places.runs}."
                )
            return file
        content = plan(book, task, self.way, self.own)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(file)
        return file

    def _wait(self) -> int:
        """Wait until a run ends; returns how many were finished."""
        while all(process.poll() is None for process in self.running.values()):
            time.sleep(POLL)
        ended = {run: process for run, process in self.running.items() if process.poll() is not None}
        for run, process in ended.items():
            del self.running[run]
            status = process.returncode
            told = {0: "finished", 1: "failed, its loss was not finite"}.get(status, f"ended with status {status}")
            print(f"{told}: {run}", file=sys.stderr, flush=True)
            if status not in (0, 1) and (status == 2 or self.starts[run] >= MOST_STARTS) and self.stopped is None:
                self.refused[run] = self._last_words(run)
        finished = sum(process.returncode == 0 for process in ended.values())
        if finished or any(process.returncode == 1 for process in ended.values()):
            with suppress(ValueError):  # of mixed records, which `table` reports
                tables.write(Book(self.places.records), self.places.results)
        return finished

    def _last_words(self, run: str) -> str:
        lines = self.places.log(run).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "it ended without a word"

    @contextmanager
    def _heeding(self) -> Iterator[None]:
        """Stop all runs on SIGTERM and SIGINT; a terminal sends the latter to them itself."""

        def stop(number: int, frame: FrameType | None) -> None:
            first, self.stopped = self.stopped is None, number
            if number == signal.SIGTERM and first:
                for process in self.running.values():
                    process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _yield_to_others() -> None:
    """Take the lowest priority, also among sessions where the kernel shares the processors by session."""
    os.nice(NICE)
    share = Path("/proc/self/autogroup")
    if os.getsid(0) == os.getpid() and os.access(share, os.W_OK):
        share.write_text(str(NICE))


def make(
    places: Places,
    data_dir: str | None,
    *,
    threads: int | None,
    jobs: int | None,
    only: Sequence[str] = ("*",),
    again: bool = False,
    quick: bool = False,
) -> int:
    """Run the queue until nothing is left that can be made.

    Returns:
        The exit status.

    Raises:
        ValueError: for bad input, such as a clone whose package is not that of the finished runs.
    """
    if not waiting(Book(places.records), only):
        if not any(matches(row, seed, only) for row in ROWS.values() for seed in row.seeds):
            raise ValueError(
                f"`only` must match the name of a run, row or table; got {' '.join(only)!r}. See python -m benchmarks.queue."
            )
        print("nothing is left to be made", file=sys.stderr)
        return 0
    own = Program(NONE, NONE) if quick else program()
    places.runs.mkdir(parents=True, exist_ok=True)
    with lock.released(lock.hold(places.runs, "runs")):
        if hasattr(os, "setsid") and os.getpgrp() != os.getpid():
            os.setsid()  # a group of its own, to be paused as a whole
        _yield_to_others()
        places.pid.write_text(f"{os.getpid()}\n")
        try:
            way = chosen_way(places, Book(places.records), threads, jobs, again, quick)
            at_once = jobs or max(1, (os.cpu_count() or 1) // way.threads)
            return Scheduler(places, data_dir, way, own, jobs=at_once, only=only, quick=quick).work()
        finally:
            places.pid.unlink(missing_ok=True)
