"""The fields whose flow is studied: the comparison systems in closed form, and any field on a box."""

from catode.theory.systems.benefit import BenefitSystem
from catode.theory.systems.box import BoxSystem, as_box
from catode.theory.systems.norms import LayerSystem, UnitSystem
from catode.theory.systems.planar import PlanarSystem, growth_rate

__all__ = ["BenefitSystem", "BoxSystem", "LayerSystem", "PlanarSystem", "UnitSystem", "as_box", "growth_rate"]
