"""Many runs on the CPU, a few at a time with one thread each; finished runs are not repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.common import run_quick
from catode.records import read_json
from catode.train import Config, run

THREADS = "OMP_NUM_THREADS"


def finished(config: Config, flag: str = "runs") -> bool:
    """Whether the run's folder holds it, finished.

    Args:
        config: The run.
        flag: Command-line flag of the folder, for the message.

    Raises:
        ValueError: if the folder holds another run than the planned one.
    """
    out = Path(config.out)
    if (out / "config.json").exists():
        there, own = read_json(out / "config.json"), json.loads(json.dumps(config.identity()))
        there |= dict.fromkeys(there.get("derived", ()))
        other = [
            name
            for name in own
            if there.get(name, getattr(Config, name)) != own[name] and name not in ("out", "data_dir")
        ]
        if other:
            raise ValueError(
                f"`{flag}` must hold runs as planned here; got {str(out)!r} with {other[0]}={there.get(other[0])!r} "
                f"in place of {own[other[0]]!r}. Delete that folder or give another --{flag}."
            )
    return (out / "result.json").exists()


def complete(config: Config, *, flag: str = "runs", progress: bool = False, quick: bool = False) -> Path:
    """Train one run, resume it if it was interrupted, or do nothing if it is finished.

    Args:
        config: The run; `resume` is set here.
        flag: Command-line flag of the folder, for the message.
        progress: Show a progress bar.
        quick: Train on the first images alone.

    Returns:
        Its folder.

    Raises:
        ValueError: if the folder holds another run than the planned one, or the configuration cannot be run.
    """
    if not finished(config, flag):
        if (Path(config.out) / "config.json").exists():
            config = replace(config, resume=config.out)
        (run_quick if quick else run)(config, progress=progress)
    return Path(config.out)


def train(configs: Iterable[Config], *, processes: int = 2, quick: bool = False) -> None:
    """Train missing runs and resume interrupted ones.

    Args:
        configs: The runs.
        processes: Runs at a time; a single one is trained in this process.
        quick: Train on the first images alone.

    Raises:
        ValueError: if a folder holds another run than the planned one; nothing is trained then.
    """
    todo = [config for config in configs if not finished(config)]
    if not todo:
        return
    print(f"{len(todo)} runs are to be trained, {processes} at a time", file=sys.stderr)
    todo.sort(key=lambda config: (not config.shadow, config.nu == 0))  # longest first
    if processes == 1:
        for config in todo:
            complete(config, quick=quick)
        return
    context = multiprocessing.get_context("spawn")
    with _single_threaded(), ProcessPoolExecutor(max_workers=processes, mp_context=context) as pool:
        started = {pool.submit(complete, config, quick=quick): config for config in todo}
        for number, future in enumerate(as_completed(started), 1):
            future.result()
            print(f"  {number}/{len(todo)} {started[future].out}", file=sys.stderr, flush=True)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Limit worker processes started inside this context to one thread each."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before
