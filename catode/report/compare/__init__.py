"""Comparison of the pruning decisions of one or many runs with their outcomes.

    python -m catode.report.compare FOLDER [FOLDER ...] [--out FOLDER]

For shadow runs (``--shadow``) it reports, for each rule, the number of regrets and how early the decisions were, the
predicted and observed probability of an escape, and which assumptions held after the decisions. For all runs it lists
accuracy and size. Shadow runs of different data sets, networks, numbers of epochs or stated risks are reported separately.

Source: docs/conventions.md, "A run's folder" (regret); docs/mathematics.md sections 5 and 6.
"""

from catode.report.compare.command import main
from catode.report.compare.pictures import draw, picture
from catode.report.compare.runs import ASSUMED, Decision, Run, groups, read, read_all
from catode.report.compare.scores import BINS, BY_SIZE, CONFIDENCE, Score, assumptions, calibration, interval, rules
from catode.report.compare.tables import rules_by_run, rules_table, text

__all__ = [
    "ASSUMED",
    "BINS",
    "BY_SIZE",
    "CONFIDENCE",
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
    "rules_by_run",
    "rules_table",
    "text",
]
