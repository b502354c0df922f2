"""Theory against practice: what became of every decision, over one or many runs.

    python -m catode.train.compare FOLDER [FOLDER ...] [--out FOLDER]

Of shadow runs (``--shadow``) it tells, rule by rule, how many decisions were regretted and how early they came, how often
the predicted probability of an escape came true, and which assumptions held after the decisions. Of all runs it
lists accuracy and size.

Source: CONTRACT, "A run's folder" (regret); THEORY sections 5 and 6.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catode.theory.plotting import PALETTE, house_style, new_figure
from catode.train import shadow
from catode.train.config import CommandLine
from catode.train.report import markdown_table, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = ["Decision", "Run", "calibration", "draw", "interval", "main", "picture", "read", "rules", "rules_table"]

BINS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)  # of the predicted probability of an escape
BY_SIZE = (shadow.FILTER, shadow.SCALE)  # decide without looking at theta, so that a return to 1 says nothing
ASSUMED = ("gain", "drift", "noise")  # bounds taken at a decision, to hold from then on
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Decision:
    """One line of shadow.csv: a structure that met a rule's condition, and what became of it.

    Attributes:
        run: Number of its run.
        rule: One of `catode.train.shadow.RULES`.
        structure: kind, block, site and index.
        step: Training step of the decision.
        numbers: keep_prob, benefit, escape and so on at the decision, by name.
        outcome: One of `catode.train.shadow.OUTCOMES`.
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
        rows: Lines of structures.csv.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    decisions: list[Decision]
    rows: list[dict[str, str]]


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
        leads: Steps from each such decision to theta = 0.
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


def read(folder: Path, number: int = 0) -> Run:
    """A run's files, compressed or not.

    Args:
        folder: A finished run, or the condensed record of one.
        number: The run's number among those compared.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one cannot be read.
    """
    found = []
    for row in _rows(folder / shadow.FILE, optional=True):
        try:
            found.append(
                Decision(
                    run=number,
                    rule=row["rule"],
                    structure=_structure(row),
                    step=int(row["step"]),
                    numbers={name: float(row[name]) for name in shadow.NUMBERS},
                    outcome=row["outcome"],
                    outcome_step=int(row["outcome_step"]) if row["outcome_step"] else None,
                )
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{folder / shadow.FILE} must have a decision in every row; got {error}.") from None
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    return Run(folder, config, result, found, _rows(folder / "structures.csv"))


def _structure(row: dict[str, str]) -> tuple[str, str, str, str]:
    return row["kind"], row["block"], row["site"], row["index"]


def _rows(path: Path, optional: bool = False) -> list[dict[str, str]]:
    packed = path.with_name(path.name + ".gz")
    if packed.exists():
        return list(csv.DictReader(io.StringIO(gzip.decompress(packed.read_bytes()).decode())))
    if not path.exists():
        if optional:
            return []
        raise FileNotFoundError(
            f"`folder` must hold {path.name}, as a finished run's does; got {path.parent} without it."
        )
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def interval(events: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper-Pearson interval of a probability, two-sided; (0, 1) without trials.

    Args:
        events: How often it happened.
        trials: Of how many.
        confidence: Coverage, in (0, 1).
    """
    from scipy.stats import beta

    tail = (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(beta.ppf(1.0 - tail, events + 1, trials - events)) if events < trials else 1.0
    return low, high


def rules(runs: Sequence[Run]) -> dict[str, Score]:
    """How every rule did over all runs, in the order of `catode.train.shadow.RULES`."""
    zero = {(d.run, d.structure): d.step for run in runs for d in run.decisions if d.rule == shadow.ZERO}
    found = {}
    for rule in shadow.RULES[:-1]:
        own = [d for run in runs for d in run.decisions if d.rule == rule]
        confirmed, regrets = (sum(d.outcome == o for d in own) for o in (shadow.CONFIRMED, shadow.REGRET))
        left = len(own) - confirmed - regrets
        gone = [d for d in own if zero.get((d.run, d.structure), -1) >= d.step]
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
            leads=np.array([zero[d.run, d.structure] - d.step for d in gone], dtype=np.int64),
        )
    return found


def calibration(runs: Sequence[Run]) -> list[tuple[float, float, float, int, int, int]]:
    """Predicted against observed escapes in bins of the prediction.

    Every decision of a rule that looks at theta counts once for its structure and step, whichever rules took it.

    Returns:
        Lower and upper end of each bin that has decisions, its mean prediction, decisions, regrets and those left open.
    """
    looks = set(shadow.RULES) - {shadow.ZERO, *BY_SIZE}
    once = {
        (d.run, d.structure, d.step): d
        for run in runs
        for d in run.decisions
        if d.rule in looks and np.isfinite(d.numbers["escape"])
    }
    found = []
    for low, high in pairwise(BINS):
        own = [d for d in once.values() if low <= d.numbers["escape"] < high or (high == 1.0 == d.numbers["escape"])]
        if own:
            regrets = sum(d.outcome == shadow.REGRET for d in own)
            left = sum(d.outcome in (shadow.OPEN, shadow.PROMOTED) for d in own)
            found.append((low, high, float(np.mean([d.numbers["escape"] for d in own])), len(own), regrets, left))
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
            traces.setdefault(_structure(row), []).append(row)
        for d in run.decisions:
            if d.rule != shadow.DERIVED:
                continue
            end = d.outcome_step or sys.maxsize
            rows = [row for row in traces.get(d.structure, []) if d.step <= int(row["step"]) <= end]
            if len(rows) < 2 or int(rows[0]["step"]) != d.step:
                continue
            regret = d.outcome == shadow.REGRET
            for name in ASSUMED:
                bound, later = float(rows[0][name]), max(float(row[name]) for row in rows[1:])
                found[name].append((later / bound if bound > 0 else (np.inf if later > 0 else 0.0), regret))
            worth = max(float(row["benefit_upper"]) / float(row["price"]) for row in rows[1:])
            found["benefit"].append((worth, regret))
    return {
        name: (
            len(pairs),
            sum(x > 1.0 for x, _ in pairs),
            sum(regret for x, regret in pairs if x > 1.0),
            float(np.median([x for x, _ in pairs if x > 1.0])) if any(x > 1.0 for x, _ in pairs) else float("nan"),
        )
        for name, pairs in found.items()
    }


# --- text and picture -----------------------------------------------------------------------------------------------


def text(runs: Sequence[Run]) -> str:
    """All tables, as Markdown."""
    parts = ["# Runs", _runs_table(runs)]
    watched = [run for run in runs if run.decisions]
    if not watched:
        return (
            "\n\n".join([*parts, "None of them is a shadow run (--shadow): there is nothing to say about regrets."])
            + "\n"
        )
    risks = sorted({run.config["risk"] for run in watched})
    stated = ", ".join(f"{risk:g}" for risk in risks)
    parts += [
        f"# Decisions and what became of them ({len(watched)} shadow runs, stated risk {stated})",
        "A regret: theta came back to 1 before it first reached 0. The interval is Clopper-Pearson's at 95 %; its upper end "
        "counts everything left open (undecided, or gone with its site or block) as a regret. It takes decisions as "
        "independent; those of one run are not quite. Precision: theta reached 0 in the end. Recall: of all thetas that "
        "reached 0, decided before. Lead: steps from decision to theta = 0. Rules by size take as many units as "
        "`derived` at the same check, whatever their theta; a return to 1 says nothing about them.",
        rules_table(watched),
    ]
    per_run = rules_by_run(watched)
    parts += ["`derived`, run by run: " + "; ".join(per_run) + "."]
    parts += [
        "# Predicted and observed escapes",
        "All decisions of the rules that look at theta, each once, by the bound on the probability of an escape that the "
        "theory gave at that moment.",
        _calibration_table(watched),
        "# What was assumed at the decision, and what was measured afterwards",
        "Upper limits at the decision against the largest value at a later check, up to the end of the observation. "
        "Later values are measured with noise and have their own margin, so an excess does not prove a "
        "violation; a regret without one would.",
        _assumptions_table(watched),
    ]
    return "\n\n".join(parts) + "\n"


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
                kind + (", shadow" if run.decisions else ""),
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
    return markdown_table(["bound", "mean bound", "decisions", "regrets", "open", "observed", "interval"], rows)


def _assumptions_table(runs: Sequence[Run]) -> str:
    names = {"gain": "gain q", "drift": "drift", "noise": "noise of theta", "benefit": "benefit below the price"}
    rows = [
        [names[name], str(n), str(more), str(regrets), "" if np.isnan(excess) else f"{excess:.2f}"]
        for name, (n, more, regrets, excess) in assumptions(runs).items()
    ]
    return markdown_table(["bound", "decisions seen later", "exceeded", "regrets among these", "median excess"], rows)


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draw regret rates, the reliability diagram and the leads into a file.

    Args:
        runs: Shadow runs.
        path: A file that matplotlib can write.

    Raises:
        ValueError: if none of the runs is a shadow run.
    """
    figure = new_figure(14.0, 5.2)
    draw(figure, runs)
    figure.savefig(path)


def draw(figure: FigureBase, runs: Sequence[Run]) -> None:
    """The same into an empty figure or part of one, three times as wide as high.

    Raises:
        ValueError: if none of the runs is a shadow run.
    """
    runs = [run for run in runs if run.decisions]
    if not runs:
        raise ValueError("`runs` must hold a shadow run; got none. Train with --shadow.")
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
    _legend_below(ax)


def _draw_reliability(ax: Axes, bins: Sequence[tuple[float, float, float, int, int, int]]) -> None:
    floor = 1e-3
    ax.plot([floor, 1], [floor, 1], color=PALETTE["grey"], linestyle="--", label="bound met exactly")
    for low, high, mean, count, regrets, left in bins:
        mean, span = max(mean, floor), (interval(regrets, count)[0], interval(regrets + left, count)[1])
        ax.plot([max(low, floor), high], [span[1]] * 2, color=PALETTE["sky"], linewidth=3, solid_capstyle="butt")
        ax.plot([mean] * 2, [max(span[0], floor), span[1]], color=PALETTE["blue"], linewidth=1.6)
        look = ("o", regrets / count) if regrets else ("v", floor)
        ax.plot(mean, look[1], look[0], color=PALETTE["blue"], clip_on=False, zorder=3)
        middle = (max(low, floor) * high) ** 0.5
        note = ax.annotate(f"{regrets}/{count}", (middle, span[1]), (0, 4), textcoords="offset points", ha="center")
        note.set(fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    ax.plot([], [], color=PALETTE["sky"], linewidth=3, label="upper end, open counted")
    ax.plot([], [], "o", color=PALETTE["blue"], label="observed (▾ none)")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(floor, 1.05)
    ax.set_ylim(floor, 1.6)
    ax.set_xlabel("predicted bound on the probability of an escape")
    ax.set_ylabel("share of regrets")
    ax.set_title("Reliability (regrets / decisions)")
    _legend_below(ax)


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
    _legend_below(ax)


def _legend_below(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(prog="python -m catode.train.compare", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a finished run, or a record of one")
    parser.add_argument("--out", type=Path, help="folder for compare.md and, of shadow runs, compare.png")
    try:
        args = parser.parse_args(argv)
        runs = [read(folder, number) for number, folder in enumerate(args.folders)]
        told = text(runs)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "compare.md").write_text(told, encoding="utf-8")
            if any(run.decisions for run in runs):
                picture(runs, args.out / "compare.png")
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(told, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
