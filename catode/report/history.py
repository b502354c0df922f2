"""Reading of a run's folder: metrics, the history of every structure, the final widths.

Reads only the files in docs/conventions.md, "A run's folder", not the model or the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from catode.records import PLACE, number, packed, read_config, read_json, read_result, read_structures, read_table
from catode.structures.fates import NOT_BY_RULE, REMOVED, REMOVED_WITH_BLOCK, UNDECIDED
from catode.structures.inventory import KINDS
from catode.theory.systems import BenefitSystem

__all__ = ["KINDS", "Run", "SiteWidth", "Trace", "comparison_system", "final_sites", "read", "read_metrics"]

_TEXT_COLUMNS = (*PLACE, "fate")
_NUMBER_COLUMNS = ("step", "keep_prob", "benefit", "price", "gain", "decay", "rate_ratio", "drift", "tolerance")
_METRIC_COLUMNS = (
    "epoch",
    "step",
    "loss",
    "train_accuracy",
    "expected_complexity",
    "macs",
    "params",
    "wait_share",
)
SYSTEM_COLUMNS = ("price", "gain", "decay", "rate_ratio", "drift")


@dataclass(frozen=True)
class Trace:
    """The rows of structures.csv of one structure, ordered by step."""

    kind: str
    block: str
    site: str
    index: str
    fates: list[str]
    columns: dict[str, np.ndarray]
    kept: bool | None = None
    """Whether the structure is in the final network; None if structure.json does not say."""

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    @property
    def fate(self) -> str:
        """Its final fate, one of `catode.structures.fates.FATES`.

        structures.csv has rows only while a structure is undecided. That one was kept and later removed with its block is
        known only from the final network.
        """
        last = self.fates[-1]
        return REMOVED_WITH_BLOCK if self.kept is False and last not in REMOVED else last

    @property
    def removed(self) -> bool:
        """Whether the structure is not in the final network."""
        return self.fate in REMOVED

    @cached_property
    def removed_at(self) -> int | None:
        """Index of the row of the removal; None if it was kept or the removal is not recorded."""
        return self.fates.index(self.fate) if self.removed and self.fates[-1] in REMOVED else None

    def gone_at(self, layers: Mapping[str, Trace]) -> float | None:
        """Step of the removal; None if the structure was kept.

        For a committed structure removed with its block it is the block's; if no removal is recorded, the step of the last
        row.

        Args:
            layers: Traces of the run's layers by block.
        """
        if not self.removed:
            return None
        own = next((t for t in (self, layers.get(self.block)) if t is not None and t.removed_at is not None), None)
        return float(self["step"][-1] if own is None else own["step"][own.removed_at])

    @property
    def rows(self) -> slice:
        """The rows up to and including the removal."""
        return slice(None) if self.removed_at is None else slice(self.removed_at + 1)


@dataclass(frozen=True)
class SiteWidth:
    """Final width of one site, or of a block without gated units (then `site` is empty)."""

    block: str
    site: str
    kept: int | None
    total: int | None
    alive: bool


@dataclass(frozen=True)
class Run:
    """The files of a run's folder, read and checked."""

    folder: Path
    config: dict[str, Any]
    env: dict[str, Any]
    result: dict[str, Any]
    structure: dict[str, Any] | None
    metrics: dict[str, np.ndarray]
    traces: list[Trace]
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Trace]:
        """The structures of one kind."""
        return [trace for trace in self.traces if trace.kind == kind]

    def epochs(self, step: np.ndarray) -> np.ndarray:
        """Convert steps, shape (n,), to epochs (fractional), by metrics.csv."""
        steps, epochs = self.metrics["step"], self.metrics["epoch"]
        if not steps.size or not steps[-1] > 0:
            return step
        if steps[0] > 0:
            steps, epochs = np.r_[0.0, steps], np.r_[0.0, epochs + (1.0 if epochs[0] == 0 else 0.0)]
        return np.interp(step, steps, epochs)


def read(folder: Path) -> Run:
    """Read a run's files, as listed at `catode.report.report.write`; tables may be compressed (`.csv.gz`)."""
    structure = read_json(folder / "structure.json") if (folder / "structure.json").exists() else None
    run = Run(
        folder=folder,
        config=read_config(folder),
        env=read_json(folder / "env.json"),
        metrics=read_metrics(folder),
        traces=_read_traces(folder, structure),
        result=read_result(folder),
        structure=structure,
    )
    if structure is None:
        run.notes.append(
            "structure.json is missing: the final widths below are read from the last fates in structures.csv."
        )
    if not run.metrics["step"].size:
        run.notes.append("metrics.csv has no rows: there are no curves over training.")
    if not run.traces:
        run.notes.append(
            "structures.csv has no rows: this run had no gates, so nothing could be removed and only the training "
            "curves are shown."
        )
    undecided = sum(trace.fate == UNDECIDED for trace in run.traces)
    if undecided:
        run.notes.append(f"{undecided} of {len(run.traces)} structures were still undecided when the record ended.")
    found = [trace.fate for trace in run.traces]
    if open_ := {fate: found.count(fate) for fate in NOT_BY_RULE if fate in found}:
        listed = ", ".join(f"{fate} {count}" for fate, count in open_.items())
        run.notes.append(
            f"{sum(open_.values())} of {len(run.traces)} structures were not decided by a measurement of their own: {listed}."
        )
    return run


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a run's metrics.csv."""
    return _numbers(folder / "metrics.csv", *read_table(folder / "metrics.csv", _METRIC_COLUMNS))


def _numbers(path: Path, header: list[str], rows: list[list[str]]) -> dict[str, np.ndarray]:
    return {name: np.array([number(path, name, row[place]) for row in rows]) for place, name in enumerate(header)}


def _read_traces(folder: Path, structure: dict[str, Any] | None) -> list[Trace]:
    path = packed(folder / "structures.csv")
    header, rows = read_structures(folder, _NUMBER_COLUMNS)
    place = {name: header.index(name) for name in _TEXT_COLUMNS + _NUMBER_COLUMNS}
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[place[name]] for name in PLACE), []).append(row)
    traces = []
    for key, members in groups.items():
        if key[0] not in KINDS:
            raise ValueError(f"{path} must hold 'layer' or 'unit' in column 'kind'; got {key[0]!r}.")
        fates = [row[place["fate"]] for row in members]
        columns = {
            name: np.array([number(path, name, row[place[name]]) for row in members]) for name in _NUMBER_COLUMNS
        }
        order = np.argsort(columns["step"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        traces.append(Trace(*key, fates=[fates[i] for i in order], columns=columns, kept=_kept(structure, *key)))
    return traces


def _kept(structure: dict[str, Any] | None, kind: str, block: str, site: str, index: str) -> bool | None:
    """Whether structure.json lists a structure as kept; None if it does not say."""
    described = (structure or {}).get("blocks", {}).get(block)
    if described is None:
        return None
    if kind == "layer" or not described.get("kept", True):
        return described.get("kept")
    units = described.get("sites", {}).get(site)
    return None if units is None else int(index) in units


def final_sites(run: Run) -> list[SiteWidth]:
    """Return the final width of every site, in the order of the network."""
    units: dict[str, dict[str, list[Trace]]] = {}
    layers: dict[str, Trace] = {}
    for trace in run.traces:
        sites = units.setdefault(trace.block, {})
        if trace.kind == "layer":
            layers[trace.block] = trace
        else:
            sites.setdefault(trace.site, []).append(trace)
    blocks = run.structure.get("blocks", {}) if run.structure else {}
    found = []
    for block in [*blocks, *(name for name in units if name not in blocks)]:
        described = blocks.get(block, {})
        alive = bool(described["kept"]) if "kept" in described else block not in layers or not layers[block].removed
        sites = described.get("sites", {})
        gated = units.get(block, {})
        if not sites and not gated:
            found.append(SiteWidth(block, "", None, None, alive))
        for site in [*sites, *(name for name in gated if name not in sites)]:
            traces = gated.get(site, [])
            if not alive:
                kept = 0
            elif site in sites:
                kept = len(sites[site])
            else:
                kept = sum(not trace.removed for trace in traces)
            total = len(traces) or (len(sites[site]) if alive else None)
            found.append(SiteWidth(block, site, kept, total, alive))
    return found


def comparison_system(values: Mapping[str, float]) -> BenefitSystem | None:
    """Comparison system of a structure with benefits in units of its price; None if its constants are invalid.

    With b = price * x the system of docs/mathematics.md section 4.3 keeps its form: price 1, gain and drift divided by the
    price, rate ratio times the price.

    Args:
        values: price, gain, decay, rate_ratio and drift as in structures.csv.
    """
    price = values["price"]
    try:
        return BenefitSystem(
            price=1.0,
            gain=values["gain"] / price,
            decay=values["decay"],
            rate_ratio=values["rate_ratio"] * price,
            drift=values["drift"] / price,
        )
    except (ValueError, ZeroDivisionError):
        return None
