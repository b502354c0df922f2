"""The environment of a run (env.json), and the state of PyTorch's random generators for checkpoints."""

from __future__ import annotations

import os
import platform

import numpy as np
import torch

from catode import __version__
from catode.prune.devices.timing import processor
from catode.train.settings.config import Config


def random_state(device: str) -> dict[str, torch.Tensor]:
    """State of PyTorch's global random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def environment(config: Config) -> dict:
    """Content of env.json: versions, processor, threads, device."""
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
