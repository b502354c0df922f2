"""Settings of the optimizer, the learning rates and the augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from catode.train.settings.setting import ConfigError, SettingsGroup, helpers

number, text, switch = helpers("training")
LAYOUTS, AUTO = ("channels-last", "channels-first"), "auto"
WARM = 0.1
"""Share of the steps in which the learning rate of `warm-cosine` increases."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(SettingsGroup):
    """Epochs, optimizer, learning rates, augmentation."""

    epochs: int = number(60, int, "passes over the training images", low=1, hint="Use at least one epoch.")
    batch_size: int = number(64, int, "images in a step", low=2, hint="Use at least two images.")
    accumulate: int = number(
        1,
        int,
        "equal parts of each step's batch, whose gradients are taken one after the other and averaged, in the memory of one part; "
        "batch norms see a part at a time",
        low=1,
        hint="Use 1 for none.",
    )
    optimizer: str = text(
        "sgd", "optimizer; adamw has PyTorch's betas and decouples the weight decay", choices=("sgd", "adamw")
    )
    lr: float = number(0.1, float, "peak learning rate", low=0, low_open=True, hint="Leave it out for the preset.")
    momentum: float = number(
        0.9, float, "momentum of sgd; 0 with adamw", low=0, high=1, high_open=True, hint="Use 0.9 if in doubt."
    )
    nesterov: bool = switch(False, "Nesterov's momentum", negatable=True)
    ema: float = number(
        0.0,
        float,
        "decay of an exponential moving average of the weights and of the batch norms' statistics, min(ema, n/(n + 9)) at step n; "
        "the averaged network is validated, tested and saved; 0 is off",
        low=0,
        high=1,
        high_open=True,
        hint="Use 0.999 if in doubt, 0 for none.",
    )
    weight_decay: float = number(
        5e-4,
        float,
        "weight decay of every parameter, including norm layers; see --decay-on",
        low=0,
        hint="Use 0 for none.",
    )
    decay_on: str = text(
        "all",
        "what the weight decay is on: all parameters, or matrices, which leaves out biases, norm layers, embeddings and tables of "
        "positions, as is usual for transformers",
        choices=("all", "matrices"),
    )
    clip_grad: float | None = number(
        None,
        float,
        "norm that the gradient of all parameters is scaled down to where it is larger; default: no clipping",
        low=0,
        low_open=True,
        optional=True,
        hint="Leave it out for no clipping.",
    )
    schedule: str = text(
        "one-cycle", "learning-rate schedule", choices=("one-cycle", "cosine", "warm-cosine", "constant")
    )
    augment: str = text(
        "crop-flip",
        "augmentation: shift moves by a pixel; crop-flip flips, pads 4 pixels and crops; resized-crop flips and resizes a box of "
        "8 to 100 % of the image",
        choices=("none", "shift", "crop-flip", "resized-crop"),
    )
    mixup: float = number(
        0.0,
        float,
        "mixup: mix images and labels within each training batch, with a share drawn from Beta(mixup, mixup); 0 is off",
        low=0,
        high=100,
        hint="Use 0.2 if in doubt, 0 for none.",
    )
    label_smoothing: float = number(
        0.0, float, "label smoothing", low=0, high=1, high_open=True, hint="Use 0 for none."
    )
    amp: str = text(
        "off",
        "automatic mixed precision; fp16 uses loss scaling and needs a CUDA device",
        choices=("off", "bf16", "fp16"),
    )
    sync_bn: bool = switch(
        False,
        "with several processes (torchrun), synchronise batch norms: statistics of the whole batch instead of each process's "
        "part",
        negatable=True,
    )
    layout: str = text(
        "channels-last",
        "memory layout of images and weights; auto tries steps of the network and of half of it in both, with --width-multiple and "
        "without, and takes the fastest",
        choices=(*LAYOUTS, AUTO),
        identity=False,
    )

    @property
    def channels_last(self) -> bool:
        """Whether the layout is channels-last; for `auto`, before the trial, it is."""
        return self.layout != LAYOUTS[1]

    def check(self) -> None:
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"`accumulate` must divide batch_size into equal parts of at least two images; got accumulate={self.accumulate} "
                f"with batch_size={self.batch_size}. Use another divisor, or 1 for none."
            )
        if self.optimizer == "adamw" and (self.momentum > 0 or self.nesterov):
            name, value = ("momentum", f"{self.momentum:g}") if self.momentum > 0 else ("nesterov", "True")
            raise ConfigError(
                f"`{name}` must be left out with optimizer=adamw, which averages gradients by its own betas; got {name}={value}. "
                "Leave it out."
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "`nesterov` must be left out without momentum; got nesterov=True with momentum=0. Leave it out, or use --momentum "
                "0.9."
            )


def learning_rates(schedule: str, peak: float, steps: int) -> np.ndarray:
    """Learning rate of every step, shape (steps,).

    Args:
        schedule: `one-cycle` (linear increase over 15 % of the steps, linear decrease to 0), `cosine`, `warm-cosine` (linear
            increase over 10 % of the steps, then a cosine to 0) or `constant`.
        peak: Peak learning rate.
        steps: Number of steps.
    """
    position = (np.arange(steps) + 0.5) / steps
    if schedule == "one-cycle":
        return peak * np.minimum(position / 0.15, (1.0 - position) / 0.85)
    if schedule == "warm-cosine":
        return peak * np.minimum(
            position / WARM, 0.5 * (1.0 + np.cos(np.pi * (position - WARM).clip(0.0) / (1.0 - WARM)))
        )
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + np.cos(np.pi * position))
    return np.full(steps, peak)


def ode_time(schedule: np.ndarray, momentum: float) -> float:
    """Length of a run in ODE time: the sum of lr/(1 - momentum) over its steps; of lr for AdamW, whose `momentum` is 0.

    Args:
        schedule: Learning rate of every step, shape (steps,).
        momentum: Momentum of SGD, in [0, 1).
    """
    return float(schedule.sum() / (1.0 - momentum))
