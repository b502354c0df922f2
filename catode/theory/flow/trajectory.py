"""What an integration of the projected flow returns: a path, the faces that it met, and how it ended.

Source: docs/mathematics.md section 3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["STATUSES", "FaceEvent", "Trajectory"]

STATUSES = ("pruned", "kept", "horizon", "failed")


@dataclasses.dataclass(frozen=True)
class FaceEvent:
    """A coordinate meets a face of the box, or comes off it.

    Args:
        time: When, in ODE time.
        coordinate: Which coordinate of the state.
        kind: "arrive" or "leave"; between the two it slides.
    """

    time: float
    coordinate: int
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """A solution of the projected ODE.

    Args:
        times: Increasing times from 0, shape (n,).
        states: States at those times, theta last, shape (n, d); theta lies in [0, 1].
        status: "pruned" (theta is 0 with the benefit below the price), "kept" (theta is 1 and stays there), "horizon"
            (neither, when the time was up; always so in a box of the user's) or "failed" (numerical failure; the states
            up to it are valid).
        message: One sentence that says the same, with numbers.
        events: Arrivals at faces and departures, in order.
    """

    times: np.ndarray
    states: np.ndarray
    status: str
    message: str
    events: tuple[FaceEvent, ...] = ()

    @property
    def end(self) -> np.ndarray:
        """Last state, shape (d,)."""
        return self.states[-1]

    @property
    def keep_prob(self) -> np.ndarray:
        """Keep probability along the trajectory, shape (n,)."""
        return self.states[:, -1]
