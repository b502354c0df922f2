"""Draws of the gates: one row of values for every step, drawn on the host for all steps up to the next reading."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from catode._saved import UNSAVED
from catode.prune.devices.transfer import upload


@dataclass(eq=False)
class GateDraws:
    """Gate values of the steps to come, on the host and on the device.

    Args:
        seed: Seed of the draws.
        device: Where the gates are.
        keep_prob: theta at the start, shape (n,).

    Attributes:
        generator: Source of the draws.
        chances: theta when the rows that are held were drawn, float32, shape (n,).
        rows: Rows that are held, float32, shape (steps, n); the first one is that of the current step. None: no rows.
        per_example: Gate values of every example of the current batch, shape (batch, n), if gates are drawn by example.
    """

    seed: InitVar[int]
    device: torch.device = field(metadata=UNSAVED)
    keep_prob: InitVar[NDArray]
    generator: torch.Generator = field(init=False)
    chances: torch.Tensor = field(init=False)
    rows: torch.Tensor | None = None
    per_example: torch.Tensor | None = field(metadata=UNSAVED, init=False, default=None)
    _uploaded: torch.Tensor | None = field(metadata=UNSAVED, init=False, default=None)

    def __post_init__(self, seed: int, keep_prob: NDArray) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.chances = torch.from_numpy(keep_prob).float()

    @property
    def empty(self) -> bool:
        """Whether no row is held."""
        return self.rows is None or not len(self.rows)

    def draw(self, keep_prob: NDArray, steps: int) -> None:
        """Draw the rows of the next steps, all at the same theta."""
        self.chances = torch.from_numpy(keep_prob).float()
        self.hold(torch.stack([torch.bernoulli(self.chances, generator=self.generator) for _ in range(steps)]))

    def hold(self, rows: torch.Tensor | None) -> None:
        """Hold rows that were drawn."""
        self.rows, self._uploaded = rows, None if rows is None else upload(rows, self.device)

    @property
    def here(self) -> torch.Tensor:
        """Row of the current step, on the device."""
        return self._uploaded[0]

    def drop(self) -> None:
        """Drop the row of the current step."""
        self.rows, self._uploaded = self.rows[1:], self._uploaded[1:]

    def draw_examples(self, batch: int, more: bool = False) -> torch.Tensor:
        """Draw gate values for every example of a whole batch, shape (batch, n).

        Args:
            batch: Examples.
            more: Whether they are more examples of the current step.
        """
        rows = torch.bernoulli(self.chances.expand(batch, -1), generator=self.generator)
        self.per_example = torch.cat([self.per_example, rows]) if more else rows
        return rows

    def values(self, by_example: bool) -> NDArray[np.float64]:
        """Gate values of the current step, shape (n,); their means over the batch with gates drawn by example."""
        return (self.per_example.detach().mean(0) if by_example else self.rows[0]).double().numpy()
