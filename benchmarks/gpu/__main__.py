"""All that needs a GPU, in one command of some minutes: correctness, ratios of step times, and a ResNet-56 on CIFAR-10.

    python -m benchmarks.gpu --minutes 8 --images ARCHIVE --out FOLDER     (again, to go on where it stopped)
    python -m benchmarks.gpu --smoke                                        (on a CPU, in less than a minute; measures nothing)
    python -m benchmarks.gpu --minutes 0 --out FOLDER --write               (the table again, and a copy in benchmarks/results)
    python -m pytest tests/test_gpu.py -m cuda                              (the checks alone, as tests)

Parts, in this order: `benchmarks.gpu.checks`, `.runs` and `.compiling` (one function a check), `.ratios`, `.training`. The package
need not be installed: the command runs from a copy of the tree, and needs no network.

Nothing begins that cannot end in time: every unit has a limit, at which it is killed. Records are flushed to FOLDER/records.jsonl
as they come, and FOLDER/gpu.md holds the table so far, so that nothing is lost if the command is killed. A second call with the
same FOLDER leaves out what has a result (failed checks too, without `--again`), and the trainings go on from FOLDER/NAME.tar.
FOLDER gets six files of at most some 15 MB each: where a machine keeps nothing, take all of them back, and put them into the folder
again before the next call.

ARCHIVE is the JPEG copy of CIFAR-10 (a tar of train/ and test/ with class folders), or a folder with the official pickles.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from benchmarks.common import RESULTS, guarded, publish
from benchmarks.gpu import images
from benchmarks.gpu import training as trainings
from benchmarks.gpu.records import BEGUN, ENDS, FAILED, FILE, NOTED, SKIPPED, Records
from benchmarks.gpu.table import page
from benchmarks.gpu.units import Place, load
from catode._validate import check_positive
from catode.train.settings.commandline import CommandLine

ROOT = Path(__file__).parent.parent.parent
SHAPE = ROOT / "benchmarks" / "records" / "r56-half-s0" / "structure.json"
KEPT = ROOT / "benchmarks" / "records" / "gpu.jsonl"
SHARES = {"checks": 0.45, "ratios": 0.7}  # of the time, after which the next part begins
EPOCHS, SMOKE_EPOCHS = 30, 2
LAST = 4.0  # seconds for the table
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic algorithms need it from the start of a process
POLL = 0.2
WORKER = [sys.executable, "-m", "benchmarks.gpu.worker"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (8); 0 prints the table alone")
    parser.add_argument(
        "--smoke", action="store_true", help="smallest sizes on the CPU: shows that it runs, measures nothing"
    )
    parser.add_argument(
        "--images", type=Path, help="archive of CIFAR-10's JPEG copy, or folder of the official pickles"
    )
    parser.add_argument("--out", type=Path, help="folder for records, table and checkpoints (a new one)")
    parser.add_argument("--device", default="cuda", help="device (cuda)")
    parser.add_argument(
        "--epochs", type=int, help="epochs of the trainings, of which as many are run as fit (30; 2 with --smoke)"
    )
    parser.add_argument(
        "--shape", type=Path, help="structure.json whose stage means shape a rival (that of r56-half-s0)"
    )
    parser.add_argument("--only", choices=("checks", "ratios", "training"), help="one part alone")
    parser.add_argument("--again", action="store_true", help="also run again what failed")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/gpu.md and benchmarks/records/gpu.jsonl"
    )
    args = parser.parse_args(argv)
    begin = time.time()
    if args.minutes != 0:
        check_positive("minutes", args.minutes)
    for name in ("images", "shape"):
        if getattr(args, name) is not None and not getattr(args, name).exists():
            raise ValueError(f"`{name}` must exist; got {str(getattr(args, name))!r}. Leave it out, or name another.")
    place = Place("cpu" if args.smoke else args.device, args.smoke)
    out = args.out or Path(tempfile.mkdtemp(prefix="catode-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    records = Records(out / FILE)
    records.mend()
    if args.minutes > 0:
        with tempfile.TemporaryDirectory(prefix="catode-gpu-") as work, (out / "log.txt").open("a") as log:
            call = Call(place, records, begin, begin + 60 * args.minutes - LAST, Path(work), log)
            call.machine()
            call.run(args)
    text = page(records)
    (out / "gpu.md").write_text(text + "\n")
    publish("gpu", text, args.write)
    if args.write:
        kept = [one for one in records.read() if one["status"] != BEGUN]
        KEPT.write_text("".join(json.dumps(one) + "\n" for one in kept))
        print(f"written: {KEPT.relative_to(RESULTS.parent.parent)}", file=sys.stderr)
    print(f"records: {out}", file=sys.stderr)


class Call:
    """One call of the command.

    Args:
        place: Where it runs.
        records: The records.
        begin: `time.time()` at its begin.
        until: `time.time()` at which everything must have ended.
        work: Folder for images and runs.
        log: File for what processes print.
    """

    def __init__(self, place: Place, records: Records, begin: float, until: float, work: Path, log: IO[str]):
        self.place, self.records, self.begin, self.until, self.work, self.log = place, records, begin, until, work, log
        self.unpacking: subprocess.Popen | None = None

    def machine(self) -> None:
        """Record the machine."""
        import numpy as np
        import torch

        lines = [
            f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} cores"
        ]
        if self.place.cuda:
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
            try:
                told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
            except (OSError, subprocess.SubprocessError) as error:
                told = f"nvidia-smi failed: {type(error).__name__}"
            lines.insert(0, f"{told}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
        else:
            lines.insert(
                0, f"no GPU: {self.place.device}{', smallest sizes, measures nothing' if self.place.smoke else ''}"
            )
        self.records.add("machine", "machine", NOTED, lines=lines)

    def run(self, args) -> None:
        """Run the parts."""
        parts = [args.only] if args.only else ["checks", "ratios", "training"]
        wanted = "training" in parts and trainings.left(self.records)
        data_dir = self.start_unpacking(args.images) if wanted else None
        for part in ("checks", "ratios"):
            if part not in parts:
                continue
            if part == "ratios" and self.unpacking is not None:
                self.unpacking.wait(max(self.until - time.time(), 1.0))  # it would disturb the times
            share = SHARES[part] if len(parts) > 1 and not self.place.smoke else 1.0
            self.units(part, min(self.begin + share * (self.until - self.begin), self.until), args.again)
            self.show()
        if data_dir is not None:
            if not self.unpacked(data_dir):
                return
            if time.time() + (0 if self.place.smoke else trainings.LEAST) > self.until:
                return
            shape = args.shape or (SHAPE if SHAPE.exists() and not self.place.smoke else None)
            trainings.train_all(
                self.place,
                self.records,
                data_dir,
                self.work / "runs",
                self.until,
                epochs=args.epochs or (SMOKE_EPOCHS if self.place.smoke else EPOCHS),
                shape=shape,
                log=self.log,
            )

    def show(self) -> None:
        """Write the table so far."""
        (self.records.path.parent / "gpu.md").write_text(page(self.records) + "\n")

    # --- units ------------------------------------------------------------------------------------------------------

    def units(self, part: str, until: float, again: bool) -> None:
        """Run the units of a part in processes that are replaced when they die, or a unit takes too long."""
        last = self.records.last(part)
        over = [one for one in ENDS if not (again and one == FAILED) and not (self.place.cuda and one == SKIPPED)]
        left = [name for name in load()[part] if name not in last or last[name]["status"] not in over]
        while left and time.time() < until:
            known = len(self.records.read())
            self.process(part, left, until)
            new = [one for one in self.records.read()[known:] if one["part"] == part]
            tried = {one["name"] for one in new}
            if not tried:  # nothing else fits, or the process does not even start
                break
            left = [name for name in left if name not in tried]

    def process(self, part: str, names: Sequence[str], until: float) -> None:
        """One process; returns when it has ended, or was killed at a unit's limit."""
        command = [*WORKER, part, "--units", json.dumps(list(names))]
        command += [
            "--out",
            str(self.records.path.parent),
            "--until",
            str(until),
            "--end",
            str(self.until),
            "--device",
            self.place.device,
        ]
        command += ["--smoke"] if self.place.smoke else []
        environment = {**os.environ, **(DETERMINISTIC if part == "checks" else {})}
        mark = self.log.tell()
        worker = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment, cwd=ROOT, process_group=0)
        try:
            while worker.poll() is None:
                running = self.running(part)
                if running and time.time() > running["at"] + running["limit"]:
                    self.kill(worker)
                    self.records.add(part, running["name"], FAILED, error=[f"stopped after {running['limit']:g} s"])
                    return
                if time.time() > self.until:
                    self.kill(worker)  # the unit under way has no result, and is run by the next call
                    return
                time.sleep(POLL)
        finally:
            if worker.poll() is None:
                self.kill(worker)
        running = self.running(part)
        if running:
            self.log.flush()
            with open(self.log.name, errors="replace") as file:
                file.seek(mark)
                lines = file.read().splitlines()[-6:]
            status = f"the process ended with status {worker.returncode}"
            self.records.add(part, running["name"], FAILED, error=[*lines, status])
        elif worker.returncode not in (0, 3) and not self.records.last(part):
            raise RuntimeError(f"the process of the {part} does not start; see {self.log.name}.")

    def running(self, part: str) -> dict | None:
        """The record of the unit under way."""
        own = [one for one in self.records.read() if one["part"] == part]
        return own[-1] if own and own[-1]["status"] == BEGUN else None

    @staticmethod
    def kill(process: subprocess.Popen) -> None:
        """Kill a process and those that it started."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    # --- images -----------------------------------------------------------------------------------------------------

    def start_unpacking(self, given: Path | None) -> Path | None:
        """Start to unpack the images, if they are packed; returns their folder, None for none."""
        if given is None and self.place.smoke:
            given = self.work / "images.tar.xz"
            images.make_small(given)
        if given is None:
            for name in trainings.NAMES:
                self.records.add(trainings.PART, name, SKIPPED, reason="no --images")
            return None
        if given.is_dir():
            found = images.complete(given)
            if found is None:
                raise ValueError(f"`images` must be an archive, or hold the official pickles; got {str(given)!r}.")
            return found
        target = self.work / "images"
        command = [sys.executable, "-m", "benchmarks.gpu.images", str(given.resolve()), str(target)]
        told = (self.work / "images.json").open("w")
        self.unpacking = subprocess.Popen(command, stdout=told, stderr=self.log, cwd=ROOT)
        return target

    def unpacked(self, folder: Path) -> bool:
        """Wait for the images; returns whether they are there, and records what it took."""
        if self.unpacking is not None:
            try:
                self.unpacking.wait(max(self.until - time.time(), 1.0))
            except subprocess.TimeoutExpired:
                self.unpacking.kill()
                self.unpacking.wait()
            told = (self.work / "images.json").read_text().strip()
            self.records.add(
                "images", "images", NOTED, what=told or f"failed: status {self.unpacking.returncode}, see log.txt"
            )
        if images.complete(folder) is None:
            for name in trainings.NAMES:
                self.records.add(trainings.PART, name, FAILED, error=["the images could not be unpacked; see log.txt"])
            return False
        return True


if __name__ == "__main__":
    guarded(main)
