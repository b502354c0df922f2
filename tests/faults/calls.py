"""Every call of a run to the operating system that changes its folder fails once."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import runs
from .runs import Said, Tally

SOURCE = Path(__file__).with_name("shim.c")
SHORT, KILL = -1, -2  # as in shim.c
NAMES = {SHORT: "a short write", KILL: "a kill"}
FAULTS = {
    "open": (errno.EACCES, errno.ENOSPC),
    "mkdir": (errno.EACCES, errno.ENOSPC),
    "write": (errno.ENOSPC, errno.EIO, SHORT),
    "truncate": (errno.EIO,),
    "fsync": (errno.EIO, errno.ENOSPC),
    "close": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EACCES, errno.EIO),
}
"""Errors of each kind of call, which take turns, as does a kill before it."""

FINISHED, RESUMED, AGAIN = "finished, all right", "one line, then resumed", "one line, then begun again"
KILLED, REPORT = "killed, then resumed", "finished, one line on the report"
TRACEBACK, WRONG, LOST, SILENT = "traceback", "wrong result", "run lost", "no advice"
GOOD = (FINISHED, REPORT, RESUMED, AGAIN, KILLED)
BAD = (TRACEBACK, WRONG, LOST, SILENT)


def compiler() -> str | None:
    """The C compiler; None if there is none."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile shim.c.

    Raises:
        OSError: if that fails; the message is what the compiler said, in one line.
    """
    path = folder / "shim.so"
    command = [compiler() or "cc", "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]} cannot compile {SOURCE.name}: {(done.stderr.splitlines() or ['?'])[0]}")
    return path


class Shim:
    """shim.c, which is loaded before everything else in this process."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.library.fault_call.restype = ctypes.c_char_p
        self.library.fault_count.restype = ctypes.c_long
        self.library.fault_begin.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)

    def during(self, folder: Path, n: int, error: int, work: Callable[[], Said]) -> tuple[Said, list[str]]:
        """Do something while the n-th call under a folder fails; also returns the calls. n = -1 lets none fail."""
        self.library.fault_begin(os.fsencode(folder), n, error)
        said = work()
        self.library.fault_end()
        calls = [self.library.fault_call(i).decode() for i in range(self.library.fault_count())]
        return said, calls


@dataclass(frozen=True)
class Scene:
    """A command whose calls fail.

    Attributes:
        name: Its name.
        before: A folder as it is before; None if there is none.
        argv: The arguments of ``catode train``, but for the folder.
        pictures: Whether its report has pictures, which take time.
    """

    name: str
    before: Path | None
    argv: tuple[str, ...]
    pictures: bool = False

    def set(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, folder)

    def run(self, folder: Path) -> Said:
        if not self.pictures:
            runs.without_pictures()
        place = f"--out={folder}" if self.before is None else f"--resume={folder}"
        return runs.catode("train", *self.argv, place)


def scenes(folder: Path) -> list[Scene]:
    """The scenes: a run from its start, one that goes on after a kill, and the end of one with the report's pictures."""
    images = runs.make_images(folder / "images")
    runs.killed(images, folder / "cut", 11)
    made = folder / "made"

    def stop() -> None:
        from catode.report import report

        report.write = lambda path: os.kill(os.getpid(), 9)
        runs.whole(images, made)

    assert isinstance(runs.forked(stop), EOFError)
    return [
        Scene("a run", None, (*runs.FLAGS, f"--data-dir={images}")),
        Scene("a resumed run", folder / "cut", ("--threads=1",)),
        Scene("the end of a run, with its report", made, ("--threads=1",), pictures=True),
    ]


def attempt(scene: Scene, folder: Path, n: int, error: int, expected: dict[str, str]) -> tuple[str, str, str]:
    """Let one call fail; returns its name, the verdict, and what was said."""
    scene.set(folder)
    shim = Shim()
    done = runs.forked(lambda: shim.during(folder, n, error, lambda: scene.run(folder)))
    if isinstance(done, EOFError):
        said, name = None, ""
        if error != KILL:
            return name, LOST, str(done)
    else:
        said, calls = done
        name = calls[n] if n < len(calls) else "none"
    verdict, text = judge(scene, folder, said, expected)
    if error != KILL or verdict not in (RESUMED, AGAIN):
        return name, verdict, text
    return name, KILLED, text


def judge(scene: Scene, folder: Path, said: Said | None, expected: dict[str, str]) -> tuple[str, str]:
    """Go on as the program said, or as the documentation does after a kill, and compare the end."""
    text = "" if said is None else said.err.strip()
    if said is not None and not said.clean:
        return TRACEBACK, text
    if said is not None and said.status == 0:
        found = compare(folder, expected)
        if found:
            return WRONG, f"{found}; {text}"
        lines = said.lines(notes=True)
        if not lines:
            return FINISHED, text
        again = runs.forked(lambda: runs.catode("report", folder)) if not (folder / "report.md").exists() else None
        good = len(lines) == 1 and lines[0].startswith("warning: ") and (again is None or again.status == 0)
        return (REPORT if good else SILENT), text
    if said is not None and (
        len(said.lines()) != 1 or not said.lines()[0].startswith("error: ") or said.status not in (1, 2)
    ):
        return SILENT, f"status {said.status}; {text}"
    resume = (folder / "config.json").exists() if said is None else f"--resume {folder}" in text
    if said is not None and not resume and not re.search(r"same command|Choose another", text):
        return SILENT, text
    if said is None and (folder / "result.json").exists() and not list(folder.glob("checkpoint-*.pt")):
        found = compare(folder, expected)  # killed in the last call
        return (WRONG, found) if found else (RESUMED, text)
    after = Scene("", folder, ("--threads=1",)) if resume else scene
    follow = runs.forked(lambda: after.run(folder))
    if isinstance(follow, EOFError) or follow.status != 0:
        return LOST, f"{text}\nthen: {follow if isinstance(follow, EOFError) else follow.err.strip()}"
    found = compare(folder, expected)
    if found:
        return WRONG, f"{found}; {text}"
    return (RESUMED if resume else AGAIN), text


def compare(folder: Path, expected: dict[str, str]) -> str:
    """What of a finished run is not as expected; empty if all is."""
    try:
        found = runs.outcome(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found["files"] = " ".join(name for name in found["files"].split() if name != "lock")
    return ", ".join(f"{k} {found[k]}" for k in expected if found[k] != expected[k])


def points(calls: list[str]) -> Iterator[tuple[int, int]]:
    """Each call's number with one error: the errors of its kind, and a kill, take turns."""
    turns: dict[str, int] = {}
    for n, call in enumerate(calls):
        kind = call.split()[0]
        errors = (*FAULTS[kind], KILL)
        turn = turns[kind] = turns.get(kind, -1) + 1
        yield n, errors[turn % len(errors)]


def campaign(folder: Path, jobs: int, every: int = 1, say: Callable[[str], None] = print) -> Tally:
    """Let each call of each scene fail in each way.

    Args:
        folder: An empty folder to work in.
        jobs: Processes at a time.
        every: Only each so-manieth case.
        say: Prints a line.
    """
    tally, shim = Tally(), Shim()
    known = scenes(folder)
    for scene in known:
        place = folder / "run"
        scene.set(place)
        said, calls = runs.forked(lambda: shim.during(place, -1, 0, lambda: scene.run(place)))  # noqa: B023
        assert said.status == 0 and said.clean, said.err
        expected = runs.outcome(place)
        if scene is known[0]:
            first = expected
        assert {**expected} == {**first}, scene.name
        cases = list(points(calls))[::every]
        works = [partial(attempt, scene, folder / f"run{i}", n, error, expected) for i, (n, error) in enumerate(cases)]
        works = [partial(removed, work, folder / f"run{i}") for i, work in enumerate(works)]
        begun = runs.clock()
        for i, found in runs.parallel(works, jobs):
            n, error = cases[i]
            name, verdict, text = (calls[n], LOST, str(found)) if isinstance(found, EOFError) else found
            kind = calls[n].split()[0]
            label = NAMES.get(error) or errno.errorcode[error]
            where = f"{scene.name}, call {n}, {name or calls[n]}, {label}"
            tally.add(f"{kind}: {label}", verdict, verdict in BAD, f"{verdict}: {where}: {text}")
            if verdict in BAD:
                say(tally.offenders[-1])
        say(f"{scene.name}: {len(calls)} calls, {len(cases)} cases, {runs.clock() - begun:.0f} s")
    tally.counts = dict(sorted(tally.counts.items()))
    return tally


def removed(work: Callable[[], tuple], folder: Path) -> tuple:
    """Do something, and remove a folder."""
    try:
        return work()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
