"""Command line of the theory: ``python -m catode.theory`` derives a tolerance, says why, and draws it."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from catode.theory import tolerance
from catode.theory.flow.paths import integrate
from catode.theory.flow.trajectory import Trajectory
from catode.theory.systems.benefit import BenefitSystem

_NEEDED = {
    "price": "complexity cost g of keeping the structure, nats",
    "gain": "bound q on the squared gradient norm over its weights, nats/time",
    "rate-ratio": "speed rho of theta, 1/(nats time)",
    "noise": "diffusion sigma of theta, time^-1/2",
}
_OPTIONAL = {
    "benefit": "upper limit of the loss that it saves, nats",
    "decay": "lower limit a on the decay of the benefit, 1/time",
    "benefit-noise": "diffusion sigma_b of the benefit, nats time^-1/2",
    "drift": "bound delta on the growth of the benefit, nats/time",
    "step-time": "ODE time of one step, lr/(1 - momentum)",
    "memory": "time constant of the pool through which theta sees the benefit",
}
_MIRROR = {
    "gain-lower": "lower bound on the squared gradient norm, nats/time",
    "decay-upper": "upper limit on the decay of the benefit, 1/time",
}
_COLUMNS = ("gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift", "step_time")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See --help.")


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser; it raises ValueError instead of leaving the process."""
    parser = _Parser(prog="python -m catode.theory", description="Derive a tolerance, say why, and draw it.")
    one = parser.add_argument_group("one structure")
    for name, text in _NEEDED.items():
        one.add_argument(f"--{name}", type=float, metavar="FLOAT", help=f"{text} (needed)")
    for name, text in _OPTIONAL.items():
        one.add_argument(f"--{name}", type=float, metavar="FLOAT", help=f"{text} (0)")
    for name, text in _MIRROR.items():
        one.add_argument(f"--{name}", type=float, metavar="FLOAT", help=f"{text}; both draw the mirror domain")
    one.add_argument("--risk", type=float, metavar="FLOAT", help="accepted probability of a regret, in (0, 0.5) (0.05)")
    parser.add_argument("--from-run", type=Path, metavar="FOLDER", help="every structure of a run, at its last check")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to save the picture (theory.png); png, pdf or svg"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    try:
        args = build_parser().parse_args(argv)
        given = {k: v for k, v in vars(args).items() if v is not None and k not in ("from_run", "out")}
        out = args.out or Path("theory.png")
        if out.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"`out` must end in .png, .pdf or .svg; got out={str(out)!r}. Choose one of these.")
        if not out.parent.is_dir():
            raise ValueError(f"`out` must lie in a folder that exists; got out={str(out)!r}. Make the folder first.")
        if args.from_run is None:
            print(_one(given, out))
        elif given:
            name, value = next(iter(given.items()))
            raise ValueError(f"`{name}` must be left out with from_run; got {name}={value:g}. The run has its own.")
        else:
            print(_run(args.from_run, out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture {out}")
    return 0


def _one(given: dict[str, float], out: Path) -> str:
    """Derive one tolerance, draw it, and return what there is to say."""
    missing = [name for name in _NEEDED if name.replace("-", "_") not in given]
    if missing:
        raise ValueError(f"`{missing[0]}` must be given; got none. Add --{missing[0]} FLOAT, or use --from-run FOLDER.")
    inputs = {name.replace("-", "_"): 0.0 for name in _OPTIONAL} | {"risk": 0.05} | given
    mirror = {name: inputs.pop(name) for name in ("gain_lower", "decay_upper") if name in inputs}
    found = tolerance.derive(**inputs)
    system = BenefitSystem(**{k: inputs[k] for k in ("price", "gain", "rate_ratio", "decay", "drift")}, **mirror)
    from catode.theory import plotting

    figure = plotting.new_figure(13.0, 5.2)
    with plotting.house_style():
        axes = figure.subplots(1, 3, width_ratios=(1.5, 1.0, 1.0))
    span = max(2.0 * inputs["price"], 1.2 * inputs["benefit"])
    plotting.phase_portrait(axes[0], system, benefit_max=span, nullclines=True, trajectories=_trajectories(system))
    here = inputs["benefit"], min(max(float(found), 0.0), 1.0)
    look = {"color": plotting.PALETTE["purple"], "markersize": 9, "linestyle": "none", "clip_on": False, "zorder": 6}
    axes[0].plot(*here, "v", label="tolerance here", **look)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.45, -0.12), ncols=3, columnspacing=1.2, frameon=False)
    plotting.tolerance_over_risk(axes[1], inputs)
    plotting.tolerance_over_batch_size(axes[2], inputs)
    figure.savefig(out)
    return f"theta_tol  {float(found):.6g}\nseparatrix {float(found.separatrix):.6g}\nreason     {found.reason()}"


def _trajectories(system: BenefitSystem) -> list[Trajectory]:
    """A few solutions of the projected flow: either side of the separatrix, and along either face."""
    edge = min(max(float(system.separatrix(0.0)), 0.0), 1.0)
    starts = [
        (0.0, 0.6 * edge),
        (0.0, min(0.6 * edge + 0.4, 1.0)),
        (0.5 * system.price, 1.0),
        (0.8 * system.price, 0.0),
    ]
    return [integrate(system, start, 8.0 / system.growth_rate, events=False) for start in starts]


def read_run(folder: Path) -> list[dict]:
    """The last row of every structure in a run's structures.csv, numbers converted.

    Raises:
        ValueError: if the folder holds no such file, or the file lacks columns or rows.
    """
    path = folder / "structures.csv"
    if not path.is_file():
        raise ValueError(
            f"`from_run` must be a run's folder; got {str(folder)!r} without structures.csv. Pass its --out."
        )
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = {"kind", "block", "site", "index", "state"}
    needed = {
        *text,
        *_COLUMNS,
        "step",
        "keep_prob",
        "benefit",
        "benefit_upper",
        "price",
        "risk",
        "separatrix",
        "tolerance",
    }
    if not rows or not needed <= set(rows[0]):
        raise ValueError(
            f"`from_run` must hold checks of structures; got none in {str(path)!r}. Was anything pruned (nu > 0)?"
        )
    last = {(row["kind"], row["block"], row["site"], row["index"]): row for row in rows}
    try:
        return [{k: v if k in text else float(v) for k, v in row.items()} for row in last.values()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`from_run` must hold whole tables; got {str(path)!r}: {error}. Restore the file.") from None


def _run(folder: Path, out: Path) -> str:
    """Derive every structure's tolerance anew from what a run measured, and draw where they were decided."""
    rows = read_run(folder)
    config = folder / "config.json"
    memory = json.loads(config.read_text()).get("memory", 0) if config.is_file() else 0
    lines = [
        f"{'structure':28} {'state':17} {'step':>6} {'theta':>7} {'benefit':>10} {'price':>10} {'theta_tol':>10} {'anew':>10}"
    ]
    tolerances = [_anew(row, memory) for row in rows]
    for row, anew in zip(rows, tolerances, strict=True):
        name = row["block"] if row["kind"] == "layer" else f"{row['site']}[{row['index']}]"
        values = f"{row['benefit']:10.3g} {row['price']:10.3g} {row['tolerance']:10.3g} {anew:10.3g}"
        lines.append(f"{name:28} {row['state']:17} {row['step']:6.0f} {row['keep_prob']:7.3f} {values}")
    both = np.array([tolerances, [row["tolerance"] for row in rows]])
    gaps = np.abs(np.diff(both[:, np.isfinite(both).all(axis=0)], axis=0))
    lines.append(f"{len(rows)} structures; {np.sum(np.array(tolerances) > 0.0)} have a positive tolerance.")
    if gaps.size:
        lines.append(
            f"Recorded and derived anew for a full pool, {gaps.size} of them differ by {np.median(gaps):.2g} in the median."
        )
    from catode.theory import plotting

    figure = plotting.new_figure(11.0, 5.0)
    with plotting.house_style():
        left, right = figure.subplots(1, 2)
    plotting.decisions(left, rows)
    plotting.tolerances(right, rows, tolerances)
    figure.savefig(out)
    return "\n".join(lines)


def _anew(row: dict, memory: float) -> float:
    """Tolerance from a row's own measurements, with the memory of a pool that is full; NaN where something is unknown."""
    inputs = {name: row[name] for name in _COLUMNS}
    price = max(row["price"] - (row["benefit_upper"] - row["benefit"]), 1e-12)
    window = max(memory / 10, 8) if row["kind"] == "layer" else memory
    if not np.all(np.isfinite([*inputs.values(), price, row["benefit_upper"]])):
        return np.nan
    found = tolerance.derive(
        benefit=row["benefit_upper"],
        pooled=row["benefit"],
        price=price,
        memory=window * row["step_time"],
        risk=row["risk"],
        **inputs,
    )
    return float(found)


if __name__ == "__main__":
    sys.exit(main())
