"""Settings of the device, the run's folder and the checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from catode.train.settings.setting import ConfigError, SettingsGroup, helpers

number, text, switch = helpers("run")


WRITTEN = (
    "model.pt", "structure.json", "result.json", "metrics.csv", "structures.csv", "shadow.csv", "env.json", "report.md",
    "latency_table.csv", "checksums.json", "accuracy.png", "theta.png", "structure.png", "complexity.png", "phase.png",
    "tensorboard",
)  # fmt: skip
"""What a run and its report write, besides config.json and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(SettingsGroup):
    """Seed, device, folder, checkpoints."""

    seed: int = number(
        0, int, "seed of all random numbers", low=0, high=2**32 - 1, identity=False, hint="Use 0 if in doubt."
    )
    device: str = text(
        "cpu",
        "where to compute: cpu, cuda, cuda:N or mps; with several processes each takes the device of its number",
        identity=False,
        hint="Use --device cpu.",
    )
    read_every: int | None = number(
        None,
        int,
        "steps between synchronisations with the device, at which measurements are read and keep probabilities updated; "
        "default: 1 on a CPU, 10 on other devices",
        low=1,
        optional=True,
        identity=False,
        hint="Use 1 for every step.",
    )
    width_multiple: int = number(
        8,
        int,
        "while training, round a pruned width up to a multiple of this with dead channels, which is faster than an odd width; "
        "they are not counted and are removed at the end",
        low=1,
        identity=False,
        hint="Use 1 for none.",
    )
    compile: bool = switch(
        False,
        "torch.compile the training step while there are no gates: with nu = 0, early in a long warm-up, and when all structures "
        "are decided; a gated network changes its shapes too often",
        negatable=True,
        identity=False,
    )
    tensorboard: bool = switch(
        False,
        "also write metrics and histograms of the keep probabilities for TensorBoard, to the run's tensorboard/",
        negatable=True,
        identity=False,
    )
    # None, as for `workers` and `array_gib`, means this machine's default, also after a resume elsewhere; env.json records it
    threads: int | None = number(
        None,
        int,
        "CPU threads; default: PyTorch's",
        low=1,
        optional=True,
        identity=False,
        hint="Leave it out for PyTorch's default.",
    )
    out: str | None = text(
        None,
        "folder of the run; default: runs/<dataset>-<arch>-<tag>-s<seed>, where the tag is a hash of the settings that differ "
        "from the preset",
        optional=True,
        path=True,
        identity=False,
        hint="Leave it out for a folder under runs/.",
    )
    checkpoint_every: int = number(
        500,
        int,
        "steps between checkpoints within an epoch; one is also written at the end of every epoch",
        low=1,
        identity=False,
        hint="Use the number of steps that may be lost.",
    )
    keep_checkpoints: int = number(
        2,
        int,
        "checkpoints kept during the run; --resume uses the newest valid one",
        low=1,
        identity=False,
        hint="Use 2 to survive the loss of one.",
    )
    resume: str | None = text(
        None,
        "folder of an interrupted run, to resume from its newest valid checkpoint; the other settings are the run's own, only "
        "those that do not affect its results may be given: --threads, --device, --compile, --tensorboard, --data-dir, "
        "--array-gib, --workers, --checkpoint-every, --keep-checkpoints",
        optional=True,
        path=True,
        identity=False,
        hint="Leave it out to start a run.",
    )
    dry_run: bool = switch(False, "check everything, print the costs and stop before the first step", identity=False)

    def check(self) -> None:
        if self.resume is not None and self.out != self.resume:
            raise ConfigError(
                f"`out` must be the same folder as resume; got out={self.out!r} and resume={self.resume!r}. Leave it out."
            )
        check_device(self.device)


def check_device(device: str) -> None:
    """Check that PyTorch supports a device and that it is available.

    Raises:
        ConfigError: if not.
    """
    kind, _, index = device.partition(":")
    numbered = kind != "cpu" and index.isdecimal()
    if kind not in ("cpu", "cuda", "mps") or (":" in device and not numbered):
        raise ConfigError(f"`device` must be cpu, cuda, cuda:N or mps; got device={device!r}. Use --device cpu.")
    if kind == "cpu":
        return
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` must be available; got device={device!r}, but PyTorch finds no CUDA device. Use --device cpu."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"`device` must be available; got device={device!r}, but PyTorch finds no MPS device. Use --device cpu."
        )
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and int(index) >= count:
        raise ConfigError(
            f"`device` must be available; got device={device!r}, but there is no {kind} device beyond {kind}:{count - 1}. "
            f"Use --device {kind}:0."
        )


def check_out(config: RunSettings) -> None:
    """Check that the output folder holds no run and can be written; writes nothing.

    Raises:
        ConfigError: if not.
    """
    folder = Path(config.out)
    if (folder / "config.json").exists():
        raise ConfigError(
            f"`out` must be a folder without a run; got out={config.out!r}, which holds one. "
            "Choose another --out or delete the folder."
        )
    found = next((name for name in WRITTEN if (folder / name).exists()), None) or next(
        (path.name for path in sorted(folder.glob("checkpoint-*.pt")) if path.stem.partition("-")[2].isdecimal()), None
    )
    if found is not None:
        raise ConfigError(
            f"`out` must be a folder without files that a run writes; got out={config.out!r}, which holds {found}. Choose another "
            "--out, or move the file."
        )
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(
            f"`out` must be a folder; got out={config.out!r}, where {str(place)!r} is a file. Choose another --out."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"`out` must be writable; got out={config.out!r}, where {str(place)!r} is not. Choose another --out."
        )
