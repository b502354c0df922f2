"""A small vision transformer for the digits, every residual branch of which can be removed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from catode.structures.description import Block, Site

SIDE, PATCH, CLASSES = 8, 2, 10
TOKENS = (SIDE // PATCH) ** 2


class Attention(nn.Module):
    """Residual branch: norm, self-attention.

    Args:
        width: Channels of a token.
        heads: Heads, which divide it.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens, shape (batch, tokens, width)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-1, -2) * qkv.shape[-1] ** -0.5
        return x + self.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(batch, tokens, width))

    def shortcut_only(self) -> nn.Module:
        """What is left without the branch."""
        return nn.Identity()


class Mlp(nn.Module):
    """Residual branch: norm, linear layer, GELU, linear layer.

    Args:
        width: Channels of a token.
        hidden: Units between the two layers.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens, shape (batch, tokens, width)."""
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))

    def shortcut_only(self) -> nn.Module:
        """What is left without the branch."""
        return nn.Identity()


class DigitsViT(nn.Module):
    """Patches of 2 x 2 pixels with learned positions, attention and MLP in turn, mean over the tokens, a linear classifier.

    Args:
        width: Channels of a token.
        depth: Pairs of attention and MLP.
        heads: Heads of every attention.
        ratio: Hidden units of an MLP over `width`.
    """

    def __init__(self, width: int = 48, depth: int = 4, heads: int = 4, ratio: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.positions = nn.Embedding(TOKENS, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        branches = [branch for _ in range(depth) for branch in (Attention(width, heads), Mlp(width, ratio * width))]
        self.branches = nn.Sequential(*branches)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, 10), of images, shape (batch, 1, 8, 8)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions(torch.arange(TOKENS, device=x.device))
        return self.head(self.norm(self.branches(tokens)).mean(1))

    def structures(self) -> list[Block]:
        """Every branch, and the hidden width of every MLP."""
        blocks = []
        for place, branch in enumerate(self.branches):
            name = f"branches.{place}"
            if isinstance(branch, Attention):
                blocks.append(Block(name, f"{name}.proj", ()))
            elif isinstance(branch, Mlp):
                site = Site(f"{name}.fc1", branch.fc1.out_features, (f"{name}.fc1",), (f"{name}.fc2",))
                blocks.append(Block(name, f"{name}.fc2", (site,)))
        return blocks

    def product_macs(self) -> int:
        """MACs per image of attention's products of activations, q k and weights v, which the pruner does not count."""
        width = self.head.in_features
        return sum(2 * TOKENS**2 * width for branch in self.branches if isinstance(branch, Attention))
