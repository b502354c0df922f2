"""State of a pruner, and its form in a checkpoint.

`pack` turns a dataclass into types that ``torch.load(weights_only=True)`` reads: by its fields, not by a list of names, so
that a new field is saved automatically. Fields marked `catode._saved.UNSAVED` follow from the settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from catode._saved import saved_fields
from catode.decisions.evidence import LEAST_EVIDENCE, Evidence
from catode.decisions.motion import ThetaSpeed
from catode.decisions.schedule import Turns
from catode.decisions.shadow import NUMBERS, OUTCOMES, RULES, Shadow
from catode.prune.gated.draws import GateDraws
from catode.prune.measure.bounds import Bounds
from catode.prune.measure.growth import BURST, GradientProducts
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
        label_rng: Generator of the vectors that probes draw, on the model's device.
        turns: Rotation of the paired differences.
        shadow: Record of a shadow run, None for others.
        bounds: Largest norms of the blocks' weights, and violations of the Lipschitz assumption.
        cut_at: Training steps at the last removal, or the last decision that moved a theta.
        removed_near_one: Structures that were removed because time was out, with a theta near 1.
        warnings: What was said aloud, one line each.
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
    bounds: Bounds
    cut_at: int = 0
    removed_near_one: int = 0
    warnings: list[str] = field(default_factory=list)

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
            label_rng: Generator of the vectors that probes draw.
        """
        n, memory = inventory.size, settings.memory
        an_epoch = None if settings.epoch_steps in (None, math.inf) else settings.epoch_steps
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
            products=GradientProducts(n, max(memory / burst_every, 20), put, an_epoch, updates),
            draws=draws,
            label_rng=label_rng,
            turns=Turns(),
            shadow=None if settings.shadow is None else Shadow(n),
            bounds=Bounds(inventory.layers),
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


@dataclass(frozen=True)
class Rule:
    """What one packed value of a pruner's state must be.

    Attributes:
        what: The same in words, continuing "must be".
        fits: Whether a value is that; its second argument is the number of structures.
    """

    what: str
    fits: Callable[[Any, int], bool]


def _array(what: str, dtype: torch.dtype, inside: Callable[[torch.Tensor], torch.Tensor], *rows: int) -> Rule:
    """A packed array of shape (*rows, n) whose entries all lie `inside`."""
    what = f"an array of {what}, {str(dtype).removeprefix('torch.')}, one for each structure"
    return Rule(what, lambda value, n: _is_array(value, dtype, (*rows, n)) and bool(inside(value[ARRAY]).all()))


def _is_array(value: Any, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> bool:
    if not isinstance(value, dict) or value.keys() != {ARRAY} or not torch.is_tensor(value[ARRAY]):
        return False
    return value[ARRAY].dtype == dtype and shape in (None, tuple(value[ARRAY].shape))


def _number(what: str, kind: type, inside: Callable[[Any], bool]) -> Rule:
    return Rule(what, lambda value, n: type(value) is kind and math.isfinite(value) and inside(value))


def _share(values: torch.Tensor) -> torch.Tensor:
    return (values >= 0) & (values <= 1)


def _not_negative(values: torch.Tensor) -> torch.Tensor:
    return values.isfinite() & (values >= 0)


def _anything(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def _is_rows(value: Any, n: int) -> bool:
    if value is None:
        return True
    fits = torch.is_tensor(value) and value.dtype == torch.float32 and value.dim() == 2 and value.shape[1] == n
    return fits and bool(((value == 0) | (value == 1)).all())


def _is_vector(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() == 1 and value.dtype.is_floating_point


def _is_burst(value: Any, n: int) -> bool:
    """Gradients may have overflowed; their products are then left out."""
    if not isinstance(value, list) or len(value) >= BURST:
        return False
    for step in value:
        if not isinstance(step, list) or len(step) != 2 or not _is_vector(step[0]):
            return False
        if not _is_array(step[1], torch.float64, (n,)) or not bool(_share(step[1][ARRAY]).all()):
            return False
    return len({len(step[0]) for step in value}) < 2


def _is_move(value: Any, n: int) -> bool:
    """A gradient that overflowed moves the weights by what is not finite; its answer is then left out."""
    return isinstance(value, list) and len(value) < 2 and all(map(_is_vector, value))


def _are_bounds(value: Any, n: int) -> bool:
    return _is_array(value, torch.float64) and bool(_not_negative(value[ARRAY]).all()) and value[ARRAY].dim() == 1


def _is_metric(value: Any, n: int) -> bool:
    """Nothing between bursts; else numbers of each parameter, and of each weight if the optimizer scales them."""
    if not isinstance(value, list) or len(value) > 2 or not all(map(torch.is_tensor, value)):
        return False
    if value and not (value[0].dtype == torch.float64 and value[0].dim() == 2 and value[0].shape[1] == 3):
        return False
    return (not value or bool(_not_negative(value[0]).all())) and all(map(_is_vector, value[1:]))


def _is_generator(value: Any, n: int) -> bool:
    """A state that a generator takes; one of an accelerator, which this process may lack, is told by its size alone."""
    if not torch.is_tensor(value) or value.dtype != torch.uint8 or value.dim() != 1 or not len(value):
        return False
    if len(value) <= COUNTER_BYTES:
        return True
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


COUNTER_BYTES = 64  # most bytes in the state of an accelerator's generator, which is counter-based
_TRUTH = Rule("True or False", lambda value, n: type(value) is bool)
_COUNT = _number("a count", int, lambda value: value >= 0)
_TIME = _number("a time", float, lambda value: value >= 0)
_MASK = _array("truth values", torch.bool, _anything)
_GENERATOR = Rule("the state of a generator", _is_generator)
_AMOUNTS = _array("finite numbers >= 0", torch.float64, _not_negative)
_POOL: dict[str, Any] = {
    "weight": _AMOUNTS,
    "weight_squares": _AMOUNTS,
    "total": _array("finite numbers", torch.float64, torch.isfinite),
    "squares": _AMOUNTS,
}
_SHADOW: dict[str, Any] = {
    **dict.fromkeys(("step", "outcome_step"), _array("counts", torch.int64, lambda v: v >= 0, len(RULES))),
    "outcome": _array("outcomes", torch.int64, lambda v: (v >= 0) & (v < len(OUTCOMES)), len(RULES)),
    "outcome_time": _array("times", torch.float64, lambda v: v.isnan() | _not_negative(v), len(RULES)),
    "numbers": _array("numbers", torch.float64, _anything, len(NUMBERS), len(RULES)),
}

SCHEMA: dict[str, Any] = {
    "keep_prob": _array("shares", torch.float64, _share),
    "fate": Rule(
        "a known fate of each structure",
        lambda value, n: (
            isinstance(value, dict)
            and value.keys() == {NAMES}
            and isinstance(value[NAMES], list)
            and len(value[NAMES]) == n
            and all(isinstance(name, str) and name in fates.FATES for name in value[NAMES])
        ),
    ),
    "kept": _MASK,
    "rate_ratio": _AMOUNTS,
    "speed": {"base": _TIME, "risen": _COUNT},
    "zero": _MASK,
    "pending": _AMOUNTS,
    "for_width": _MASK,
    "present": Rule(
        "increasing numbers of structures, int64, at each site",
        lambda value, n: isinstance(value, list) and all(_is_array(units, torch.int64) for units in value),
    ),
    "nu": _number("a positive number", float, lambda value: value > 0),
    "done": _COUNT,
    "time": _TIME,
    "started": _TRUTH,
    "finished": _TRUTH,
    "evidence": {
        "curvature": _POOL,
        **dict.fromkeys(("_benefit", "_slow", "_when", "_slow_when", "_elapsed", "_estimate", "_successive"), _POOL),
        "_last": _array("finite numbers or NaN", torch.float64, lambda v: ~v.isinf()),
    },
    "products": {
        "pools": dict.fromkeys(("gain", "gain_below", "answer", "reach", "displaced", "share", "pull"), _POOL),
        "burst": Rule(f"fewer than {BURST} gradients of one length with the gates they were taken at", _is_burst),
        "metric": Rule("what the optimizer makes of a burst's gradients", _is_metric),
        "answering": _TRUTH,
        "moved": Rule("nothing, or what a step moved the weights by, one vector", _is_move),
        "unit": _TIME,
        "share": _array("shares", torch.float64, _share),
        "followed": _COUNT,
    },
    "draws": {
        "generator": _GENERATOR,
        "chances": Rule(
            "shares, float32, one for each structure",
            lambda value, n: (
                torch.is_tensor(value)
                and (value.dtype, value.shape) == (torch.float32, (n,))
                and bool(_share(value).all())
            ),
        ),
        "rows": Rule("rows of zeros and ones, float32, or nothing", _is_rows),
    },
    "label_rng": _GENERATOR,
    "turns": dict.fromkeys(("layers", "units"), _COUNT),
    "shadow": _SHADOW,
    "bounds": dict.fromkeys(("norm", "violation"), Rule("numbers >= 0, float64", _are_bounds)),
    "cut_at": _COUNT,
    "removed_near_one": _COUNT,
    "warnings": Rule(
        "lines of text",
        lambda value, n: isinstance(value, list) and all(isinstance(line, str) and "\n" not in line for line in value),
    ),
}
"""What every packed value of a pruner's state must be, by the names of the fields."""


def check_fits(own: PrunerState, state: dict, inventory: Inventory, whole: dict[str, torch.Tensor]) -> None:
    """Make sure that a `Pruner.state_dict` fits a pruner; changes nothing.

    Args:
        own: The state of the fresh pruner.
        state: The state_dict.
        inventory: Numbering of the structures.
        whole: State dict of the fresh, whole network.

    Raises:
        ValueError: if the state is of another network, of another kind of run, or of an earlier version, or holds what a
            pruner's does not.
    """
    packed = state.get("pruner")
    if not isinstance(packed, dict) or packed.keys() != SCHEMA.keys():
        raise ValueError(
            f"`state` must be a state_dict of this version's Pruner; got one with {', '.join(map(str, state))}. "
            "Start a new run, or use the version that wrote it."
        )
    names, present = packed["fate"].get(NAMES) if isinstance(packed["fate"], dict) else None, packed["present"]
    lists = isinstance(names, list) and isinstance(present, list)
    if lists and (len(names), len(present)) != (len(own.fate), len(own.present)):
        raise ValueError(
            f"`state` must be of the same network; got one of {len(names)} structures instead of {len(own.fate)}. "
            "Build the model and the pruner with the same arguments."
        )
    if (packed["shadow"] is None) != (own.shadow is None):
        raise ValueError(
            f"`state` must be of a pruner with the same arguments; got one {'without' if own.shadow else 'with'} shadow. "
            "Build the pruner with the same shadow."
        )
    schema = SCHEMA if own.shadow else {name: rule for name, rule in SCHEMA.items() if name != "shadow"}
    odd = _unlike(schema, packed, len(own.fate)) or _contrary(packed, inventory) or _odd_weights(state["model"], whole)
    if odd:
        raise ValueError(f"`state` must hold what a Pruner does; got something else at {odd}. Restore it from the run.")


def _unlike(schema: dict[str, Any], packed: Any, n: int, place: str = "pruner") -> str:
    """Where a packed value breaks its rule, and the rule; empty if nowhere."""
    if not isinstance(packed, dict) or schema.keys() - packed.keys():
        return f"{place}, which must hold {', '.join(schema)}"
    for name, rule in schema.items():
        inside = f"{place}.{name}"
        if isinstance(rule, dict):
            if odd := _unlike(rule, packed[name], n, inside):
                return odd
        elif not rule.fits(packed[name], n):
            return f"{inside}, which must be {rule.what}"
    return ""


def _contrary(packed: dict, inventory: Inventory) -> str:
    """Where values that follow their rules contradict each other; empty if nowhere."""
    for name, values in packed["bounds"].items():
        if len(values[ARRAY]) != inventory.layers:
            return f"pruner.bounds.{name}, which must have one number for each of {inventory.layers} layers"
    fate, kept = np.array(packed["fate"][NAMES]), packed["kept"][ARRAY].numpy()
    if (kept == np.isin(fate, fates.REMOVED)).any() or (inventory.close(kept) != kept).any():
        return "pruner.kept, which must be what the fates leave in the network"
    least = np.array([place.site.least for place in inventory.places])[inventory.unit_site]
    if ((fate[inventory.layers :] == fates.KEPT_AT_LEAST) & (least == 0)).any():
        return "pruner.fate, where widths are at a least that this pruner's description does not give them"
    fixed = fate != fates.UNDECIDED
    if (packed["keep_prob"][ARRAY].numpy() != kept)[fixed].any():
        return "pruner.keep_prob, which must be 0 or 1 where a fate is decided"
    for place in inventory.places:
        units = packed["present"][place.number][ARRAY].numpy()
        if units.ndim != 1 or not np.isin(units, place.units).all() or (np.diff(units) <= 0).any():
            return "pruner.present, which must be increasing numbers of each site's units"
        if kept[place.layer] and not np.isin(place.units[kept[place.units]], units).all():
            return "pruner.present, which must hold every unit that is kept"
    rows = packed["draws"]["rows"]
    if packed["started"] and not packed["finished"] and (rows is None or not len(rows)):
        return "pruner.draws.rows, which must hold the row of the step to come"
    return ""


def _odd_weights(state: Any, whole: dict[str, torch.Tensor]) -> str:
    """Which tensor cannot be a part of the whole network's of the same name; empty if none."""
    if not isinstance(state, dict):
        return "model, which must be tensors by name"
    for name, tensor in state.items():
        own = whole.get(name)
        if own is None or not torch.is_tensor(tensor) or tensor.dtype != own.dtype or tensor.dim() != own.dim():
            return f"model.{name}"
        finite = bool(tensor.isfinite().all()) or not bool(own.isfinite().all())  # a mask may hold -inf
        if any(a > b for a, b in zip(tensor.shape, own.shape, strict=True)) or not finite:
            return f"model.{name}, which must be finite and no larger than the network's"
    return ""


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
