"""A GPT that knows nothing of pruning: what can go is found by tracing it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Residual branch: norm, causal self-attention with a fused projection of queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Residual branch: norm, linear layer, GELU, linear layer."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class GPT(nn.Module):
    """Tokens with learned positions, attention and MLP in turn, a norm; the output shares its weight with the embedding.

    Args:
        vocabulary: Number of different tokens.
        context: Most tokens of a sequence.
        width: Channels of a token.
        depth: Pairs of attention and MLP.
        heads: Heads of every attention, which divide `width`.
    """

    def __init__(self, vocabulary: int, context: int = 64, width: int = 96, depth: int = 4, heads: int = 6):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        pairs = [(Attention(width, heads), Mlp(width, 4 * width)) for _ in range(depth)]
        self.branches = nn.Sequential(*(branch for pair in pairs for branch in pair))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for branch in self.branches:
            last = branch.proj if isinstance(branch, Attention) else branch.down
            nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * depth))
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, tokens, vocabulary), of numbers of tokens, shape (batch, tokens)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.branches(x)))
