"""What of an object a checkpoint holds: the fields of its dataclass, but those marked `UNSAVED`."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

UNSAVED = MappingProxyType({"saved": False})
"""Metadata of a field that follows from the settings: ``field(metadata=UNSAVED)``."""


def saved_fields(thing: Any) -> list[str]:
    """Names of the fields of a dataclass instance that a checkpoint holds."""
    return [field.name for field in dataclasses.fields(thing) if field.metadata.get("saved", True)]
