"""What the compiled and the numpy form of `catode.theory.flow.batch` share: status codes, limits of steps, empty results.

Source: docs/mathematics.md section 3.
"""

from __future__ import annotations

import numpy as np

PRUNED, KEPT, HORIZON, FAILED, ARRIVED = range(5)  # in the order of `batch.STATUSES`
SLACK = 1e-2  # an event counts as located where the state passed it by less than this share of `atol`
GROW, SHRINK, SAFETY = 8.0, 0.2, 0.9  # limits of a change of step, and its safety factor
CHECK = 1000  # steps between two looks at the headway of a start
HOPELESS = 1_000_000  # steps still to go, at the pace of the last ones, that are not begun: a field that jumps chatters
TRIES = 80  # of a root search


def outputs(starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ends, times, codes, targets and steps, before the first step."""
    n = len(starts)
    return starts.copy(), np.zeros(n), np.full(n, -1, np.int8), np.full(n, -1, np.int32), np.zeros(n, np.int32)
