"""A network of a few units as its exact expected loss over all gate patterns, the cost, the gradient flow and its projection.

They are expressions of sympy, which is imported when first needed, and vectorised functions made of these.

Source: docs/mathematics.md sections 1 and 3.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from catode._validate import check_choice, check_int, check_nonnegative, check_positive, check_real, check_shape, fail

__all__ = ["GatedNetwork"]

_MAX_EXAMPLES, _MAX_FEATURES, _MAX_BLOCKS, _MAX_WIDTH = 8, 2, 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedNetwork:
    """A residual network of one or two blocks y = x + xi_B W_out diag(xi) act(W_in x), small enough to be exact.

    The state is all weights (per block W_in, then W_out, row by row), then all keep probabilities (per block the
    layer's, then its units'). Expectations are sums over every gate pattern, of which 8 gates have 256. Expressions are
    built on first use: seconds for the larger networks.

    Source: docs/mathematics.md sections 1 and 3.

    Args:
        inputs: Examples, shape (n, d), with n at most 8 and d at most 2.
        targets: What the last block should return, shape (n, d); labels -1 and 1 for the logistic loss.
        widths: Hidden units of each block: one or two numbers in [1, 3].
        prices: Complexity cost g of keeping each gated structure, nats, in the order of `keep_probs`; or one for all.
        weight_decay: Coefficient lambda of the L2 penalty, 1/time.
        rate_ratio: Speed rho of the keep probabilities, 1/(nats time).
        activation: "identity", "tanh", "relu" (of slope 1/2 at 0) or "square".
        loss: "squared", half the squared distance, or "logistic", log(1 + exp(-target * output)) summed over features;
            either is averaged over examples.
        gated: What carries a gate: "layers", "units" or "both".

    Raises:
        ValueError: if a shape, a number or a choice is not one of these.

    Example:
        >>> network = GatedNetwork(inputs=[[1.0]], targets=[[2.0]], widths=(1,), prices=0.1, activation="identity",
        ...                        gated="layers")
        >>> network.expected_loss()
        theta_B1*(W1_in_11*W1_out_11 - 1)**2/2 - theta_B1/2 + 1/2
        >>> network.field([0.5, 0.5, 0.5]).round(3).tolist()
        [0.188, 0.188, 0.119]
    """

    inputs: Any
    targets: Any
    widths: tuple[int, ...]
    prices: Any
    weight_decay: float = 0.0
    rate_ratio: float = 1.0
    activation: str = "tanh"
    loss: str = "squared"
    gated: str = "both"

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("activation", check_choice("activation", self.activation, ("identity", "tanh", "relu", "square")))
        put("loss", check_choice("loss", self.loss, ("squared", "logistic")))
        put("gated", check_choice("gated", self.gated, ("layers", "units", "both")))
        put("weight_decay", check_nonnegative("weight_decay", self.weight_decay))
        put("rate_ratio", check_positive("rate_ratio", self.rate_ratio))
        inputs, targets = check_real("inputs", self.inputs, array=True), check_real("targets", self.targets, array=True)
        good = inputs.ndim == 2 and 1 <= len(inputs) <= _MAX_EXAMPLES and 1 <= inputs.shape[1] <= _MAX_FEATURES
        check_shape("inputs", inputs, f"(n, d) with 1 <= n <= {_MAX_EXAMPLES} and 1 <= d <= {_MAX_FEATURES}", good)
        check_shape("targets", targets, f"{inputs.shape}, that of `inputs`", targets.shape == inputs.shape)
        if self.loss == "logistic" and not np.all(np.abs(targets) == 1.0):
            index = tuple(int(i) for i in np.argwhere(np.abs(targets) != 1.0)[0])
            fail("targets", "be labels -1 or 1 for the logistic loss", targets[index], index=index)
        put("inputs", _freeze(inputs))
        put("targets", _freeze(targets))
        if not isinstance(self.widths, (tuple, list)) or not 1 <= len(self.widths) <= _MAX_BLOCKS:
            fail("widths", f"list one or {_MAX_BLOCKS} widths", self.widths, hint="Write e.g. widths=(2,).")
        widths = (check_int(f"widths[{i}]", width, low=1, high=_MAX_WIDTH) for i, width in enumerate(self.widths))
        put("widths", tuple(widths))
        prices, gates = check_nonnegative("prices", self.prices, array=True), len(self._names)
        check_shape("prices", prices, f"() or ({gates},), one for each gate", prices.shape in ((), (gates,)))
        put("prices", tuple(np.broadcast_to(prices, (gates,)).tolist()))

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """Suffixes of the gates: B1 for the layer of block 1, 1_2 for its second unit."""
        names = []
        for block, width in enumerate(self.widths, 1):
            names += [f"B{block}"] * (self.gated != "units")
            names += [f"{block}_{unit}" for unit in range(1, width + 1)] * (self.gated != "layers")
        return tuple(names)

    @functools.cached_property
    def _layers(self) -> tuple[tuple[Any, Any], ...]:
        """The weight matrices (W_in, W_out) of each block."""
        import sympy

        def matrix(name: str, rows: int, columns: int) -> Any:
            return sympy.Matrix(rows, columns, lambda i, j: sympy.Symbol(f"{name}_{i + 1}{j + 1}", real=True))

        d = len(self.inputs[0])
        widths = enumerate(self.widths, 1)
        return tuple((matrix(f"W{block}_in", width, d), matrix(f"W{block}_out", d, width)) for block, width in widths)

    @functools.cached_property
    def weights(self) -> tuple[Any, ...]:
        """Symbols of the weights, in the order of the state."""
        return tuple(symbol for pair in self._layers for matrix in pair for symbol in matrix)

    @functools.cached_property
    def keep_probs(self) -> tuple[Any, ...]:
        """Symbols theta of the keep probabilities, in the order of the state."""
        import sympy

        return tuple(sympy.Symbol(f"theta_{name}", real=True) for name in self._names)

    @functools.cached_property
    def gates(self) -> tuple[Any, ...]:
        """Symbols xi of the gates, in the order of `keep_probs`."""
        import sympy

        return tuple(sympy.Symbol(f"xi_{name}", real=True) for name in self._names)

    @property
    def state(self) -> tuple[Any, ...]:
        """Symbols of the state: the weights, then the keep probabilities."""
        return self.weights + self.keep_probs

    @functools.cached_property
    def patterns(self) -> np.ndarray:
        """Every gate pattern, shape (2^gates, gates), entries 0.0 and 1.0."""
        return np.array(list(itertools.product((0.0, 1.0), repeat=len(self.gates))))

    def loss_expression(self) -> Any:
        """Mean loss L(W, xi) over the examples, in `weights` and `gates`."""
        import sympy

        activate = {
            "identity": lambda x: x,
            "tanh": sympy.tanh,
            "relu": lambda x: (x + sympy.Abs(x)) / 2,
            "square": lambda x: x**2,
        }[self.activation]
        gate = dict(zip(self._names, self.gates, strict=True))
        total = sympy.Integer(0)
        for example, target in zip(self.inputs, self.targets, strict=True):
            x = sympy.Matrix([_exact(value) for value in example])
            for block, (inward, outward) in enumerate(self._layers, 1):
                hidden = (inward * x).applyfunc(activate)
                units = [gate.get(f"{block}_{unit}", 1) * value for unit, value in enumerate(hidden, 1)]
                x = x + gate.get(f"B{block}", 1) * outward * sympy.Matrix(units)
            for value, wanted in zip(x, target, strict=True):
                wanted = _exact(wanted)
                squared = self.loss == "squared"
                total += (value - wanted) ** 2 / 2 if squared else sympy.log(1 + sympy.exp(-wanted * value))
        return total / len(self.inputs)

    def pattern_probability(self) -> Any:
        """Probability of the gate pattern `gates`: a product over gates of theta where xi = 1, 1 - theta where 0."""
        import sympy

        return sympy.prod(
            1 - theta + xi * (2 * theta - 1) for theta, xi in zip(self.keep_probs, self.gates, strict=True)
        )

    def expected_loss(self) -> Any:
        """Exact expectation of the loss over all gate patterns, in `weights` and `keep_probs`."""
        return self._expect(self.loss_expression())

    def penalty(self) -> Any:
        """What the cost adds to the expected loss: (lambda/2) |W|^2 + sum of price * theta."""
        decay = _exact(self.weight_decay) / 2 * sum(weight**2 for weight in self.weights)
        prices = zip(self.prices, self.keep_probs, strict=True)
        return decay + sum(_exact(price) * theta for price, theta in prices)

    def cost(self) -> Any:
        """The cost C(W, Theta): expected loss plus penalty."""
        return self.expected_loss() + self.penalty()

    def flow(self) -> Any:
        """Gradient flow of the cost before projection, a sympy column: W' = -dC/dW, theta' = -rho dC/dtheta."""
        import sympy

        cost = self.cost()
        return sympy.Matrix(
            [-rate * sympy.diff(cost, x) for rate, x in zip(map(_exact, self._rates), self.state, strict=True)]
        )

    def projected_flow(self) -> Any:
        """The projected ODE, a sympy column: `flow`, with no speed of a theta out of [0, 1]."""
        import sympy

        flow = self.flow()
        for i, theta in enumerate(self.keep_probs, len(self.weights)):
            speed = flow[i]
            outward = sympy.Or(sympy.And(theta <= 0, speed < 0), sympy.And(theta >= 1, speed > 0))
            flow[i] = sympy.Piecewise((0, outward), (speed, True))
        return flow

    def value(self, state: Any) -> np.ndarray:
        """The cost.

        Args:
            state: States (weights, keep probabilities), shape (..., len(state)).

        Returns:
            Values, nats, shape (...).

        Raises:
            ValueError: if `state` is not finite or has another last axis; likewise in the methods below.
        """
        return self._sum(0, state)[..., 0]

    def field(self, state: Any) -> np.ndarray:
        """Velocity before projection, `flow` in numbers.

        Args:
            state: States, shape (..., d).

        Returns:
            Time derivatives, shape (..., d).
        """
        return -self._rates * self._sum(1, state)

    def jacobian(self, state: Any) -> np.ndarray:
        """Derivative of `field`; entry [..., i, j] is that of component i with respect to coordinate j.

        Args:
            state: States, shape (..., d).

        Returns:
            Jacobians, shape (..., d, d).
        """
        d = len(self.state)
        upper = self._sum(2, state)
        hessian = np.empty((*upper.shape[:-1], d, d))
        rows, columns = np.triu_indices(d)
        hessian[..., rows, columns] = hessian[..., columns, rows] = upper
        return -self._rates[:, None] * hessian

    def projected_field(self, state: Any) -> np.ndarray:
        """Velocity of the projected ODE: `field`, with no speed of a theta out of [0, 1].

        Args:
            state: States, shape (..., d).

        Returns:
            Time derivatives, shape (..., d).
        """
        state = self._check(state)
        speed = self.field(state)
        outward = ((state <= 0.0) & (speed < 0.0)) | ((state >= 1.0) & (speed > 0.0))
        outward[..., : len(self.weights)] = False
        return np.where(outward, 0.0, speed)

    @functools.cached_property
    def _rates(self) -> np.ndarray:
        return np.repeat([1.0, self.rate_ratio], [len(self.weights), len(self.keep_probs)])

    def _expect(self, expression: Any) -> Any:
        """Expectation of an expression in `gates` over all patterns."""
        total, probability = 0, self.pattern_probability()
        for pattern in self.patterns.astype(int).tolist():
            values = dict(zip(self.gates, pattern, strict=True))
            total += probability.xreplace(values).doit() * expression.xreplace(values)
        return total

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_compiled"}  # made again where needed

    @functools.cached_property
    def _compiled(self) -> dict[int, Any]:
        return {}

    def _sum(self, order: int, state: Any) -> np.ndarray:
        """Cost, gradient or upper triangle of the Hessian (order 0, 1, 2): shape (..., entries).

        One lambdified term, P(xi) (L + penalty), is evaluated at all patterns at once and summed.
        """
        state = self._check(state)
        if order not in self._compiled:
            self._compiled[order] = self._compile(order)
        arguments = [*np.moveaxis(state, -1, 0)[..., None], *self.patterns.T]
        terms = self._compiled[order](*arguments)
        shape = (*state.shape[:-1], len(self.patterns))
        return np.stack([np.broadcast_to(term, shape).sum(axis=-1) for term in terms], axis=-1)

    def _compile(self, order: int) -> Any:
        import sympy

        terms = [self.pattern_probability() * (self.loss_expression() + self.penalty())]
        if order > 0:
            terms = [sympy.diff(terms[0], x) for x in self.state]
        if order > 1:
            terms = [sympy.diff(term, x) for i, term in enumerate(terms) for x in self.state[i:]]
            terms = [term.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0)) for term in terms]  # kinks of the relu
        return sympy.lambdify(self.state + self.gates, terms, "numpy", cse=True)

    def _check(self, state: Any) -> np.ndarray:
        state, d = check_real("state", state, array=True), len(self.state)
        check_shape("state", state, f"(..., {d})", state.ndim > 0 and state.shape[-1] == d)
        return state


def _exact(value: float) -> Any:
    """The decimal fraction that a float is written as: 1/10 for 0.1."""
    import sympy

    return sympy.Rational(str(value))


def _freeze(array: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in array.tolist())
