"""The text: Python modules of scikit-learn without its tests, character by character; every tenth module is held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import sklearn
import torch

HELD_OUT = 10  # every tenth module
LEFT_OUT = ("tests", "externals")


@dataclass(frozen=True)
class Text:
    """Characters as numbers.

    Attributes:
        training: Shape (characters,), int64.
        held_out: The same of the modules held out.
        vocabulary: Number of different characters.
        source: What it is, with its fingerprint, in one line.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    vocabulary: int
    source: str


def load() -> Text:
    """The text of the installed scikit-learn; what is not ASCII becomes a question mark."""
    home = Path(sklearn.__file__).parent
    paths = sorted(
        (path for path in home.rglob("*.py") if not set(LEFT_OUT) & set(path.relative_to(home).parts)),
        key=lambda path: path.relative_to(home).as_posix(),
    )
    parts = [path.read_text("utf-8").encode("ascii", "replace") for path in paths]
    held = b"".join(parts[HELD_OUT - 1 :: HELD_OUT])
    training = b"".join(part for number, part in enumerate(parts, 1) if number % HELD_OUT)
    characters = sorted({*training, *held})
    table = torch.zeros(256, dtype=torch.int64)
    table[characters] = torch.arange(len(characters))
    numbers = [table[torch.frombuffer(bytearray(part), dtype=torch.uint8).long()] for part in (training, held)]
    fingerprint = hashlib.sha256(training + b"\0" + held).hexdigest()[:12]
    source = (
        f"{len(parts)} modules of scikit-learn {sklearn.__version__} without its tests, {len(training):,} characters for "
        f"training and {len(held):,} of every tenth module held out, {len(characters)} different ones, SHA-256 {fingerprint}"
    )
    return Text(numbers[0], numbers[1], len(characters), source)


def windows(text: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that begin at `starts`, and the characters that follow each of theirs, shape (len(starts), context) each."""
    places = starts[:, None] + torch.arange(context + 1)
    found = text[places]
    return found[:, :-1], found[:, 1:]
