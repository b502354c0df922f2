"""Command line of the trainer: ``python -m catode.train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from catode.train import config as configuration


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, 1 for a loss that is not finite)."""
    from catode.train import data, loop, preflight

    try:
        setup = loop.prepare(configuration.parse(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if setup.config.dry_run:
        print(preflight.table(setup))
        return 0
    try:
        folder = loop.train(setup)
    except configuration.ConfigError as error:  # another process is at work in the folder
        print(f"error: {error}", file=sys.stderr)
        return 2
    except loop.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except data.DataError as error:
        print(f"error: {error} Then go on with --resume {setup.config.out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; go on with --resume {setup.config.out}", file=sys.stderr)
        return 130
    print(summary(folder))
    return 0


def summary(folder: Path) -> str:
    """What a finished run has to say, in a few lines."""
    from catode.train.report import waiting

    result = json.loads((folder / "result.json").read_text())
    lines = [
        f"accuracy {result['accuracy']:.2%} (test images, final epoch)",
        f"MACs     {result['macs_dense']:,} -> {result['macs']:,} ({result['macs'] / result['macs_dense']:.1%})",
        f"params   {result['params_dense']:,} -> {result['params']:,} ({result['params'] / result['params_dense']:.1%})",
        f"layers   {result['layers_total']} -> {result['layers_kept']}, units {result['units_total']} -> {result['units_kept']}",
    ]
    if result["units_kept_for_rounding"]:
        lines.append(f"rounding {result['units_kept_for_rounding']} of the units kept for round widths alone")
    if result["decisions"]:
        lines.append("decided  " + ", ".join(f"{n} {state}" for state, n in result["decisions"].items()))
    for batch, key in ((1, "ms"), (128, "ms_128")):
        before, after = result[f"latency_dense_{key}"], result[f"latency_{key}"]
        lines.append(f"latency  {before:.2f} -> {after:.2f} ms ({after / before:.1%}, batch {batch})")
    lines.append(f"waiting  {waiting(folder)} of the steps' time, for images")
    lines.append(f"report   {folder / 'report.md'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
