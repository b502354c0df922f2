"""Settings of the gates and of the measurement of benefits."""

from __future__ import annotations

from dataclasses import dataclass

from catode.train.settings.setting import SettingsGroup, helpers

number, text, switch = helpers("gates")


@dataclass(frozen=True, kw_only=True)
class GateSettings(SettingsGroup):
    """Sampling of gates and measurement of benefits."""

    estimator: str = text(
        "curvature",
        "estimator of the units' benefits; straight-through misses most of the benefit",
        choices=("curvature", "paired", "straight-through"),
    )
    layer_estimator: str = text(
        "paired",
        "estimator of the layers' benefits; paired compares the loss with and without a layer",
        choices=("paired", "curvature", "straight-through"),
    )
    per_example_gates: bool = switch(False, "sample gates for each example instead of once a step", negatable=True)
    probe_size: int | None = number(
        None,
        int,
        "images of a batch on which benefits are measured; default: a tenth of the batch, at least 12",
        low=2,
        optional=True,
        hint="Leave it out for a tenth of the batch.",
    )
    layers_per_probe: int = number(
        1,
        int,
        "layers whose benefit one measurement estimates by a paired difference",
        low=1,
        hint="Use 1 if in doubt.",
    )
    measure_every: int = number(
        2, int, "steps between measurements of the benefits", low=1, hint="Use 1 for every step."
    )
    memory: int | None = number(
        None,
        int,
        "steps over which measurements are averaged; default: 200, in long runs 200 (deciding steps/6240)^(2/3), and "
        "in short ones a tenth of the deciding phase",
        low=10,
        optional=True,
        hint="Leave it out for the default.",
    )
    check_every: int | None = number(
        None,
        int,
        "steps between checks for removals; default: a quarter of --memory",
        low=1,
        optional=True,
        hint="Leave it out for a quarter of the memory.",
    )
