"""Named architectures, and loading of initial weights."""

from catode._lazy import lazy

_HOMES = {
    name: "catode.train.models.resnets"
    for name in (
        "Architecture",
        "BasicBlock",
        "Bottleneck",
        "DenseBlock",
        "DenseResNet",
        "PadShortcut",
        "Projection",
        "ResNet",
        "ResidualBlock",
        "build",
    )
} | {name: "catode.train.models.catalogue" for name in ("ARCHITECTURES", "SHORTCUTS", "STEMS")}
__getattr__, __dir__ = lazy(__name__, _HOMES)
__all__ = [*_HOMES]
