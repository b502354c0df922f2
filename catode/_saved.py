"""Which fields of a dataclass a checkpoint stores: all that are not marked `UNSAVED`."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

UNSAVED = MappingProxyType({"saved": False})
"""Metadata of a field that is recomputed from the settings: ``field(metadata=UNSAVED)``."""


def saved_fields(thing: Any) -> list[str]:
    """Names of the fields of a dataclass instance that a checkpoint stores."""
    return [field.name for field in dataclasses.fields(thing) if field.metadata.get("saved", True)]
