"""The mathematics of catode: systems, their flow, domains of attraction, and the tolerance that training uses.

Imports numpy and scipy only; never torch, `catode.train` or, at import time, sympy, numba or matplotlib.

* `catode.theory.systems`: the comparison systems with their separatrices in closed form (THEORY section 4).
* `catode.theory.systems.box`: any field on a box, as a function or as sympy expressions.
* `catode.theory.flow`, `faces`, `batch`, `trajectory`: the projected ODE, one path or millions, faces met exactly (section 3).
* `catode.theory.basins.equilibria`, `curves`, `continuation`: equilibria on every face, nullclines and manifolds, how they move.
* `catode.theory.basins`: domains of attraction on grids.
* `catode.theory.certificates`: inner approximations of them, proved in exact arithmetic.
* `catode.theory.tolerance`: how small a keep probability must be for safe removal (section 5).
* `catode.theory.flow.stochastic`, `escape`: the iterates themselves, and how often they escape.
* `catode.theory.priors.priors`, `symbolic`: the flattening prior and its rivals, gated networks as exact projected ODEs.
* `catode.theory.networks`, `network_bounds`, `network_runs`: small ones, bounds that put them under a comparison system,
  and their real flow held against it.
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
