"""The named architectures, without PyTorch: for the command line, which offers them before it loads anything heavy."""

from __future__ import annotations

from dataclasses import dataclass

SHORTCUTS, STEMS = ("A", "B"), ("cifar", "imagenet")


@dataclass(frozen=True)
class Architecture:
    """A named residual network.

    Args:
        block: Kind of its residual blocks, `basic` or `bottleneck`.
        blocks: Their number in each stage.
        width: Width of the first stage's branches, doubled at each further one.
        shortcut: Option that it has if no other is asked for, of `SHORTCUTS`.
        stem: The same of `STEMS`: `cifar` is a 3x3 convolution at full resolution, `imagenet` a 7x7 one of stride 2 and a
            3x3 maximum of stride 2.
    """

    block: str
    blocks: tuple[int, ...]
    width: int
    shortcut: str
    stem: str


ARCHITECTURES = {
    f"resnet{6 * n + 2}": Architecture("basic", (n, n, n), 16, "A", "cifar") for n in (2, 3, 5, 7, 9, 18)
} | {
    "resnet18": Architecture("basic", (2, 2, 2, 2), 64, "B", "imagenet"),
    "resnet34": Architecture("basic", (3, 4, 6, 3), 64, "B", "imagenet"),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3), 64, "B", "imagenet"),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3), 64, "B", "imagenet"),
}
