"""The mathematics of catode: systems, their flow, and the tolerance that training uses.

Imports numpy and scipy only; never torch, `catode.train` or, at import time, sympy.

* `catode.theory.systems`: the comparison systems with their separatrices in closed form (THEORY section 4).
* `catode.theory.flow`: integration of the projected ODE (THEORY section 3).
* `catode.theory.tolerance`: how small a keep probability must be for safe removal (THEORY section 5).
"""

from catode.theory.flow import Trajectory, integrate, trace_separatrix
from catode.theory.systems import BenefitSystem, LayerSystem, PlanarSystem, UnitSystem
from catode.theory.tolerance import Tolerance, commit_alarm, derive, escape_probability, fixed

__all__ = [
    "BenefitSystem",
    "LayerSystem",
    "PlanarSystem",
    "Tolerance",
    "Trajectory",
    "UnitSystem",
    "commit_alarm",
    "derive",
    "escape_probability",
    "fixed",
    "integrate",
    "trace_separatrix",
]
