"""One setting (type, range, help), and the base class of the settings of a topic."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from catode import _validate

__all__ = ["GROUPS", "LEAST", "ConfigError", "Setting", "SettingsGroup", "helpers", "nearest"]

LEAST = 1e-20  # smallest magnitude of a non-zero number
MOST = 2**31 - 1  # largest integer of a setting without an upper end: what is counted fits into every integer type

GROUPS = {  # headings of `--help`, in this order
    "data": "data and network",
    "pruning": "what is pruned, and when",
    "gates": "gates and measuring",
    "training": "training",
    "run": "the run",
}


class ConfigError(ValueError):
    """An invalid setting; one line: argument, constraint, value, hint."""


@dataclass(frozen=True)
class Setting:
    """Description of one field of `Config`, without its default.

    Args:
        kind: `float`, `int`, `bool`, `str`, or `tuple` for a list of texts.
        help: Text for `--help`.
        group: Heading in `--help`, a key of `GROUPS`.
        choices: Allowed values; empty if they are not a list.
        besides: What else than the `choices` is allowed: checks a text, raises a ValueError in one line, and tells whether it is.
        forms: What `besides` allows, as text.
        low: Lower end of the range.
        high: Upper end of the range.
        low_open: The lower end is excluded.
        high_open: The upper end is excluded.
        optional: None is allowed.
        identity: The setting affects the results, so it is part of the run's identity.
        path: A text is a path, in which ~ is the home folder.
        negatable: A boolean also gets a flag `--no-...`.
        hint: How to fix an invalid value.
    """

    kind: type
    help: str
    group: str
    choices: tuple[str, ...] = ()
    besides: Callable[[object], bool] | None = None
    forms: str = ""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    optional: bool = False
    identity: bool = True
    path: bool = False
    negatable: bool = False
    hint: str | None = None

    @property
    def range(self) -> str:
        """The range as text; empty for a setting without one."""
        if self.kind not in (int, float) or (self.low == -math.inf and self.high == math.inf):
            return ""
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        if self.kind is int:
            return f"in [{self.low}, {self.high}]"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"

    def check(self, name: str, value: Any) -> Any:
        """Return the converted value.

        Raises:
            ValueError: if it is invalid.
        """
        if value is None and self.optional:
            return None
        if self.besides is not None and self.besides(value):
            return value
        if self.choices:
            if self.forms and value not in self.choices:
                named = f"one of {', '.join(self.choices)}, or {self.forms}"
                _validate.fail(name, f"be {named}", value, hint=_suggest(value, self.choices))
            return _validate.check_choice(name, value, self.choices, hint=_suggest(value, self.choices))
        if self.kind is bool:
            return _validate.check_bool(name, value, hint=self.hint or "Use one of the two.")
        if self.kind is tuple:
            texts = isinstance(value, (list, tuple)) and all(isinstance(part, str) and part for part in value)
            if not texts or not value:
                _validate.fail(name, "be a list of non-empty texts", value, hint=self.hint)
            return tuple(value)
        if self.kind is str:
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not isinstance(value, str) or not value:
                _validate.fail(name, "be a non-empty text", value, hint=self.hint)
            return _validate.expanded(name, value, hint=self.hint) if self.path else value
        if self.kind is int:
            value = _validate.check_int(name, value, hint=self.hint)
            if value > MOST and self.high == math.inf:
                _validate.fail(name, f"be at most {MOST}", value, hint=self.hint)
        else:
            value = _validate.check_real(name, value, hint=self.hint)
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        if not (above and below):
            verb = "lie" if self.range.startswith("in ") else "be"
            shown = int(value) if value == int(value) else value
            _validate.fail(name, f"{verb} {self.range}", shown, hint=self.hint)
        if 0 < abs(value) < LEAST:
            _validate.fail(
                name, f"be 0 or at least {LEAST:g} in magnitude, or quotients overflow", value, hint=self.hint
            )
        return value


def nearest(value: Any, names: Iterable[str]) -> str | None:
    """The name most similar to `value`, None if no name is; ties go to the longest common prefix."""
    value = str(value).lower()
    near = difflib.get_close_matches(value, names, n=5, cutoff=0.6)
    return max(
        near,
        key=lambda name: (
            difflib.SequenceMatcher(None, name, value).ratio(),
            len(os.path.commonprefix([name, value])),
        ),
        default=None,
    )


def _suggest(value: Any, choices: Iterable[str]) -> str:
    """A hint that names the most similar of `choices`."""
    near = nearest(value, choices)
    return f"Did you mean {near!r}?" if near else "Use one of these names."


def helpers(group: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Functions that make the dataclass fields of one group.

    Args:
        group: A key of `GROUPS`.

    Returns:
        ``number(default, kind, help, ...)``, ``text(default, help, ...)`` and ``switch(default, help, ...)``; further
        arguments are attributes of `Setting`.
    """
    return partial(_field, group), partial(_of_kind, group, str), partial(_of_kind, group, bool)


def _field(group: str, default: Any, kind: type, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"setting": Setting(kind, help, group, **more)})


def _of_kind(group: str, kind: type, default: Any, help: str, **more: Any) -> Any:
    return _field(group, default, kind, help, **more)


@dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """Settings of one topic. Construction checks each setting, then calls the `check` of every class.

    Raises:
        ConfigError: if a value is invalid, or two values cannot be combined.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "setting" not in field.metadata:
                continue
            try:
                value = field.metadata["setting"].check(field.name, getattr(self, field.name))
            except ValueError as error:
                raise ConfigError(str(error)) from None
            object.__setattr__(self, field.name, value)
        for owner in reversed(type(self).__mro__):
            if "check" in vars(owner):
                owner.check(self)

    def check(self) -> None:
        """Raise a `ConfigError` for values that cannot be combined; each subclass checks only its own fields."""
