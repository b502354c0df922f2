"""The process that runs units, one after the other: python -m benchmarks.gpu.worker PART --units [NAME, ..] --out FOLDER ..

Each unit leaves a record when it begins and when it ends; an exception is a record with the last lines of its traceback.
The process ends early where CUDA itself failed, after which nothing that this process computes can be trusted.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from benchmarks.gpu.records import BEGUN, FAILED, FILE, MEASURED, PASSED, SKIPPED, Records
from benchmarks.gpu.units import Place, Unit, load

LINES = 8  # of a traceback that a record keeps
BROKEN = 3  # exit status after an error of CUDA itself


def main() -> int:
    """Run the units; returns the exit status."""
    units = load()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=units)
    parser.add_argument("--units", required=True, help="names, as JSON")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.time() after which nothing begins")
    parser.add_argument("--end", type=float, required=True, help="time.time() at which all must have ended")
    parser.add_argument("--device", required=True)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    place, records = Place(args.device, args.smoke), Records(args.out / FILE)
    if place.smoke:
        torch.set_num_threads(1)
    for name in json.loads(args.units):
        if not execute(units[args.part][name], place, records, args.until, args.end):
            return BROKEN
    return 0


def execute(unit: Unit, place: Place, records: Records, until: float, end: float) -> bool:
    """Run one unit if it begins before `until` and can end by `end`; returns whether this process can go on."""
    if unit.needs_cuda and not place.cuda:
        records.add(unit.part, unit.name, SKIPPED, reason=f"needs CUDA, not {place.device}")
        return True
    if time.time() > until or time.time() + unit.seconds > end:
        return True  # without a record: the next call runs it
    records.add(unit.part, unit.name, BEGUN, limit=unit.seconds)
    begin, whole = time.perf_counter(), True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = unit.run(place)
            if place.cuda:
                torch.cuda.synchronize()
    except Exception as error:  # whatever it is, it is this unit's result, and the others go on
        lines = [short(line) for line in "".join(traceback.format_exception(error)).strip().splitlines()]
        print(f"{unit.part}: {unit.name}", *lines, sep="\n", file=sys.stderr, flush=True)
        whole = not (place.cuda and ("CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"))
        more, status = {"error": lines[-LINES:]}, FAILED
    else:
        more = {"numbers": found.numbers}
        status = MEASURED if found.passed is None else PASSED if found.passed else FAILED
    records.add(unit.part, unit.name, status, seconds=round(time.perf_counter() - begin, 2), **more)
    if whole:
        torch.compiler.reset()
        gc.collect()
        if place.cuda:
            torch.cuda.empty_cache()
    return whole


def short(line: str) -> str:
    """A line of a traceback without the path of this machine."""
    return re.sub(r'File "[^"]*/(?=[^"/]+/[^"/]+")', 'File "', line)


if __name__ == "__main__":
    sys.exit(main())
