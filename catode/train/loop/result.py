"""The environment (env.json) and the result (result.json) of a run, and PyTorch's random state for its checkpoints."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from catode import __version__
from catode._output import out_of_memory
from catode.prune.devices.timing import latency_ms, processor
from catode.records import read_json
from catode.structures import fates
from catode.train.loop.evaluation import Score
from catode.train.settings.config import Config

if TYPE_CHECKING:
    from catode.train.loop.trainer import Trainer


def random_state(device: str) -> dict[str, torch.Tensor]:
    """State of PyTorch's global random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def environment(config: Config) -> dict:
    """Versions, processor, threads, device."""
    return {
        "catode": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": config.device,
        **({"accelerator": torch.cuda.get_device_name()} if config.device.startswith("cuda") else {}),
    }


def environments(config: Config, processes: int, images: int | str, folder: Path) -> dict:
    """Content of env.json, with the other environments that a resumed run had before, the oldest first.

    Args:
        config: The run's configuration.
        processes: Number of its processes.
        images: Fingerprint of its images.
        folder: Its folder, with the env.json of before, if it had one.
    """
    now = {**environment(config), "processes": processes, "images": images}
    try:
        last = read_json(folder / "env.json")
    except (ValueError, OSError):  # none, or damaged
        return now
    before = last.pop("before", [])
    before = [*(before if isinstance(before, list) else []), *([last] if last != now else [])]
    return {**now, "before": before} if before else now


def latencies(networks: Sequence[nn.Module], example: torch.Tensor) -> list[list[float | None]]:
    """`latency_ms` of networks at batches of 1 and 128; None for a batch that does not fit into the memory, which costs no run."""
    try:
        return latency_ms(networks, example)
    except Exception as error:
        if not out_of_memory(error):
            raise
    try:
        return [*latency_ms(networks, example, batches=(1,)), [None] * len(networks)]
    except Exception as error:
        if not out_of_memory(error):
            raise
    return [[None] * len(networks)] * 2


def content(run: Trainer, dense: nn.Module, validation: list[Score] | None, test: list[Score]) -> dict[str, Any]:
    """Content of result.json.

    Args:
        run: The run at its end.
        dense: A new network like the one that the run began with.
        validation: Scores on the validation images, None for none: of the network, then of its weights without averaging.
        test: The same on the test images.
    """
    counts, images, pruner = run.counts(), run.setup.images, run.pruner
    layers, units, _ = run.left()
    times = latencies([dense, run.model] if pruner else [dense], run.setup.example)
    return {
        "test_accuracy": test[0].accuracy,
        "test_loss": test[0].loss,
        "validation_accuracy": validation[0].accuracy if validation else None,
        "validation_loss": validation[0].loss if validation else None,
        "validation_accuracy_history": run.history,
        "test_accuracy_without_ema": test[1].accuracy if run.average else None,
        "validation_accuracy_without_ema": validation[1].accuracy if run.average and validation else None,
        "training_images": len(images.train_labels),
        "validation_images": len(images.validation_labels) if images.validated else 0,
        "test_images": len(images.test_labels),
        "macs": counts.macs,
        "macs_executed": run.executed,
        "macs_dense": run.dense.macs,
        "params": counts.params,
        "params_dense": run.dense.params,
        "expected_complexity": pruner.expected_complexity if pruner else 1.0,
        "layers_kept": layers,
        "layers_total": run.total[0],
        "units_kept": units,
        "units_total": run.total[1],
        "units_kept_for_rounding": pruner.kept_for_width if pruner else 0,
        "nu": pruner.nu if pruner else None,
        "decisions": pruner.decisions() if pruner else {},
        "macs_removed_by_tolerance": pruner.macs_removed(fates.PRUNED_TOLERANCE) if pruner else 0,
        "decided_by_rule": pruner.decided_by_rule if pruner else None,
        "out_of_time": pruner.out_of_time if pruner else 0,
        "removed_near_one": pruner.removed_near_one if pruner else 0,
        "largest_norm": float(pruner.largest_norms.max()) if pruner else None,
        "largest_violation": float(pruner.largest_violations.max()) if pruner else None,
        "warnings": pruner.warnings if pruner else [],
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "latency_ms": times[0][-1],
        "latency_dense_ms": times[0][0],
        "latency_ms_128": times[1][-1],
        "latency_dense_ms_128": times[1][0],
        "seed": run.config.seed,
    }
