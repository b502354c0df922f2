"""State of a pruner, and its form in a checkpoint.

`pack` turns a dataclass into types that ``torch.load(weights_only=True)`` reads: by its fields, not by a list of names, so
that a new field is saved automatically. Fields marked `catode._saved.UNSAVED` follow from the settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from catode._saved import saved_fields
from catode.decisions.evidence import LEAST_EVIDENCE, Evidence
from catode.decisions.schedule import Turns
from catode.decisions.motion import ThetaSpeed
from catode.decisions.shadow import Shadow
from catode.prune.gated.draws import GateDraws
from catode.prune.measure.growth import GradientProducts
from catode.prune.optimizers import Updates
from catode.prune.settings import PrunerSettings
from catode.structures import fates
from catode.structures.inventory import Inventory

ARRAY, NAMES = "array of numbers", "array of names"
FATE_TYPE = "<U32"


@dataclass(eq=False)
class PrunerState:
    """Everything that a checkpoint must hold of a pruner beside the network itself; arrays have shape (n,).

    Attributes:
        keep_prob: theta.
        fate: One of `catode.structures.fates.FATES` of every structure.
        kept: Structures in the network.
        rate_ratio: Speeds of theta at base time 1 (`ThetaSpeed`), 1/(nats time); see `rates`.
        speed: Speed of all thetas.
        zero: Undecided structures whose theta was absorbed at 0; removed at the next check.
        pending: ODE time since each structure's last estimate.
        for_width: Units kept for a round width alone.
        present: Numbers of the units that are physically present at each site, dead channels included.
        nu: Nats that the whole network may cost.
        done: Training steps.
        time: ODE time.
        started: Whether gates are in the model, or were.
        finished: Whether everything is decided.
        evidence: Evidence about the benefits.
        products: Products of gradients.
        draws: Draws of the gates.
        label_rng: Generator of the labels that probes sample, on the model's device.
        turns: Rotation of the paired differences.
        shadow: Record of a shadow run, None for others.
    """

    keep_prob: NDArray
    fate: NDArray[np.str_]
    kept: NDArray[np.bool_]
    rate_ratio: NDArray
    speed: ThetaSpeed
    zero: NDArray[np.bool_]
    pending: NDArray
    for_width: NDArray[np.bool_]
    present: list[NDArray[np.int64]]
    nu: float
    done: int
    time: float
    started: bool
    finished: bool
    evidence: Evidence
    products: GradientProducts
    draws: GateDraws
    label_rng: torch.Generator
    turns: Turns
    shadow: Shadow | None

    @classmethod
    def fresh(
        cls,
        settings: PrunerSettings,
        inventory: Inventory,
        keep_prob: NDArray,
        *,
        gated: NDArray[np.bool_],
        rate_ratio: NDArray,
        speed: ThetaSpeed,
        updates: Updates,
        corrected: NDArray[np.bool_],
        burst_every: int,
        put: Callable[..., None],
        draws: GateDraws,
        label_rng: torch.Generator,
    ) -> PrunerState:
        """The state before the first step.

        Args:
            settings: The pruner's settings.
            inventory: Numbering of the structures.
            keep_prob: theta at the start, shape (n,).
            gated: Which structures have gates, shape (n,).
            rate_ratio: Speeds of theta at base time 1, shape (n,).
            speed: Speed of all thetas.
            updates: What the optimizer does with gradients.
            corrected: Structures whose estimates contain half the pooled curvature, shape (n,).
            burst_every: Steps from one burst of gradients to the next.
            put: Defers a read; see `catode.prune.devices.transfer`.
            draws: Draws of the gates.
            label_rng: Generator of the labels that probes sample.
        """
        n, memory = inventory.size, settings.memory
        evidence = Evidence(
            np.where(inventory.is_layer, max(memory / 10, LEAST_EVIDENCE), memory),
            curvature_window=max(memory / (2 * settings.measure_every), 10),
            corrected=corrected,
            risk=settings.risk,
        )
        return cls(
            keep_prob=keep_prob,
            fate=np.where(gated, fates.UNDECIDED, fates.COMMITTED).astype(FATE_TYPE),
            kept=np.ones(n, dtype=bool),
            rate_ratio=rate_ratio,
            speed=speed,
            zero=np.zeros(n, dtype=bool),
            pending=np.zeros(n),
            for_width=np.zeros(n, dtype=bool),
            present=list(inventory.units),
            nu=float(settings.nu),
            done=0,
            time=0.0,
            started=False,
            finished=False,
            evidence=evidence,
            products=GradientProducts(n, max(memory / burst_every, 20), put, settings.epoch_steps, updates),
            draws=draws,
            label_rng=label_rng,
            turns=Turns(),
            shadow=None if settings.shadow is None else Shadow(n),
        )

    @property
    def rates(self) -> NDArray:
        """Speeds of theta, 1/(nats time)."""
        return self.rate_ratio * self.speed.per_unit


def pack(thing: Any) -> Any:
    """A copy of a dataclass, its nested ones included, of dicts, lists, tensors on the CPU, numbers and text."""
    if dataclasses.is_dataclass(thing):
        return {name: pack(getattr(thing, name)) for name in saved_fields(thing)}
    if isinstance(thing, np.ndarray):
        if thing.dtype.kind == "U":
            return {NAMES: thing.tolist()}
        return {ARRAY: torch.from_numpy(np.array(thing))}
    if isinstance(thing, torch.Tensor):
        return thing.detach().cpu().clone()
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, (list, tuple)):
        return [pack(part) for part in thing]
    return thing


def check_fits(own: PrunerState, state: dict) -> None:
    """Make sure that a `Pruner.state_dict` fits a pruner; changes nothing.

    Raises:
        ValueError: if the state is of another network, of another kind of run, or of an earlier version.
    """
    packed = state.get("pruner")
    names = {field.name for field in dataclasses.fields(PrunerState)}
    if not isinstance(packed, dict) or packed.keys() != names:
        raise ValueError(
            f"`state` must be a state_dict of this version's Pruner; got one with {', '.join(map(str, state))}. "
            "Start a new run, or use the version that wrote it."
        )
    sizes = len(packed["fate"][NAMES]), len(packed["present"])
    if sizes != (len(own.fate), len(own.present)):
        raise ValueError(
            f"`state` must be of the same network; got one of {sizes[0]} structures instead of {len(own.fate)}. "
            "Build the model and the pruner with the same arguments."
        )
    if (packed["shadow"] is None) != (own.shadow is None):
        raise ValueError(
            f"`state` must be of a pruner with the same arguments; got one {'without' if own.shadow else 'with'} shadow. "
            "Build the pruner with the same shadow."
        )
    odd = _unlike(pack(own), packed)
    if odd:
        raise ValueError(f"`state` must hold what a Pruner does; got something else at {odd}. Restore it from the run.")
    keep_prob = packed["keep_prob"][ARRAY]
    if not bool(((keep_prob >= 0) & (keep_prob <= 1)).all()) or not set(packed["fate"][NAMES]) <= set(fates.FATES):
        raise ValueError(
            "`state` must hold keep probabilities in [0, 1] and known fates; got others. Restore it from the run."
        )


def _unlike(own: Any, other: Any, place: str = "pruner") -> str:
    """Where one of two results of `pack` is of another type or shape than the first, which is of a fresh state; empty if nowhere.

    What is nothing or a list in a fresh state may be anything in the other: it grows while a run goes on.
    """
    if own is None or isinstance(own, list):
        return ""
    if isinstance(own, dict):
        if not isinstance(other, dict) or own.keys() - other.keys():
            return place
        return next(filter(None, (_unlike(own[name], other[name], f"{place}.{name}") for name in own)), "")
    if isinstance(own, torch.Tensor):  # an array's shape is that of the network; a tensor's may be that of a batch
        alike = isinstance(other, torch.Tensor) and own.dtype == other.dtype
        alike = alike and (own.shape == other.shape or not place.endswith(ARRAY))
    elif type(own) is float:
        alike = type(other) in (int, float)
    else:
        alike = type(other) is type(own)
    return "" if alike else place


def unpack(thing: Any, packed: dict) -> None:
    """Restore a dataclass in place from what `pack` made of one of its class; tensors stay on the CPU.

    Raises:
        KeyError: if a field is missing.
    """
    for name in saved_fields(thing):
        current, value = getattr(thing, name), packed[name]
        if dataclasses.is_dataclass(current):
            unpack(current, value)
        elif isinstance(current, torch.Generator):
            if value.shape == current.get_state().shape:  # another kind of device has another generator
                current.set_state(value)
        else:
            setattr(thing, name, _unpacked(value))


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and ARRAY in value:
        return value[ARRAY].numpy().copy()
    if isinstance(value, dict) and NAMES in value:
        return np.array(value[NAMES], dtype=FATE_TYPE)
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_unpacked(part) for part in value]
    return value
