"""Architectures and how they describe their structures.

CIFAR ResNets after He et al. (2016), with parameter-free option A shortcuts, and a fully-connected residual network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from catode.train.structure import Block, Site

CIFAR_DEPTHS = {"resnet14": 2, "resnet20": 3, "resnet32": 5, "resnet56": 9, "resnet110": 18}


class PadShortcut(nn.Module):
    """Option A shortcut: every second pixel, new channels zero; no weights."""

    def __init__(self, stride: int, channels: int):
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, channels={self.channels}"


class BasicBlock(nn.Module):
    """``relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`` with one hidden site.

    Args:
        width_in: Input channels.
        hidden: Channels between the two convolutions.
        width_out: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, width_in: int, hidden: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else PadShortcut(stride, width_out - width_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut_only(self) -> nn.Module:
        """What is left without the branch; the input is already non-negative, so the ReLU is the identity."""
        return self.shortcut

    def structure(self, name: str) -> Block:
        """The block's description under its path `name` in the model."""
        site = Site(
            name=f"{name}.conv1",
            width=self.conv1.out_channels,
            producers=(f"{name}.conv1", f"{name}.bn1"),
            consumers=(f"{name}.conv2",),
            normalised=True,
        )
        return Block(name=name, output=f"{name}.bn2", sites=(site,))


class CifarResNet(nn.Module):
    """ResNet for small images: a stem, three stages, global average pooling, a classifier.

    Args:
        blocks: Residual blocks in each stage; depth = 6 blocks + 2.
        in_channels: Image channels.
        classes: Number of classes.
        width: Channels of the first stage, doubled at each further one.
        hidden_scale: Factor on every hidden width, for networks narrowed from the start.
    """

    def __init__(self, blocks: int, in_channels: int, classes: int, width: int = 16, hidden_scale: float = 1.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        before = width
        for stage in range(3):
            channels = width * 2**stage
            hidden = max(1, round(channels * hidden_scale))
            layers = []
            for i in range(blocks):
                layers.append(BasicBlock(before, hidden, channels, 2 if stage and i == 0 else 1))
                before = channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))

    def structures(self) -> list[Block]:
        """The residual blocks, in the order of the forward pass."""
        return [m.structure(name) for name, m in self.named_modules() if isinstance(m, BasicBlock)]


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
        """What is left without the branch."""
        return nn.Identity()


class DenseResNet(nn.Module):
    """Fully-connected residual network on flattened inputs.

    Args:
        features: Inputs per example after flattening.
        classes: Number of classes.
        blocks: Residual blocks.
        width: Width of the residual stream.
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


def build(arch: str, *, in_channels: int, classes: int, hidden_scale: float = 1.0) -> CifarResNet:
    """A fresh network of a named architecture.

    Args:
        arch: A key of `CIFAR_DEPTHS`.
        in_channels: Image channels.
        classes: Number of classes.
        hidden_scale: Factor on every hidden width.

    Raises:
        ValueError: if the name is unknown.
    """
    if arch not in CIFAR_DEPTHS:
        raise ValueError(f"`arch` must be one of {', '.join(CIFAR_DEPTHS)}; got arch={arch}")
    return CifarResNet(CIFAR_DEPTHS[arch], in_channels, classes, hidden_scale=hidden_scale)
