"""How gates are drawn, and how benefits are measured."""

from __future__ import annotations

from dataclasses import dataclass

from catode.train.settings.setting import SettingsGroup, helpers

number, text, switch = helpers("gates")


@dataclass(frozen=True, kw_only=True)
class GateSettings(SettingsGroup):
    """Gates, and the measuring of the benefits."""

    estimator: str = text(
        "curvature",
        "estimator of the units' benefits; straight-through is blind at open gates",
        choices=("curvature", "paired", "straight-through"),
    )
    layer_estimator: str = text(
        "paired",
        "estimator of the layers' benefits; paired compares the loss with and without a layer",
        choices=("paired", "curvature", "straight-through"),
    )
    per_example_gates: bool = switch(False, "draw gates for each example instead of once a step", negatable=True)
    probe_size: int | None = number(
        None,
        int,
        "images of a batch on which benefits are probed; without it a tenth of the batch, at least 12",
        low=2,
        optional=True,
        hint="Leave it out for a tenth of the batch.",
    )
    layers_per_probe: int = number(
        1, int, "layers whose paired difference one probe takes", low=1, hint="Use 1 if in doubt."
    )
    measure_every: int = number(
        2, int, "steps from one measurement of the benefits to the next", low=1, hint="Use 1 for every step."
    )
    memory: int | None = number(
        None,
        int,
        "steps over which measurements are pooled; without it 200, and in long runs 200 (deciding steps/6240)^(2/3)",
        low=10,
        optional=True,
        hint="Leave it out for one that fits the run's length.",
    )
    check_every: int | None = number(
        None,
        int,
        "steps from one check for removals to the next; without it a quarter of the memory",
        low=1,
        optional=True,
        hint="Leave it out for a quarter of the memory.",
    )
