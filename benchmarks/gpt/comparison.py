"""A small GPT on characters, AdamW: half its MACs, against its dense twins.

    python -m benchmarks.gpt [--seeds 3] [--folder runs/gpt] [--set NAME=VALUE ...] [--quick] [--write]

Each seed is trained twice, with the pruner and, paired, without: same weights at the start, same batches, same steps. The model is
traced, the loop is its own and tells the loss. A record in the folder is not made again, so an interrupted command goes on;
`--folder benchmarks/records/gpt --write` makes table and picture of the records there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import add_quick, hardware, load, markdown, publish, publish_picture, spread
from benchmarks.gpt import text
from benchmarks.gpt.model import GPT
from benchmarks.gpt.picture import draw
from benchmarks.vit.comparison import changed, factor
from catode.prune.pruner import Pruner
from catode.structures import fates
from catode.train.settings.commandline import CommandLine

EVERY = 50
"""Steps over which the training loss is averaged for the picture."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        steps: Optimizer steps.
        batch_size: Sequences in a batch, each at a random place of the text.
        context: Characters of a sequence.
        width: Channels of a token.
        depth: Pairs of attention and MLP.
        heads: Heads of every attention.
        lr: Largest learning rate, after a linear warm-up; it then falls to 0 like a cosine.
        weight_decay: AdamW's.
        warmup: Share of the steps over which the learning rate rises.
        wait: Share of the steps before any theta moves.
        decide: Share of the steps after which everything is decided.
        nu: Nats that the whole network may cost until the first check sets it.
        target: Share of the MACs to end at.
        alpha: Layers (1) against units (0) in the price.
        layers_per_probe: Layers whose paired difference one probe takes.
        held_out: Sequences of the held-out text, at equal distances.
    """

    steps: int = 1500
    batch_size: int = 32
    context: int = 64
    width: int = 96
    depth: int = 4
    heads: int = 6
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    wait: float = 0.15
    decide: float = 0.6
    nu: float = 1.0
    target: float = 0.5
    alpha: float = 0.5
    layers_per_probe: int = 2
    held_out: int = 2048


QUICK = Recipe(steps=30, batch_size=16, context=16, width=16, depth=1, heads=2, decide=0.9, held_out=8)


def token_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over sequences and positions, nats a character."""
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, of: text.Text, recipe: Recipe) -> float:
    """Loss on the held-out text, nats a character."""
    model.eval()
    last = len(of.held_out) - recipe.context - 1
    starts = torch.linspace(0, last, recipe.held_out, dtype=torch.float64).long()
    parts = [
        token_loss(model, text.windows(of.held_out, part, recipe.context)) * len(part) for part in starts.split(64)
    ]
    return float(sum(parts) / recipe.held_out)


def train(recipe: Recipe, seed: int, pruned: bool) -> dict[str, Any]:
    """Train one network; returns its record, fit for JSON."""
    torch.set_num_threads(1)
    of = text.load()
    torch.manual_seed(seed)
    model = GPT(of.vocabulary, recipe.context, recipe.width, recipe.depth, recipe.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, recipe.steps, recipe.warmup))
    pruner = None
    if pruned:
        pruner = Pruner(
            model,
            torch.zeros(2, recipe.context, dtype=torch.long),
            optimizer=optimizer,
            loss=token_loss,
            nu=recipe.nu,
            alpha=recipe.alpha,
            steps=round(recipe.decide * recipe.steps),
            warmup=round(recipe.wait * recipe.steps),
            target_macs=recipe.target,
            epoch_steps=math.inf,  # sequences are drawn independently
            layers_per_probe=recipe.layers_per_probe,
            seed=seed,
        )
    places, losses, began = torch.Generator().manual_seed(seed), [], time.perf_counter()
    model.train()
    for _ in range(recipe.steps):
        starts = torch.randint(len(of.training) - recipe.context, (recipe.batch_size,), generator=places)
        batch = text.windows(of.training, starts, recipe.context)
        loss = token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if pruner is not None:
            pruner.step(batch)
    if pruner is not None:
        model = pruner.finish()
    seconds = time.perf_counter() - began
    found = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "pruned": pruned,
        "text": of.source,
        "machine": f"{hardware()}; {load()}",
        "held_out_loss": held_out_loss(model, of, recipe),
        "seconds": round(seconds, 1),
        "training_loss": [round(float(np.mean(losses[i : i + EVERY])), 4) for i in range(0, len(losses), EVERY)],
        "params": sum(p.numel() for p in model.parameters()),
    }
    return found if pruner is None else found | left(pruner, model)


def left(pruner: Pruner, model: GPT) -> dict[str, Any]:
    """What the pruner left: counts, fates, and the heads and widths of every branch."""
    whole, inventory = np.ones(pruner.complexity.size), pruner.inventory
    branches = []
    for layer, block in enumerate(inventory.blocks):
        units = inventory.places[layer].units
        branches.append({"name": block.name, "stands": bool(pruner.kept[layer]), "units": pruner.kept[units].tolist()})
    return {
        "macs": pruner.counts().macs / pruner.complexity.macs(whole),
        "params_share": pruner.counts().params / pruner.complexity.params(whole),
        "tied": model.head.weight is model.tokens.weight,
        "decisions": pruner.decisions(),
        "decided_by_rule": pruner.decided_by_rule,
        "warnings": pruner.warnings,
        "branches": branches,
    }


def complete(recipe: Recipe, seed: int, pruned: bool, folder: Path) -> dict[str, Any]:
    """The record of a training, made if it is not there.

    Raises:
        ValueError: if it is of another recipe.
    """
    path = folder / f"{'pruned' if pruned else 'dense'}-s{seed}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(train(recipe, seed, pruned), indent=1) + "\n")
    found = json.loads(path.read_text())
    if found["recipe"] != dataclasses.asdict(recipe):
        raise ValueError(f"`folder` must hold records of these settings; {path.name} has others. Use another folder.")
    return found


HEADER = (
    "seed", "loss, nats a character", "dense", "difference", "MACs", "parameters", "heads", "MLP units", "attention", "MLP",
    "decided by rule", "by tolerance",
)  # fmt: skip


def row(pruned: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def kept(parts: Sequence[dict], units: bool) -> str:
        flags = [flag for part in parts for flag in (part["units"] if units else [part["stands"]])]
        return f"{sum(flags)} of {len(flags)}"

    attention, mlp = pruned["branches"][::2], pruned["branches"][1::2]
    return [
        str(pruned["seed"]),
        f"{pruned['held_out_loss']:.4f}",
        f"{dense['held_out_loss']:.4f}",
        f"{pruned['held_out_loss'] - dense['held_out_loss']:+.4f}",
        f"{pruned['macs']:.1%}",
        f"{pruned['params_share']:.1%}",
        kept(attention, True),
        kept(mlp, True),
        kept(attention, False),
        kept(mlp, False),
        f"{pruned['decided_by_rule']:.1%}",
        str(pruned["decisions"].get(fates.PRUNED_TOLERANCE, 0)),
    ]


def report(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], recipe: Recipe) -> str:
    """The table with what it says, as Markdown."""
    differences = [pruned["held_out_loss"] - dense["held_out_loss"] for pruned, dense in pairs]
    first = pairs[0][0]
    said = sorted({line for pruned, _ in pairs for line in pruned["warnings"]})
    whole = pairs[0][1]["params"]
    return "\n".join(
        [
            f"A GPT of {recipe.depth} attention branches of {recipe.heads} heads and {recipe.depth} MLP branches, width "
            f"{recipe.width}, {whole:,} parameters, its output tied to its embedding, on sequences of {recipe.context} characters: "
            f"{first['text']}. What can go was found by tracing; the loop is its own. AdamW, {recipe.steps:,} steps of "
            f"{recipe.batch_size} sequences, against the same network without pruner: same weights at the start, same batches. "
            f"n = {len(pairs)}; mean loss on {recipe.held_out * recipe.context:,} characters of the held-out text at the final "
            f"step; {first['machine']} at the end of the first.",
            "",
            "Settings: " + ", ".join(f"{f.name}={getattr(recipe, f.name):g}" for f in dataclasses.fields(recipe)) + ".",
            "",
            markdown(HEADER, [row(*pair) for pair in pairs]),
            "",
            f"Mean [95% t-interval] over seeds. Loss, pruned minus dense, paired by seed: {spread(differences, '{:+.4f}')}. Loss: "
            f"{spread([p['held_out_loss'] for p, _ in pairs], '{:.4f}')}; dense: "
            f"{spread([d['held_out_loss'] for _, d in pairs], '{:.4f}')}. MACs, %: "
            f"{spread([p['macs'] for p, _ in pairs], '{:.1f}', 100)}. MACs are of all that is executed, attention's products "
            "included. The tied weight counts once as parameters, and is tied in every compact network: "
            f"{'yes' if all(p['tied'] for p, _ in pairs) else 'NO'}.",
            "",
            "![heads, widths and branches that are left; training loss](gpt.png)",
            "",
            *(["The pruner said:", "", *(f"- {line}" for line in said)] if said else []),
        ]
    ).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.gpt", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt"), help="folder of the records (runs/gpt)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpt.md and .png")
    add_quick(parser)
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise ValueError(f"`seeds` must be at least 1; got {args.seeds}. Leave it out.")
    recipe, seeds = changed(args.set, QUICK if args.quick else Recipe()), 1 if args.quick else args.seeds
    folder, pairs = args.folder / "quick" if args.quick else args.folder, []
    for seed in range(args.first, args.first + seeds):
        pairs.append(tuple(complete(recipe, seed, pruned, folder) for pruned in (True, False)))
        pruned, dense = pairs[-1]
        told = f"loss {pruned['held_out_loss']:.4f}, dense {dense['held_out_loss']:.4f}, MACs {pruned['macs']:.3f}"
        print(f"seed {seed}: {told}", file=sys.stderr, flush=True)
    publish("gpt", report(pairs, recipe), args.write)
    if args.write:
        publish_picture("gpt", draw(pairs, EVERY))
