"""Projected flows of one's own: any field on a box, given as a function or as sympy expressions.

Source: docs/mathematics.md section 3, where the box is [0, 1] for theta; here every coordinate may have faces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from catode._validate import check_real, check_shape, fail
from catode.theory.systems._expressions import read_expressions
from catode.theory.systems.planar import PlanarSystem

__all__ = ["BoxSystem", "as_box"]


@dataclass(frozen=True, eq=False, kw_only=True)
class BoxSystem:
    """A field on a box; the projected flow has no speed out of the box.

    Args:
        velocity: The raw field: states of shape (..., d) to velocities of shape (..., d).
        lower: Lower end of every coordinate, shape (d,); `-inf` for none.
        upper: Upper end of every coordinate, shape (d,); `inf` for none.
        derivative: Jacobian of the raw field, (..., d) to (..., d, d); None for differences, taken inside the box.
        names: Names of the coordinates.
        expressions: The components in sympy, where the field was given so: what can be compiled.

    Raises:
        ValueError: for an empty or inverted box, or a field that does not return finite velocities of the states' shape.

    Example:
        >>> spiral = BoxSystem.from_expressions("x, y", "y - 1/4, x/2 - y", lower=(0, 0), upper=(1, 1))
        >>> spiral.projected_field([[0.0, 0.0]]).tolist()
        [[0.0, 0.0]]
    """

    velocity: Callable[[np.ndarray], np.ndarray]
    lower: Any
    upper: Any
    derivative: Callable[[np.ndarray], np.ndarray] | None = None
    names: tuple[str, ...] = ()
    expressions: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        ends = []
        for name in ("lower", "upper"):
            try:
                end = np.array(getattr(self, name), dtype=np.float64)  # a copy: the caller's array may change
            except (TypeError, ValueError):
                fail(name, "be an array of real numbers", getattr(self, name))
            check_shape(name, end, "(d,) with d >= 1", end.ndim == 1 and end.size >= 1)
            if np.isnan(end).any():
                fail(name, "not be NaN", end.tolist())
            end.setflags(write=False)
            object.__setattr__(self, name, end)
            ends.append(end)
        check_shape("upper", ends[1], f"({ends[0].size},), that of `lower`", ends[0].shape == ends[1].shape)
        wrong = np.flatnonzero(~(ends[0] < ends[1]))
        if wrong.size:
            i = int(wrong[0])
            fail("upper", f"exceed lower[{i}]={ends[0][i]:g}", float(ends[1][i]), index=(i,))
        names = tuple(self.names) or tuple(f"x{i}" for i in range(self.dimension))
        if len(set(names)) != self.dimension or len(names) != self.dimension:
            fail("names", f"name {self.dimension} different coordinates", names)
        object.__setattr__(self, "names", names)
        self._check_field()

    @classmethod
    def from_expressions(cls, coordinates: Any, expressions: Any, *, lower: Any, upper: Any) -> BoxSystem:
        """Build from sympy expressions, or text that sympy can read; field and Jacobian are derived from them.

        Args:
            coordinates: Symbols, or their names in one text, in the order of the state.
            expressions: One velocity for each coordinate, or all in one text, separated by commas.
            lower: Lower end of every coordinate, shape (d,).
            upper: Upper end of every coordinate, shape (d,).

        Raises:
            ValueError: if an expression cannot be read or holds a symbol that is no coordinate, or for a wrong box.
        """
        symbols, values, velocity, derivative = read_expressions(coordinates, expressions)
        return cls(
            velocity=velocity,
            derivative=derivative,
            lower=lower,
            upper=upper,
            names=tuple(map(str, symbols)),
            expressions=values,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for end in (self.lower, self.upper):
            end.setflags(write=False)  # pickle does not keep that

    @property
    def dimension(self) -> int:
        """Number d of coordinates."""
        return self.lower.size

    def field(self, state: Any) -> np.ndarray:
        """Raw velocity, shape (..., d)."""
        return np.asarray(self.velocity(np.asarray(state, dtype=np.float64)), dtype=np.float64)

    def jacobian(self, state: Any) -> np.ndarray:
        """Derivative of the raw velocity, shape (..., d, d); entry [..., i, j] of component i along coordinate j."""
        state = np.asarray(state, dtype=np.float64)
        if self.derivative is not None:
            return np.asarray(self.derivative(state), dtype=np.float64)
        columns = []
        for j in range(self.dimension):
            x, low, up = state[..., j : j + 1], self.lower[j], self.upper[j]
            width = np.minimum(6e-6 * np.maximum(1.0, np.abs(x)), 0.25 * (up - low))  # cube root of the rounding error
            # Inside the box only: the parabola through three points there, which beside a face are moved inwards.
            centre = np.where((x < low) | (x > up), x, np.clip(x, low + width, up - width))
            step = np.arange(self.dimension) == j
            behind, middle, ahead = (self.field(np.where(step, centre + k * width, state)) for k in (-1, 0, 1))
            bend = np.where(x == centre, 0.0, (x - centre) * (ahead - 2.0 * middle + behind) / width**2)
            columns.append((ahead - behind) / (2.0 * width) + bend)
        return np.stack(columns, axis=-1)

    def project(self, state: Any) -> np.ndarray:
        """Nearest state in the box, shape (..., d)."""
        return np.clip(np.asarray(state, dtype=np.float64), self.lower, self.upper)

    def projected_field(self, state: Any) -> np.ndarray:
        """Velocity of the projected flow, shape (..., d): no component out of the box."""
        state = self.project(state)
        speed = self.field(state)
        outward = ((state <= self.lower) & (speed < 0.0)) | ((state >= self.upper) & (speed > 0.0))
        return np.where(outward, 0.0, speed)

    def check_inside(self, name: str, state: Any) -> np.ndarray:
        """Return `state` as finite states in the box, shape (..., d).

        Raises:
            ValueError: if it is not.
        """
        state = check_real(name, state, array=True)
        check_shape(name, state, f"(..., {self.dimension})", state.ndim > 0 and state.shape[-1] == self.dimension)
        outside = np.argwhere((state < self.lower) | (state > self.upper))
        if outside.size:
            place = tuple(int(i) for i in outside[0])
            box = f"[{self.lower[place[-1]]:g}, {self.upper[place[-1]]:g}]"
            fail(name, f"lie in the box, {self.names[place[-1]]} in {box}", float(state[place]), index=place)
        return state

    def _check_field(self) -> None:
        """Try the field on a few states of the box."""
        low = np.where(np.isfinite(self.lower), self.lower, np.minimum(-1.0, self.upper - 1.0))
        high = np.where(np.isfinite(self.upper), self.upper, np.maximum(1.0, low + 1.0))
        count = self.dimension + 2  # never d: a field that takes states the other way round would pass with d of them
        states = low + np.linspace(0.1, 0.9, count)[:, None] * (high - low)
        hint = "Index the last axis, state[..., 0]; for a field of one state use state.T inside it."
        take = f"take states of shape (..., {self.dimension})"
        try:
            with np.errstate(all="ignore"):  # reported below
                speed, alone = self.field(states), self.field(states[1])
        except Exception as error:  # the user's own code: whatever it raises is said in one line
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            fail("velocity", take, self.velocity, hint=f"It raised {type(error).__name__}: {reason}. {hint}")
        if speed.shape != states.shape:
            fail("velocity", f"return shape {states.shape} for states of that shape", speed.shape, hint=hint)
        if alone.shape != (self.dimension,):
            fail("velocity", f"return shape ({self.dimension},) for one state", alone.shape, hint=hint)
        if not np.isfinite(speed).all():
            i = int(np.argwhere(~np.isfinite(speed))[0, 0])
            fail("velocity", f"be finite in the box, e.g. at {states[i].tolist()}", speed[i].tolist())
        if not np.allclose(alone, speed[1], rtol=1e-6, atol=1e-6 * float(np.abs(speed).max())):
            fail("velocity", "give a state the same speed alone and among others", alone.tolist(), hint=hint)
        if self.derivative is None:
            return
        shape = (*states.shape, self.dimension)
        try:
            with np.errstate(all="ignore"):
                found = np.shape(self.derivative(states))
        except Exception as error:  # likewise
            fail("derivative", take, self.derivative, hint=f"It raised {type(error).__name__}: {error}.")
        if found != shape:
            fail("derivative", f"return shape {shape} for states of shape {states.shape}", found)


def as_box(system: BoxSystem | PlanarSystem) -> BoxSystem:
    """A comparison system as a field on its box, size not negative and theta in [0, 1]; a `BoxSystem` as it is.

    Raises:
        ValueError: if the system is neither.
    """
    if isinstance(system, BoxSystem):
        return system
    if not isinstance(system, PlanarSystem):
        fail("system", "be a BoxSystem or a PlanarSystem", system)
    return BoxSystem(
        velocity=system.field,
        derivative=system.jacobian,
        lower=(0.0, 0.0),
        upper=(np.inf, 1.0),
        names=("size", "theta"),
    )
