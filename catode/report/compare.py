"""Theory against practice: what became of every decision, over one or many runs.

    python -m catode.report.compare FOLDER [FOLDER ...] [--out FOLDER]

Of shadow runs (``--shadow``) it tells, rule by rule, how many decisions were regretted and how early they came, how often
the predicted probability of an escape came true, and which assumptions held after the decisions. Of all runs it
lists accuracy and size. Shadow runs of different data sets, networks, numbers of epochs or stated risks are told apart.

Source: CONTRACT, "A run's folder" (regret); THEORY sections 5 and 6.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catode import _validate
from catode.decisions import shadow
from catode.records import PLACE, number, packed, read_json, read_rows, structure_key
from catode.report.report import markdown_table
from catode.theory.plotting.plotting import PALETTE, house_style, legend_below, new_figure
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = [
    "Decision",
    "Run",
    "Score",
    "assumptions",
    "calibration",
    "draw",
    "groups",
    "interval",
    "main",
    "picture",
    "read",
    "read_all",
    "rules",
    "rules_table",
    "text",
]

BINS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)  # of the predicted probability of an escape
BY_SIZE = (shadow.FILTER, shadow.SCALE)  # decide without looking at theta, so that a return to 1 says nothing
ASSUMED = ("gain", "drift", "noise")  # bounds taken at a decision, to hold from then on
CONFIDENCE = 0.95
_MEASURED = (*ASSUMED, "benefit_upper", "price")
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
        outcome: One of `catode.decisions.shadow.OUTCOMES`.
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


@dataclass(frozen=True)
class Score:
    """How a rule did.

    Attributes:
        decisions: Number of structures that met its condition with theta above 0.
        confirmed: Of these, theta reached 0 before it came back to 1.
        regrets: It came back to 1 first.
        open: Neither until the end, or until the site or block went.
        low: Lower end of the interval of the regret rate, of the regrets alone.
        high: Its upper end, where all that is open counts as a regret.
        precision: Share of the decisions whose theta reached 0 in the end, those that went with site or block left out.
        recall: Share of all structures whose theta reached 0 that were decided before.
        leads: Steps from each confirmed decision to theta = 0. By a rule by size, which does not look at theta, every
            decision whose theta reached 0 in the end counts.
        checks: Number of different checks, of a run each, at which the decisions were taken.
        regretted: Number of runs with at least one regret.
    """

    decisions: int
    confirmed: int
    regrets: int
    open: int
    low: float
    high: float
    precision: float
    recall: float
    leads: NDArray[np.int64]
    checks: int
    regretted: int


def read(folder: Path, place: int = 0) -> Run:
    """A run's files, compressed or not.

    Args:
        folder: A finished run, or the condensed record of one.
        place: The run's number among those compared.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one cannot be read, or holds what no run writes; the message names the file.
    """
    config = read_json(folder / "config.json", _CONFIG, dict(tol=float, shadow=bool))
    result = read_json(folder / "result.json", _RESULT, dict(decided_by_rule=float))
    path = folder / "structures.csv"
    rows = read_rows(path, ("step", *PLACE, *_MEASURED))
    for row in rows:
        for name in ("step", *_MEASURED):
            number(path, name, row[name])
    found = []
    if config.get("shadow"):
        path = folder / shadow.FILE
        found = [_decision(packed(path), row, place) for row in read_rows(path, ("rule", *PLACE, "step", *_OUTCOME))]
    return Run(folder, config, result, found, rows)


_OUTCOME = (*shadow.NUMBERS, "outcome", "outcome_step")


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


def interval(events: int, trials: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a probability, two-sided, 95 %; (0, 1) without trials.

    Args:
        events: How often it happened.
        trials: Of how many, independent of each other.
    """
    from scipy.stats import beta

    tail = (1.0 - CONFIDENCE) / 2.0
    low = float(beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(beta.ppf(1.0 - tail, events + 1, trials - events)) if events < trials else 1.0
    return low, high


def rules(runs: Sequence[Run], kind: str | None = None) -> dict[str, Score]:
    """How every rule did over all runs, in the order of `catode.decisions.shadow.RULES`.

    Args:
        runs: Shadow runs.
        kind: Count "layer" or "unit" alone; None for both together.
    """
    counted = [d for run in runs for d in run.decisions if kind in (None, d.structure[0])]
    zero = {(d.run, d.structure): d.step for d in counted if d.rule == shadow.ZERO}
    found = {}
    for rule in shadow.RULES[:-1]:
        own = [d for d in counted if d.rule == rule]
        confirmed, regrets = (sum(d.outcome == o for d in own) for o in (shadow.CONFIRMED, shadow.REGRET))
        left = len(own) - confirmed - regrets
        gone = [d for d in own if zero.get((d.run, d.structure), -1) >= d.step]
        led = gone if rule in BY_SIZE else [d for d in gone if d.outcome == shadow.CONFIRMED]
        judged = len(own) - sum(d.outcome == shadow.PROMOTED for d in own)
        found[rule] = Score(
            decisions=len(own),
            confirmed=confirmed,
            regrets=regrets,
            open=left,
            low=interval(regrets, len(own))[0],
            high=interval(regrets + left, len(own))[1],
            precision=len(gone) / judged if judged else float("nan"),
            recall=len(gone) / len(zero) if zero else float("nan"),
            leads=np.array([zero[d.run, d.structure] - d.step for d in led], dtype=np.int64),
            checks=len({(d.run, d.step) for d in own}),
            regretted=len({d.run for d in own if d.outcome == shadow.REGRET}),
        )
    return found


def calibration(runs: Sequence[Run]) -> list[tuple[float, float, float, int, int, int]]:
    """Predicted against observed escapes in bins of the prediction.

    Of the decisions of all rules that look at theta, a bin takes each structure's first whose prediction lies in it, so that
    within a bin every structure of a run counts once. A structure may be in several bins.

    Returns:
        Lower and upper end of each bin that has decisions, its mean prediction, structures, regrets and those left open.
    """
    looks = set(shadow.RULES) - {shadow.ZERO, *BY_SIZE}
    own = [d for run in runs for d in run.decisions if d.rule in looks and np.isfinite(d.numbers["escape"])]
    own.sort(key=lambda d: d.step)
    found = []
    for low, high in pairwise(BINS):
        first: dict[tuple, Decision] = {}
        for d in own:
            if low <= d.numbers["escape"] < high or (high == 1.0 == d.numbers["escape"]):
                first.setdefault((d.run, d.structure), d)
        if first:
            regrets = sum(d.outcome == shadow.REGRET for d in first.values())
            left = sum(d.outcome in (shadow.OPEN, shadow.PROMOTED) for d in first.values())
            mean = float(np.mean([d.numbers["escape"] for d in first.values()]))
            found.append((low, high, mean, len(first), regrets, left))
    return found


def assumptions(runs: Sequence[Run]) -> dict[str, tuple[int, int, int, float]]:
    """Which bounds taken at the derived decisions were exceeded before the observation ended.

    Returns:
        By bound: decisions that were seen at a later check, those that exceeded it, regrets among these, and the median
        of the largest excess (measured over bound) of those that did. `benefit` is whether its upper limit
        came to the price.
    """
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in (*ASSUMED, "benefit")}
    for run in runs:
        traces: dict[tuple, list[dict[str, str]]] = {}
        for row in run.rows:
            traces.setdefault(structure_key(row), []).append(row)
        for d in run.decisions:
            if d.rule != shadow.DERIVED:
                continue
            end = d.outcome_step or sys.maxsize
            rows = [row for row in traces.get(d.structure, []) if d.step <= float(row["step"]) <= end]
            if len(rows) < 2 or float(rows[0]["step"]) != d.step:
                continue
            regret = d.outcome == shadow.REGRET
            path = run.folder / "structures.csv"
            values = {name: np.array([number(path, name, row[name]) for row in rows]) for name in _MEASURED}
            for name in ASSUMED:
                bound, later = values[name][0], np.fmax.reduce(values[name][1:])
                found[name].append((later / bound if bound > 0 else (np.inf if later > 0 else 0.0), regret))
            found["benefit"].append((np.fmax.reduce(values["benefit_upper"][1:] / values["price"][1:]), regret))
    return {
        name: (
            len(pairs),
            int(sum(x > 1.0 for x, _ in pairs)),
            sum(regret for x, regret in pairs if x > 1.0),
            float(np.median([x for x, _ in pairs if x > 1.0])) if any(x > 1.0 for x, _ in pairs) else float("nan"),
        )
        for name, pairs in found.items()
    }


# --- text and picture -----------------------------------------------------------------------------------------------


def text(runs: Sequence[Run]) -> str:
    """All tables, as Markdown."""
    parts = ["# Runs", _runs_table(runs)]
    watched = groups(runs)
    if not watched:
        parts.append("None of them is a shadow run (--shadow): there is nothing to say about regrets.")
        return "\n\n".join(parts) + "\n"
    count = sum(len(own) for own in watched.values())
    stated = ", ".join(f"{risk:g}" for risk in sorted({run.config["risk"] for own in watched.values() for run in own}))
    parts += [
        f"# Decisions and what became of them ({count} shadow run{'s' if count > 1 else ''}, stated risk {stated})",
        "A regret: theta came back to 1 before it first reached 0. The interval is Clopper-Pearson's at 95 %; its upper end "
        "counts everything left open (undecided, or gone with its site or block) as a regret. It takes decisions as "
        "independent; those of one run, and more so those of one check, are not. Precision: theta reached 0 in the end. "
        "Recall: of all thetas that reached 0, decided before. Lead: steps from a confirmed decision to theta = 0. Rules by "
        "size take as many units as `derived` at the same check, whatever their theta; a return to 1 says nothing about "
        "them, and their lead is that of all whose theta reached 0.",
        *_by_group(watched, lambda own: f"{rules_table(own)}\n\n{_derived(own)}"),
        "# Predicted and observed escapes",
        "Decisions of all rules that look at theta, by the bound on the probability of an escape that the theory gave at that "
        "moment. Within a bin every structure of a run counts once, by its first decision there; it may be in several "
        "bins, so the rows are not independent of each other.",
        *_by_group(watched, _calibration_table),
        "# What was assumed at the decision, and what was measured afterwards",
        "Upper limits at the decision against the largest value at a later check, up to the end of the observation. "
        "Later values are measured with noise and have their own margin, so an excess does not prove a violation. Nor does a "
        "regret: the claim is about its probability.",
        *_by_group(watched, _assumptions_table),
    ]
    return "\n\n".join(parts) + "\n"


def _by_group(watched: dict[str, list[Run]], tell: Callable[[Sequence[Run]], str]) -> list[str]:
    """What is told of each group, under a heading where there are several."""
    return [f"## {name}\n\n{tell(own)}" if len(watched) > 1 else tell(own) for name, own in watched.items()]


def _derived(runs: Sequence[Run]) -> str:
    """How the decisions of the derived rule are spread over kinds, checks and runs."""
    score = rules(runs)[shadow.DERIVED]
    kinds = []
    for kind in ("unit", "layer"):
        own = rules(runs, kind)[shadow.DERIVED]
        kinds.append(
            f"{own.decisions} on {kind}s with {own.regrets} regrets ({100 * own.low:.1f} to {100 * own.high:.1f} %)"
            if own.decisions
            else f"none on {kind}s"
        )
    return (
        f"`derived`: {score.decisions} decisions, {' and '.join(kinds)}, taken at {score.checks} different checks; a regret in "
        f"{score.regretted} of {len(runs)} runs. Run by run: {'; '.join(rules_by_run(runs))}."
    )


def rules_by_run(runs: Sequence[Run]) -> list[str]:
    """Regrets, open ones and decisions of the derived rule in each run, as text."""
    found = []
    for run in runs:
        score = rules([run])[shadow.DERIVED]
        found.append(f"{run.folder.name} {score.regrets} regrets and {score.open} open of {score.decisions}")
    return found


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f} %"


def _runs_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        c, r = run.config, run.result
        kind = "ungated" if c["nu"] == 0 else f"tol {c['tol']:g}" if c.get("tol") is not None else f"risk {c['risk']:g}"
        rows.append(
            [
                run.folder.name,
                f"{c['arch']}, {c['dataset']}",
                kind + (", shadow" if run.shadow else ""),
                f"{c['nu']:g}/{c['alpha']:g}/{c['beta']:g}",
                str(c["seed"]),
                f"{100 * r['accuracy']:.2f} %",
                _share(r["macs"] / r["macs_dense"]),
                f"{r['layers_kept']} of {r['layers_total']}",
                f"{r['units_kept']} of {r['units_total']}",
                _share(float("nan") if r.get("decided_by_rule") is None else r["decided_by_rule"]),
            ]
        )
    header = ["run", "network", "decided by", "nu/alpha/beta", "seed", "accuracy", "MACs", "layers", "units"]
    return markdown_table([*header, "by rule"], rows)


def rules_table(runs: Sequence[Run]) -> str:
    """How every rule did over all runs, as Markdown."""
    rows = []
    for rule, s in rules(runs).items():
        lead = [f"{v:.0f}" for v in np.quantile(s.leads, (0.25, 0.5, 0.75))] if len(s.leads) else []
        passages = [str(s.confirmed), str(s.regrets), str(s.open), f"{100 * s.low:.1f} to {100 * s.high:.1f} %"]
        rows.append(
            [
                rule,
                str(s.decisions),
                *([""] * 4 if rule in BY_SIZE or not s.decisions else passages),
                _share(s.precision),
                _share(s.recall),
                f"{lead[1]} ({lead[0]} to {lead[2]})" if lead else "",
            ]
        )
    header = ["rule", "decisions", "confirmed", "regrets", "open", "regret rate", "precision", "recall"]
    return markdown_table([*header, "lead, steps: median (quartiles)"], rows)


def _calibration_table(runs: Sequence[Run]) -> str:
    rows = []
    for low, high, mean, count, regrets, left in calibration(runs):
        span = interval(regrets, count)[0], interval(regrets + left, count)[1]
        rows.append(
            [
                f"{low:g} to {high:g}",
                f"{mean:.3f}",
                str(count),
                str(regrets),
                str(left),
                _share(regrets / count),
                f"{100 * span[0]:.1f} to {100 * span[1]:.1f} %",
            ]
        )
    return markdown_table(["bound", "mean bound", "structures", "regrets", "open", "observed", "interval"], rows)


def _assumptions_table(runs: Sequence[Run]) -> str:
    names = {"gain": "gain q", "drift": "drift", "noise": "noise of theta", "benefit": "benefit below the price"}
    rows = [
        [names[name], str(n), str(more), str(regrets), "" if np.isnan(excess) else f"{excess:.2f}"]
        for name, (n, more, regrets, excess) in assumptions(runs).items()
    ]
    return markdown_table(["bound", "decisions seen later", "exceeded", "regrets among these", "median excess"], rows)


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draw regret rates, the reliability diagram and the leads into a file, a row for each of the `groups`.

    Args:
        runs: Shadow runs, and others that are passed over.
        path: A file that matplotlib can write.

    Raises:
        ValueError: if none of the runs is a shadow run.
    """
    watched = groups(runs)
    figure = new_figure(14.0, 5.2 * max(1, len(watched)))
    if len(watched) <= 1:
        draw(figure, runs)
    else:
        for part, (name, own) in zip(figure.subfigures(len(watched), 1), watched.items(), strict=True):
            draw(part, own)
            part.suptitle(name)
    figure.savefig(path)


def draw(figure: FigureBase, runs: Sequence[Run]) -> None:
    """The same for a single group, into an empty figure or part of one, three times as wide as high.

    Raises:
        ValueError: if none of the runs is a shadow run, or they are of several groups.
    """
    watched = groups(runs)
    if not watched:
        raise ValueError("`runs` must hold a shadow run; got none. Train with --shadow.")
    if len(watched) > 1:
        raise ValueError(f"`runs` must be of one group; got {'; '.join(watched)}. Draw each group by itself.")
    (runs,) = watched.values()
    scores = {rule: s for rule, s in rules(runs).items() if rule not in BY_SIZE and s.decisions}
    with house_style():
        axes = figure.subplots(1, 3, width_ratios=(1.0, 1.1, 1.1))
        _draw_regrets(axes[0], scores, runs[0].config["risk"])
        _draw_reliability(axes[1], calibration(runs))
        _draw_leads(axes[2], scores)


def _draw_regrets(ax: Axes, scores: dict[str, Score], risk: float) -> None:
    for place, (rule, s) in enumerate(scores.items()):
        derived = rule.startswith(shadow.DERIVED)
        color = PALETTE["blue"] if derived else PALETTE["vermillion"]
        ax.plot([s.low, s.high], [place] * 2, color=color, linewidth=2)
        ax.plot(
            s.regrets / s.decisions, place, "o" if derived else "D", color=color, markersize=5, clip_on=False, zorder=3
        )
        if derived:
            stated = float(rule.partition("@")[2] or risk)
            ax.plot(stated, place, "|", color=PALETTE["black"], markersize=14, markeredgewidth=1.6)
    names = {rule: rule.replace("@", ", risk ") for rule in scores}
    names |= {shadow.DERIVED: f"derived, risk {risk:g} (the run's)"}
    ax.set_yticks(range(len(scores)), [f"{names[rule]}  (n={s.decisions})" for rule, s in scores.items()])
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    ax.set_xlim(0.0, 1.02 * max([0.5, *(s.high for s in scores.values())]))
    ax.set_xlabel("regret rate, 95 % interval")
    ax.set_title("Regrets by rule")
    ax.plot([], [], "|", color=PALETTE["black"], markersize=12, markeredgewidth=1.6, label="stated risk")
    legend_below(ax)


def _draw_reliability(ax: Axes, bins: Sequence[tuple[float, float, float, int, int, int]]) -> None:
    floor = 1e-3
    ax.plot([floor, 1], [floor, 1], color=PALETTE["grey"], linestyle="--", label="bound met exactly")
    for place, (low, high, mean, count, regrets, left) in enumerate(bins):
        mean, span = max(mean, floor), (interval(regrets, count)[0], interval(regrets + left, count)[1])
        ax.plot([max(low, floor), high], [span[1]] * 2, color=PALETTE["sky"], linewidth=3, solid_capstyle="butt")
        ax.plot([mean] * 2, [max(span[0], floor), span[1]], color=PALETTE["blue"], linewidth=1.6)
        look = ("o", regrets / count) if regrets else ("v", floor)
        ax.plot(mean, look[1], look[0], color=PALETTE["blue"], clip_on=False, zorder=3)
        middle = (max(low, floor) * high) ** 0.5
        note = ax.annotate(
            f"{regrets}/{count}", (middle, span[1]), (0, 4 + 12 * (place % 2)), textcoords="offset points", ha="center"
        )
        note.set(fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.8})
    ax.plot([], [], color=PALETTE["sky"], linewidth=3, label="upper end, open counted")
    ax.plot([], [], "o", color=PALETTE["blue"], label="observed (▾ none)")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(floor, 1.05)
    ax.set_ylim(floor, 1.6)
    ax.set_xlabel("predicted bound on the probability of an escape")
    ax.set_ylabel("share of regrets")
    ax.set_title("Reliability (regrets / structures)")
    legend_below(ax)


def _draw_leads(ax: Axes, scores: dict[str, Score]) -> None:
    styles = {shadow.DERIVED: (PALETTE["blue"], "-")}
    marks = ((PALETTE["vermillion"], ":"), (PALETTE["orange"], "--"), (PALETTE["purple"], "-."))
    styles |= {f"fixed {t:g}": mark for t, mark in zip(shadow.FIXED, marks, strict=True)}
    for rule, (color, line) in styles.items():
        leads = np.sort(scores[rule].leads) if rule in scores else []
        if len(leads):
            x, y = np.maximum(leads, 1), np.arange(1, len(leads) + 1) / len(leads)
            label = f"{rule}: median {np.median(leads):.0f}"
            ax.step(np.r_[x[0], x], np.r_[0.0, y], color=color, linestyle=line, where="post", label=label)
    ax.set_xscale("log")
    ax.set_ylim(0.0, 1.02)
    ax.set_xlabel("steps from decision to θ = 0")
    ax.set_ylabel("share of confirmed decisions")
    ax.set_title("How early the rules decide")
    legend_below(ax)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(prog="python -m catode.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a finished run, or a record of one")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for compare.md, which is printed too, and, of shadow runs (catode.train --shadow), compare.png",
    )
    try:
        args = parser.parse_args(argv)
        if args.out is not None and args.out.exists() and not args.out.is_dir():
            _validate.fail("out", "be a folder", str(args.out), hint="Choose another --out.")
        runs = read_all(args.folders)
        told = text(runs)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "compare.md").write_text(told, encoding="utf-8")
            if groups(runs):
                picture(runs, args.out / "compare.png")
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(told, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
