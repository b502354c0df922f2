"""The mathematics of catode: systems, their flow, domains of attraction, and the tolerance that training uses.

Imports numpy and scipy only; never torch or what trains and, at import time, neither sympy, numba nor matplotlib.

* `catode.theory.systems`: the comparison systems with their separatrices in closed form (docs/mathematics.md section 4),
  and any field on a box, as a function or as sympy expressions.
* `catode.theory.flow`: the projected ODE, one path or millions, faces met exactly (section 3); the iterates themselves.
* `catode.theory.basins`: domains of attraction on grids; equilibria, nullclines, manifolds, and how they move.
* `catode.theory.certificates`: inner approximations of these domains, proved in exact arithmetic.
* `catode.theory.tolerance`: how small a keep probability must be for safe removal (section 5), and how often the iterates
  escape all the same.
* `catode.theory.priors`: the flattening prior and its rivals.
* `catode.theory.networks`: gated networks as exact projected ODEs, bounds that put them under a comparison system, and
  their real flow held against it.
* `catode.theory.plotting`: pictures of all that.
"""

from catode.theory.basins.grids import Basins, basins_fractions, basins_of_attraction
from catode.theory.certificates.certificate import Certificate, certify
from catode.theory.flow.batch import Batch, integrate_batch
from catode.theory.flow.paths import integrate, trace_separatrix
from catode.theory.flow.trajectory import FaceEvent, Trajectory
from catode.theory.systems.benefit import BenefitSystem
from catode.theory.systems.box import BoxSystem
from catode.theory.systems.norms import LayerSystem, UnitSystem
from catode.theory.systems.planar import PlanarSystem
from catode.theory.tolerance.derivation import commit_alarm, derive, escape_probability
from catode.theory.tolerance.result import Tolerance, fixed

__all__ = [
    "Basins",
    "Batch",
    "BenefitSystem",
    "BoxSystem",
    "Certificate",
    "FaceEvent",
    "LayerSystem",
    "PlanarSystem",
    "Tolerance",
    "Trajectory",
    "UnitSystem",
    "basins_fractions",
    "basins_of_attraction",
    "certify",
    "commit_alarm",
    "derive",
    "escape_probability",
    "fixed",
    "integrate",
    "integrate_batch",
    "trace_separatrix",
]
