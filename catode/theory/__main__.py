"""Command line of the theory: ``python -m catode.theory`` derives a tolerance, says why, and draws it."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from catode._output import run
from catode._validate import expanded
from catode.records import PLACE, number, packed, read_config, read_structures, structure_key
from catode.theory import tolerance
from catode.theory.flow.paths import integrate
from catode.theory.flow.trajectory import Trajectory
from catode.theory.systems.benefit import BenefitSystem
from catode.theory.tolerance.measured import arguments

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
_MEASURED = (
    "benefit",
    "benefit_upper",
    "price",
    "gain",
    "decay",
    "rate_ratio",
    "noise",
    "benefit_noise",
    "drift",
    "step_time",
)
_COLUMNS = ("step", "keep_prob", *_MEASURED, "risk", "separatrix", "tolerance")


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
        "--out",
        type=Path,
        metavar="FILE",
        help="where to save the picture, replaced if it is there (theory.png, theory-2.png, ...); png, pdf or svg",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    try:
        args = build_parser().parse_args(argv)
        for name in ("from_run", "out"):
            if getattr(args, name) is not None:
                setattr(args, name, Path(expanded(name, getattr(args, name))))
        given = {k: v for k, v in vars(args).items() if v is not None and k not in ("from_run", "out")}
        out = args.out or _free(Path("theory.png"))
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
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"picture {out}")
    return 0


def _free(path: Path) -> Path:
    """The path, or the first of it with a number that is not there yet."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


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
    if inputs.get("memory"):
        axes[0].set_title(f"flow and separatrix without memory;\ntolerance with memory {inputs['memory']:g}")
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


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The last row of every structure in a run's structures.csv, numbers converted.

    The entry `memory`, the time constant of the pool in ODE time, is worked out from config.json for a run of an earlier
    version, whose table has no such column.

    Args:
        folder: The run's folder.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, lacks columns, or holds no structures.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """What `read_run` returns, and whether the table holds the memory of every pool."""
    path = packed(folder / "structures.csv")
    header, rows = read_structures(folder, _COLUMNS)
    if not rows:
        raise ValueError(f"{path} must hold checks of structures; got none. Was anything pruned (nu > 0)?")
    named = (dict(zip(header, row, strict=True)) for row in rows)
    last = {structure_key(row): row for row in named}.values()
    text = {*PLACE, "fate"}
    numbers = [{k: v if k in text else number(path, k, v) for k, v in row.items()} for row in last]
    if "memory" in header:
        return numbers, True
    steps = read_config(folder, optional={"memory": float}).get("memory", 0)
    for row in numbers:
        row["memory"] = row["step_time"] * (max(steps / 10, 8) if row["kind"] == "layer" else steps)
    return numbers, False


def _run(folder: Path, out: Path) -> str:
    """Derive every structure's tolerance anew from what a run measured, and draw where they were decided."""
    rows, whole = _read(folder)
    try:
        tolerances = _anew(rows)
    except ValueError as error:
        path = packed(folder / "structures.csv")
        raise ValueError(f"{path} must hold what a run measured: {str(error).rstrip('.')}. Restore it.") from None
    wide = max(len("fate"), *(len(row["fate"]) for row in rows))
    values = "".join(f" {name:>10}" for name in ("benefit", "price", "theta_tol", "anew"))
    lines = [f"{'structure':28} {'fate':{wide}} {'step':>6} {'theta':>7}{values}"]
    for row, anew in zip(rows, tolerances, strict=True):
        name = row["block"] if row["kind"] == "layer" else f"{row['site']}[{row['index']}]"
        values = f"{row['benefit']:10.3g} {row['price']:10.3g} {row['tolerance']:10.3g} {anew:10.3g}"
        lines.append(f"{name:28} {row['fate']:{wide}} {row['step']:6.0f} {row['keep_prob']:7.3f} {values}")
    both = np.array([tolerances, [row["tolerance"] for row in rows]])
    gaps = np.abs(np.diff(both[:, np.isfinite(both).all(axis=0)], axis=0))
    lines.append(f"{len(rows)} structures; {np.sum(tolerances > 0.0)} have a positive tolerance.")
    if gaps.size:
        anew = "derived anew" if whole else "derived anew for a full pool"
        lines.append(f"Recorded and {anew}, {gaps.size} of them differ by {np.median(gaps):.2g} in the median.")
    from catode.theory import plotting

    figure = plotting.new_figure(11.0, 5.0)
    with plotting.house_style():
        left, right = figure.subplots(1, 2)
    plotting.decisions(left, rows)
    plotting.tolerances(right, rows, tolerances)
    figure.savefig(out)
    return "\n".join(lines)


def _anew(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Tolerances from the rows' own measurements, shape (n,); NaN where something is unknown."""
    columns = {name: np.array([row[name] for row in rows]) for name in (*_MEASURED, "memory", "risk")}
    known = np.isfinite([*columns.values()]).all(axis=0)
    columns = {name: column[known] for name, column in columns.items()}
    found = np.full(len(rows), np.nan)
    found[known] = tolerance.derive(risk=columns.pop("risk"), **arguments(**columns)).values
    return found


if __name__ == "__main__":
    sys.exit(run(main))
