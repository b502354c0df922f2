"""Theory against practice: what became of every decision, over one or many runs.

    python -m catode.report.compare FOLDER [FOLDER ...] [--out FOLDER]

Of shadow runs (``--shadow``) it tells, rule by rule, how many decisions were regretted and how early they came, how often
the predicted probability of an escape came true, and which assumptions held after the decisions. Of all runs it
lists accuracy and size. Shadow runs of different data sets, networks, numbers of epochs or stated risks are told apart.

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
