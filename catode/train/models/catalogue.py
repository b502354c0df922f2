"""The named architectures, without PyTorch, so that the command line can list them quickly."""

from __future__ import annotations

from dataclasses import dataclass

SHORTCUTS, STEMS = ("A", "B"), ("cifar", "imagenet")


@dataclass(frozen=True)
class Architecture:
    """A named residual network.

    Args:
        block: Kind of its residual blocks, `basic` or `bottleneck`.
        blocks: Number of blocks in each stage.
        width: Hidden width in the first stage, doubled at each further stage.
        shortcut: Default shortcut, one of `SHORTCUTS`.
        stem: Default stem, one of `STEMS`: `cifar` is a 3x3 convolution at full resolution, `imagenet` a 7x7 convolution
            of stride 2 and a 3x3 max-pooling of stride 2.
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
