"""The fields whose flow is studied: the comparison systems in closed form, and any field on a box."""

from catode.theory.systems.box import BoxSystem, as_box
from catode.theory.systems.planar import BenefitSystem, LayerSystem, PlanarSystem, UnitSystem, growth_rate

__all__ = ["BenefitSystem", "BoxSystem", "LayerSystem", "PlanarSystem", "UnitSystem", "as_box", "growth_rate"]
