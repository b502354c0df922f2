"""What every test shares: one thread, reproducible hypothesis runs, a network with two sites and a real shortcut."""

from __future__ import annotations

import os
import signal

# before torch is imported, here and in processes that tests start: what waits leaves its core to the others
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import nn

from catode.structures.description import Block, Site

settings.register_profile("catode", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("catode")
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it


class Bottleneck(nn.Module):
    """``relu(shortcut(x) + bn3(conv3(..conv2(..conv1(x)))))``: two hidden sites, biases, a shortcut with weights."""

    def __init__(self, width_in: int, first: int, second: int, width_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, first, 1)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, width_out, 1)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))

    def shortcut_only(self) -> nn.Module:
        return nn.Sequential(self.shortcut, nn.ReLU())


class BottleneckNet(nn.Module):
    """Two bottlenecks between a stem and a classifier."""

    def __init__(self, in_channels: int = 1, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 6, 3, 1, 1)
        self.blocks = nn.Sequential(Bottleneck(6, 4, 5, 8), Bottleneck(8, 3, 4, 8))
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))

    def structures(self) -> list[Block]:
        found = []
        for number, module in enumerate(self.blocks):
            name = f"blocks.{number}"
            sites = tuple(
                Site(
                    f"{name}.conv{i}",
                    getattr(module, f"conv{i}").out_channels,
                    (f"{name}.conv{i}", f"{name}.bn{i}"),
                    (f"{name}.conv{i + 1}",),
                )
                for i in (1, 2)
            )
            found.append(Block(name, f"{name}.bn3", sites, fixed=(f"{name}.shortcut",)))
        return found


@pytest.fixture(scope="session")
def bottleneck_net() -> type[nn.Module]:
    """An architecture that the package does not know, written against the protocol alone."""
    return BottleneckNet
