"""The small run that is hurt, what must not depend on that, and cases that run in forks of this process."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = [
    *(
        "--dataset=folder",
        "--arch=resnet14",
        "--hidden-scale=0.25",
        "--batch-size=16",
        "--epochs=3",
        "--warmup-epochs=0.6",
    ),
    *("--nu=20", "--memory=10", "--measure-every=1", "--layers-per-probe=3", "--check-every=2", "--checkpoint-every=4"),
    "--threads=1",
]
"""Most units go; a checkpoint in the middle of each epoch and one at its end."""

LIMIT = 120  # seconds for a case
MEMORY = 4 << 30  # bytes for a case
MODULES = ("train.__main__", "report.report", "report.compare.command", "export", "theory.__main__", "theory.plotting")

ABOUT_PRUNING = re.compile(r"warning: (the deciding phase|\d+ of \d+ structures)")  # that so small a run is too short


@dataclass
class Said:
    """What a program did.

    Attributes:
        status: Its exit status; None for an exception that nobody caught, whose traceback is in `err`.
        out: What it printed.
        err: What it printed on standard error.
    """

    status: int | None
    out: str
    err: str

    @property
    def clean(self) -> bool:
        """Whether there is no traceback, nor a complaint of Python about an object that could not be closed."""
        return self.status is not None and not any(
            w in self.err for w in ("Traceback", "Exception ignored", "Error:\n")
        )

    def lines(self, *, notes: bool = False) -> list[str]:
        """Lines on standard error but for the progress bar, and unless `notes` but for warnings and notes."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line]
        lines = [line for line in lines if "?step" not in line and "s/step" not in line]
        lines = [line for line in lines if not ABOUT_PRUNING.match(line)]
        return lines if notes else [line for line in lines if not line.startswith(("note: ", "warning: "))]


def prepare() -> None:
    """Import what every fork needs, measure no latencies, and keep to one thread."""
    for name in MODULES:
        importlib.import_module(f"catode.{name}")
    for name in (
        "matplotlib.backends.backend_agg",
        "scipy.stats",
        "PIL.PngImagePlugin",
        "torch.export",
        "torch._dynamo",
    ):
        importlib.import_module(name)
    import torch

    from catode.train import loop

    torch.set_num_threads(1)
    loop.result.latency_ms = lambda networks, example: [[1.0] * len(networks)] * 2


def make_images(folder: Path) -> Path:
    """Class folders of small made-up images: four classes of bright squares in noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for number in range(4):
            (folder / split / f"c{number}").mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (8, 8), dtype=np.uint8)
                row, column = 4 * (number // 2), 4 * (number % 2)
                pixels[row : row + 4, column : column + 4] += 120
                Image.fromarray(pixels).save(folder / split / f"c{number}" / f"{i:02}.png")
    return folder


def call(main: Callable[[list[str]], int | None], argv: Iterable[str]) -> Said:
    """Run a program's `main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(list(argv)) or 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
    return Said(status, out.getvalue(), err.getvalue())


def catode(*argv: str | Path) -> Said:
    """Run the command ``catode``."""
    from catode.cli import main

    return call(main, map(str, argv))


def forked(work: Callable[[], Any], limit: int = LIMIT) -> Any:
    """The result of a function that runs in a fork; an `EOFError` if that was killed, or took too long."""
    return next(iter(parallel([work], 1, limit)))[1]


def parallel(works: Iterable[Callable[[], Any]], jobs: int, limit: int = LIMIT) -> Iterator[tuple[int, Any]]:
    """Run functions in forks, several at a time; yields the place of each and its result as they end."""
    todo, running = enumerate(works), {}
    while True:
        while len(running) < jobs and (pair := next(todo, None)) is not None:
            running[start(pair[1], limit)] = pair[0]
        if not running:
            return
        child = finished([handle for handle, _ in running])
        key = next(key for key in running if key[0] == child)
        yield running.pop(key), end(*key)


def finished(handles: list[int]) -> int:
    """The first of several pipes that can be read."""
    import select

    return select.select(handles, [], [])[0][0]


def start(work: Callable[[], Any], limit: int) -> tuple[int, int]:
    """Run a function in a fork; returns the pipe of its result and the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    try:
        os.close(reader)
        signal.alarm(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        content = pickle.dumps(work())
        while content:
            content = content[os.write(writer, content) :]
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def end(reader: int, child: int) -> Any:
    """The result of a fork."""
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(content) if content else EOFError("the process was killed, or took too long")


def outcome(folder: Path) -> dict[str, str]:
    """Digests of everything of a finished run that must not depend on what happened, and the names of its files."""
    import torch

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:16]

    result = json.loads((folder / "result.json").read_text())
    result = {k: v for k, v in result.items() if "seconds" not in k and "latency" not in k}
    with (folder / "metrics.csv").open(newline="") as file:
        metrics = [{k: v for k, v in r.items() if k not in ("seconds", "wait_share")} for r in csv.DictReader(file)]
    found = {"result.json": digest(json.dumps(result).encode()), "metrics.csv": digest(json.dumps(metrics).encode())}
    for name in ("structures.csv", "structure.json"):
        found[name] = digest((folder / name).read_bytes())
    weights = torch.load(folder / "model.pt", weights_only=True)
    found["model.pt"] = digest(b"".join(k.encode() + v.numpy().tobytes() for k, v in weights.items()))
    names = {path.name for path in folder.iterdir()}
    found["files"] = " ".join(sorted(n for n in names if not n.endswith(".png") and n != "report.md"))
    return found


def whole(images: Path, out: Path, *flags: str) -> Said:
    """Train the small run from start to end."""
    return catode("train", *FLAGS, f"--data-dir={images}", f"--out={out}", *flags)


def killed(images: Path, out: Path, step: int, *flags: str) -> None:
    """Train the small run until a step, in a fork that is killed there."""
    from catode.train import loop

    def work() -> None:
        before = loop.Trainer.prune

        def prune(self, *args):
            if self.step >= step:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, *args)

        loop.Trainer.prune = prune
        whole(images, out, *flags)

    assert isinstance(forked(work), EOFError)


def without_pictures() -> None:
    """Let the report be made of text alone."""
    from catode.report import report

    report._MAKERS = ()


def fresh_copy(source: Path, folder: Path) -> Path:
    """A folder as another, whatever there was before."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


@dataclass
class Tally:
    """Counts of outcomes by kind of case, and the cases that must not be.

    Attributes:
        counts: Numbers of cases by row and outcome.
        offenders: One text a case.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    offenders: list[str] = field(default_factory=list)

    def add(self, row: str, verdict: str, bad: bool, text: str) -> None:
        counts = self.counts.setdefault(row, {})
        counts[verdict] = counts.get(verdict, 0) + 1
        if bad:
            self.offenders.append(text)

    def table(self, first: str, verdicts: Iterable[str]) -> str:
        """The counts as a table in Markdown."""
        verdicts = list(verdicts)
        lines = ["| " + " | ".join([first, "n", *verdicts]) + " |", "|---|" + "---:|" * (len(verdicts) + 1)]
        rows = [*self.counts.items()]
        total: dict[str, int] = {}
        for _, counts in rows:
            for verdict, n in counts.items():
                total[verdict] = total.get(verdict, 0) + n
        for name, counts in [*rows, ("all", total)]:
            numbers = [sum(counts.values()), *(counts.get(verdict, 0) for verdict in verdicts)]
            lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
        return "\n".join(lines)


def clock() -> float:
    return time.monotonic()
