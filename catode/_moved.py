"""Import paths of version 0.1: importing one raises an error that names the new path."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

__all__ = ["ALSO", "MOVED", "RENAMED", "MovedFinder", "install"]

MOVED = {
    "catode.complexity": "catode.structures.complexity",
    "catode.theory.box": "catode.theory.systems.box",
    "catode.theory.symbolic": "catode.theory.networks",
    "catode.theory.trajectory": "catode.theory.flow.trajectory",
    "catode.theory.faces": "catode.theory.flow.faces",
    "catode.theory.batch": "catode.theory.flow.batch",
    "catode.theory._batch_numpy": "catode.theory.flow._batch_numpy",
    "catode.theory._batch_compiled": "catode.theory.flow._batch_compiled",
    "catode.theory._batch_scheme": "catode.theory.flow._batch_scheme",
    "catode.theory.stochastic": "catode.theory.flow.stochastic",
    "catode.theory.escape": "catode.theory.tolerance.escape",
    "catode.theory.equilibria": "catode.theory.basins.equilibria",
    "catode.theory.curves": "catode.theory.basins.curves",
    "catode.theory.continuation": "catode.theory.basins.continuation",
    "catode.theory._exact": "catode.theory.certificates._exact",
    "catode.theory._certify_polygon": "catode.theory.certificates._certify_polygon",
    "catode.theory._certify_staircase": "catode.theory.certificates._certify_staircase",
    "catode.theory.prior": "catode.theory.priors",
    "catode.theory.network_bounds": "catode.theory.networks.bounds",
    "catode.theory.network_runs": "catode.theory.networks.runs",
    "catode.train.files": "catode.records",
    "catode.train.structure": "catode.prune.describe.costs",
    "catode.train.measure": "catode.decisions.evidence",
    "catode.train.decide": "catode.decisions.rules",
    "catode.train.outcome": "catode.decisions.outcomes",
    "catode.train.target": "catode.decisions.target",
    "catode.train.priors": "catode.decisions.priors",
    "catode.train.shadow": "catode.decisions.shadow",
    "catode.train.gates": "catode.prune.gated.gates",
    "catode.train.estimators": "catode.prune.measure.probes",
    "catode.train.compact": "catode.prune.gated.cut",
    "catode.train.transfer": "catode.prune.devices.transfer",
    "catode.train.prune": "catode.prune.pruner",
    "catode.train.distributed": "catode.prune.devices.distributed",
    "catode.train.steptime": "catode.prune.describe.steptime",
    "catode.train.device": "catode.prune.devices.timing",
    "catode.train.config": "catode.train.settings.config",
    "catode.train.commandline": "catode.train.settings.commandline",
    "catode.train.images": "catode.train.data.images",
    "catode.train.cifar": "catode.train.data.cifar",
    "catode.train.folder": "catode.train.data.folder",
    "catode.train.download": "catode.train.data.download",
    "catode.train.augment": "catode.train.data.augment",
    "catode.train.batches": "catode.train.data.batches",
    "catode.train.weights": "catode.train.models.weights",
    "catode.train.checkpoint": "catode.train.loop.checkpoint",
    "catode.train.lock": "catode.train.loop.lock",
    "catode.train.board": "catode.train.loop.board",
    "catode.train.preflight": "catode.train.loop.preflight",
    "catode.train.report": "catode.report.report",
    "catode.train.history": "catode.report.history",
    "catode.train.pictures": "catode.report.pictures",
    "catode.train.compare": "catode.report.compare",
}
"""New module of each old one. What was one module and is a package of the same name (`catode.theory.systems`, `flow`,
`tolerance`, `basins`, `certificates`, `networks`, `plotting`, `catode.train.data`, `models`, `loop`) keeps its import path."""

ALSO = {
    "catode.train.structure": {
        "Block": "catode.structures.description",
        "Site": "catode.structures.description",
        "Prunable": "catode.prune.describe.protocol",
    },
    "catode.train.measure": {"GradientProducts": "catode.prune.measure.growth"},
    "catode.train.prune": {"rate_ratios": "catode.decisions.motion", "ROW_FIELDS": "catode.prune.checking"},
    "catode.train.shadow": {"unit_norms": "catode.prune.gated.cut"},
}
"""Names of an old module that are in another module than the rest of it."""

RENAMED = {
    "catode.train.measure": {"summary": "catode.decisions.limits.measure"},
    "catode.train.decide": {"inputs": "catode.theory.tolerance.measured.arguments"},
}
"""Names of an old module that changed: the full new name of each."""


class MovedFinder:
    """Last entry of `sys.meta_path`: raises an error for the modules in `MOVED`, which no other finder finds."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Find nothing.

        Raises:
            ModuleNotFoundError: if the module has moved; the message names its new path.
        """
        if name in MOVED:
            _refuse(name)


def _refuse(name: str) -> NoReturn:
    others: dict[str, list[str]] = {}
    for own, place in ALSO.get(name, {}).items():
        others.setdefault(place, []).append(own)
    also = "".join(f"; {' and '.join(names)} from {place}" for place, names in others.items())
    also += "".join(f"; {own} is {new}" for own, new in RENAMED.get(name, {}).items())
    # without the argument `name`: `from package import module` would swallow the error and its message
    raise ModuleNotFoundError(f"{name} is now {MOVED[name]}; import it from there{also}")


def install() -> None:
    """Put the finder at the end of `sys.meta_path`, once."""
    if MovedFinder not in sys.meta_path:
        sys.meta_path.append(MovedFinder)
