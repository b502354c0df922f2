"""Fates of a structure: one name each, the same in code, files, tables and pictures.

Source: docs/conventions.md item 3.
"""

from __future__ import annotations

UNDECIDED = "undecided"
COMMITTED = "committed"
PRUNED_TOLERANCE = "pruned_tolerance"
PRUNED_ZERO = "pruned_zero"
REMOVED_WITH_BLOCK = "removed_with_block"
KEPT_OUT_OF_TIME = "kept_out_of_time"
REMOVED_OUT_OF_TIME = "removed_out_of_time"
KEPT_FOR_WIDTH = "kept_for_width"
KEPT_AT_TARGET = "kept_at_target"
KEPT_AS_LAST = "kept_as_last"
KEPT_AT_LEAST = "kept_at_least"

MEANINGS = {
    UNDECIDED: "not decided yet",
    COMMITTED: "certain to stay: gate fixed at 1",
    PRUNED_TOLERANCE: "removed by its tolerance",
    PRUNED_ZERO: "removed at theta = 0",
    REMOVED_WITH_BLOCK: "removed with its site or block",
    KEPT_OUT_OF_TIME: "undecided when time was out, theta at least 1/2: kept",
    REMOVED_OUT_OF_TIME: "undecided when time was out: removed",
    KEPT_FOR_WIDTH: "kept for a round width alone",
    KEPT_AT_TARGET: "kept since the target is met, theta below 0.9",
    KEPT_AS_LAST: "kept since nothing else would be left",
    KEPT_AT_LEAST: "kept since its width is at its least",
}
"""Meaning of every fate, in the order of tables and legends."""

FATES = tuple(MEANINGS)

COLORS = {
    UNDECIDED: "grey",
    COMMITTED: "blue",
    PRUNED_TOLERANCE: "vermillion",
    PRUNED_ZERO: "orange",
    REMOVED_WITH_BLOCK: "purple",
    KEPT_OUT_OF_TIME: "black",
    REMOVED_OUT_OF_TIME: "wine",
    KEPT_FOR_WIDTH: "sky",
    KEPT_AT_TARGET: "green",
    KEPT_AS_LAST: "indigo",
    KEPT_AT_LEAST: "yellow",
}
"""The colour of every fate in every picture, by its name in `catode.theory.plotting.PALETTE`; no two share one."""

NOT_BY_RULE = (KEPT_OUT_OF_TIME, REMOVED_OUT_OF_TIME, KEPT_FOR_WIDTH, KEPT_AT_TARGET, KEPT_AS_LAST, KEPT_AT_LEAST)
"""Fates that no measurement of the structure itself decided; always counted and reported separately."""

REMOVED = (PRUNED_TOLERANCE, PRUNED_ZERO, REMOVED_WITH_BLOCK, REMOVED_OUT_OF_TIME)
