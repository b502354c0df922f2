"""The one configuration of a run: the settings of all topics, resolved, from which flags, run identity and config.json derive.

To add a setting, add a field to the class of its topic in `data`, `pruning`, `gates`, `training` or `run`; to tune one, edit
`catode.train.settings.presets`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from catode.train.settings import presets
from catode.train.settings.data import DataSettings
from catode.train.settings.gates import GateSettings
from catode.train.settings.pruning import PruningSettings
from catode.train.settings.run import RunSettings, check_device, check_out
from catode.train.settings.setting import LEAST, ConfigError, Setting, nearest
from catode.train.settings.training import TrainingSettings, learning_rates, ode_time

__all__ = ["DERIVED", "Config", "ConfigError", "check_device", "check_out", "settings"]

READ_EVERY = 10  # steps on an accelerator
DERIVED = ("memory", "check_every", "rate_ratio", "probe_size")
"""Settings that follow from the others and the run's length where they are not given; see `Config.resolved`."""


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings, TrainingSettings, GateSettings, PruningSettings, DataSettings):
    """Every setting of a run, checked.

    Built directly, a field that is not given takes its own default; `Config.from_presets` and `parse` put the preset of
    the data set and architecture over it. `derive_tol`, `read_every` and `out` are resolved on construction, the settings of
    `DERIVED` by `resolved`, once the number of steps is known. Give `out=None` to `dataclasses.replace` for a folder named anew.

    Args:
        derived: Names of the settings that `resolved` filled in; no flag.

    Raises:
        ConfigError: if a value is not admitted, or two values do not go together.
    """

    derived: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_every is None:
            object.__setattr__(self, "read_every", 1 if self.device == "cpu" else READ_EVERY)
        object.__setattr__(self, "derive_tol", self.tol is None)
        if self.out is None:
            object.__setattr__(self, "out", f"runs/{self.dataset}-{self.arch}-{self.tag}-s{self.seed}")

    def check(self) -> None:
        if self.amp == "fp16" and not self.device.startswith("cuda"):
            raise ConfigError(
                f"`amp` must be off or bf16 on device={self.device!r}, where fp16 has no use; got amp='fp16'. Use --amp bf16."
            )
        deciding = self.decide_until * self.epochs
        if self.nu > 0 and self.warmup_epochs >= deciding:
            raise ConfigError(
                f"`warmup_epochs` must be < decide_until x epochs = {deciding:g}, or nothing is ever decided; "
                f"got warmup_epochs={self.warmup_epochs:g}. Shorten the warm-up or train longer."
            )
        if not isinstance(self.derived, tuple) or not set(self.derived) <= set(DERIVED):
            raise ConfigError(
                f"`derived` must hold names among {', '.join(DERIVED)}; got derived={self.derived!r}. Restore config.json from the "
                "run."
            )

    def resolved(self, steps: int, processes: int = 1) -> Config:
        """The same with a value in place of every null of `DERIVED`.

        Args:
            steps: Training steps of the whole run.
            processes: Processes that share each batch.

        Raises:
            ConfigError: if a value that follows is not admitted.
        """
        from catode.prune.measuring import usual_probe
        from catode.theory.tolerance.measured import pool_memory

        decide_steps = round(self.decide_until * steps)
        memory = pool_memory(decide_steps) if self.memory is None else self.memory
        time = ode_time(learning_rates(self.schedule, self.lr, steps), self.momentum)
        # each process probes its own share of the batch, unless they normalise it together
        batch = self.batch_size if self.sync_bn else self.batch_size // processes
        values = {
            "memory": memory,
            "check_every": memory // 4,
            "rate_ratio": max(1.0 / (self.sink_share * time), LEAST),
            "probe_size": usual_probe(batch),
        }
        values = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **values, derived=(*self.derived, *values))

    def identity(self) -> dict[str, Any]:
        """What decides the course of a run: data set, architecture, seed, and every setting that the tag stands for.

        A setting of `derived` is None here, as it follows from the others.
        """
        own = ("dataset", "arch", "seed")
        values = {name: getattr(self, name) for name, setting in settings().items() if setting.identity or name in own}
        return values | dict.fromkeys(self.derived)

    @property
    def tag(self) -> str:
        """What sets this run apart from the preset: a short hash of the settings that differ, or `default`."""
        base = presets.resolve({"dataset": self.dataset, "arch": self.arch}, _defaults())
        values = {name: value for name, value in self.identity().items() if settings()[name].identity}
        values.pop("derive_tol")  # follows from tol
        differing = {name: value for name, value in values.items() if value != base[name]}
        if not differing:
            return "default"
        return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]

    @classmethod
    def from_presets(cls, **given: Any) -> Config:
        """Build from some values; the preset of their data set and architecture fills in the others.

        Args:
            **given: Values of fields.

        Returns:
            The configuration.

        Raises:
            ConfigError: if a name or value is not admitted.
        """
        _check_names(given)
        known = settings()
        for name in ("dataset", "arch"):
            try:
                known[name].check(name, given.get(name, getattr(cls, name)))
            except ValueError as error:
                raise ConfigError(str(error)) from None
        return cls(**presets.resolve(given, _defaults()))

    def to_json(self) -> str:
        """Every setting as the text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, **changes: Any) -> Config:
        """Read `config.json` back.

        Args:
            text: Content of the file.
            **changes: Values to put over those read, such as `device="cpu"` where the run's device is not at hand.

        Returns:
            The configuration.

        Raises:
            ConfigError: if the text is not a JSON object, or names or holds something that is not admitted.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"`config.json` must be valid JSON; got an error at line {error.lineno}, column {error.colno} "
                f"({error.msg}). Restore the file from the run."
            ) from None
        except (ValueError, RecursionError) as error:  # of a number of thousands of digits, of deep nesting
            raise ConfigError(
                f"`config.json` must be valid JSON; got: {error}. Restore the file from the run."
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"`config.json` must hold one JSON object; got {type(values).__name__}. Restore the file from the run."
            )
        derived = values.pop("derived", ())
        if isinstance(derived, list):
            derived = tuple(derived)
        if any(name in settings() and settings()[name].identity for name in changes):
            # another run: what followed from the settings of that one is derived anew
            values |= {name: None for name in derived if name in DERIVED}
            derived = ()
        values = {**values, **changes}
        _check_names(values)
        return cls(**values, derived=derived)


def settings() -> dict[str, Setting]:
    """The setting behind each flag, in order."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(Config) if "setting" in f.metadata}


def _defaults() -> dict[str, Any]:
    """Default of every setting."""
    return {f.name: f.default for f in dataclasses.fields(Config) if "setting" in f.metadata}


def _check_names(given: dict[str, Any]) -> None:
    known = settings()
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean `{near}`?" if near else "Leave it out."
            raise ConfigError(f"`{name}` must be the name of a setting; got {name}={value!r}. {hint}")
