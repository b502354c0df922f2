"""The runs that the figures are drawn from: runs on the digits, trained here if missing, and committed records.

Every run on the digits has the data set's preset, but half its epochs and half its memory of measurements, so that all
of them together take minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import cifar, copies
from benchmarks.common import pool
from catode.decisions.priors import PRIORS
from catode.records import read_json
from catode.report import compare, history
from catode.train import Config

RECORDS = Path(cifar.__file__).parent / "records"
SHORT: dict[str, Any] = {"dataset": "digits", "epochs": 30, "memory": 200, "threads": 1}
SEEDS = (0, 1, 2)
DECIDED = 0.5
"""Least share of the structures that a rule decided in a record whose paths and widths are drawn."""

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "pruned": {"pruned": {}},
    "dense": {"dense": {"nu": 0.0}},
    "narrow": {"narrow": {"nu": 0.0, "hidden_scale": 0.38}},
    "shadow": {"shadow": {"shadow": True}},
    "priors": {f"prior-{name}": {"prior": name, "tol": 0.01, "initial_keep_prob": 0.9} for name in PRIORS},
    "fixed": {"fixed-0.5": {"tol": 0.5}},
    "knobs": {
        **{f"nu-{nu:g}": {"nu": nu} for nu in (1.0, 9.0)},
        **{f"alpha-{alpha:g}": {"alpha": alpha} for alpha in (0.0, 1.0)},
        "beta-1": {"beta": 1.0},
    },
}
"""Settings of the runs by group and name; each is trained from every seed of `seeds`."""


def seeds(group: str) -> tuple[int, ...]:
    """Seeds of a group's runs; the rival priors are trained from the first alone, to save time."""
    return SEEDS[:1] if group == "priors" else SEEDS


def plan(folder: Path, groups: Iterable[str]) -> dict[Path, Config]:
    """The runs of some groups, by their folders.

    Args:
        folder: Where the runs are.
        groups: Keys of `GROUPS`.
    """
    found = {}
    for group in groups:
        for name, changed in GROUPS[group].items():
            for seed in seeds(group):
                out = folder / f"digits-{name}-s{seed}"
                found[out] = Config.from_presets(**{**SHORT, **changed, "seed": seed, "out": str(out)})
    return found


def train(folder: Path, groups: Iterable[str], *, processes: int = 2) -> None:
    """Train missing runs and resume interrupted ones.

    Args:
        folder: Where the runs are.
        groups: Keys of `GROUPS`.
        processes: Runs at a time, one thread each.

    Raises:
        ValueError: if a folder holds another run than the planned one.
    """
    pool.train(plan(folder, groups).values(), processes=processes)


class Data:
    """Runs and records for the figures; files are read on first use.

    Args:
        runs: Folder of the runs on the digits.
        records: Folder of the committed records.
    """

    def __init__(self, runs: Path, records: Path = RECORDS):
        self.runs = Path(runs)
        self.records_folder = Path(records)
        self._read: dict[tuple[Callable, Path], Any] = {}

    def folders(self, name: str) -> list[Path]:
        """Folders of the finished digits runs of one name, such as "fixed-0.5", in the order of their seeds."""
        return [self.runs / f"digits-{name}-s{seed}" for seed in SEEDS if self._finished(name, seed)]

    def _finished(self, name: str, seed: int) -> bool:
        return (self.runs / f"digits-{name}-s{seed}" / "result.json").exists()

    def reports(self, name: str) -> list[history.Run]:
        """Digits runs with their paths over time."""
        return [self._once(history.read, folder) for folder in self.folders(name)]

    def by_prior(self) -> dict[str, list[history.Run]]:
        """Runs by the prior that they were trained under."""
        return {name: found for name in PRIORS if (found := self.reports(f"prior-{name}"))}

    def results(self, name: str) -> list[cifar.Record]:
        """Digits runs with their last rows alone."""
        return [self._once(cifar.read, folder) for folder in self.folders(name)]

    def shadows(self) -> dict[str, list[compare.Run]]:
        """Shadow runs that may be counted together, by what they share: those on the digits trained here, and records.

        Data sets are called by the names of their copies.
        """
        return compare.groups(self._shadows)

    def own_shadows(self) -> list[compare.Run]:
        """Shadow runs on the digits that are trained here."""
        own = self.folders("shadow")
        return [run for run in self._shadows if run.folder in own]

    @cached_property
    def _shadows(self) -> list[compare.Run]:
        packed = sorted(path.parent for path in (self.records_folder / "shadow").glob("*/result.json"))
        runs = compare.read_all([*self.folders("shadow"), *packed])
        names = [copies.name_of(run.config, read_json(run.folder / "env.json")) for run in runs]
        named = zip(runs, names, strict=True)
        return [dataclasses.replace(run, config=run.config | {"dataset": name}) for run, name in named]

    @cached_property
    def records(self) -> list[cifar.Record]:
        """The committed records."""
        return [self._once(cifar.read, folder) for folder in self._record_folders()]

    def record_reports(self) -> list[history.Run]:
        """The committed records of pruned runs with their paths over time, of which a rule decided at least half."""
        return [
            self._once(history.read, folder)
            for folder, one in zip(self._record_folders(), self.records, strict=True)
            if one.kind == "pruned" and one.result["decided_by_rule"] >= DECIDED
        ]

    def _record_folders(self) -> list[Path]:
        return sorted(path.parent for path in self.records_folder.glob("*/result.json"))

    def _once(self, read: Callable[[Path], Any], folder: Path) -> Any:
        key = read, folder
        if key not in self._read:
            self._read[key] = read(folder)
        return self._read[key]
