"""The numpy form of `catode.theory.flow.batch`: the scheme for all starts at a time, where a field is only a Python function.

Source: docs/mathematics.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from catode.theory.flow._batch_scheme import (
    ARRIVED,
    CHECK,
    FAILED,
    GROW,
    HOPELESS,
    HORIZON,
    KEPT,
    PRUNED,
    SAFETY,
    SHRINK,
    SLACK,
    TRIES,
)


class _Faces:
    """The box and the size of what counts as nothing, for states of many starts."""

    def __init__(
        self, field: Callable[[np.ndarray], np.ndarray], lower: np.ndarray, upper: np.ndarray, rtol: float, atol: float
    ) -> None:
        from scipy.integrate import RK45

        self.field, self.lower, self.upper, self.rtol, self.atol, self.pair = field, lower, upper, rtol, atol, RK45
        self.slack = SLACK * atol

    def step(self, y: np.ndarray, k: np.ndarray, a: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of every start: states, raw speeds, errors, and where in it a frozen coordinate seemed to turn."""
        pair, h = self.pair, h[:, None]
        speeds = np.empty((7, *y.shape))
        speeds[0] = np.where(a == 0.0, k, 0.0)
        turn = np.ones(len(y))
        for j in range(1, 6):
            raw = self.field(y + h * np.tensordot(pair.A[j, :j], speeds[:j], 1))
            speeds[j] = np.where(a == 0.0, raw, 0.0)
            if j < 5:
                turn = np.where((turn == 1.0) & (-a * raw * h > self.slack).any(axis=1), pair.C[j], turn)
        z = y + h * np.tensordot(pair.B, speeds[:6], 1)
        q = self.field(z)
        speeds[6] = np.where(a == 0.0, q, 0.0)
        width = self.atol + self.rtol * np.maximum(np.abs(y), np.abs(z))
        return z, q, (np.abs(np.tensordot(pair.E, speeds, 1)) * h / width).max(axis=1), turn

    def passed(self, z: np.ndarray, q: np.ndarray, a: np.ndarray, h: np.ndarray, width: Any = 1.0) -> np.ndarray:
        """How far each start is past an event: beyond a face, or on its way off one."""
        beyond = np.maximum(self.lower - z, z - self.upper)
        return (np.where(a == 0.0, beyond, -a * q * h[:, None]) / width).max(axis=1)

    def dip(
        self, y: np.ndarray, k: np.ndarray, z: np.ndarray, q: np.ndarray, a: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        """Where in the step (1: nowhere) a free coordinate lies furthest beyond a face that it has come back from."""
        share, h = np.ones(len(y)), h[:, None]
        for face, sign in ((self.lower, 1.0), (self.upper, -1.0)):
            slope, end, rise = h * k * sign, h * q * sign, (z - y) * sign
            square, cube = 3.0 * rise - 2.0 * slope - end, slope + end - 2.0 * rise
            s = -slope / (square + np.sqrt(np.maximum(square * square - 3.0 * slope * cube, 0.0)))
            depth = (y - face) * sign + s * (slope + s * (square + s * cube))
            inside = (z - face) * sign >= 0.0
            found = (a == 0.0) & (s > 0.0) & (s < 1.0) & inside & (depth < -self.slack)
            share = np.minimum(share, np.where(found, s, 1.0).min(axis=1))
        return share

    def locate(
        self, y: np.ndarray, k: np.ndarray, a: np.ndarray, h: np.ndarray, z: np.ndarray, q: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Times into the step, states and raw speeds just past the first event."""
        low, high, z, q, side = np.zeros_like(h), h.copy(), z.copy(), q.copy(), np.zeros(len(h))
        width = self.atol + self.rtol * np.maximum(np.abs(y), np.abs(z))
        below, above = self.passed(y, k, a, h, width), self.passed(z, q, a, h, width)
        left, right = below.copy(), above.copy()  # these are halved where the same end stays (Illinois)
        for i in range(TRIES):
            (on,) = np.nonzero((above > SLACK) & (high - low > 1e-15 * h))
            if not on.size:
                break
            middle = (below[on] >= 0.0) | (i % 4 == 3)
            share = np.where(middle, 0.5, (0.5 * SLACK - left[on]) / (right[on] - left[on]))
            guess = low[on] + (high[on] - low[on]) * share
            x, xq, _, _ = self.step(y[on], k[on], a[on], guess)
            now = self.passed(x, xq, a[on], h[on], width[on])
            past = now > 0.0
            to, back = on[past], on[~past]
            high[to], above[to], z[to], q[to] = guess[past], now[past], x[past], xq[past]
            low[back], below[back] = guess[~past], now[~past]
            right[to], left[back] = now[past], now[~past]
            left[to[side[to] == 1.0]] *= 0.5
            stay = back[side[back] == -1.0]
            right[stay] = np.maximum(0.5 * right[stay], SLACK)
            side[to], side[back] = 1.0, -1.0
        return high, z, q

    def begin(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw speeds, frozen coordinates (-1 lower face, 1 upper, 0 free) and first steps."""
        k = self.field(y)
        a = np.where((y <= self.lower) & (k < 0.0), -1.0, np.where((y >= self.upper) & (k > 0.0), 1.0, 0.0))
        m = np.where(a == 0.0, k, 0.0)
        width = self.atol + self.rtol * np.abs(y)
        d0, d1 = (np.abs(y) / width).max(axis=1), (np.abs(m) / width).max(axis=1)
        h = np.where((d0 > 1e-5) & (d1 > 1e-5), 0.01 * d0 / d1, 1e-6)[:, None]
        later = np.where(a == 0.0, self.field(y + h * m), 0.0)
        d2 = np.maximum(d1, (np.abs(later - m) / width / h).max(axis=1))
        return k, a, np.where(d2 > 1e-15, np.minimum(100.0 * h[:, 0], 0.3 / np.sqrt(np.sqrt(d2))), 100.0 * h[:, 0])


def solve(
    ends: np.ndarray,
    times: np.ndarray,
    codes: np.ndarray,
    reached: np.ndarray,
    counts: np.ndarray,
    horizon: float,
    rtol: float,
    atol: float,
    absorbing: bool,
    holds: bool,
    targets: np.ndarray,
    reach: np.ndarray,
    max_steps: int,
    lower: np.ndarray,
    upper: np.ndarray,
    field: Callable[[np.ndarray], np.ndarray],
) -> None:
    """What `solve` of the compiled source does, for all starts at a time."""
    if not len(ends):
        return
    faces = _Faces(field, lower, upper, rtol, atol)
    speeds, frozen, steps = faces.begin(ends)
    rounds, marks = 0, times.copy()
    while True:
        live = np.nonzero(codes < 0)[0]
        y, k, a, t = ends[live], speeds[live], frozen[live], times[live]
        code = np.where(t >= horizon, HORIZON, -1)
        if absorbing:
            rising = holds | (np.where(a == 0.0, k, 0.0)[:, :-1] >= 0.0).all(axis=1)
            code = np.where((a[:, -1] > 0.0) & (k[:, -1] > 0.0) & rising, KEPT, code)
            code = np.where((a[:, -1] < 0.0) & (k[:, -1] < 0.0), PRUNED, code)
        if len(targets):
            near = (np.abs(y[:, None] - targets) <= reach).all(axis=2)
            code = np.where(near.any(axis=1), ARRIVED, code)
            reached[live] = np.where(near.any(axis=1), near.argmax(axis=1), -1)
        last = steps[live] >= horizon - t
        steps[live] = np.where(last, horizon - t, steps[live])
        stuck = (code < 0) & ((counts[live] >= max_steps) | ~(t + steps[live] > t))
        rounds += 1
        if rounds % CHECK == 0:
            stuck |= (code < 0) & ((horizon - t) * CHECK > HOPELESS * (t - marks[live]))
            marks = times.copy()
        codes[live] = np.where(stuck, FAILED, code)
        on = codes[live] < 0
        live, y, k, a, t, last = live[on], y[on], k[on], a[on], t[on], last[on]
        if not live.size:
            return
        h = steps[live]
        counts[live] += 1
        z, q, error, turn = faces.step(y, k, a, h)
        change = np.where(error > 0.0, SAFETY / np.sqrt(np.sqrt(error)), GROW)
        good = error <= 1.0
        steps[live[~good]] *= np.where(error < 1e300, np.maximum(SHRINK, change), SHRINK)[~good]
        grown = h * np.minimum(GROW, change)
        event = good & (faces.passed(z, q, a, h) > 0.0)
        if event.any():
            h[event], z[event], q[event] = faces.locate(y[event], k[event], a[event], h[event], z[event], q[event])
        turn = np.minimum(np.where(event, 1.0, turn), faces.dip(y, k, z, q, a, h))
        steps[live[good]] = np.where(turn < 1.0, h * turn, grown)[good]
        good &= turn == 1.0
        event &= good
        if event.any():
            z[event], q[event], a[event] = _touch(faces, z[event], q[event], a[event])
        times[live[good]] = np.where(last & ~event, horizon, t + h)[good]
        ends[live[good]], speeds[live[good]], frozen[live[good]] = z[good], q[good], a[good]


def _touch(faces: _Faces, y: np.ndarray, k: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put coordinates that left the box on their face, frozen unless pushed inwards, and let go those that turned."""
    touched = (a == 0.0) & ((y <= faces.lower) | (y >= faces.upper))
    a = np.where((a != 0.0) & (-a * k > 0.0), 0.0, a)
    y = np.clip(y, faces.lower, faces.upper)
    side = np.where(y == faces.lower, -1.0, 1.0)
    k = faces.field(y)
    return y, k, np.where(touched & (-side * k <= 0.0), side, a)
