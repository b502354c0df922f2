"""Residual networks and descriptions of their prunable structures.

The networks of He et al. (2016) for CIFAR and for ImageNet, the latter with torchvision's parameter names and shapes, and
a fully-connected residual network.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from catode._validate import check_choice
from catode.structures.description import Block, Site
from catode.train.models.catalogue import ARCHITECTURES, SHORTCUTS, STEMS, Architecture


class PadShortcut(nn.Module):
    """Option A shortcut: every `stride`-th pixel along each axis, new channels zero; no weights."""

    def __init__(self, stride: int, channels: int):
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, channels={self.channels}"


class Projection(nn.Module):
    """A block with a projection shortcut after its branch was removed; the shortcut keeps its name."""

    def __init__(self, downsample: nn.Module):
        super().__init__()
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.downsample(x))


class ResidualBlock(nn.Module):
    """Base class of the residual blocks, ``relu(branch(x) + downsample(x))`` with ``x >= 0``.

    The branch is conv1, bn1, relu, conv2, bn2 and so on; every hidden width is a site.
    """

    convolutions: int

    def shortcut_only(self) -> nn.Module:
        """The block without its branch; a shortcut without weights maps ``x >= 0`` to values >= 0, so it needs no ReLU."""
        projects = isinstance(self.downsample, nn.Sequential)
        return Projection(self.downsample) if projects else self.downsample

    def structure(self, name: str) -> Block:
        """The block's description; `name` is its path in the model."""
        sites = tuple(
            Site(
                name=f"{name}.conv{i}",
                width=self.get_submodule(f"conv{i}").out_channels,
                producers=(f"{name}.conv{i}", f"{name}.bn{i}"),
                consumers=(f"{name}.conv{i + 1}",),
                normalised=True,
            )
            for i in range(1, self.convolutions)
        )
        return Block(name, output=f"{name}.bn{self.convolutions}", sites=sites, fixed=(f"{name}.downsample",))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions with one site between them.

    Args:
        width_in: Input channels.
        hidden: Channels between the two convolutions.
        width_out: Output channels.
        stride: Stride of the first convolution.
        shortcut: Where the shape changes: option `A`, subsampling and zero padding, or `B`, a 1x1 convolution with batch norm.
    """

    convolutions, expansion = 2, 1

    def __init__(self, width_in: int, hidden: int, width_out: int, stride: int, shortcut: str = "A"):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.downsample = _downsample(width_in, width_out, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution with two sites between them; the 3x3 one has the stride, as in torchvision.

    Args:
        width_in: Input channels.
        hidden: Input and output channels of the 3x3 convolution.
        width_out: Output channels.
        stride: Stride of the 3x3 convolution.
        shortcut: As for `BasicBlock`.
    """

    convolutions, expansion = 3, 4

    def __init__(self, width_in: int, hidden: int, width_out: int, stride: int, shortcut: str = "B"):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, width_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.downsample = _downsample(width_in, width_out, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _downsample(width_in: int, width_out: int, stride: int, shortcut: str) -> nn.Module:
    if stride == 1 and width_in == width_out:
        return nn.Identity()
    if shortcut == "A":
        return PadShortcut(stride, width_out - width_in)
    return nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out))


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """Residual network: a stem, stages that halve the resolution from the second on, average pooling, a classifier.

    Args:
        architecture: Blocks, widths, shortcuts and stem.
        in_channels: Image channels.
        classes: Number of classes.
        hidden_scale: Factor on every hidden width, for narrow baselines.
    """

    def __init__(self, architecture: Architecture, in_channels: int, classes: int, hidden_scale: float = 1.0):
        super().__init__()
        imagenet, block = architecture.stem == "imagenet", BLOCKS[architecture.block]
        before = architecture.width
        self.conv1 = nn.Conv2d(in_channels, before, *((7, 2, 3) if imagenet else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.stages = len(architecture.blocks)
        for stage, blocks in enumerate(architecture.blocks):
            width = architecture.width * 2**stage
            hidden, out = max(1, round(width * hidden_scale)), width * block.expansion
            layers = []
            for i in range(blocks):
                stride = 2 if stage and i == 0 else 1
                layers.append(block(before, hidden, out, stride, architecture.shortcut))
                before = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))

    def structures(self) -> list[Block]:
        """The residual blocks, in the order of the forward pass."""
        return [m.structure(name) for name, m in self.named_modules() if isinstance(m, ResidualBlock)]


class DenseBlock(nn.Module):
    """``x + out(relu(norm(hidden(x))))``: a fully-connected residual block with one hidden site."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(width, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(F.relu(self.norm(self.hidden(x))))

    def shortcut_only(self) -> nn.Module:
        """The block without its branch."""
        return nn.Identity()


class DenseResNet(nn.Module):
    """Fully-connected residual network on flattened inputs.

    Args:
        features: Inputs per example after flattening.
        classes: Number of classes.
        blocks: Residual blocks.
        width: Width between the blocks.
        hidden: Hidden width of every block.
    """

    def __init__(self, features: int, classes: int, blocks: int = 3, width: int = 32, hidden: int = 64):
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.Sequential(*(DenseBlock(width, hidden) for _ in range(blocks)))
        self.norm = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.norm(self.blocks(self.stem(x.flatten(1))))))

    def structures(self) -> list[Block]:
        """The residual blocks; here the layer gate scales a linear layer, which also consumes the units."""
        found = []
        for name, module in self.named_modules():
            if isinstance(module, DenseBlock):
                site = Site(
                    name=f"{name}.hidden",
                    width=module.hidden.out_features,
                    producers=(f"{name}.hidden", f"{name}.norm"),
                    consumers=(f"{name}.out",),
                )
                found.append(Block(name=name, output=f"{name}.out", sites=(site,)))
        return found


def build(
    arch: str,
    *,
    in_channels: int,
    classes: int,
    hidden_scale: float = 1.0,
    shortcut: str | None = None,
    stem: str | None = None,
) -> ResNet:
    """A fresh network of a named architecture.

    Args:
        arch: A key of `ARCHITECTURES`.
        in_channels: Image channels.
        classes: Number of classes.
        hidden_scale: Factor on every hidden width.
        shortcut: One of `SHORTCUTS`; None for the architecture's default.
        stem: One of `STEMS`; None for the architecture's default.

    Raises:
        ValueError: if a name is unknown.
    """
    own = ARCHITECTURES[check_choice("arch", arch, ARCHITECTURES)]
    shortcut = check_choice("shortcut", own.shortcut if shortcut is None else shortcut, SHORTCUTS)
    stem = check_choice("stem", own.stem if stem is None else stem, STEMS)
    return ResNet(replace(own, shortcut=shortcut, stem=stem), in_channels, classes, hidden_scale)
