"""Digits, default settings with a target: how near the network's MACs or parameters end to the requested share.

    python -m benchmarks.target [--shares 0.3 0.5 0.7] [--seeds 0 1] [--set NAME=VALUE ...] [--quick] [--write]

Each share is requested twice, of the MACs and of the parameters, from each seed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from benchmarks.common import QUICK, add_quick, guarded, machine, markdown, overrides, publish, run_quick
from catode.decisions.target import QUANTITIES
from catode.records import read_json, read_result
from catode.structures.fates import PRUNED_TOLERANCE
from catode.train import run
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

NEAR = 0.02

HEADER = [
    "target",
    "seed",
    "ended at",
    "off by, points",
    "accuracy",
    "layers",
    "units",
    "decided by rule",
    "by tolerance",
]


def row(quantity: str, share: float, result: dict) -> tuple[list[str], float]:
    """One line of the table, and the distance from the target."""
    ended = result[quantity] / result[f"{quantity}_dense"]
    cells = [
        f"{share:.0%} of the {quantity}",
        str(result["seed"]),
        f"{ended:.1%}",
        f"{100 * (ended - share):+.2f}",
        f"{result['test_accuracy']:.2%}",
        f"{result['layers_kept']} of {result['layers_total']}",
        f"{result['units_kept']} of {result['units_total']}",
        f"{result['decided_by_rule']:.1%}",
        str(result["decisions"].get(PRUNED_TOLERANCE, 0)),
    ]
    return cells, abs(ended - share)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.target", description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="default: 0.3 0.5 0.7")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    add_quick(parser)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/target.md")
    args = parser.parse_args(argv)
    fixed = ("dataset", "data_dir", "seed", "out", *(f"target_{quantity}" for quantity in QUANTITIES))
    changed, rows, worst, env = overrides(args.set, fixed=fixed), [], 0.0, {}
    shares, seeds, train = args.shares, args.seeds, run
    if args.quick:
        changed, shares, seeds, train = changed | QUICK, shares[:1], seeds[:1], run_quick
    with tempfile.TemporaryDirectory() as folder:
        for quantity in QUANTITIES:
            for share in shares:
                for seed in seeds:
                    given = {**changed, f"target_{quantity}": share, "seed": seed, "out": f"{folder}/{len(rows)}"}
                    path = train(Config.from_presets(dataset="digits", **given), progress=sys.stderr.isatty())
                    cells, off = row(quantity, share, read_result(path))
                    rows.append(cells)
                    worst, env = max(worst, off), read_json(path / "env.json")
                    print(markdown(HEADER, [cells]).splitlines()[-1], file=sys.stderr, flush=True)
    notes = ", ".join(f"{k}={v}" for k, v in changed.items()) or "default settings"
    lines = [
        f"Digits, {notes}, with a target; final epoch; {machine(env)}.",
        "",
        markdown(HEADER, rows),
        "",
        f"- {'yes' if worst <= NEAR else 'NO'}: every run within {100 * NEAR:.0f} points; the worst is off by {100 * worst:.2f}",
    ]
    publish("target", "\n".join(lines), args.write)


if __name__ == "__main__":
    guarded(main)
