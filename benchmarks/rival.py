"""The usual pipeline: train the whole network, prune it once with Torch-Pruning, fine-tune; the same epochs in total.

    pip install torch-pruning
    python -m benchmarks.rival --macs 0.45 --seed 0 --data-dir DIR --out FOLDER

The same data, batches, augmentation and optimizer as every other row of `benchmarks.cifar`; both halves have a whole
one-cycle schedule, and the second one's batches are those of the epochs that it stands for. Channels go by group norms over the
whole network (`GroupNormPruner` with `GroupMagnitudeImportance`), a little at a time until the MACs are met, all between two
steps of training. With `--sparse` the last half of the steps before is sparse training by Torch-Pruning's own regularisation of
groups, without weight decay and with importances in units of each group's largest one, as in its authors' experiments; they
have a phase of its own for it, longer and at a small learning rate.

With option A shortcuts the channels of all three residual streams are one group, whose channels go from all stages at once, those
of the first stage at most. `--scope hidden` leaves the streams alone, `--scope isomorphic` ranks channels among groups of the
same form only. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import QUICK, add_quick, guarded, overrides, training
from catode._validate import check_int, check_interval, fail
from catode.prune.checking import ROW_FIELDS
from catode.prune.describe.costs import count
from catode.prune.devices.timing import latency_ms
from catode.records import read_json, read_rows
from catode.train import load
from catode.train.loop import CsvTable, Setup, Trainer, checkpoint
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config, ConfigError, check_out

STEPS = 400
SCOPES = ("all", "hidden", "isomorphic")
"""What is ranked together: the channels of all groups; of all but the residual streams; of each kind of group by itself."""
METHOD = "group-norm magnitude, one shot"


def check_installed() -> None:
    """Make sure that Torch-Pruning can be imported.

    Raises:
        ConfigError: if it cannot.
    """
    try:
        importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ConfigError(
            f"`torch_pruning` must be installed for the rival; got: {error}. Run pip install torch-pruning."
        ) from None


def group_norm_pruner(model: nn.Module, example: torch.Tensor, scope: str = SCOPES[0], reg: float = 0.0):
    """Torch-Pruning's pruner by group norms; `reg` is the strength of its `regularize`, and of the training before `prune`."""
    import torch_pruning

    stream = "conv1", *(f"{name}.conv2" for name, module in model.named_modules() if hasattr(module, "conv2"))
    ignored = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return torch_pruning.pruner.GroupNormPruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max" if reg else "mean"),
        reg=reg,
        global_pruning=True,
        isomorphic=scope == "isomorphic",
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,  # with 1 whole layers collapse
        iterative_steps=STEPS,
        ignored_layers=ignored + ([model.get_submodule(name) for name in stream] if scope == "hidden" else []),
    )


def sparse_trainer(scope: str, reg: float) -> type[Trainer]:
    """A trainer whose gradients are regularised by group, in place of weight decay, in the last half of its steps."""

    class Sparse(Trainer):
        def __init__(self, setup: Setup, folder: Path, progress: bool):
            super().__init__(setup, folder, progress)
            self.model.eval()
            self.regularizer = group_norm_pruner(self.model, setup.example, scope, reg)

        def update(self):
            if self.step >= len(self.setup.schedule) // 2:
                for group in self.optimizer.param_groups:
                    group["weight_decay"] = 0.0
                self.regularizer.regularize(self.model)
            return super().update()

    return Sparse


def later_trainer(epochs: int) -> type[Trainer]:
    """A trainer whose first epoch has the order and augmentation of a later one."""

    class Later(Trainer):
        def __init__(self, setup: Setup, folder: Path, progress: bool):
            super().__init__(setup, folder, progress)
            whole = self.batches.epoch
            self.batches.epoch = lambda epoch, seed, start=0: whole(epochs + epoch, seed, start)

    return Later


def prune(
    model: nn.Module, example: torch.Tensor, share: float, scope: str = SCOPES[0], sparse: float = 0.0
) -> nn.Module:
    """A copy without the channels of smallest group norm, the classifier's outputs excepted.

    Args:
        model: A trained network.
        example: One image, shape (1, channels, height, width).
        share: MACs to keep; the first network at or below it is taken.
        scope: One of `SCOPES`.
        sparse: Strength of the sparse training before; 0 for none.

    Raises:
        ValueError: if the share cannot be reached.
    """
    model = copy.deepcopy(model).eval()
    goal = share * count(model, example).macs
    pruner = group_norm_pruner(model, example, scope, sparse)
    for _ in range(STEPS):
        pruner.step()
        if count(model, example).macs <= goal:
            return model
    reached = count(model, example).macs / goal * share
    fail("macs", f"be a share that Torch-Pruning can reach, {reached:.3g} or more", share, hint="Ask for more.")


def widths(model: nn.Module) -> dict[str, list[int]]:
    """Output and input channels of every convolution, by its path."""
    return {name: list(m.weight.shape[:2]) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def compete(
    common: dict,
    share: float,
    tune_epochs: int,
    tune_lr: float,
    out: Path,
    sparse: float = 0.0,
    scope: str = SCOPES[0],
    quick: bool = False,
) -> None:
    """Train, prune, fine-tune, and write a record like that of any run.

    Args:
        common: Settings of the run.
        share: MACs to keep, in (0, 1).
        tune_epochs: Epochs after pruning, out of all.
        tune_lr: Largest learning rate of these.
        out: Its folder, with the two halves in `trained` and `tuned`. Existing halves are used, or resumed.
        sparse: Strength of the sparse training in the last half of the steps before pruning; 0 for none.
        scope: One of `SCOPES`.
        quick: Train on the first images alone.

    Raises:
        ValueError: if Torch-Pruning is missing, a setting is not admitted, `out` holds another run, or the share cannot be
            reached.
    """
    check_installed()
    whole = Config.from_presets(**common, nu=0.0, out=str(out))
    if tune_epochs >= whole.epochs:
        raise ConfigError(f"`tune_epochs` must be below epochs, {whole.epochs}; got {tune_epochs}. Take half of them.")
    check_out(whole)
    first = dataclasses.replace(whole, epochs=whole.epochs - tune_epochs, out=f"{out}/trained")
    second = dataclasses.replace(whole, epochs=tune_epochs, lr=tune_lr, out=f"{out}/tuned")
    kind = sparse_trainer(scope, sparse) if sparse > 0 else Trainer
    trained = load(training.complete(first, kind=kind, flag="out", quick=quick))
    structure = checkpoint.read_structure(Path(first.out))
    example = torch.zeros(1, *structure["image_shape"])
    pruned = prune(
        trained, example, share, scope, sparse
    )  # the same each time, so that an interrupted second half can go on
    later = later_trainer(first.epochs)
    training.complete(second, change=lambda model, setup: copy.deepcopy(pruned), kind=later, flag="out", quick=quick)
    latencies = latency_ms([checkpoint.fresh(structure), pruned], example)
    a, b = (read_json(Path(c.out) / "result.json") for c in (first, second))
    rival = {
        "rival": f"{METHOD}, {f'sparse training {sparse:g}' if sparse else 'no sparse training'}, scope {scope} "
        f"(torch-pruning {version('torch-pruning')})",
        "share": share,
        "tune_epochs": tune_epochs,
        "tune_lr": tune_lr,
        "sparse": sparse,
        "scope": scope,
    }
    result = b | {
        "macs_dense": a["macs_dense"],
        "params_dense": a["params_dense"],
        "layers_kept": a["layers_kept"],
        "layers_total": a["layers_total"],
        "units_kept": sum(site.width for block in pruned.structures() for site in block.sites),
        "units_total": a["units_total"],
        "validation_accuracy_history": a["validation_accuracy_history"] + b["validation_accuracy_history"],
        **{name: a[name] + b[name] for name in ("seconds", "cpu_seconds")},
        **dict(zip(("latency_dense_ms", "latency_ms"), latencies[0], strict=True)),
        **dict(zip(("latency_dense_ms_128", "latency_ms_128"), latencies[1], strict=True)),
    }
    rows, more = (read_rows(Path(c.out) / "metrics.csv") for c in (first, second))
    for row in more:
        row |= {name: float(row[name]) + float(rows[-1][name]) for name in ("epoch", "step", "time", "seconds")}
    table = CsvTable(out, "metrics.csv", list(rows[0]))
    table.add(rows + more)
    table.close()
    CsvTable(out, "structures.csv", ROW_FIELDS).close()
    for name, content in (("config", json.loads(whole.to_json()) | rival), ("result", result)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    env = read_json(Path(second.out) / "env.json") | {"widths": widths(pruned)}
    (out / "env.json").write_text(json.dumps(env, indent=2) + "\n")
    print(
        f"{rival['rival']}: {100 * result['test_accuracy']:.2f} %, {result['macs'] / a['macs_dense']:.1%} of the MACs"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.rival", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10", help="digits, cifar10, cifar100 or folder")
    parser.add_argument("--data-dir", help="folder that holds the data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--macs", type=float, required=True, help="share of the MACs to keep")
    parser.add_argument("--tune-epochs", type=int, default=10, help="epochs after pruning, out of all (10)")
    parser.add_argument("--tune-lr", type=float, default=0.05, help="largest learning rate after pruning (0.05)")
    parser.add_argument(
        "--sparse", type=float, default=0.0, help="strength of sparse training before pruning (0: none)"
    )
    parser.add_argument("--scope", choices=SCOPES, default=SCOPES[0], help="channels that are ranked together (all)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting; repeatable")
    add_quick(parser)
    args = parser.parse_args(argv)
    share = check_interval("macs", args.macs, 0, 1, low_open=True, high_open=True, hint="Choose e.g. 0.5.")
    epochs = check_int("tune_epochs", args.tune_epochs, low=1)
    sparse = check_interval("sparse", args.sparse, 0, math.inf, high_open=True, hint="Use 0 for none.")
    common = dict(dataset=args.dataset, data_dir=args.data_dir, seed=args.seed) | overrides(
        args.set, flags=("dataset", "data_dir", "seed", "out"), fixed=("nu", "shadow", "target_macs", "target_params")
    )
    if args.quick:
        common, epochs = common | QUICK | {"epochs": 2}, 1
    compete(common, share, epochs, args.tune_lr, args.out, sparse, args.scope, args.quick)


if __name__ == "__main__":
    guarded(main)
