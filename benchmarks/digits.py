"""Digits, default settings: what the derived tolerances remove, and what it costs in accuracy.

    python -m benchmarks.digits [--seeds 0 1 2 3 4] [--out FOLDER] [--quick] [--write]

Each seed is trained twice: with the defaults and, paired, ungated (nu = 0).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    CONFIDENCE,
    QUICK,
    add_quick,
    guarded,
    machine,
    markdown,
    overrides,
    publish,
    run_quick,
    spread,
)
from catode.records import read_json, read_result, read_structures
from catode.structures.fates import PRUNED_TOLERANCE
from catode.train import run
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

LEAST_SHARE, MOST_LOSS = 0.30, 0.01


@dataclass(frozen=True)
class Pair:
    """A pruned run and the ungated one with the same seed.

    Args:
        seed: Their seed.
        pruned: result.json of the pruned run.
        ungated: result.json of the ungated run.
        units: Units removed by the derived tolerance, 0 < keep_prob <= tolerance.
        layers: Layers removed so.
        env: env.json of the pruned run.
    """

    seed: int
    pruned: dict[str, Any]
    ungated: dict[str, Any]
    units: int
    layers: int
    env: dict[str, Any]

    @property
    def difference(self) -> float:
        """Accuracy of the pruned network minus that of the ungated one."""
        return self.pruned["test_accuracy"] - self.ungated["test_accuracy"]

    @property
    def share(self) -> float:
        """Share of the dense MACs that the removals by tolerance take."""
        return self.pruned["macs_removed_by_tolerance"] / self.pruned["macs_dense"]


def by_tolerance(folder: Path) -> dict[str, int]:
    """Structures of each kind that structures.csv shows removed by the derived tolerance.

    Raises:
        ValueError: if a removal does not satisfy 0 < keep_prob <= tolerance, or the counts differ from result.json.
    """
    header, rows = read_structures(folder, ("keep_prob", "tolerance"))
    rows = [row for values in rows if (row := dict(zip(header, values, strict=True)))["fate"] == PRUNED_TOLERANCE]
    for row in rows:
        # six digits are written
        if not 0.0 < float(row["keep_prob"]) <= float(row["tolerance"]) * (1 + 1e-5):
            raise ValueError(f"`keep_prob` must lie in (0, tolerance] where fate={PRUNED_TOLERANCE}; got {row}")
    recorded = read_result(folder)["decisions"].get(PRUNED_TOLERANCE, 0)
    if recorded != len(rows):
        raise ValueError(f"structures.csv must hold every removal; got {len(rows)} rows, result.json counts {recorded}")
    return {kind: sum(row["kind"] == kind for row in rows) for kind in ("unit", "layer")}


def pair(seed: int, folder: Path, train: Callable[..., Path], **settings: Any) -> Pair:
    """Train one seed with and without gates; `train` is called as `catode.train.run` is."""
    runs = {"pruned": {}, "ungated": {"nu": 0.0}}
    for name, change in runs.items():
        given = {**settings, **change, "seed": seed, "out": str(folder / f"{name}-s{seed}")}
        runs[name] = train(Config.from_presets(**given), progress=sys.stderr.isatty())
    removed = by_tolerance(runs["pruned"])
    results = {name: read_result(path) for name, path in runs.items()}
    env = read_json(runs["pruned"] / "env.json")
    return Pair(seed, **results, units=removed["unit"], layers=removed["layer"], env=env)


def row(p: Pair) -> list[str]:
    """One line of the table."""
    r = p.pruned
    return [
        str(p.seed),
        f"{r['test_accuracy']:.2%}",
        f"{p.ungated['test_accuracy']:.2%}",
        f"{100 * p.difference:+.2f}",
        f"{r['macs'] / r['macs_dense']:.1%}",
        f"{p.units} / {r['units_total'] - r['units_kept']} / {r['units_total']}",
        f"{p.layers} / {r['layers_total'] - r['layers_kept']} / {r['layers_total']}",
        f"{p.share:.1%}",
        f"{r['decided_by_rule']:.1%}",
        f"{r['seconds']:.0f} / {p.ungated['seconds']:.0f}",
    ]


HEADER = [
    "seed",
    "accuracy",
    "ungated",
    "difference, points",
    "MACs left",
    "units: by tolerance / gone / all",
    "layers: by tolerance / gone / all",
    "MACs removed by tolerance",
    "decided by rule",
    "seconds / ungated",
]


def summary(pairs: list[Pair], notes: str) -> str:
    """The whole result as Markdown."""
    mean = sum(p.difference for p in pairs) / len(pairs)
    met = {
        "a unit and a layer removed by tolerance in every seed": all(p.units and p.layers for p in pairs),
        f"these removals take at least {LEAST_SHARE:.0%} of the dense MACs in every seed": all(
            p.share >= LEAST_SHARE for p in pairs
        ),
        f"mean accuracy within {100 * MOST_LOSS:.0f} point of the ungated runs": abs(mean) <= MOST_LOSS,
    }
    pruned, ungated = (spread([100 * getattr(p, k)["test_accuracy"] for p in pairs]) for k in ("pruned", "ungated"))
    left = spread([p.pruned["macs"] / p.pruned["macs_dense"] for p in pairs], "{:.1f}", 100)
    lines = [
        f"Digits, {notes}; accuracy on the fixed test images at the final epoch; n = {len(pairs)} seeds; "
        f"{machine(pairs[0].env)}.",
        "",
        markdown(HEADER, map(row, pairs)),
        "",
        *(f"- {'yes' if value else 'NO'}: {what}" for what, value in met.items()),
        "",
        f"Mean [{CONFIDENCE:.0%} t-interval] over seeds. Accuracy difference in points, pruned minus ungated, paired by seed: "
        f"{spread([p.difference for p in pairs], '{:+.2f}', 100)}. Accuracy, %: {pruned}; ungated: {ungated}. "
        f"MACs left, %: {left}.",
        "",
        "A seed's result depends on the processor, whose order of summation training amplifies: another one gives other runs from "
        "the same seeds.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds (default: 0 1 2 3 4)")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    add_quick(parser)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/digits.md")
    args = parser.parse_args(argv)
    changed = overrides(args.set, fixed=("dataset", "data_dir", "seed", "out"))
    seeds, train = args.seeds, run
    if args.quick:
        changed, seeds, train = changed | QUICK, seeds[:1], run_quick
    notes = "default settings"
    if changed:
        notes = "settings " + ", ".join(f"{k}={v}" for k, v in changed.items())
    with tempfile.TemporaryDirectory() as temporary:
        folder, pairs = args.out or Path(temporary), []
        for seed in seeds:
            pairs.append(pair(seed, folder, train, **{"dataset": "digits", "threads": args.threads} | changed))
            print(markdown(HEADER, [row(pairs[-1])]).splitlines()[-1], file=sys.stderr, flush=True)
        publish("digits", summary(pairs, notes), args.write)


if __name__ == "__main__":
    guarded(main)
