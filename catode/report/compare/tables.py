"""The tables of a comparison, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from catode.decisions import shadow
from catode.report.compare.runs import Run, groups
from catode.report.compare.scores import BY_SIZE, assumptions, calibration, interval, rules
from catode.report.report import markdown_table


def text(runs: Sequence[Run]) -> str:
    """All tables, as Markdown."""
    parts = ["# Runs", _runs_table(runs)]
    watched = groups(runs)
    if not watched:
        parts.append("None of them is a shadow run (--shadow), so regrets are not known.")
        return "\n\n".join(parts) + "\n"
    count = sum(len(own) for own in watched.values())
    every = [run.config for own in watched.values() for run in own]
    stated = ", ".join(f"{risk:g}" for risk in sorted({c["risk"] for c in every if c.get("tol") is None}))
    fixed = ", ".join(f"{tol:g}" for tol in sorted({c["tol"] for c in every if c.get("tol") is not None}))
    rule = " and ".join([f"stated risk {stated}"] * bool(stated) + [f"fixed tolerance {fixed}"] * bool(fixed))
    parts += [
        f"# Decisions and their outcomes ({count} shadow run{'s' if count > 1 else ''}, {rule})",
        "A regret: theta returned to 1 before it first reached 0. The interval is Clopper-Pearson's at 95 %; its upper end "
        "counts every open decision (undecided, or removed with its site or block) as a regret. It assumes independent "
        "decisions; those of one run, and more so those of one check, are not. Precision: share whose theta reached 0 in the "
        "end. Recall: share of all thetas that reached 0 that were decided before. Lead: steps from a confirmed decision to "
        "theta = 0. Rules by size select as many units as `derived` at the same check, whatever their theta; regrets are not "
        "defined for them, and their lead is that of all whose theta reached 0."
        f"{' In runs with a fixed tolerance `derived` is that rule.' if fixed else ''}",
        *_by_group(watched, lambda own: f"{rules_table(own)}\n\n{_derived(own)}"),
        "# Predicted and observed escapes",
        "Decisions of all rules that use theta, by the theory's bound on the probability of an escape at the decision. Within a "
        "bin every structure of a run counts once, by its first decision there; it may be in several bins, so the rows are "
        "not independent.",
        *_by_group(watched, _calibration_table),
        "# Upper limits assumed at the decision, and later measurements",
        "Upper limits at the decision, compared with the largest value at a later check up to the outcome. Later values are "
        "noisy and have their own margin, so an excess does not prove a violation. Neither does a regret: the claim is about "
        "its probability.",
        *_by_group(watched, _assumptions_table),
    ]
    return "\n\n".join(parts) + "\n"


def _by_group(watched: dict[str, list[Run]], section: Callable[[Sequence[Run]], str]) -> list[str]:
    """The section of each group, under a heading if there are several."""
    return [f"## {name}\n\n{section(own)}" if len(watched) > 1 else section(own) for name, own in watched.items()]


def _derived(runs: Sequence[Run]) -> str:
    """Numbers of decisions and regrets of the derived rule by kind, check and run."""
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
    """Regrets, open decisions and decisions of the derived rule in each run, as text."""
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
                f"{100 * r['test_accuracy']:.2f} %",
                _share(r["macs"] / r["macs_dense"]),
                f"{r['layers_kept']} of {r['layers_total']}",
                f"{r['units_kept']} of {r['units_total']}",
                _share(float("nan") if r.get("decided_by_rule") is None else r["decided_by_rule"]),
            ]
        )
    header = ["run", "network", "decided by", "nu/alpha/beta", "seed", "test accuracy", "MACs", "layers", "units"]
    return markdown_table([*header, "by rule"], rows)


def rules_table(runs: Sequence[Run]) -> str:
    """Score of every rule over all runs, as Markdown."""
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
