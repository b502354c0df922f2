"""Expected MACs and parameters of a gated network: a multilinear polynomial in the keep probabilities, and its gradient.

Source: THEORY section 2 (the paper's complexity (11)-(12)). The vector of keep probabilities is laid out as all layers
(one for each residual block) followed by the units, site by site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catode._validate import check_interval, check_nonnegative


@dataclass(frozen=True)
class Term:
    """One monomial family: ``coefficient * theta_block * N_inner * N_outer``, absent factors being 1.

    Args:
        name: The layer that is counted.
        macs: MACs per example for each pair of an inner and an outer unit.
        params: Parameters for each such pair.
        block: Index of the residual block that the layer goes with, None for the fixed part of the network.
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
        blocks: Number of residual blocks.
        site_block: Block of each site, shape (sites,).
        widths: Units of each site, shape (sites,).

    Attributes:
        is_layer: Which structures are layers, shape (n,); the others are units.
        sites: Numbers of the units of each site.
        removable_macs: F_0, MACs of all blocks together.
        removable_params: P_0, parameters of all blocks together.
    """

    def __init__(self, terms: Sequence[Term], blocks: int, site_block: Sequence[int], widths: Sequence[int]):
        for term in terms:
            if term.inner is not None and term.inner == term.outer:
                raise ValueError(f"`{term.name}` must read and write different sites; got site {term.inner} twice")
        self.terms = tuple(terms)
        self.blocks = blocks
        self.site_block = np.asarray(site_block, dtype=np.int64)
        self.widths = np.asarray(widths, dtype=np.int64)
        self.unit_site = np.repeat(np.arange(len(self.widths)), self.widths)
        self.unit_block = self.site_block[self.unit_site]
        self.size = blocks + len(self.unit_site)
        self.is_layer = np.arange(self.size) < blocks
        ends = blocks + np.cumsum(self.widths)
        self.sites = [np.arange(end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        ones = len(self.widths)  # index of the constant 1 appended to the factor vectors
        self._macs = np.array([t.macs for t in terms], dtype=np.float64)
        self._params = np.array([t.params for t in terms], dtype=np.float64)
        self._block = np.array([blocks if t.block is None else t.block for t in terms], dtype=np.int64)
        self._inner = np.array([ones if t.inner is None else t.inner for t in terms], dtype=np.int64)
        self._outer = np.array([ones if t.outer is None else t.outer for t in terms], dtype=np.int64)
        self._removable = self._block < blocks
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
        layers = np.bincount(self._block, share * i * o, self.blocks + 1)[: self.blocks]
        n = len(self.widths)
        sites = np.bincount(self._inner, share * a * o, n + 1) + np.bincount(self._outer, share * a * i, n + 1)
        return np.concatenate([layers, sites[:n][self.unit_site]])

    def prices(self, theta: ArrayLike, *, nu: float, alpha: float, beta: float) -> NDArray[np.float64]:
        """Price of every structure in nats, recomputed from theta (THEORY section 2), shape (size,).

        Args:
            theta: Keep probabilities, shape (size,).
            nu: Nats that the whole network may cost, >= 0.
            alpha: Layers (1) against units (0).
            beta: Parameters (1) against MACs (0).
        """
        check_nonnegative("nu", nu)
        check_interval("alpha", alpha, 0.0, 1.0)
        gradient = self.gradient(theta, beta)
        gradient[: self.blocks] *= nu * alpha
        gradient[self.blocks :] *= nu * (1.0 - alpha)
        return gradient

    def close(self, kept: ArrayLike) -> NDArray[np.bool_]:
        """Smallest removal closed under promotion: an emptied site takes its block along, a block all its units."""
        kept = np.array(kept, dtype=bool)
        layers, units = kept[: self.blocks], kept[self.blocks :]
        alive = np.bincount(self.unit_site, units, len(self.widths)) > 0
        np.logical_and.at(layers, self.site_block, alive)
        units &= layers[self.unit_block]
        return kept

    def _share(self, beta: float) -> NDArray[np.float64]:
        check_interval("beta", beta, 0.0, 1.0)
        share = (1.0 - beta) * self._macs / self.removable_macs + beta * self._params / self.removable_params
        return np.where(self._removable, share, 0.0)

    def _factors(self, theta: NDArray) -> tuple[NDArray, NDArray]:
        gate = np.append(theta[: self.blocks], 1.0)
        width = np.append(np.bincount(self.unit_site, theta[self.blocks :], len(self.widths)), 1.0)
        return gate, width

    def _products(self, theta: NDArray) -> NDArray:
        gate, width = self._factors(theta)
        return gate[self._block] * width[self._inner] * width[self._outer]

    def _check(self, theta: ArrayLike) -> NDArray[np.float64]:
        theta = np.asarray(theta, dtype=np.float64)
        if theta.shape != (self.size,):
            raise ValueError(f"`theta` must have shape ({self.size},); got {theta.shape}")
        return theta
