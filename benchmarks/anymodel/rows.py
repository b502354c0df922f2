"""The runs: networks and settings, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import QUICK

SHARE = 0.5
"""Share of the MACs to end at."""


@dataclass(frozen=True)
class Row:
    """A network that is trained with gates and without.

    Args:
        name: Name of its runs.
        arch: The network, as ``--arch`` takes it.
        images: Training images, the first ones; a fifth as many validation and test images.
        own: Settings other than the presets'.
        small: A small one of the kind for ``--quick``, which takes the digits.
    """

    name: str
    arch: str
    images: int
    small: str
    own: dict[str, Any] = field(default_factory=dict)

    def settings(self, kind: str, quick: bool) -> dict[str, Any]:
        """Settings of a run.

        Args:
            kind: "half" for the one with gates, "dense" for its twin.
            quick: On the digits, for seconds.
        """
        gates: dict[str, Any] = {"target_macs": SHARE} if kind == "half" else {"nu": 0.0}
        values = {"dataset": "cifar10", "threads": 1, "seed": 0, "arch": self.arch, **self.own, **gates}
        return values | ({**QUICK, "dataset": "digits", "image_size": 32, "arch": self.small} if quick else {})


CNN: dict[str, Any] = dict(image_size=64, epochs=4, batch_size=32, lr=0.05, warmup_epochs=0.5)
VIT: dict[str, Any] = dict(epochs=4, batch_size=32, optimizer="adamw", warmup_epochs=0.5)

SMALL_CNN = "timm:test_efficientnet"
SMALL_VIT = "timm:vit_tiny_patch16_224(patch_size=8, depth=2, embed_dim=16, num_heads=2)"
VIT_TINY = "timm:vit_tiny_patch16_224(patch_size=4, depth=6, embed_dim=96, num_heads=3)"

ROWS = (
    Row("mobilenet_v2", "torchvision:mobilenet_v2", 16_000, SMALL_CNN, CNN),
    Row("vit_tiny", VIT_TINY, 8_000, SMALL_VIT, VIT),
    Row("efficientnet_b0", "torchvision:efficientnet_b0", 8_000, SMALL_CNN, CNN),
)
