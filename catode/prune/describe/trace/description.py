"""What `catode.describe` returns: the blocks of a network, and what cannot go with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from catode._validate import fail
from catode.structures.description import Block


@dataclass(frozen=True)
class Refusal:
    """A width or branch that cannot go.

    Args:
        name: Path of the module that makes the width, or of the branch's addition.
        kind: "width" or "branch".
        units: Number of units of a width; 0 for a branch.
        reason: The operation that forbids it and the module that runs it.
    """

    name: str
    kind: str
    units: int
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} `{self.name}`" + (f" ({self.units})" if self.units else "") + f": {self.reason}"


class Description(list[Block]):
    """The blocks of a network, in the order of the forward pass.

    Args:
        blocks: The blocks.
        refused: What cannot go.
        least: Fewest units that a site may keep, by its name.

    Attributes:
        refused: What cannot go.
        least: Fewest units that a site may keep, by its name.
    """

    def __init__(
        self, blocks: Iterable[Block] = (), refused: Iterable[Refusal] = (), least: Mapping[str, int] | None = None
    ):
        self.refused, self.least = tuple(refused), dict(least or {})
        super().__init__(self._bounded(block) for block in blocks)

    def _bounded(self, block: Block) -> Block:
        """A block whose sites know their least."""
        if not any(site.name in self.least for site in block.sites):
            return block
        return replace(
            block, sites=tuple(replace(site, least=self.least.get(site.name, site.least)) for site in block.sites)
        )


def matches(pattern: str, path: str) -> bool:
    """Whether a glob pattern names a module or one that holds it."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


def check_patterns(name: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Make sure that every pattern names a module.

    Raises:
        ValueError: if one names none.
    """
    paths = [path for path in paths if path]
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(fnmatchcase(path, pattern) for path in paths):
            fail(
                name,
                "hold patterns of module paths of the network",
                pattern,
                hint='Use a path of named_modules() or a pattern such as "layer4.*".',
            )
