"""What gates and measuring cost in two versions of this project, in one run: time of a cycle, and memory.

    git worktree add ../old COMMIT
    python -m benchmarks.gate_versions --old ../old [--cycles 12] [--threads N] [--quick] [--write]

Each version runs in a process of its own, from its own tree, and takes a plain and a gated step, in either order, whenever it is
asked for a round; the versions take turns. A cycle is the 16 steps after which measuring repeats itself, in all versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import gate_cost
from benchmarks.common import add_quick, guarded, hardware, load, markdown, publish, quartiles, spread
from benchmarks.gate_versions.steps import PRECISIONS
from catode._validate import check_int
from catode.train.settings.commandline import CommandLine

CYCLE = 16
MEMORY_STEPS = CYCLE + 1
LIMIT = 1.05
NETWORKS = (("resnet20", 128, 32), ("resnet56", 128, 32), ("resnet50", 8, 224))
"""Architecture, batch and image size of the memory's table."""


def started(tree: Path, *arguments: object) -> subprocess.Popen:
    """A worker in a tree."""
    command = [sys.executable, str(Path(__file__).resolve().with_name("steps.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def answer(worker: subprocess.Popen) -> str:
    """The next line of a worker.

    Raises:
        ValueError: if it has ended.
    """
    line = worker.stdout.readline()
    if not line:
        raise ValueError(
            f"`old` must be a tree of this project, version 0.2 or later; its process ended with {worker.wait()}."
        )
    return line


def times(trees: dict[str, Path], arch: str, threads: int, batch: int, cycles: int) -> tuple[str, list[str]]:
    """Table of the steps' times, and statements about the newest version."""
    workers = {version: started(tree, "turns", arch, threads, batch) for version, tree in trees.items()}
    for worker in workers.values():
        answer(worker)
    found = defaultdict(list)
    for _ in range(cycles * CYCLE):
        for precision in PRECISIONS:
            for version, worker in workers.items():
                worker.stdin.write(precision + "\n")
                found[precision, version].append(json.loads(answer(worker)))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows, said = [], []
    for precision in PRECISIONS:
        ratios = {}
        for version in trees:
            rounds = found[precision, version]
            plain, gated = (np.array([r[name] for r in rounds]) for name in ("plain", "gated"))
            whole = gated + np.array([r["pruner"] for r in rounds])
            kinds = np.array([r["kind"] for r in rounds])
            for kind in sorted(set(kinds)):
                own = kinds == kind
                cells = [f"{precision} {version}", kind, f"{CYCLE * own.mean():.0f} of {CYCLE}"]
                cells += [quartiles(1e3 * part[own], "{:.1f}") for part in (plain, whole, whole - gated)]
                rows.append([*cells, quartiles(whole[own] / plain[own], "{:.3f}")])
            sums = [part.reshape(cycles, CYCLE).sum(1) for part in (whole, plain)]
            ratios[version] = sums[0] / sums[1]
            rows.append([f"{precision} {version}", "whole cycles", "", "", "", "", spread(ratios[version], "{:.3f}")])
        new, old = ratios.values()
        said.append(f"- {precision}: new - old, paired by cycle: {spread(new - old, '{:+.3f}')}.")
        verdict = "yes" if new.mean() <= LIMIT else "NO"
        said.append(f"- {verdict}: {precision}: mean of a cycle at most {LIMIT:g} of a plain one: {new.mean():.3f}")
    header = ["version", "step", "of a cycle", "plain, ms", "gated, ms", "of it in Pruner.step, ms", "ratio"]
    return markdown(header, rows), said


def peaks(trees: dict[str, Path], networks: Sequence[tuple[str, int, int]]) -> str:
    """Table of the largest resident memory in training."""
    rows = []
    for arch, batch, size in networks:
        for version, tree in trees.items():
            peak = {}
            for kind in ("plain", "gated"):
                worker = started(tree, "memory", arch, kind, batch, size, MEMORY_STEPS)
                peak[kind] = json.loads(answer(worker))
                worker.wait()
            cells = [f"{peak[kind]:.0f}" for kind in ("plain", "gated")]
            rows.append([arch, f"{batch} of {size} x {size}", version, *cells, f"{peak['gated'] / peak['plain']:.3f}"])
    return markdown(["network", "batch", "version", "plain, MiB", "gated, MiB", "ratio"], rows)


def commit(tree: Path) -> str:
    """The commit of a tree, and whether it was changed since."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True)
    return found.stdout.strip() or "no repository"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.gate_versions", description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="a tree of the earlier version")
    nets = [name for name, own in gate_cost.models.ARCHITECTURES.items() if own.stem == "cifar"]
    parser.add_argument("--arch", default="resnet20", choices=nets, help="the network that is timed (resnet20)")
    parser.add_argument("--cycles", type=int, default=12, help="cycles of 16 steps (12)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gate_versions.md")
    add_quick(parser)
    args = parser.parse_args(argv)
    if not (args.old / "benchmarks" / "gate_cost.py").is_file():
        raise ValueError(f"`old` must be a tree of this project; got {str(args.old)!r}. See git worktree.")
    check_int("cycles", args.cycles, low=1)
    check_int("threads", args.threads, low=1)
    trees = {"new": Path(__file__).resolve().parents[2], "old": args.old.resolve()}
    began, before = time.perf_counter(), load()
    arch, batch, cycles, networks = args.arch, gate_cost.BATCH, args.cycles, NETWORKS
    measured = trees
    if args.quick:  # memory of one version: the other's steps are timed
        arch, batch, cycles, networks = "resnet14", 2, 1, [("resnet14", 2, 32)]
        measured = {"old": trees["old"]}
    steps, said = times(trees, arch, args.threads, batch, cycles)
    title = (
        f"{arch}, batch {batch}, random images of 32 x 32, channels_last, each version's preset for real images, every "
        f"gate undecided; new {commit(trees['new'])}, old {commit(trees['old'])}; {hardware()}, the timed steps {args.threads}"
    )
    memory_table = peaks(measured, networks)
    text = [
        f"{title}; {before} at the start, {load()} at the end; {time.perf_counter() - began:.0f} s. Medians (quartiles); of whole "
        "cycles sum over sum, mean and 95 % t-interval.",
        "",
        steps,
        "",
        *said,
        "",
        f"Largest resident memory of {MEMORY_STEPS} training steps, fp32, one thread, beyond what imports take:",
        "",
        memory_table,
    ]
    publish("gate_versions", "\n".join(text), args.write)


if __name__ == "__main__":
    guarded(main)
