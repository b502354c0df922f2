"""Expected MACs and parameters of a gated network: a multilinear polynomial in the keep probabilities, and its gradient.

Source: docs/mathematics.md section 2 (the paper's complexity (11)-(12)). Keep probabilities are numbered by
`catode.structures.inventory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catode._validate import check_interval, check_nonnegative
from catode.structures.inventory import Inventory


@dataclass(frozen=True)
class Term:
    """One monomial family: ``coefficient * theta_block * N_inner * N_outer``, absent factors being 1.

    Args:
        name: The layer that is counted.
        macs: MACs per example for each pair of an inner and an outer unit.
        params: Parameters for each such pair.
        block: Index of the residual block that the layer is removed with, None for the fixed part of the network.
        inner: Index of the site on its input side, None if that width is fixed.
        outer: Index of the site on its output side, None if that width is fixed.
    """

    name: str
    macs: float
    params: float
    block: int | None = None
    inner: int | None = None
    outer: int | None = None


class Complexity:
    """The complexity index J and the counts behind it.

    Args:
        terms: Everything that the network executes.
        inventory: Numbering of the structures.

    Attributes:
        size: Number of structures n.
        removable_macs: F_0, MACs of all blocks and sites together.
        removable_params: P_0, parameters of all blocks and sites together.
    """

    def __init__(self, terms: Sequence[Term], inventory: Inventory):
        for term in terms:
            if term.inner is not None and term.inner == term.outer:
                raise ValueError(f"`{term.name}` must read and write different sites; got site {term.inner} twice")
        self.terms, self.inventory = tuple(terms), inventory
        self.size, blocks = inventory.size, inventory.layers
        ones = len(inventory.widths)  # index of the constant 1 appended to the factor vectors
        self._macs = np.array([t.macs for t in terms], dtype=np.float64)
        self._params = np.array([t.params for t in terms], dtype=np.float64)
        self._block = np.array([blocks if t.block is None else t.block for t in terms], dtype=np.int64)
        self._inner = np.array([ones if t.inner is None else t.inner for t in terms], dtype=np.int64)
        self._outer = np.array([ones if t.outer is None else t.outer for t in terms], dtype=np.int64)
        self._removable = (self._block < blocks) | (self._inner < ones) | (self._outer < ones)
        whole = self._products(np.ones(self.size))
        self.removable_macs = float(self._macs[self._removable] @ whole[self._removable])
        self.removable_params = float(self._params[self._removable] @ whole[self._removable])

    def macs(self, theta: ArrayLike) -> float:
        """Expected MACs per example of the whole network, fixed part included."""
        return float(self._macs @ self._products(self._check(theta)))

    def params(self, theta: ArrayLike) -> float:
        """Expected parameters of the whole network, fixed part included."""
        return float(self._params @ self._products(self._check(theta)))

    def index(self, theta: ArrayLike, beta: float) -> float:
        """The complexity index J in [0, 1] of the removable part.

        Args:
            theta: Keep probabilities, shape (size,).
            beta: Weight of parameters against MACs, in [0, 1].
        """
        return float(self._share(beta) @ self._products(self._check(theta)))

    def gradient(self, theta: ArrayLike, beta: float) -> NDArray[np.float64]:
        """dJ/dtheta, exact, shape (size,). J is multilinear: an entry does not depend on its own theta."""
        theta = self._check(theta)
        share = self._share(beta)
        gate, width = self._factors(theta)
        a, i, o = gate[self._block], width[self._inner], width[self._outer]
        layers = np.bincount(self._block, share * i * o, self.inventory.layers + 1)[: self.inventory.layers]
        n = len(self.inventory.widths)
        sites = np.bincount(self._inner, share * a * o, n + 1) + np.bincount(self._outer, share * a * i, n + 1)
        return np.concatenate([layers, sites[:n][self.inventory.unit_site]])

    def prices(self, theta: ArrayLike, *, nu: float, alpha: float, beta: float) -> NDArray[np.float64]:
        """Price of every structure in nats, recomputed from theta (docs/mathematics.md section 2), shape (size,).

        Args:
            theta: Keep probabilities, shape (size,).
            nu: Nats that the whole network may cost, >= 0.
            alpha: Layers (1) against units (0).
            beta: Parameters (1) against MACs (0).
        """
        check_nonnegative("nu", nu)
        check_interval("alpha", alpha, 0.0, 1.0)
        gradient = self.gradient(theta, beta)
        gradient[: self.inventory.layers] *= nu * alpha
        gradient[self.inventory.layers :] *= nu * (1.0 - alpha)
        return gradient

    def _share(self, beta: float) -> NDArray[np.float64]:
        check_interval("beta", beta, 0.0, 1.0)
        share = (1.0 - beta) * self._macs / self.removable_macs + beta * self._params / self.removable_params
        return np.where(self._removable, share, 0.0)

    def _factors(self, theta: NDArray) -> tuple[NDArray, NDArray]:
        gate = np.append(theta[: self.inventory.layers], 1.0)
        width = np.append(
            np.bincount(self.inventory.unit_site, theta[self.inventory.layers :], len(self.inventory.widths)), 1.0
        )
        return gate, width

    def _products(self, theta: NDArray) -> NDArray:
        gate, width = self._factors(theta)
        return gate[self._block] * width[self._inner] * width[self._outer]

    def _check(self, theta: ArrayLike) -> NDArray[np.float64]:
        theta = np.asarray(theta, dtype=np.float64)
        if theta.shape != (self.size,):
            raise ValueError(f"`theta` must have shape ({self.size},); got {theta.shape}")
        return theta
