"""The projected flow: one path or millions, the faces met exactly; and the noisy iterates that follow it."""

from catode.theory.flow.batch import Batch, integrate_batch
from catode.theory.flow.paths import Flow, integrate, trace_separatrix
from catode.theory.flow.trajectory import FaceEvent, Trajectory

__all__ = ["Batch", "FaceEvent", "Flow", "Trajectory", "integrate", "integrate_batch", "trace_separatrix"]
