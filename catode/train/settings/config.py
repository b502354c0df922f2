"""The configuration of a run: the settings of all topics. Flags, run identity and config.json are made from it.

To add a setting, add a field to the class of its topic in `data`, `pruning`, `gates`, `training` or `run`; to change a
preset, edit `catode.train.settings.presets`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from catode.train.models import sources
from catode.train.settings import presets
from catode.train.settings.data import DataSettings
from catode.train.settings.gates import GateSettings
from catode.train.settings.pruning import PruningSettings
from catode.train.settings.run import RunSettings, check_device, check_out
from catode.train.settings.setting import LEAST, ConfigError, Setting, nearest
from catode.train.settings.training import LAYOUTS, TrainingSettings, learning_rates, ode_time

__all__ = ["DERIVED", "Config", "ConfigError", "check_device", "check_out", "settings"]

READ_EVERY = 10  # default of read_every on an accelerator
DERIVED = ("memory", "check_every", "rate_ratio", "probe_size")
"""Settings that, if not given, are computed from the others and the run's length; see `Config.resolved`."""


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings, TrainingSettings, GateSettings, PruningSettings, DataSettings):
    """Every setting of a run, checked.

    The constructor uses the fields' defaults; `Config.from_presets` and `parse` use the preset of the data set and
    architecture. `derive_tol`, `read_every` and `out` are resolved on construction, the settings of `DERIVED` by `resolved`,
    once the number of steps is known. Pass `out=None` to `dataclasses.replace` to recompute the folder's name.

    Args:
        derived: Names of the settings that `resolved` computed; not a flag.

    Raises:
        ConfigError: if a value is invalid, or two values cannot be combined.
    """

    derived: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_every is None:
            object.__setattr__(self, "read_every", 1 if self.device == "cpu" else READ_EVERY)
        object.__setattr__(self, "derive_tol", self.tol is None)
        if self.out is None:
            name = sources.folder_name(self.arch)
            object.__setattr__(self, "out", f"runs/{self.dataset}-{name}-{self.tag}-s{self.seed}")

    def check(self) -> None:
        if self.amp == "fp16" and not self.device.startswith("cuda"):
            raise ConfigError(
                f"`amp` must be off or bf16 on device={self.device!r}, where fp16 is not supported; got amp='fp16'. Use --amp bf16."
            )
        deciding = self.decide_until * self.epochs
        if self.nu > 0 and self.warmup_epochs >= deciding:
            raise ConfigError(
                f"`warmup_epochs` must be < decide_until x epochs = {deciding:g}, or nothing is decided; "
                f"got warmup_epochs={self.warmup_epochs:g}. Shorten the warm-up or train longer."
            )
        if not isinstance(self.derived, tuple) or not set(self.derived) <= set(DERIVED):
            raise ConfigError(
                f"`derived` must hold names among {', '.join(DERIVED)}; got derived={self.derived!r}. Restore config.json from the "
                "run."
            )

    def resolved(self, steps: int, processes: int = 1) -> Config:
        """A copy with a value for every setting of `DERIVED` that is None.

        Args:
            steps: Training steps of the whole run.
            processes: Processes that share each batch.

        Raises:
            ConfigError: if a computed value is invalid.
        """
        from catode.prune.measure.measuring import usual_probe
        from catode.theory.tolerance.measured import check_steps, fitting_memory

        decide_steps = round(self.decide_until * steps)
        warmup = round(self.warmup_epochs * steps / self.epochs)
        memory = fitting_memory(decide_steps, warmup) if self.memory is None else self.memory
        time = ode_time(learning_rates(self.schedule, self.lr, steps), self.momentum)
        # each process probes its own part of the batch, unless batch norms are synchronised
        batch = self.batch_size if self.sync_bn else self.batch_size // processes
        values = {
            "memory": memory,
            "check_every": check_steps(memory),
            "rate_ratio": max(1.0 / (self.sink_share * time), LEAST),
            "probe_size": usual_probe(batch),
        }
        values = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **values, derived=(*self.derived, *values))

    def identity(self) -> dict[str, Any]:
        """The settings that affect a run's results: data set, architecture, seed, and every setting in the tag.

        A setting of `derived` is None here, as it is computed from the others.
        """
        own = ("dataset", "arch", "seed")
        values = {name: getattr(self, name) for name, setting in settings().items() if setting.identity or name in own}
        return values | dict.fromkeys(self.derived)

    @property
    def tag(self) -> str:
        """A short hash of the settings that differ from the preset, or `default` if none does."""
        base = presets.resolve({"dataset": self.dataset, "arch": self.arch}, _defaults())
        values = {name: value for name, value in self.identity().items() if settings()[name].identity}
        values.pop("derive_tol")  # determined by tol
        if sources.is_foreign(self.arch) and self.arch.replace(":", "-", 1) != sources.folder_name(self.arch):
            values["arch"], base["arch"] = self.arch, None  # the folder's name does not tell all of it
        differing = {name: value for name, value in values.items() if value != base[name]}
        if not differing:
            return "default"
        return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]

    @classmethod
    def from_presets(cls, **given: Any) -> Config:
        """Build from given values and, for the others, the presets of the data set, architecture and optimizer.

        Args:
            **given: Values of settings.

        Returns:
            The configuration.

        Raises:
            ConfigError: if a name or value is invalid.
        """
        _check_names(given)
        known = settings()
        for name in ("dataset", "arch", "optimizer"):
            try:
                known[name].check(name, given.get(name, getattr(cls, name)))
            except ValueError as error:
                raise ConfigError(str(error)) from None
        return cls(**presets.resolve(given, _defaults()))

    def to_json(self) -> str:
        """All settings as JSON, the content of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, **changes: Any) -> Config:
        """Read `config.json`.

        Args:
            text: Content of the file.
            **changes: Values that replace those read, such as `device="cpu"` if the run's device is missing here.

        Returns:
            The configuration.

        Raises:
            ConfigError: if the text is not a JSON object, or a name or value is invalid.
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
        if isinstance(values.get("channels_last"), bool) and "layout" not in values:  # of a version without `layout`
            values["layout"] = LAYOUTS[0] if values.pop("channels_last") else LAYOUTS[1]
        derived = values.pop("derived", ())
        if isinstance(derived, list):
            derived = tuple(derived)
        if any(name in settings() and settings()[name].identity for name in changes):
            # a change of results: derived settings are computed again
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
