"""Fields given as sympy expressions: read, differentiated, and made into numpy functions.

States are real, so every symbol is taken as real whatever it was declared to be: Abs, sign and their derivatives then
have numerics. Derivatives are those between the jumps; what a jump would add there (a Dirac delta) is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from catode._validate import fail

__all__ = ["VectorisedExpressions", "read_expressions", "without_jumps"]


class VectorisedExpressions:
    """Sympy expressions as one function of states (..., d) with values of shape (..., *shape).

    An object rather than a closure, so that a system can be pickled and sent to another process. Special functions
    (erf, gamma, ..) are those of scipy.
    """

    def __init__(self, symbols: Sequence[Any], expressions: Any, shape: tuple[int, ...]) -> None:
        self.symbols, self.expressions, self.shape = tuple(symbols), tuple(expressions), shape
        self._function: Callable[..., Any] | None = None

    def __call__(self, state: np.ndarray) -> np.ndarray:
        if self._function is None:
            import sympy

            self._function = sympy.lambdify(self.symbols, list(self.expressions), "scipy", cse=True)
        values = self._function(*np.moveaxis(state, -1, 0))
        out = np.empty((*state.shape[:-1], len(values)))
        for i, value in enumerate(values):
            out[..., i] = value
        return out.reshape(*state.shape[:-1], *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}


def read_expressions(coordinates: Any, expressions: Any) -> tuple[list[Any], tuple[Any, ...], Any, Any]:
    """Symbols, expressions, and the field and its Jacobian as functions; see `BoxSystem.from_expressions`.

    The Jacobian is None where sympy has no derivative that can be evaluated.

    Raises:
        ValueError: if an expression cannot be read, or cannot be evaluated.
    """
    import sympy
    from sympy.core.function import AppliedUndef

    symbols = sympy.symbols(coordinates, seq=True) if isinstance(coordinates, str) else list(coordinates)
    if len(set(symbols)) != len(symbols):
        fail("coordinates", "be different", [str(s) for s in symbols])
    try:
        values = sympy.sympify(expressions, locals={str(s): s for s in symbols})
    except (sympy.SympifyError, SyntaxError, TypeError, AttributeError) as error:
        hint = f"{(str(error).splitlines() or ['It is empty'])[0]}."
        fail("expressions", "be sympy expressions or text that sympy reads", expressions, hint=hint)
    values = tuple(values) if isinstance(values, (tuple, list, sympy.Tuple, sympy.MatrixBase)) else (values,)
    unfit = [value for value in values if not isinstance(value, sympy.Expr) or value.has(AppliedUndef)]
    if unfit:
        fail("expressions", "be sympy expressions of known functions", unfit[0])
    if len(values) != len(symbols):
        fail("expressions", f"be one for each of {len(symbols)} coordinates", values)
    foreign = set().union(*(value.free_symbols for value in values)) - set(symbols)
    if foreign:
        fail("expressions", f"hold no other symbols than {', '.join(map(str, symbols))}", sorted(map(str, foreign)))
    real = [sympy.Symbol(f"x_{i}", real=True) for i in range(len(symbols))]
    inner = [value.xreplace(dict(zip(symbols, real, strict=True))) for value in values]
    inner = [value.doit() if value.has(sympy.Derivative, sympy.Integral, sympy.Sum) else value for value in inner]
    for value, given in zip(inner, values, strict=True):
        if value.has(sympy.I, sympy.zoo, sympy.nan, sympy.oo, -sympy.oo):
            fail("expressions", "be real and finite for real coordinates", given)
        why = _fault(real, [value], ())
        if why:
            fail("expressions", "be of functions that numpy or scipy evaluates", given, hint=why)
    d = len(real)
    slopes = [_slope(value, s) for value in inner for s in real]
    derivative = None
    if not any(s.has(sympy.Derivative, sympy.Subs, sympy.I) for s in slopes) and not _fault(real, slopes, (d, d)):
        derivative = VectorisedExpressions(real, slopes, (d, d))
    return symbols, values, VectorisedExpressions(real, inner, (d,)), derivative


def without_jumps(expression: Any) -> Any:
    """Rewrite what jumps (sign, Heaviside, Mod, frac) by cases and floor, of which every printer knows the value."""
    import sympy

    def by_sign(x: Any) -> Any:
        return sympy.Piecewise((-1, x < 0), (1, x > 0), (0, True))

    def by_step(x: Any, *middle: Any) -> Any:
        return sympy.Piecewise((0, x < 0), (1, x > 0), (*(middle or (sympy.Rational(1, 2),)), True))

    for function, form in (
        (sympy.sign, by_sign),
        (sympy.Heaviside, by_step),
        (sympy.Mod, lambda x, y: x - y * sympy.floor(x / y)),
        (sympy.frac, lambda x: x - sympy.floor(x)),
    ):
        expression = expression.replace(function, form)
    return expression


def _slope(value: Any, symbol: Any) -> Any:
    """Derivative between the jumps."""
    import sympy

    if value.has(sympy.Mod, sympy.frac, sympy.Heaviside):
        value = without_jumps(value)
    slope = sympy.diff(value, symbol)
    slope = slope.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))

    def of_a_step(part: Any) -> bool:
        part = part.expr if isinstance(part, sympy.Subs) else part
        return isinstance(part, sympy.Derivative) and isinstance(part.expr, (sympy.floor, sympy.ceiling, sympy.sign))

    return slope.replace(of_a_step, lambda *_: sympy.Integer(0))


def _fault(symbols: Sequence[Any], values: Sequence[Any], shape: tuple[int, ...]) -> str | None:
    """Why the expressions have no numerics, in a sentence; None where they do."""
    state = np.full((2, len(symbols)), 0.375) + 0.25 * np.arange(2)[:, None]
    shape = shape or (len(values),)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            VectorisedExpressions(symbols, values, shape)(state)
    except np.exceptions.ComplexWarning:
        return "Its values are complex."
    except (
        NameError,
        NotImplementedError,
        AttributeError,
        TypeError,
        ValueError,
        SyntaxError,
        RecursionError,
    ) as error:
        import sympy

        functions = sorted({type(f).__name__ for v in values for f in v.atoms(sympy.Function)})
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        return f"It holds {', '.join(functions) or 'no function'}; {reason}."
    return None
