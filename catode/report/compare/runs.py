"""Reading of finished runs for a comparison: configuration, result, decisions and their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from catode import _validate
from catode.decisions import shadow
from catode.records import (
    PLACE,
    number,
    packed,
    read_config,
    read_decisions,
    read_json,
    read_result,
    read_structures,
    structure_key,
)
from catode.train.settings.config import settings

ASSUMED = ("gain", "drift", "noise")
"""Upper limits assumed at a decision to hold from then on."""

MEASURED = (*ASSUMED, "benefit_upper", "price")
_CONFIG = dict(dataset=str, arch=str, epochs=int, seed=int, nu=float, alpha=float, beta=float, risk=float)
_RESULT = dict(
    test_accuracy=float,
    macs=float,
    macs_dense=float,
    layers_kept=int,
    layers_total=int,
    units_kept=int,
    units_total=int,
)


@dataclass(frozen=True)
class Decision:
    """One row of shadow.csv: a structure that met a rule's condition, and the outcome.

    Attributes:
        run: Index of its run.
        rule: One of `catode.decisions.shadow.RULES`.
        structure: kind, block, site and index.
        step: Training step of the decision.
        numbers: Values at the decision by name, `catode.decisions.shadow.NUMBERS`.
        outcome: One of `catode.decisions.shadow.OUTCOMES`.
        outcome_step: Step of the outcome; None if it is open.
    """

    run: int
    rule: str
    structure: tuple[str, str, str, str]
    step: int
    numbers: dict[str, float]
    outcome: str
    outcome_step: int | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        config: Content of config.json.
        result: Content of result.json.
        decisions: Rows of shadow.csv; empty for a run that is not a shadow run.
        rows: Rows of structures.csv, as text.
        images: What tells its images apart: their fingerprint, of folders before that was recorded their path, else "".
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    decisions: list[Decision]
    rows: list[dict[str, str]]
    images: str = ""

    @property
    def shadow(self) -> bool:
        """Whether it is a shadow run (--shadow)."""
        return bool(self.config.get("shadow", False))

    @property
    def group(self) -> tuple[str, ...]:
        """Shadow runs are counted together if these agree: network, data set, epochs, stated risk or fixed tolerance, images."""
        c = self.config
        tol = c.get("tol")
        rule = f"risk {c['risk']:g}" if tol is None else f"tolerance {tol:g}, which `derived` stands for here"
        return c["arch"], c["dataset"], f"{c['epochs']} epochs", rule, self.images

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that affect the run's results."""
        known = settings()
        own = {
            name: value
            for name, value in self.config.items()
            if name in ("dataset", "arch", "seed") or name not in known or known[name].identity
        }
        return {**own, "images": self.images} if self.config["dataset"] == "folder" else own


def read(folder: Path, place: int = 0) -> Run:
    """Read a run's files, compressed or not.

    Args:
        folder: Folder of a finished run, or its record.
        place: Index of the run among those compared.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed; the message names it.
    """
    config = read_config(folder, _CONFIG, dict(tol=float, shadow=bool))
    result = read_result(folder, _RESULT, dict(decided_by_rule=float))
    header, lines = read_structures(folder, ("step", *MEASURED))
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    path = packed(folder / "structures.csv")
    for row in rows:
        for name in ("step", *MEASURED):
            number(path, name, row[name])
    decisions = []
    if config.get("shadow"):
        path = packed(folder / shadow.FILE)
        needed = ("rule", *PLACE, "step", *shadow.NUMBERS, "outcome", "outcome_step")
        decisions = [_decision(path, row, place) for row in read_decisions(folder, needed)]
    env = read_json(folder / "env.json") if (folder / "env.json").exists() else {}
    where = str(config.get("data_dir")) if config["dataset"] == "folder" else ""
    return Run(folder, config, result, decisions, rows, str(env.get("images", where)))


def _decision(path: Path, row: dict[str, str], place: int) -> Decision:
    for name, known in (("rule", shadow.RULES), ("outcome", shadow.OUTCOMES)):
        if row[name] not in known:
            raise ValueError(f"{path} must hold one of {', '.join(known)} in column {name!r}; got {row[name]!r}.")
    try:
        return Decision(
            run=place,
            rule=row["rule"],
            structure=structure_key(row),
            step=int(row["step"]),
            numbers={name: float(row[name]) for name in shadow.NUMBERS},
            outcome=row["outcome"],
            outcome_step=int(row["outcome_step"]) if row["outcome_step"] else None,
        )
    except ValueError as error:
        raise ValueError(f"{path} must have a decision in every row; got {error}.") from None


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, indexed in their order.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed, or a run is given twice: the same folder, or the same configuration.
    """
    places: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in places:
            _validate.fail("folders", "be different runs", str(folder), hint="Name each folder once.")
        places[folder.resolve()] = folder
    runs = [read(folder, place) for place, folder in enumerate(folders)]
    for one, other in combinations(runs, 2):
        if one.identity == other.identity:
            raise ValueError(
                f"`folders` must be different runs; got {str(one.folder)!r} and {str(other.folder)!r} with the same "
                f"configuration and seed={one.config['seed']}. Leave one of them out."
            )
    return runs


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Shadow runs that may be counted together, by a heading that names what they have in common."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.shadow:
            found.setdefault(run.group, []).append(run)
    names = [", ".join(group[:-1]) for group in found]
    return {
        name if names.count(name) == 1 else f"{name}, images {group[-1] or 'not recorded'}": own
        for name, (group, own) in zip(names, found.items(), strict=True)
    }
