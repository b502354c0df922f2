"""Every row of the evidence as data: what is trained, with which seeds, in which order, and what it waits for.

`benchmarks/protocol.md` says what the rows are for and how they are judged. Nothing here may be changed once a run of the row
has started; a row that is wrong gets a successor of another name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from benchmarks.queue import derive
from benchmarks.queue.book import Book

CHOOSING = (100,)
"""Seeds with which anything is chosen; no row of a table uses them."""
DENSE, PRUNED, PREMATURE = "dense rows and rivals", "pruned rows", "premature pruning"
FAMILIES = (DENSE, PRUNED, PREMATURE)
"""Rows of one family are trained with one version of the package."""


@dataclass(frozen=True)
class Row:
    """One line of a table, or one setting of a choice: the same run from several seeds.

    Attributes:
        name: Its name; a run is called NAME-sSEED.
        told: The network, in words, as tables call it.
        table: Name of the table that shows it.
        family: One of `FAMILIES`.
        kind: How it is trained, a key of `benchmarks.queue.worker.KINDS`.
        seeds: Seeds of its runs.
        priority: Of each of its runs, the lowest first.
        common: Settings shared with other rows, such as the data set.
        settings: Its own settings: of `catode.train.Config`, or of its kind.
        derive: Further settings, from the records of finished runs.
        after: Names of the rows whose runs must all have ended before.
        needless: Why none of its runs need be made, from the records once those of `after` have ended; None if they must.
    """

    name: str
    told: str
    table: str
    family: str
    kind: str
    seeds: tuple[int, ...]
    priority: tuple[int, ...]
    common: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    derive: tuple[Callable[[Book, int], dict[str, Any]], ...] = ()
    after: tuple[str, ...] = ()
    needless: Callable[[Book], str | None] | None = None

    def run(self, seed: int) -> str:
        """Name of the run of a seed."""
        return f"{self.name}-s{seed}"

    def reason(self, book: Book) -> str | None:
        """Why its runs are not made; None if they are, or if that is not known yet."""
        known = self.needless is not None and all(book.all_ended(ROWS[name]) for name in self.after)
        return self.needless(book) if known else None

    def left(self, book: Book) -> list[int]:
        """Seeds of the runs that are still to be made."""
        seeds = [seed for seed in self.seeds if not book.ended(self.run(seed))]
        return seeds if seeds and self.reason(book) is None else []

    def given(self, book: Book, seed: int) -> dict[str, Any]:
        """All settings of the run of a seed; those of `after` must have ended."""
        values = {**self.common, **self.settings}
        for derived in self.derive:
            values |= derived(book, seed)
        return values


def _from(first: int, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Priorities of a row's seeds, one after the other."""
    return tuple(first + i for i in range(len(seeds)))


FIVE, THREE, TWO, ONE = (0, 1, 2, 3, 4), (0, 1, 2), (0, 1), (0,)
TARGET = 0.45
CIFAR = {"dataset": "cifar10", "arch": "resnet20", "epochs": 20, "validation_share": 0.1, "split_seed": 0}
LONG = CIFAR | {"arch": "resnet56", "epochs": 30}
SHORT = CIFAR | {"epochs": 8}
DIGITS = {"dataset": "digits", "arch": "resnet20", "validation_share": 0.1, "split_seed": 0, "amp": "off"}


# --- the dense recipe: a fraction 2^(6-3) of all combinations, in which every two factors are balanced ----------------

LEVELS = {
    "lr": (0.1, 0.2),
    "batch_size": (128, 64),
    "nesterov": (False, True),
    "label_smoothing": (0.0, 0.1),
    "weight_decay": (5e-4, 2e-4),
    "ema": (0.0, 0.999),
}
"""Two levels of each factor; the first is the preset's."""


def design() -> list[dict[str, Any]]:
    """The eight settings of the recipe, the cheapest and simplest first: large batches, then fewest extras.

    Label smoothing is at its second level where exactly one of learning rate and batch size is, weight decay where one of
    learning rate and Nesterov is, EMA where one of batch size and Nesterov is.
    """
    found = []
    for a, b, c in product((0, 1), repeat=3):
        levels = dict(zip(LEVELS, (a, b, c, a ^ b, a ^ c, b ^ c), strict=True))
        extras = sum(levels[name] for name in ("nesterov", "label_smoothing", "ema"))
        found.append(((b, extras, a), {name: LEVELS[name][level] for name, level in levels.items()}))
    return [values for _, values in sorted(found, key=lambda one: one[0])]


DESIGN = design()
RECIPE = tuple(
    Row(
        f"recipe-{number}",
        ", ".join(f"{name}={value:g}" for name, value in values.items()),
        "recipe",
        DENSE,
        "plain",
        CHOOSING,
        (0,),
        CIFAR,
        {"nu": 0.0, **values},
    )
    for number, values in enumerate(DESIGN, 1)
)
NAMES = tuple(row.name for row in RECIPE)
recipe = partial(derive.chosen, rows=NAMES, settings=DESIGN)


# --- choices of catode and of its best rival --------------------------------------------------------------------------

SPLITS, RATES = ((5, 15), (10, 10), (14, 6)), (1.0, 0.3)
RIVALS = [
    {"train_epochs": a, "tune_epochs": b, "tune_rate": rate, "sparse": 0.0, "scope": "all"}
    for a, b in SPLITS
    for rate in RATES
]
RIVALS.append({"train_epochs": 10, "tune_epochs": 10, "tune_rate": 1.0, "sparse": 5e-4, "scope": "all"})
"""Torch-Pruning: epochs before and after, largest learning rate after in units of the recipe's, strength of the sparse training
in the last half of the epochs before, and which channels are ranked together (`benchmarks.rival.SCOPES`)."""
RIVAL_SCOPES = ("hidden", "isomorphic")
"""Two more settings: the best of `RIVALS` with another ranking."""
CATODES = [
    {},
    {"warmup_epochs": 2.0},
    {"decide_until": 0.6},
    {"warmup_epochs": 2.0, "decide_until": 0.6},
    {"alpha": 0.75},
    {"memory": 100},
    {"alpha": 0.25, "decide_until": 0.6},
]
"""catode: what differs from the preset (warm-up 5 epochs, deciding until 0.8, alpha 0.5, memory from the run's length)."""


def _told(values: Mapping[str, Any]) -> str:
    told = (f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}" for name, value in values.items())
    return ", ".join(told) or "preset"


CATODE_CHOICE = tuple(
    Row(
        f"pruned-choice-{number}",
        _told(values),
        "choices",
        PRUNED,
        "plain",
        CHOOSING,
        (30,),
        CIFAR,
        {"target_macs": TARGET, **values},
        (recipe,),
        NAMES,
    )
    for number, values in enumerate(CATODES, 1)
)
RIVAL_CHOICE = tuple(
    Row(
        f"rival-choice-{number}",
        _told(values),
        "choices",
        DENSE,
        "rival",
        CHOOSING,
        (50,),
        CIFAR,
        {"share": TARGET, **values},
        (recipe,),
        NAMES,
    )
    for number, values in enumerate(RIVALS, 1)
)
CATODE_NAMES, RIVAL_FIRST = (tuple(row.name for row in rows) for rows in (CATODE_CHOICE, RIVAL_CHOICE))
chosen = partial(derive.chosen, rows=CATODE_NAMES, settings=CATODES)
RIVAL_CHOICE += tuple(
    Row(
        f"rival-choice-{number}",
        f"the best of these, {scope}",
        "choices",
        DENSE,
        "rival",
        CHOOSING,
        (52,),
        CIFAR,
        {"share": TARGET},
        (
            recipe,
            partial(derive.chosen, rows=RIVAL_FIRST, settings=RIVALS, tie=0.0),
            partial(derive.fixed, scope=scope),
        ),
        (*NAMES, *RIVAL_FIRST),
    )
    for number, scope in enumerate(RIVAL_SCOPES, len(RIVALS) + 1)
)
RIVAL_NAMES = tuple(row.name for row in RIVAL_CHOICE)


def rival(book: Book, seed: int) -> dict[str, Any]:
    """Settings of Torch-Pruning, those of the best of all its choices."""
    name = derive.best(book, RIVAL_NAMES, derive.near_target, 0.0).env["queue"]["row"]
    return {key: value for key, value in ROWS[name].given(book, seed).items() if key in RIVALS[0]}


# --- 1: the headline --------------------------------------------------------------------------------------------------


def _row(name, told, table, family, kind, seeds, priority, common, settings, derived, after, needless=None) -> Row:
    priority = _from(priority, seeds) if isinstance(priority, int) else priority
    return Row(name, told, table, family, kind, seeds, priority, common, settings, derived, after, needless)


HALF = {"target_macs": TARGET}
HEADLINE = (
    _row(
        "dense", "dense", "headline", DENSE, "plain", FIVE, (20, 41, 42, 43, 44), CIFAR, {"nu": 0.0}, (recipe,), NAMES
    ),
    _row(
        "pruned", "catode", "headline", PRUNED, "plain", FIVE, 40, CIFAR, HALF, (recipe, chosen), NAMES + CATODE_NAMES
    ),
    _row(
        "stage-shaped",
        "stage-shaped",
        "headline",
        DENSE,
        "shaped",
        FIVE,
        47,
        CIFAR,
        {"nu": 0.0},
        (recipe, partial(derive.stage_shaped, row="pruned", seeds=FIVE)),
        (*NAMES, "pruned"),
    ),
    _row(
        "narrowed",
        "all widths narrowed",
        "headline",
        DENSE,
        "narrowed",
        FIVE,
        46,
        CIFAR,
        {"nu": 0.0},
        (recipe, partial(derive.narrowed, arch=CIFAR["arch"], share=TARGET)),
        NAMES,
    ),
    _row(
        "rival",
        "Torch-Pruning",
        "headline",
        DENSE,
        "rival",
        FIVE,
        55,
        CIFAR,
        {"share": TARGET},
        (recipe, rival),
        NAMES + RIVAL_NAMES,
    ),
)


# --- 2: what each part is worth ---------------------------------------------------------------------------------------

PLAIN_RULE = {
    "estimator": "straight-through",
    "layer_estimator": "straight-through",
    "measure_every": 1,
    "memory": 10,
    "check_every": 10,
    "risk": 0.49,
    "tol": 0.05,
}
"""The paper's rule, as near as the settings come: theta is moved by gradients of single draws (a mean over ten steps, the least
memory, at a risk whose limit is about the mean), and a structure goes at one fixed tolerance."""
EQUAL_TIME = {"row": "pruned", "dense": "dense", "seeds": FIVE, "epochs": CIFAR["epochs"]}
DETAILS = tuple(
    _row(
        name,
        told,
        "parts",
        PRUNED,
        "plain",
        THREE,
        90,
        CIFAR,
        HALF,
        (recipe, chosen, partial(derive.fixed, **own)),
        NAMES + CATODE_NAMES,
    )
    for name, told, own in (
        ("units-only", "units only", {"alpha": 0.0}),
        ("layers-only", "layers only", {"alpha": 1.0}),
        ("plain-rule", "the paper's plain rule", PLAIN_RULE),
        ("early", "catode, decided early", {"warmup_epochs": 2.0, "decide_until": 0.6, "width_multiple": 1}),
    )
)
DETAILS += (
    _row(
        "found",
        "found structure from scratch",
        "parts",
        DENSE,
        "shaped",
        THREE,
        93,
        CIFAR,
        {"nu": 0.0},
        (recipe, partial(derive.found, row="pruned")),
        (*NAMES, "pruned"),
    ),
    _row(
        "equal-time",
        "catode, equal training time",
        "parts",
        PRUNED,
        "plain",
        THREE,
        95,
        CIFAR,
        HALF,
        (recipe, chosen, partial(derive.equal_time, **EQUAL_TIME)),
        (*NAMES, *CATODE_NAMES, "pruned", "dense"),
        partial(derive.no_time_left, **EQUAL_TIME),
    ),
)


# --- 3: ResNet-56 -----------------------------------------------------------------------------------------------------

RESNET56 = (
    _row(
        "r56-half",
        "catode, half the MACs",
        "resnet56",
        PRUNED,
        "plain",
        ONE,
        70,
        LONG,
        {"target_macs": 0.5},
        (recipe, chosen),
        NAMES + CATODE_NAMES,
    ),
    _row("r56-dense", "dense", "resnet56", DENSE, "plain", ONE, 71, LONG, {"nu": 0.0}, (recipe,), NAMES),
    _row(
        "r56-stage-shaped",
        "stage-shaped",
        "resnet56",
        DENSE,
        "shaped",
        ONE,
        72,
        LONG,
        {"nu": 0.0},
        (recipe, partial(derive.stage_shaped, row="r56-half", seeds=ONE)),
        (*NAMES, "r56-half"),
    ),
    _row(
        "r56-paper-units",
        "the paper's nu 0.081, alpha 0, beta 0",
        "resnet56",
        PRUNED,
        "plain",
        ONE,
        73,
        LONG,
        {"nu": 0.081, "alpha": 0.0, "beta": 0.0},
        (recipe,),
        NAMES,
    ),
    _row(
        "r56-paper-both",
        "the paper's nu 0.081, alpha 0.8, beta 1",
        "resnet56",
        PRUNED,
        "plain",
        ONE,
        74,
        LONG,
        {"nu": 0.081, "alpha": 0.8, "beta": 1.0},
        (recipe,),
        NAMES,
    ),
)


# --- 3, its question: why half of a ResNet-56 lost at three epochs, and which schedule mends it -------------------------

BRIEF = CIFAR | {"arch": "resnet56", "epochs": 3}
MIDDLE = BRIEF | {"epochs": 10}
SCHEDULES = {
    "preset": {},
    "late": {"warmup_epochs": 1.5, "decide_until": 0.95},
    "early": {"warmup_epochs": 0.15, "decide_until": 0.5},
    "long": {"warmup_epochs": 0.15, "decide_until": 0.95},
    "slow": {"sink_share": 0.3},
    "less-noise": {"memory": 232},
    "more-noise": {"memory": 58},
}
"""Start, length and ramp of the deciding phase, and the noise of what is decided by: the preset warms up for 0.75 epochs, decides
until 0.8 of the run, lets theta of a useless structure fall within 0.1 of it, and averages over 116 steps."""


def _schedule(name, told, family, kind, common, settings, derived, after, priority=100) -> Row:
    after = (*NAMES, *after)
    return _row(
        f"r56-{name}", told, "schedule", family, kind, CHOOSING, priority, common, settings, (recipe, *derived), after
    )


SCHEDULE = (
    *(
        _schedule(
            f"brief-{name}", f"3 epochs: {_told(own)}", PRUNED, "plain", BRIEF, {"target_macs": 0.5, **own}, (), ()
        )
        for name, own in SCHEDULES.items()
    ),
    _schedule("middle", "10 epochs: preset", PRUNED, "plain", MIDDLE, {"target_macs": 0.5}, (), ()),
    _schedule("brief-dense", "3 epochs: dense", DENSE, "plain", BRIEF, {"nu": 0.0}, (), ()),
    *(
        _schedule(
            f"{name}-stage-shaped",
            f"{common['epochs']} epochs: stage-shaped like the preset's",
            DENSE,
            "shaped",
            common,
            {"nu": 0.0},
            (partial(derive.stage_shaped, row=row, seeds=CHOOSING),),
            (row,),
            101,
        )
        for name, row, common in (("brief", "r56-brief-preset", BRIEF), ("middle", "r56-middle", MIDDLE))
    ),
)


# --- 4: deciding from the first step at a high learning rate ----------------------------------------------------------

HASTY = {"warmup_epochs": 0.0, "schedule": "cosine"}
RULES = {
    "derived": ("derived tolerance", {}),
    "fixed-0.05": ("fixed tolerance 0.05", {"tol": 0.05}),
    "fixed-0.5": ("fixed tolerance 0.5", {"tol": 0.5}),
    "fixed-0.9": ("fixed tolerance 0.9", {"tol": 0.9}),
    "raw": ("raw draws, fixed tolerance 0.05", PLAIN_RULE),
    "shadow": ("shadow run, derived", {"shadow": True}),
    "raw-shadow": ("shadow run, raw draws", {**PLAIN_RULE, "shadow": True}),
    "dense": ("dense", {"nu": 0.0}),
}
PREMATURE_ROWS = tuple(
    _row(f"premature-{rule}", told, "haste", PREMATURE, "plain", FIVE, 10, DIGITS, HASTY | own, (), ())
    for rule, (told, own) in RULES.items()
) + tuple(
    _row(f"premature-cifar-{rule}", told, "haste", PREMATURE, "plain", TWO, 80, SHORT, HASTY | own, (recipe,), NAMES)
    for rule, (told, own) in RULES.items()
)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (*RECIPE, *CATODE_CHOICE, *RIVAL_CHOICE, *HEADLINE, *DETAILS, *RESNET56, *SCHEDULE, *PREMATURE_ROWS)
}
