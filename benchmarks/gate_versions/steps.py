"""Plain and gated steps of one tree of this project, on demand; run by its path in any tree, the working directory.

It needs of that tree what `benchmarks.gate_cost` has had since version 0.2, and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks import gate_cost
from catode.prune.devices.timing import keep_freed_memory

WARM = 2
PRECISIONS = ("fp32", "bf16")


def turns(arch: str, threads: int, batch: int) -> None:
    """For each line read, ``fp32`` or ``bf16``: take a plain and a gated step, and print their seconds as JSON."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    lanes, order = {}, np.random.default_rng(0)
    for precision in PRECISIONS:
        plain, gated = (
            gate_cost.Lane(name, gate_cost.network(arch), precision == "bf16", batch=batch)
            for name in ("plain", "gated")
        )
        lanes[precision] = plain, gated, gate_cost.pruner_for(gated, settled=True)
        for _ in range(WARM):
            plain.step()
            gated.step()
            lanes[precision][2].step()
    print("ready", flush=True)
    for line in sys.stdin:
        plain, gated, pruner = lanes[line.strip()]
        found = {"kind": gate_cost.kind_of_next(pruner)}
        plain.step()  # not timed: the other version's process had the caches
        for name in order.permutation(("plain", "gated")):
            if name == "plain":
                found[name] = plain.timed()
                continue
            found[name] = gated.timed()
            mark = time.perf_counter()
            pruner.step()
            found["pruner"] = time.perf_counter() - mark
        print(json.dumps(found), flush=True)


def memory(arch: str, kind: str, batch: int, size: int, steps: int) -> None:
    """Print the largest resident memory of some training steps, MiB, beyond what the imports had taken."""
    torch.set_num_threads(1)
    keep_freed_memory()
    gate_cost.SIZE, before = size, resident("VmRSS")
    lane = gate_cost.Lane(kind, gate_cost.network(arch), False, batch=batch)
    pruner = gate_cost.pruner_for(lane, settled=True) if kind == "gated" else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: building is no training
    for _ in range(steps):
        lane.step()
        if pruner is not None:
            pruner.step()
    print(json.dumps(resident("VmHWM") - before), flush=True)


def resident(name: str) -> float:
    """A line of the process's memory in /proc, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the lengths are made up
    what, arch, *rest = sys.argv[1:]
    if what == "turns":
        turns(arch, *map(int, rest))
    else:
        memory(arch, rest[0], *map(int, rest[1:]))
