"""Priors on a gate, the regulariser that each amounts to, and where each lets a keep probability come to rest.

| prior | effective regulariser R(theta), nats | where theta rests |
|---|---|---|
| `FlatteningPrior` | theta log(gamma) + constant: linear | 0 or 1, reached in finite time; hard switch at b = log(gamma) |
| `BernoulliPrior` | KL of Bern(theta) from Bern(pi), slope infinite at 0 and 1 | one interior point, sigmoid(logit(pi) + b) |
| `SpikeAndSlab` | the same + theta times the slab's KL K | one interior point, sigmoid(logit(pi) + b - K) |
| `HardConcrete` | price * theta: linear, but theta is a sigmoid of log(alpha) | 0 or 1 at infinite log(alpha), never reached |

All share one interface. The flow of theta for a constant benefit b is `rho * velocity(theta, b)`, and `rest_points(b)`
lists its equilibria. Numbers come from the sympy expressions by `lambdify`; sympy is imported when first needed.

Source: docs/mathematics.md section 1; the flattening hyper-prior is that of arXiv:2411.09127 in a form derived there.
The rivals: Bernoulli gates with a fixed prior (variational dropout), spike-and-slab, and the hard-concrete L0 of
arXiv:1712.01312.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit, logit

from catode._validate import check_broadcast, check_interval, check_nonnegative, check_positive, check_real, fail

__all__ = ["BernoulliPrior", "FlatteningPrior", "HardConcrete", "Prior", "RestPoint", "SpikeAndSlab"]

_NODES = 64  # of the Gauss-Legendre rule for the mean of a hard-concrete gate


@dataclasses.dataclass(frozen=True)
class RestPoint:
    """An equilibrium of the projected flow of theta.

    Args:
        keep_prob: The keep probability theta, in [0, 1].
        stability: "stable", "unstable", or "neutral" where its neighbours rest as well.
    """

    keep_prob: float
    stability: str

    @property
    def is_vertex(self) -> bool:
        """Whether the gate is deterministic there."""
        return self.keep_prob in (0.0, 1.0)


class Prior(abc.ABC):
    """What a prior on one gate does to its keep probability theta.

    A subclass is a frozen dataclass of numbers and supplies `expression` and `rest_points`.
    """

    @classmethod
    @abc.abstractmethod
    def expression(cls) -> Any:
        """Effective regulariser R as a sympy expression in `theta` and the names of the parameters; nats."""

    @abc.abstractmethod
    def rest_points(self, benefit: float) -> tuple[RestPoint, ...]:
        """Every equilibrium of theta' = rho P(velocity) in [0, 1] for a benefit that stays as it is.

        Args:
            benefit: Loss saved by a gate at 1 against one at 0, nats; of the whole data where R is.

        Returns:
            The equilibria, theta increasing.

        Raises:
            ValueError: if `benefit` is not a finite real number.
        """

    def regulariser(self, theta: Any) -> np.ndarray:
        """Effective regulariser R, nats.

        Args:
            theta: Keep probabilities in [0, 1], any shape.

        Returns:
            Values, same shape; limits at 0 and 1.

        Raises:
            ValueError: if an entry lies outside [0, 1].
        """
        return self._evaluate(0, theta)

    def slope(self, theta: Any) -> np.ndarray:
        """Derivative dR/dtheta, nats; arguments and errors as in `regulariser`, and it may be infinite at 0 and 1."""
        return self._evaluate(1, theta)

    def response(self, theta: Any) -> np.ndarray:
        """Derivative of the mean gate by theta, 1 for a Bernoulli gate; arguments and errors as in `regulariser`."""
        return np.ones_like(_check_theta(theta))

    def mobility(self, theta: Any) -> np.ndarray:
        """Speed of theta per force, 1 where theta itself descends; arguments and errors as in `regulariser`."""
        return np.ones_like(_check_theta(theta))

    def velocity(self, theta: Any, benefit: Any) -> np.ndarray:
        """Projected speed of theta divided by rho: mobility (benefit * response - slope), never out of [0, 1].

        Args:
            theta: Keep probabilities in [0, 1], any shape.
            benefit: Loss saved by a gate at 1 against one at 0, nats, the loss linear in the gate; broadcasts.

        Returns:
            Speeds in nats, of the broadcast shape; may be infinite at 0 and 1.

        Raises:
            ValueError: if `theta` lies outside [0, 1], `benefit` is not finite, or the shapes do not broadcast.
        """
        theta, benefit = _check_theta(theta), check_real("benefit", benefit, array=True)
        check_broadcast({"theta": theta, "benefit": benefit})
        speed = self.mobility(theta) * (benefit * self.response(theta) - self.slope(theta))
        outward = ((theta <= 0.0) & (speed < 0.0)) | ((theta >= 1.0) & (speed > 0.0))
        return np.where(outward, 0.0, speed)

    def _parameters(self) -> tuple[float, ...]:
        return dataclasses.astuple(self)

    def _evaluate(self, order: int, theta: Any) -> np.ndarray:
        theta = _check_theta(theta)
        inner, *faces = _compile(type(self), order)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.broadcast_to(inner(theta, *self._parameters()), theta.shape)
        for face, limit in enumerate(faces):
            value = np.where(theta == face, limit(*self._parameters()), value)
        return value


@dataclasses.dataclass(frozen=True)
class FlatteningPrior(Prior):
    """The flattening hyper-prior: pi ~ p(pi | gamma), and the best pi for each theta.

    Minimising KL(Bern(theta) || Bern(pi)) - log p(pi | gamma) over pi cancels every entropy term. What is left is linear
    in theta, so that theta always ends at 0 or 1: at 1 iff the benefit exceeds `price`.

    Source: docs/mathematics.md section 1.

    Args:
        gamma: The hyper-parameter, positive and not 1; above 1 it favours removal.

    Raises:
        ValueError: if `gamma` is not positive, or is 1.

    Example:
        >>> prior = FlatteningPrior(20.0)
        >>> round(prior.price, 3), prior.rest_points(2.9)[0], prior.rest_points(3.1)[0]
        (2.996, RestPoint(keep_prob=0.0, stability='stable'), RestPoint(keep_prob=1.0, stability='stable'))
    """

    gamma: float

    def __post_init__(self) -> None:
        gamma = check_positive("gamma", self.gamma)
        if gamma == 1.0:
            fail("gamma", "differ from 1", gamma, hint="There the prior is uniform and the price 0: use no gate.")
        object.__setattr__(self, "gamma", gamma)

    @property
    def price(self) -> float:
        """Complexity cost log(gamma) of keeping the structure, in nats of the whole data; per example, divide by N."""
        return float(np.log(self.gamma))

    @classmethod
    def expression(cls) -> Any:
        """R = theta log(gamma); the constant log(log(gamma) / (gamma - 1)) is dropped, gamma being frozen."""
        sympy, theta, gamma = _symbols("theta", "gamma")
        return theta * sympy.log(gamma)

    @classmethod
    def density_expression(cls) -> Any:
        """Density p(pi | gamma) on 0 < pi < 1, a sympy expression in `prior_prob` and `gamma`."""
        sympy, pi, gamma = _symbols("prior_prob", "gamma")
        return (gamma - 1) / (sympy.log(gamma) * (1 + (gamma - 1) * pi))

    @classmethod
    def objective_expression(cls) -> Any:
        """What `minimiser` minimises over `prior_prob`: KL(Bern(theta) || Bern(pi)) - log p(pi | gamma), in sympy."""
        sympy, *_ = _symbols("theta")
        return _bernoulli_kl() - sympy.log(cls.density_expression())

    @classmethod
    def minimiser_expression(cls) -> Any:
        """The one stationary point of the objective in `prior_prob`, solved for by sympy."""
        sympy, pi = _symbols("prior_prob")
        (minimiser,) = sympy.solve(sympy.diff(cls.objective_expression(), pi), pi)
        return minimiser

    def density(self, prior_prob: Any) -> np.ndarray:
        """Density p(pi | gamma).

        Args:
            prior_prob: Prior probabilities pi in [0, 1], any shape.

        Returns:
            Densities, same shape.

        Raises:
            ValueError: if an entry lies outside [0, 1].
        """
        pi = check_interval("prior_prob", prior_prob, 0.0, 1.0, array=True)
        return _numeric(self.density_expression, "prior_prob", "gamma")(pi, self.gamma)

    def minimiser(self, theta: Any) -> np.ndarray:
        """Best prior probability pi* = theta / (theta + gamma (1 - theta)); arguments as in `regulariser`."""
        return _numeric(self.minimiser_expression, "theta", "gamma")(_check_theta(theta), self.gamma)

    def rest_points(self, benefit: float) -> tuple[RestPoint, ...]:
        """One stable vertex, 1 iff b > log(gamma); at equality both, neutral, and every theta between rests too."""
        force = check_real("benefit", benefit) - self.price
        if force == 0.0:
            return RestPoint(0.0, "neutral"), RestPoint(1.0, "neutral")
        return (RestPoint(1.0 if force > 0.0 else 0.0, "stable"),)


class _EntropicPrior(Prior):
    """A prior whose KL keeps the entropy of the gate: the slope is logit(theta) less a constant `_log_odds`."""

    @property
    @abc.abstractmethod
    def _log_odds(self) -> float:
        """logit(theta) at rest for a benefit of 0."""

    def rest_points(self, benefit: float) -> tuple[RestPoint, ...]:
        """One stable point inside (0, 1) whatever the benefit: no vertex, so that a gate is never deterministic.

        It is reported inside (0, 1) also where its rounded value would be 0 or 1.
        """
        theta = expit(self._log_odds + check_real("benefit", benefit))
        return (RestPoint(float(np.clip(theta, np.nextafter(0.0, 1.0), np.nextafter(1.0, 0.0))), "stable"),)


@dataclasses.dataclass(frozen=True)
class BernoulliPrior(_EntropicPrior):
    """A Bernoulli prior with a fixed probability pi: R = KL(Bern(theta) || Bern(pi)).

    Args:
        prior_prob: Prior probability pi of keeping the structure, in (0, 1).

    Raises:
        ValueError: if `prior_prob` lies outside (0, 1).

    Example:
        >>> [round(point.keep_prob, 3) for point in BernoulliPrior(0.05).rest_points(3.0)]
        [0.514]
    """

    prior_prob: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior_prob", _check_prior_prob(self.prior_prob))

    @property
    def _log_odds(self) -> float:
        return float(logit(self.prior_prob))

    @classmethod
    def expression(cls) -> Any:
        return _bernoulli_kl()


@dataclasses.dataclass(frozen=True)
class SpikeAndSlab(_EntropicPrior):
    """Weights that are 0 with probability 1 - pi and otherwise follow a slab: R = KL(Bern(theta) || Bern(pi)) + theta K.

    K is the KL from the posterior of the structure's weights, given that they are kept, to the slab; for the posterior
    N(m, s^2) of one weight and the slab N(0, v^2) it is log(v/s) + (s^2 + m^2)/(2 v^2) - 1/2, summed over weights.

    Args:
        prior_prob: Prior probability pi of keeping the structure, in (0, 1).
        slab_cost: The slab's KL K of the whole structure, nats.

    Raises:
        ValueError: if `prior_prob` lies outside (0, 1) or `slab_cost` is negative.

    Example:
        >>> [round(point.keep_prob, 3) for point in SpikeAndSlab(0.5, 3.0).rest_points(3.0)]
        [0.5]
    """

    prior_prob: float
    slab_cost: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior_prob", _check_prior_prob(self.prior_prob))
        object.__setattr__(self, "slab_cost", check_nonnegative("slab_cost", self.slab_cost))

    @property
    def _log_odds(self) -> float:
        return float(logit(self.prior_prob)) - self.slab_cost

    @classmethod
    def expression(cls) -> Any:
        _, theta, cost = _symbols("theta", "slab_cost")
        return _bernoulli_kl() + theta * cost


@dataclasses.dataclass(frozen=True)
class HardConcrete(Prior):
    """The hard-concrete L0 gate: a stretched, clipped logistic variable z in [0, 1], with penalty price * P(z > 0).

    theta = P(z > 0) = sigmoid(log(alpha) - temperature * log(-low / high)) and descent acts on log(alpha). Hence, exactly:

    * The penalty is linear in theta, but theta = 0 and 1 lie at infinite log(alpha). The speed of theta carries the
      factor (theta (1 - theta))^2, so a vertex is approached like 1/time and never reached; the gradient vanishes there,
      so a gate that has gone far comes back as slowly.
    * The gate is not Bernoulli. For a loss linear in z, P(z > x) = theta k / (1 - theta + theta k) with k(x) <= 1, so
      the mean gate is convex in theta: its derivative, `response`, rises from the mean of k, below 1, at theta = 0 to
      that of 1/k, above 1, at theta = 1. With a benefit between price/response(1) and price/response(0) both vertices
      are stable, with an unstable point between: no single switch at benefit = price, but hysteresis.

    Source: arXiv:1712.01312 for the gate; its flow is derived here.

    Args:
        price: Penalty per active gate, nats.
        temperature: Temperature beta of the concrete distribution, in [0.01, 1]; towards 0 the gate is Bernoulli.
        low: Lower end of the stretched interval, in [-10, -0.001].
        high: Upper end of the stretched interval, in [1.001, 11].

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> [(round(p.keep_prob, 3), p.stability) for p in HardConcrete(0.1).rest_points(0.1)]
        [(0.0, 'stable'), (0.717, 'unstable'), (1.0, 'stable')]
    """

    price: float
    temperature: float = 2.0 / 3.0
    low: float = -0.1
    high: float = 1.1

    def __post_init__(self) -> None:
        checked = {
            "price": check_positive("price", self.price, hint="Without a price there is nothing to regularise."),
            "temperature": check_interval("temperature", self.temperature, 0.01, 1.0),
            "low": check_interval("low", self.low, -10.0, -0.001),
            "high": check_interval("high", self.high, 1.001, 11.0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def expression(cls) -> Any:
        _, theta, price = _symbols("theta", "price")
        return price * theta

    @classmethod
    def mobility_expression(cls) -> Any:
        """(dtheta/dlog(alpha))^2 in terms of `theta`, in sympy: descent on log(alpha) moves theta that much per force."""
        sympy, theta = _symbols("theta")
        return sympy.factor(1 / sympy.diff(sympy.log(theta) - sympy.log(1 - theta), theta)) ** 2

    @classmethod
    def mean_expression(cls) -> Any:
        """Mean gate E[z], a sympy integral over `v`, the logit of the gate before it is stretched."""
        sympy, theta, beta, low, high, v = _symbols("theta", "temperature", "low", "high", "v")
        start = sympy.log(-low / high)
        k = sympy.exp(-beta * (v - start))
        share = theta * k / (1 - theta + theta * k)
        width = (high - low) * sympy.exp(-v) / (1 + sympy.exp(-v)) ** 2
        return sympy.Integral(share * width, (v, start, sympy.log((1 - low) / (high - 1))))

    def keep_prob(self, log_alpha: Any) -> np.ndarray:
        """Probability theta = P(z > 0) that the gate is active.

        Args:
            log_alpha: Location parameters log(alpha), any shape.

        Returns:
            Probabilities, same shape.

        Raises:
            ValueError: if an entry is not finite.
        """
        return expit(check_real("log_alpha", log_alpha, array=True) - self.temperature * np.log(-self.low / self.high))

    def mean_gate(self, theta: Any) -> np.ndarray:
        """Mean gate E[z] at P(z > 0) = theta; arguments and errors as in `regulariser`."""
        return self._integrate(0, theta)

    def response(self, theta: Any) -> np.ndarray:
        return self._integrate(1, theta)

    def mobility(self, theta: Any) -> np.ndarray:
        return _numeric(self.mobility_expression, "theta")(_check_theta(theta))

    def rest_points(self, benefit: float) -> tuple[RestPoint, ...]:
        """Both vertices, which rest because the gradient vanishes there, and an unstable point where both are stable."""
        benefit = check_real("benefit", benefit)

        def force(theta: float) -> float:
            return float(benefit * self.response(theta)) - self.price

        at_zero, at_one = force(0.0), force(1.0)
        ends = [RestPoint(0.0, "stable" if at_zero < 0.0 else "unstable")]
        if at_zero < 0.0 < at_one:
            from scipy.optimize import brentq

            ends.append(RestPoint(float(brentq(force, 0.0, 1.0, xtol=1e-15)), "unstable"))
        ends.append(RestPoint(1.0, "stable" if at_one > 0.0 else "unstable"))
        return tuple(ends)

    def _integrate(self, order: int, theta: Any) -> np.ndarray:
        """Mean gate (order 0) or its derivative by theta (order 1), by Gauss-Legendre quadrature."""
        theta = _check_theta(theta)
        integrand, *ends, nodes, weights = _compile_mean(order)
        shape = self.temperature, self.low, self.high
        start, stop = (end(*shape) for end in ends)
        v = start + (stop - start) * nodes
        return integrand(theta[..., None], v, *shape) @ weights * (stop - start)


def _check_theta(theta: Any) -> np.ndarray:
    return check_interval("theta", theta, 0.0, 1.0, array=True)


def _check_prior_prob(value: Any) -> float:
    return check_interval("prior_prob", value, 0.0, 1.0, True, True, hint="At 0 or 1 the gate is decided; use none.")


def _symbols(*names: str) -> tuple[Any, ...]:
    """sympy itself, then a symbol for each name: positive, but for those of either sign."""
    import sympy

    signs = {"low": {"negative": True}, "v": {"real": True}}
    return sympy, *(sympy.Symbol(name, **signs.get(name, {"positive": True})) for name in names)


def _bernoulli_kl() -> Any:
    """KL(Bern(theta) || Bern(prior_prob)) in sympy."""
    sympy, theta, pi = _symbols("theta", "prior_prob")
    log = sympy.log
    return theta * (log(theta) - log(pi)) + (1 - theta) * (log(1 - theta) - log(1 - pi))


@functools.cache
def _compile(prior: type[Prior], order: int) -> tuple[Callable[..., Any], ...]:
    """The derivative of that order of a prior's expression, as a function of theta and the parameters, and its limits.

    The limits at theta = 0 and 1 are functions of the parameters alone.
    """
    sympy, theta, *parameters = _symbols("theta", *(field.name for field in dataclasses.fields(prior)))
    expression = sympy.diff(prior.expression(), theta, order)
    limits = (sympy.limit(expression, theta, face, side) for face, side in ((0, "+"), (1, "-")))
    return (
        sympy.lambdify((theta, *parameters), expression, "numpy", cse=True),
        *(sympy.lambdify(parameters, limit, "numpy") for limit in limits),
    )


@functools.cache
def _numeric(expression: Callable[[], Any], *names: str) -> Callable[..., Any]:
    """Function of the named symbols that evaluates what `expression` returns."""
    sympy, *arguments = _symbols(*names)
    return sympy.lambdify(arguments, expression(), "numpy")


@functools.cache
def _compile_mean(order: int) -> tuple[Any, ...]:
    """Integrand of the mean gate, differentiated `order` times by theta, the ends of the integral, and a rule on [0, 1]."""
    sympy, theta, v, *shape = _symbols("theta", "v", "temperature", "low", "high")
    integral = HardConcrete.mean_expression()
    _, start, stop = integral.limits[0]
    integrand = sympy.diff(integral.function, theta, order)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return (
        sympy.lambdify((theta, v, *shape), integrand, "numpy", cse=True),
        sympy.lambdify(shape, start, "numpy"),
        sympy.lambdify(shape, stop, "numpy"),
        0.5 * (nodes + 1.0),
        0.5 * weights,
    )
