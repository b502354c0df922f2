"""Presets: values that replace the defaults, by data set, architecture and optimizer; to change one, edit it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from catode.train.models.catalogue import ARCHITECTURES
from catode.train.models.sources import is_foreign

__all__ = ["FOREIGN", "FOREIGN_OPTIMIZERS", "OPTIMIZERS", "PRESETS", "resolve"]

_REAL_IMAGES: dict[str, Any] = dict(
    nu=1.2, epochs=20, batch_size=128, lr=0.1, weight_decay=5e-4, warmup_epochs=5.0, probe_size=8
)
_IMAGENET_NETS = [name for name, architecture in ARCHITECTURES.items() if architecture.stem == "imagenet"]
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    **{("*", name): dict(shortcut=own.shortcut, stem=own.stem) for name, own in ARCHITECTURES.items()},
    ("digits", "*"): dict(
        augment="shift",
        nu=3.0,
        alpha=0.75,
        epochs=60,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        warmup_epochs=5.0,
        probe_size=32,
        layers_per_probe=3,
        measure_every=4,
        check_every=10,
        width_multiple=1,
    ),
    ("cifar10", "*"): {**_REAL_IMAGES, "nu": 2.4},
    ("cifar100", "*"): {**_REAL_IMAGES, "nu": 2.4},
    ("folder", "*"): _REAL_IMAGES,
    **{
        ("folder", name): dict(nu=0.24, beta=0.5, epochs=90, batch_size=256, weight_decay=1e-4, probe_size=None)
        for name in _IMAGENET_NETS
    },
}
"""Values by (data set, architecture) that replace the defaults.

`*` stands for every data set or architecture. An entry for the data set overrides one for the architecture, and an exact
entry overrides both.
"""

FOREIGN: dict[str, Any] = dict(shortcut=None, stem=None)
"""Values for networks that are not the trainer's own, instead of an entry of `PRESETS` for the architecture."""

OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": dict(lr=3e-3, weight_decay=0.05, momentum=0.0)}
"""Values by optimizer that override those of `PRESETS`."""

FOREIGN_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": dict(lr=1e-3, schedule="warm-cosine", clip_grad=1.0, decay_on="matrices")
}
"""Values by optimizer, for networks that are not the trainer's own, that override those of `OPTIMIZERS`: usual for transformers."""


def resolve(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every setting: given values override presets, presets override defaults.

    A preset's warm-up is scaled down with the epochs if fewer are given than the preset has.

    Args:
        given: Values by name of the setting; data set, architecture and optimizer select the presets.
        defaults: Default of every setting.
    """
    dataset, arch = (given.get(name, defaults[name]) for name in ("dataset", "arch"))
    values = dict(defaults)
    if is_foreign(arch):
        values |= FOREIGN
    for key in (("*", arch), (dataset, "*"), (dataset, arch)):
        values |= PRESETS.get(key, {})
    optimizer = given.get("optimizer", values["optimizer"])
    values |= OPTIMIZERS.get(optimizer, {}) | (FOREIGN_OPTIMIZERS.get(optimizer, {}) if is_foreign(arch) else {})
    epochs = given.get("epochs")
    if isinstance(epochs, int) and 0 < epochs < values["epochs"]:
        values["warmup_epochs"] *= epochs / values["epochs"]
    return values | dict(given)
