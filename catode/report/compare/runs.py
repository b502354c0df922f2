"""Finished runs read back for a comparison: configuration, result, and what became of every decision."""

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
    read_result,
    read_structures,
    structure_key,
)
from catode.structures.fates import REMOVED_WITH_BLOCK
from catode.train.settings.config import settings

ASSUMED = ("gain", "drift", "noise")
"""Upper limits taken at a decision, to hold from then on."""

MEASURED = (*ASSUMED, "benefit_upper", "price")
OUTCOMES = (shadow.OPEN, shadow.CONFIRMED, shadow.REGRET, REMOVED_WITH_BLOCK)
_CONFIG = dict(dataset=str, arch=str, epochs=int, seed=int, nu=float, alpha=float, beta=float, risk=float)
_RESULT = dict(
    accuracy=float, macs=float, macs_dense=float, layers_kept=int, layers_total=int, units_kept=int, units_total=int
)


@dataclass(frozen=True)
class Decision:
    """One line of shadow.csv: a structure that met a rule's condition, and what became of it.

    Attributes:
        run: Number of its run.
        rule: One of `catode.decisions.shadow.RULES`.
        structure: kind, block, site and index.
        step: Training step of the decision.
        numbers: keep_prob, benefit, escape and so on at the decision, by name.
        outcome: One of `OUTCOMES`.
        outcome_step: Step at which the observation ended; None if it did not.
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
        folder: Where it is.
        config: config.json.
        result: result.json.
        decisions: Lines of shadow.csv; empty for a run that removed what it decided.
        rows: Lines of structures.csv, as texts.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    decisions: list[Decision]
    rows: list[dict[str, str]]

    @property
    def shadow(self) -> bool:
        """Whether it decided without removing."""
        return bool(self.config.get("shadow", False))

    @property
    def group(self) -> tuple[str, str, int, float]:
        """What shadow runs must share to be counted together: data set, network, epochs, stated risk."""
        c = self.config
        return c["dataset"], c["arch"], c["epochs"], c["risk"]

    @property
    def identity(self) -> dict[str, Any]:
        """All of the configuration that decides the course of the run."""
        known = settings()
        return {
            name: value
            for name, value in self.config.items()
            if name in ("dataset", "arch", "seed") or name not in known or known[name].identity
        }


def read(folder: Path, place: int = 0) -> Run:
    """A run's files, compressed or not.

    Args:
        folder: A finished run, or the condensed record of one.
        place: The run's number among those compared.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one cannot be read, or holds what no run writes; the message names the file.
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
    return Run(folder, config, result, decisions, rows)


def _decision(path: Path, row: dict[str, str], place: int) -> Decision:
    for name, known in (("rule", shadow.RULES), ("outcome", OUTCOMES)):
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
    """Several runs, numbered in their order.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one cannot be read, or a run is given twice: the same folder, or the same configuration.
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
    """Shadow runs that may be counted together, by a heading that says what they share."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.shadow:
            dataset, arch, epochs, risk = run.group
            found.setdefault(f"{arch}, {dataset}, {epochs} epochs, risk {risk:g}", []).append(run)
    return found
