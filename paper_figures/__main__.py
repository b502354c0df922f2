"""Make all figures and tables: ``python -m paper_figures [--out FOLDER] [--runs FOLDER] [--only NAME ...]``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import copies
from catode import _validate
from catode.train.settings.commandline import CommandLine
from paper_figures import (
    animation,
    basins,
    complexity,
    convergence,
    knobs,
    paths,
    premature,
    regrets,
    rivals,
    runs,
    thetas,
    widths,
)
from paper_figures._common import Made

FIGURES = {
    "basins": basins,
    "thetas": thetas,
    "paths": paths,
    "complexity": complexity,
    "regrets": regrets,
    "rivals": rivals,
    "widths": widths,
    "knobs": knobs,
    "premature": premature,
    "convergence": convergence,
}
"""Modules by name, in the order of the index; each has `NEEDS`, groups of `runs.GROUPS`, and `make(data) -> Made`."""

INDEX = "figures.md"
HEAD = """# Figures

Made by `python -m paper_figures`, which trains what is missing on the digits (about ten minutes of one core) and takes larger
images from the committed records in `benchmarks/records`. The digits' runs have the preset of the data set, but {epochs} epochs
and a memory of {memory} steps; what a seed ends with depends on the processor. Every figure is also written as {formats}.

The data sets of the records:

{copies}
"""


def section(name: str, made: Made) -> str:
    """One figure's part of the index."""
    parts = [f"## {made.title}"]
    if made.figure is not None:
        parts.append(f"![{made.title}]({name}.png)")
    parts += [made.caption, made.table, f"`python -m paper_figures --only {name}`"]
    return "\n\n".join(filter(None, parts))


def write_index(folder: Path, sections: dict[str, str], vector: str) -> None:
    """Write the index; existing sections of other figures are kept."""
    path = folder / INDEX
    there = re.split(r"^<!-- (\w+) -->\n", path.read_text(encoding="utf-8"), flags=re.M)[1:] if path.exists() else []
    old = {name: text.strip() for name, text in zip(there[::2], there[1::2], strict=True)}
    told = "\n".join(copies.notes(copy.name for copy in copies.KNOWN.values()))
    head = HEAD.format(formats=vector.upper(), copies=told, **{name: runs.SHORT[name] for name in ("epochs", "memory")})
    body = [f"<!-- {name} -->\n{text}\n" for name in FIGURES if (text := sections.get(name) or old.get(name))]
    path.write_text("\n".join([head, *body]), encoding="utf-8")


def build_parser() -> CommandLine:
    """The command line."""
    parser = CommandLine(prog="python -m paper_figures", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder for the figures (docs/figures)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/figures"),
        help="folder of the runs on the digits; missing ones are trained (runs/figures)",
    )
    parser.add_argument("--records", type=Path, default=runs.RECORDS, help="folder of records (benchmarks/records)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=list(FIGURES), help=f"some of {', '.join(FIGURES)}"
    )
    parser.add_argument("--vector", default="pdf", help="vector format beside PNG: pdf or svg (pdf)")
    parser.add_argument("--processes", type=int, default=2, help="runs that are trained at a time, one thread each (2)")
    parser.add_argument("--animate", action="store_true", help="also write one run as animation.gif")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    try:
        args = build_parser().parse_args(argv)
        for name in args.only:
            _validate.check_choice("only", name, FIGURES, hint="Leave it out for all.")
        _validate.check_choice("vector", args.vector, ("pdf", "svg"), hint="Use pdf.")
        if args.processes < 1:
            _validate.fail("processes", "be >= 1", args.processes, hint="Use one for each core.")
        for name in ("out", "runs"):
            if getattr(args, name).exists() and not getattr(args, name).is_dir():
                _validate.fail(name, "be a folder", str(getattr(args, name)), hint="Choose another.")
        if not args.records.is_dir():
            _validate.fail("records", "be an existing folder", str(args.records), hint="Leave it out.")
        groups = dict.fromkeys(group for name in args.only for group in FIGURES[name].NEEDS)
        if args.animate:
            groups["pruned"] = None
        runs.train(args.runs, groups, processes=args.processes)
        data, sections = runs.Data(args.runs, args.records), {}
        args.out.mkdir(parents=True, exist_ok=True)
        for name, module in FIGURES.items():
            if name in args.only:
                made = module.make(data)
                made.save(args.out, name, ("png", args.vector))
                sections[name] = section(name, made)
        if args.animate:
            animation.write(data.reports("pruned")[0], args.out / "animation.gif")
        write_index(args.out, sections, args.vector)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out / INDEX)
    return 0


if __name__ == "__main__":
    sys.exit(main())
