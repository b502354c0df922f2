"""Domains of attraction on grids, and what bounds them: equilibria, their manifolds, how these move."""

from catode.theory.basins.grids import UNDECIDED, Basins, basins_fractions, basins_of_attraction, find_attractors

__all__ = ["UNDECIDED", "Basins", "basins_fractions", "basins_of_attraction", "find_attractors"]
