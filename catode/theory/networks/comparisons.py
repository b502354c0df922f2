"""The comparison systems derived from the dynamics of a single structure and the stated bounds.

`layer_comparison`, `unit_comparison`, `benefit_comparison` and `mirror_comparison` work out what
`catode.theory.systems` has as formulas: saddle, growth rate, invariant and separatrix, as expressions of sympy, which is
imported when first needed.

Source: docs/mathematics.md section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Comparison", "benefit_comparison", "layer_comparison", "mirror_comparison", "unit_comparison"]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A planar comparison system in sympy, as derived.

    Args:
        parameters: Symbols by the names of the numeric system's fields.
        state: Symbols (size, theta).
        velocity: Raw field (size', theta').
        saddle: Its equilibrium with a positive size.
        growth_rate: Unstable eigenvalue mu at the saddle.
        invariant: V, linear, with V' = mu (V - V*); or the first integral H, with H' = 0, for the unit.
        separatrix: Keep probability on the stable manifold of the saddle, in terms of the size.
    """

    parameters: Mapping[str, Any]
    state: tuple[Any, Any]
    velocity: tuple[Any, Any]
    saddle: tuple[Any, Any]
    growth_rate: Any
    invariant: Any
    separatrix: Any

    @property
    def jacobian(self) -> Any:
        """Derivative of the raw field by the state, a sympy matrix."""
        return _matrix(self.velocity).jacobian(_matrix(self.state))

    def along(self, expression: Any) -> Any:
        """Derivative of an expression in the state along the raw field."""
        return sum(expression.diff(x) * speed for x, speed in zip(self.state, self.velocity, strict=True))


def layer_comparison() -> Comparison:
    """Derive `LayerSystem` from w' = -theta grad L1(w) - lambda w and theta' = rho (b(w) - g).

    With w along the first axis, grad L1 is some `slope` <= eta at an angle of cosine `cosine` to it, and b lies within
    kappa r of 0. The worst of these at each state gives the bounds.

    Source: docs/mathematics.md section 4.1.
    """
    import sympy

    p = _parameters("price", "weight_decay", "rate_ratio", "grad_bound", "benefit_slope")
    (r, slope), theta = sympy.symbols("r slope", positive=True), sympy.Symbol("theta", nonnegative=True)
    cosine, benefit = sympy.symbols("cosine benefit", real=True)
    w = sympy.Matrix([r, 0])
    gradient = slope * sympy.Matrix([cosine, sympy.sqrt(1 - cosine**2)])
    speed = sympy.expand(w.dot(-theta * gradient - p["weight_decay"] * w) / r)
    size = p["benefit_slope"] * r
    bounds = {cosine: (-1, 1), slope: (0, p["grad_bound"]), benefit: (-size, size)}
    return _linear(p, (r, theta), _worst((speed, p["rate_ratio"] * (benefit - p["price"])), bounds))


def unit_comparison() -> Comparison:
    """Derive `UnitSystem` from the flow of the incoming and outgoing weights of one unit.

    |w_in| = sqrt(u) cos(phi), |w_out| = sqrt(u) sin(phi); each gradient has at most kappa times the norm of the other
    side along its own weights, and b lies within kappa |w_in| |w_out| of 0. The worst is sin(2 phi) = 1.

    Source: docs/mathematics.md section 4.2.
    """
    import sympy

    p = _parameters("price", "weight_decay", "rate_ratio", "benefit_slope")
    u, kappa = sympy.Symbol("u", positive=True), p["benefit_slope"]
    theta, sine = sympy.symbols("theta sine", nonnegative=True)  # sine is sin(2 phi)
    along_in, along_out, benefit = sympy.symbols("along_in along_out benefit", real=True)
    product = u * sine / 2  # |w_in| |w_out|
    # u' = 2 w_in.w_in' + 2 w_out.w_out', where w_in.grad_in = product * along_in and |along_in| <= kappa; likewise out
    speed = -2 * p["weight_decay"] * u - 2 * theta * product * (along_in + along_out)
    bounds = {
        along_in: (-kappa, kappa),
        along_out: (-kappa, kappa),
        benefit: (-kappa * product, kappa * product),
        sine: (0, 1),
    }
    velocity = _worst((speed, p["rate_ratio"] * (benefit - p["price"])), bounds)
    return _separable(p, (u, theta), velocity)


def benefit_comparison() -> Comparison:
    """Derive `BenefitSystem` from b' = -grad L1 . w' + (rest of the network).

    It has three parts: theta |grad L1|^2 with |grad L1|^2 <= q; lambda w.grad L1, which is -a_eff b with a_eff >= a; and
    the rest, at most delta. A benefit below 0 counts as 0.

    Source: docs/mathematics.md section 4.3.
    """
    return _benefit(upper=True)


def mirror_comparison() -> Comparison:
    """Derive the mirror system, whose separatrix is `BenefitSystem.mirror_separatrix` for 0 <= b <= g.

    The same dynamics as in `benefit_comparison`, bounded from below by q_low, a_high and -delta.

    Source: docs/mathematics.md section 4.4.
    """
    return _benefit(upper=False)


def _benefit(upper: bool) -> Comparison:
    import sympy

    gain, decay = ("gain", "decay") if upper else ("gain_lower", "decay_upper")
    p = _parameters("price", gain, "rate_ratio", decay, "drift")
    b, theta, squared, rate = sympy.symbols("b theta squared rate", nonnegative=True)  # |grad L1|^2, a_eff
    lam, slope, inner, rest = sympy.symbols("lambda slope inner rest", real=True)  # |grad L1|, w.grad L1
    # -grad L1 . w' with w' = -theta grad L1 - lambda w, in a frame with grad L1 along the first axis
    gradient, w = sympy.Matrix([slope, 0]), sympy.Matrix([inner / slope, sympy.Symbol("across", real=True)])
    speed = sympy.expand(-gradient.dot(-theta * gradient - lam * w)) + rest
    speed = speed.subs({slope**2: squared, inner: -rate * b / lam})
    if upper:
        bounds = {squared: (0, p[gain]), rate: (p[decay], None), rest: (None, p["drift"])}
    else:
        bounds = {squared: (p[gain], None), rate: (None, p[decay]), rest: (-p["drift"], None)}
    velocity = _worst((speed, p["rate_ratio"] * (b - p["price"])), bounds, upper)
    return _linear(p, (b, theta), velocity)


def _worst(velocity: tuple[Any, Any], bounds: Mapping[Any, tuple[Any, Any]], upper: bool = True) -> tuple[Any, Any]:
    """Largest (or smallest) velocity over quantities that are only known within bounds, affine in each of them."""
    worst = []
    for speed in velocity:
        for quantity, (low, high) in bounds.items():
            sign = speed.diff(quantity)
            if sign == 0:
                continue
            bound = high if bool(sign.is_nonnegative) == upper else low
            assert bound is not None and not sign.has(quantity) and (sign.is_nonnegative or sign.is_nonpositive), speed
            speed = speed.subs(quantity, bound)
        worst.append(speed.factor())
    return tuple(worst)


def _linear(parameters: Mapping[str, Any], state: tuple[Any, Any], velocity: tuple[Any, Any]) -> Comparison:
    """Complete a linear system: the left eigenvector of mu is the invariant, and vanishes on the stable manifold."""
    saddle, jacobian, mu = _saddle(parameters, state, velocity)
    row = (mu - jacobian[1, 1], jacobian[0, 1])
    invariant = row[0] * state[0] + row[1] * state[1]
    separatrix = saddle[1] + row[0] * (saddle[0] - state[0]) / row[1]
    return Comparison(parameters, state, velocity, saddle, mu, invariant, separatrix)


def _separable(parameters: Mapping[str, Any], state: tuple[Any, Any], velocity: tuple[Any, Any]) -> Comparison:
    """Complete a system x' = f(x) h(y), y' = k(x): H = integral of h dy - integral of k/f dx is a first integral."""
    import sympy

    (x, y), (saddle, _, mu) = state, _saddle(parameters, state, velocity)
    parts = sympy.separatevars(velocity[0], symbols=state, dict=True)
    invariant = sympy.integrate(sympy.expand(parts["coeff"] * parts[y]), y) - sympy.integrate(
        sympy.expand(velocity[1] / parts[x]), x
    )
    level = invariant.subs(dict(zip(state, saddle, strict=True)), simultaneous=True)
    root = max(sympy.solve(invariant - level, y), key=lambda root: root.subs(_ones(parameters)).subs(x, 1).evalf())
    # the system is cooperative, so its stable manifold falls with x: the upper root left of the saddle
    root = sympy.expand_log(root, force=True)
    separatrix = saddle[1] + sympy.sign(saddle[0] - x) * (root - saddle[1])
    return Comparison(parameters, state, velocity, saddle, mu, invariant, separatrix)


def _saddle(parameters: Mapping[str, Any], state: tuple[Any, Any], velocity: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    """Equilibrium, Jacobian there and its positive eigenvalue."""
    import sympy

    (solution,) = sympy.solve(velocity, state, dict=True)
    saddle = tuple(solution[x] for x in state)
    jacobian = _matrix(velocity).jacobian(_matrix(state)).subs(solution)
    mu = max(jacobian.eigenvals(), key=lambda value: value.subs(_ones(parameters)).evalf())
    return saddle, jacobian, mu


def _ones(parameters: Mapping[str, Any]) -> dict[Any, int]:
    """Every parameter 1: enough to tell the two roots of a quadratic apart, which never cross."""
    return dict.fromkeys(parameters.values(), 1)


def _parameters(*names: str) -> dict[str, Any]:
    import sympy

    return {name: sympy.Symbol(name, positive=True) for name in names}


def _matrix(entries: tuple[Any, ...]) -> Any:
    import sympy

    return sympy.Matrix(entries)
