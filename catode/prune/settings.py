"""Settings of the pruner, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from catode._validate import check_bool, check_choice, check_int, check_interval, check_positive
from catode.decisions.priors import PRIORS
from catode.prune.measure.probes import ESTIMATORS
from catode.theory.tolerance.measured import check_steps, fitting_memory

ONE_EPOCH = (
    "`epoch_steps` should be the number of batches in an epoch, len(loader); got none, so that batches count as independent. If "
    "they go through the images epoch by epoch, tolerances come out too large; if not, pass epoch_steps=math.inf."
)
SHORT = 40  # memory, in steps, below which every step is probed by default
ENOUGH, RAREST = 100, 8  # probes that a memory holds in long runs, in which they may be as rare as this many steps


@dataclass(frozen=True, kw_only=True)
class PrunerSettings:
    """Everything that can be chosen about a pruner.

    Args:
        nu: Nats that the whole network may cost, > 0. With a target it holds until the first check that sets it.
        steps: Steps after which the deciding phase ends and what is still undecided is rounded.
        rate_ratio: Speed of every theta, 1/time: a useless structure sinks from 1 to 0 within ``1 / rate_ratio`` of ODE
            time (the sum over steps of lr / (1 - momentum)). Divided by a structure's price at the start it is its
            effective rate ratio. None: a tenth of `steps` at the base time, see `catode.decisions.motion.ThetaSpeed`.
        alpha: Layers (1) against units (0).
        beta: Parameters (1) against MACs (0).
        risk: Accepted probability that a removed structure would have recovered, in (0, 0.5).
        tolerance: A fixed tolerance on theta in place of the derived one.
        prior: One of `catode.decisions.priors.PRIORS`. The tolerances and commitments are those of `flattening`; its rivals
            take a fixed `tolerance`, and what does not sink below it is rounded in the end.
        images: Number of training images, which `bernoulli` needs.
        epoch_steps: Batches in an epoch, images / batch size, where an epoch's batches are drawn without replacement, as
            PyTorch's loaders do; infinity for batches drawn independently. Products of gradients are corrected by it. At or
            below 1 every batch is all images. None: infinity, with a warning.
        target_macs: Share of the MACs to end at, in (0, 1); sets nu while training (see `catode.decisions.target`).
        target_params: The same for parameters.
        warmup: Steps before any theta moves. The first part of a long one is trained without gates (if thetas start at 1):
            measuring begins four memories before its end, earlier where many layers share the paired probes.
        initial_keep_prob: Where every theta starts, in (0, 1].
        estimator: Estimator of the units' benefits, one of `catode.prune.measure.probes.ESTIMATORS`.
        layer_estimator: The same for layers.
        per_example: Draw gates for each example instead of each batch; costs passes over activations. The curvature
            correction then uses the batch means of draw and curvature, taken as uncorrelated.
        probe_size: Examples in a probe; None: a tenth of the batch, at least 12. More where images are small.
        layers_per_probe: Structures (layers by default) whose paired difference one probe takes.
        measure_every: Steps between probes; probes of curvature and of paired differences take turns. None: 2; 1 in runs so
            short that `memory` is below 40; a hundredth of `memory`, at most 8, in long ones.
        check_every: Steps between checks; None: a quarter of `memory`.
        read_every: Steps after which the host reads what was measured, waiting for the device, moves the thetas step by
            step and checks; 1 on a CPU, about 10 elsewhere. In between thetas do not move.
        memory: Steps over which measurements are pooled, at least 10; None:
            `catode.theory.tolerance.measured.fitting_memory`, 200 or a tenth of a short deciding phase.
        width_multiple: While training, a site that loses units keeps dead channels up to a multiple of this width, which
            is faster than an odd one. They are not counted, and `finish` removes them. Needs an activation that maps 0 to
            0 between the site's producers and consumers, which the self-check makes sure of.
        round_to: Units leave a site only in groups that leave a multiple of this many, or none; those that wait for a
            group stay gated. What still waits when nothing else is undecided at the site is kept for the width alone, its
            keep probability folded into its weights, so that the network does not change, and trained on without a gate.
        max_norm: Bound on the norm of the weights of every block's branch, which is scaled down to it after each step while
            pruning; the theorems assume that there is one. None: no bound.
        shadow: Decide, but remove nothing before its theta is 0; the pruner's `shadow` then holds what several rules
            would have removed and the outcomes (see `catode.decisions.shadow`). Decisions end after `steps`; what is
            undecided then is watched, gated, up to this step. None: remove. Not with a target or `round_to`.
        seed: Seed of the gate draws.

    Raises:
        ValueError: for values out of range or that do not go together.
    """

    nu: float
    steps: int
    rate_ratio: float | None = None
    alpha: float = 0.5
    beta: float = 0.0
    risk: float = 0.05
    tolerance: float | None = None
    prior: str = "flattening"
    images: int | None = None
    epoch_steps: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    warmup: int = 0
    initial_keep_prob: float = 1.0
    estimator: str = "curvature"
    layer_estimator: str = "paired"
    per_example: bool = False
    probe_size: int | None = None
    layers_per_probe: int = 1
    measure_every: int | None = None
    check_every: int | None = None
    read_every: int = 1
    memory: int | None = None
    width_multiple: int = 1
    round_to: int = 1
    max_norm: float | None = None
    shadow: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, given: dict[str, Any]) -> PrunerSettings:
        """Settings from keyword arguments.

        Args:
            given: Values by name.

        Raises:
            TypeError: for a name that is no setting, or a missing one that has no default.
            ValueError: for values out of range or that do not go together.
        """
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean `{near[0]}`?" if near else "Leave it out."
                raise TypeError(f"`{name}` must be a setting of the pruner; got {name}={value!r}. {hint}")
        for name in ("nu", "steps"):
            if name not in given:
                raise TypeError(f"`{name}` must be given; got none. See catode.prune.settings.PrunerSettings.")
        return cls(**given)

    def __post_init__(self) -> None:
        self._set_checked(check_positive, "nu", hint="Leave the pruner out for the ungated network.")
        for name in ("alpha", "beta"):
            self._set_checked(check_interval, name, low=0.0, high=1.0)
        self._set_checked(check_interval, "risk", low=0.0, high=0.5, low_open=True, high_open=True)
        self._set_checked(check_interval, "initial_keep_prob", low=0.0, high=1.0, low_open=True)
        self._set_checked(check_interval, "tolerance", low=0.0, high=1.0)
        for name in ("rate_ratio", "epoch_steps", "max_norm"):
            if name != "epoch_steps" or self.epoch_steps != math.inf:
                self._set_checked(check_positive, name)
        self._set_checked(check_choice, "prior", choices=PRIORS)
        for name in ("layer_estimator", "estimator"):
            self._set_checked(check_choice, name, choices=ESTIMATORS)
        self._set_checked(check_bool, "per_example")
        self._set_checked(check_int, "seed")
        counts = dict(steps=1, warmup=0, layers_per_probe=1, measure_every=1, check_every=1, read_every=1, memory=10)
        for name, low in (counts | dict(width_multiple=1, round_to=1, images=1, probe_size=2)).items():
            self._set_checked(check_int, name, low=low)
        self._set_checked(check_int, "shadow", low=self.steps)
        self._check_together()
        self._choose()

    @property
    def targeted(self) -> bool:
        """Whether a target is set."""
        return (self.target_macs, self.target_params) != (None, None)

    @property
    def watch_until(self) -> int:
        """Steps after which a shadow run ends; `steps` for others."""
        return self.steps if self.shadow is None else self.shadow

    def _choose(self) -> None:
        """Give a value to what the length of the run decides."""
        if self.memory is None:
            object.__setattr__(self, "memory", fitting_memory(self.steps, self.warmup))
        for name, value in (
            ("check_every", check_steps(self.memory)),
            ("measure_every", 1 if self.memory < SHORT else min(max(self.memory // ENOUGH, 2), RAREST)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _set_checked(self, check: Callable[..., Any], name: str, **limits: Any) -> None:
        """Replace a setting by its checked, plain Python value; None stays where it is the default."""
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value is not None or default is not None:
            object.__setattr__(self, name, check(name, value, **limits))

    def _check_together(self) -> None:
        if self.prior != "flattening" and (self.tolerance is None or self.shadow is not None or self.targeted):
            raise ValueError(
                "`prior` must be flattening without a fixed tolerance, with a target or with shadow; got "
                f"prior={self.prior!r}. The derived tolerances hold for it alone."
            )
        if self.prior == "concrete" and self.initial_keep_prob == 1.0:
            raise ValueError(
                "`initial_keep_prob` must be below 1 with prior='concrete', which never leaves 1; got 1.0. Use 0.9."
            )
        if self.prior == "bernoulli" and self.images is None:
            raise ValueError(
                "`images` must be given with prior='bernoulli'; got None. It is the number of training images."
            )
        if self.warmup >= self.steps:
            raise ValueError(
                f"`warmup` must be below steps={self.steps}, or nothing is ever decided; got warmup={self.warmup}. Shorten it."
            )
        if self.shadow is not None and (self.targeted or self.round_to > 1):
            raise ValueError(
                "`shadow` must be None with a target or round_to, whose removals depend on each other; got "
                f"shadow={self.shadow}. Leave the target and round_to out."
            )
