"""What an epoch adds up for its row in metrics.csv."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Sums:
    """Sums over the steps of an epoch so far, for its row in metrics.csv.

    Attributes:
        right: Correct predictions, a count on the device.
        losses: Loss of each step, on the device.
        waited: Seconds spent waiting for batches.
        seconds: Seconds spent on steps, including waiting.
    """

    right: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    waited: float = 0.0
    seconds: float = 0.0

    def state(self) -> dict:
        """The sums for a checkpoint."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0)
        return {"right": self.right.cpu(), "losses": losses.cpu(), "waited": self.waited, "seconds": self.seconds}

    @classmethod
    def of(cls, state: dict, device: str) -> Sums:
        """The sums from a checkpoint's `state`."""
        tensors = {"right": state["right"].to(device, copy=True), "losses": list(state["losses"].to(device).unbind())}
        return cls(**{**state, **tensors})
