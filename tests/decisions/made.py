"""What the tests of the decisions are made of: limits with right defaults, and networks that need no PyTorch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from catode.decisions.limits import Limits
from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory

MEASURED = {
    "keep_prob": 0.1,
    "benefit": 0.01,
    "benefit_upper": 0.02,
    "benefit_lower": 0.0,
    "price": 0.1,
    "gain": 0.5,
    "decay": 0.05,
    "rate_ratio": 1.0,
    "noise": 0.02,
    "benefit_noise": 0.001,
    "drift": 0.001,
    "step_time": 0.01,
    "memory": 0.5,
}


def limits(n: int = 1, **values) -> Limits:
    """Limits of n structures whose benefit is a tenth of their price, but for what is given."""
    return Limits(**{name: np.array(np.broadcast_to(values.get(name, v), n), float) for name, v in MEASURED.items()})


def inventory(*widths: tuple[int, ...]) -> Inventory:
    """Blocks with sites of these widths."""
    return Inventory(
        [
            Block(
                f"b{b}",
                f"b{b}.out",
                tuple(Site(f"b{b}.s{s}", width, (f"b{b}.s{s}",), ()) for s, width in enumerate(own)),
            )
            for b, own in enumerate(widths)
        ]
    )


def network(*widths: tuple[int, ...]) -> Complexity:
    """Chains of layers: unequal MACs and parameters, a norm in each block, a stem that stays."""
    owner, terms = inventory(*widths), [Term("stem", 50, 3)]
    for b in range(len(widths)):
        own = [place.number for place in owner.places if place.layer == b]
        for k, (inner, outer) in enumerate(pairwise([None, *own, None])):
            terms.append(Term(f"b{b}.{k}", 40 - 7 * b + 3 * k, 2 + b + k, b, inner, outer))
        terms.append(Term(f"b{b}.norm", 8, 5, b))
    return Complexity(terms, owner)


def mask(n: int, *numbers: int) -> np.ndarray:
    """True at these numbers, shape (n,)."""
    return np.isin(np.arange(n), numbers)
