"""What became of the decisions of shadow runs: regrets rule by rule, calibration, and how early the rules decide."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import copies
from catode.decisions import shadow
from catode.records import read_json
from catode.report import compare
from catode.theory.plotting import new_figure
from paper_figures._common import Made, seeds_text
from paper_figures.runs import Data

NEEDS = ("shadow",)
HALF = f"fixed {max(shadow.FIXED):g}"  # the rule whose decisions are all thetas that sank to one half


def make(data: Data) -> Made:
    """Draw each data set's shadow runs in a row of their own."""
    groups = dict(sorted(data.shadows().items(), key=lambda item: -len(item[1])))
    figure = new_figure(14.0, 5.2 * len(groups))
    rows = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    told, tables = [], []
    for row, (name, runs) in zip(rows, groups.items(), strict=True):
        compare.draw(row, runs)
        if len(groups) > 1:
            row.suptitle(_readable(name, runs))
        scores = compare.rules(runs)
        score, half = scores[shadow.DERIVED], scores[HALF]
        name = _readable(name, runs)
        told.append(
            f"{name} ({seeds_text([run.config['seed'] for run in runs])}): of "
            f"{score.decisions} decisions by the derived tolerance, {score.confirmed} were confirmed, "
            f"{score.regrets} regretted and {score.open} left open, a regret rate of {100 * score.low:.1f} to "
            f"{100 * score.high:.1f} % at 95 % confidence with all that is open counted as regrets in the upper end, in runs "
            f"where hardly anything comes back: of all {half.decisions} θ that sank to one half {half.regrets} did"
        )
        tables.append(f"{name}:\n\n{compare.rules_table(runs)}")
    caption = (
        "Shadow runs decide but remove nothing before θ is 0, so that it can be seen what became of every decision. "
        "Left: share of decisions that were regretted, θ back at 1 before it first reached 0, with Clopper-Pearson "
        "intervals; the black mark is the stated risk. Middle: the bound on the probability of an escape that the "
        "theory gave at each decision, against the share that did escape; below the dashed line the bound holds, and "
        "a triangle at the lower edge stands for no escape at all. Few decisions cannot show a small rate: where a whisker "
        "passes its mark, or an upper end lies above the dashed line, there were too few to test the bound. Right: how "
        "many steps before θ = 0 the confirmed "
        "decisions came. " + "; ".join(told) + "."
    )
    return Made("Regrets and calibration", caption, figure, "\n\n".join(tables))


def _readable(name: str, runs: Sequence[compare.Run]) -> str:
    """The name of a group with its data set as captions call it."""
    config = runs[0].config
    return name.replace(config["dataset"], copies.name_of(config, read_json(runs[0].folder / "env.json")))
