"""Prunability: what `catode.describe` finds in models nobody here wrote, and whether cutting it is exact.

    python -m benchmarks.prunability [--list torchvision|timm|hf] [--only PATTERN] [--vertices N] [--quick] [--write]

Every model is described, then verified: in double precision (in single precision above 700 M parameters), with random
parameters, at `--vertices` random sets of units and branches, in eval and train mode, the network with closed gates is compared
with the physically cut one; the largest difference, relative to the largest output, must stay below 1e-4. Units' gates scale
the entries of the weights that read them, branches' gates what the branch's last module returns. Then some structures' gates
are closed alone: each must change the output. MACs and parameters of the cut networks are counted, and must
be those of the whole one's polynomial. `seconds` are those of describing alone, on a machine that may be busy. Results are
kept, one file for each model, and the table is made of them: a run that was stopped resumes where it was; `--again` measures
anew.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import HOME, add_quick, guarded, hardware, markdown, publish
from benchmarks.prunability.models import LISTS, Model, models
from benchmarks.prunability.rival import records as rival_records
from benchmarks.prunability.rival import takes as rival_takes
from catode._validate import check_int
from catode.prune.describe.costs import count
from catode.prune.describe.costs import describe as complexity
from catode.prune.describe.trace import Description, describe
from catode.prune.describe.trace.verifying import cut_copy, verify
from catode.prune.describe.trace.verifying import vertices as random_vertices
from catode.prune.gated.heads import adopt
from catode.structures.inventory import Inventory
from catode.train.settings.commandline import CommandLine

RECORDS = HOME / "records" / "prunability"
LARGEST_DEVIATION = 1e-4
HEADER = [
    "model",
    "parameters, M",
    "widths",
    "units",
    "branches",
    "deviation",
    "counts",
    "seconds",
    "Torch-Pruning",
    "refused",
    "remark",
]


def measured(model: Model, vertices: int, alone: int) -> dict[str, Any]:
    """Describe and verify a model; an error is part of the result.

    Args:
        model: The model.
        vertices: Random sets of structures to compare; 0: none.
        alone: Structures to close alone.
    """
    torch.manual_seed(0)
    network, example = model.build()
    found: dict[str, Any] = {"model": model.name, "parameters": sum(p.numel() for p in network.parameters())}
    began = time.perf_counter()
    try:
        blocks = describe(network, example)
    except Exception as error:  # a fault of catode, if it is no ValueError
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return {**found, "error": f"{kind}{error}"}
    found |= {
        "seconds": time.perf_counter() - began,
        "widths": sum(len(block.sites) for block in blocks),
        "units": sum(site.width for block in blocks for site in block.sites),
        "branches": sum(block.removable for block in blocks),
        "refused": [str(refusal) for refusal in blocks.refused],
    }
    adopt(network, blocks)
    if vertices:
        try:
            verdict = verify(network, blocks, example, vertices, alone)
        except Exception as error:  # the table says what went wrong
            return {**found, "error": f"cut network: {type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        found |= {"vertices": vertices, "deviation": verdict.deviation, "where": verdict.where}
        found |= {"idle": verdict.idle, "alone": verdict.tried}
        try:
            found["counts"] = counted(network, blocks, example, vertices)
        except Exception as error:
            found["counts"] = False
            found["count_error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


def counted(network: nn.Module, blocks: Description, example: Any, vertices: int) -> bool:
    """Whether MACs and parameters of cut networks are what the polynomial of the whole one says."""
    inventory, costs = Inventory(blocks), complexity(network, blocks, example)
    for _, kept in random_vertices(inventory, vertices, np.random.default_rng(0)):
        counts = count(cut_copy(network, inventory, kept), example)
        expected = costs.macs(kept.astype(float)), costs.params(kept.astype(float))
        if not np.allclose(expected, (counts.macs, counts.params), rtol=1e-12, atol=0.5):
            return False
    return True


def is_verified(record: dict[str, Any]) -> bool:
    """Whether a model was described and its description is true."""
    return "error" not in record and record.get("deviation", 1.0) <= LARGEST_DEVIATION and not record.get("idle")


def row(record: dict[str, Any], rivals: Mapping[str, dict[str, Any]]) -> list[str]:
    """The table's line of a model.

    Args:
        record: Its result.
        rivals: What Torch-Pruning makes of models, by name.
    """
    remark = record.get("error") or record.get("count_error", "")
    if record.get("idle"):
        remark = f"gates without effect: {', '.join(record['idle'])}"
    refused = [text for text in record.get("refused", ()) if "residual stream" not in text and "over it" not in text]
    cells = [record["model"], f"{record['parameters'] / 1e6:.1f}"]
    cells += [str(record.get(key, "-")) for key in ("widths", "units", "branches")]
    cells += [f"{record['deviation']:.0e}" if "deviation" in record else "-"]
    cells += [{True: "exact", False: "wrong"}.get(record.get("counts"), "-")]
    cells += [f"{record['seconds']:.1f}" if "seconds" in record else "-"]
    rival = rivals.get(record["model"])
    cells += ["-" if rival is None else "runs" if rival_takes(rival) else "fails", str(len(refused))]
    return [*cells, (remark or (refused[0] if refused else "")).replace("|", "/")[:160]]


def summary(records: Sequence[dict[str, Any]], rivals: Mapping[str, dict[str, Any]]) -> str:
    """What the list comes to, in a line, and what Torch-Pruning comes to."""
    described = [record for record in records if "error" not in record]
    verified = [record for record in described if is_verified(record)]
    with_branches = sum(bool(record["branches"]) for record in described)
    tried = [rivals[record["model"]] for record in records if record["model"] in rivals]
    other = f" Torch-Pruning leaves {sum(map(rival_takes, tried))} of {len(tried)} running." if tried else ""
    return (
        f"{len(records)} models: {len(described)} described, {with_branches} of them with branches that can go, "
        f"{len(verified)} verified to {LARGEST_DEVIATION:g}, {sum(record.get('counts') is True for record in records)} with exact "
        f"counts.{other}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: for a pattern that no model has.
    """
    parser = CommandLine(prog="python -m benchmarks.prunability", description=__doc__.partition("\n")[0])
    parser.add_argument("--list", choices=LISTS, default=LISTS[0], dest="which", help="whose models")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of models, a glob pattern")
    parser.add_argument(
        "--vertices", type=int, default=3, help="random sets of structures to compare; 0: only describe"
    )
    parser.add_argument("--alone", type=int, default=4, help="structures whose gate is closed alone")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--recorded", action="store_true", help="measure nothing: the table of what has a result")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER", help="where results are kept")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/prunability.md, or that of the list"
    )
    add_quick(parser)
    args = parser.parse_args(argv)
    check_int("vertices", args.vertices, low=0)
    check_int("alone", args.alone, low=0)
    torch.set_num_threads(1)
    chosen = [model for model in models(args.which) if fnmatchcase(model.name, args.only)]
    if not chosen:
        raise ValueError(
            f"`only` must be a pattern of names of the list {args.which}; got {args.only!r}, which none has."
        )
    if args.quick:
        chosen, args.vertices, args.alone = chosen[:1], 1, 1
    records, rivals = [], rival_records() if args.which == LISTS[0] else {}
    for model in chosen:
        path = args.records / args.which / f"{model.name.replace(' ', '_')}.json"
        record = json.loads(path.read_text()) if path.exists() and not (args.again or args.quick) else None
        if args.recorded and record is None:
            continue
        if record is None or (not args.recorded and args.vertices and not {"deviation", "error"} & set(record)):
            record = measured(model, args.vertices, args.alone)
            if not args.quick:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
        records.append(record)
        print("  ".join(row(record, rivals)), file=sys.stderr, flush=True)
    missing = len(chosen) - len(records)
    left = [f"{missing} more of the list have no result yet."] if missing else []
    text = [
        " ".join([summary(records, rivals), *left]),
        "",
        markdown(HEADER, [row(record, rivals) for record in records]),
        "",
        hardware(),
    ]
    publish("prunability" if args.which == LISTS[0] else f"prunability_{args.which}", "\n".join(text), args.write)


if __name__ == "__main__":
    guarded(main)
