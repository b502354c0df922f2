"""torchvision's attention in shifted windows in a form that can lose heads; imported only where torchvision is."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as swin


class _FewerHeads(nn.Module):
    """Attention in windows whose heads are as many as its parameters hold; it calls its last layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention inside of windows, which are shifted in every second layer.

        Args:
            x: Shape (batch, height, width, channels).

        Returns:
            The same shape.
        """
        height, width = x.shape[1:3]
        (rows, columns), heads = self.window_size, self.num_heads
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        down, across = x.shape[1], x.shape[2]
        # a window as large as the image is not shifted
        shift = [
            by if size < whole else 0
            for by, size, whole in zip(self.shift_size, self.window_size, (down, across), strict=True)
        ]
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = (
            x.unflatten(1, (-1, rows)).unflatten(3, (-1, columns)).transpose(2, 3)
        )  # batch, windows down, across, rows, columns, ...
        shape = x.shape[:-1]
        x = x.flatten(3, 4).flatten(0, 2)
        q, k, v = F.linear(x, self.qkv.weight, self._bias()).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shift):
            apart = self._apart(x, down, across, shift)
            scores = (scores.unflatten(0, (-1, len(apart))) + apart.unsqueeze(1)).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        x = F.dropout(self.proj((weights @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)
        x = x.view(*shape, x.shape[-1]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x.roll((shift[0], shift[1]), (1, 2))[:, :height, :width].contiguous()

    def _bias(self) -> torch.Tensor | None:
        return self.qkv.bias

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)

    def _apart(self, like: torch.Tensor, down: int, across: int, shift: list[int]) -> torch.Tensor:
        """-100 between positions of a window that were no neighbours before the shift, shape (windows, positions, positions)."""
        rows, columns = self.window_size
        first, second = (
            (torch.arange(whole, device=like.device) >= whole - by).long()
            for whole, by in ((down, shift[0]), (across, shift[1]))
        )
        region = (2 * first[:, None] + second).view(down // rows, rows, across // columns, columns)
        region = region.transpose(1, 2).flatten(2).flatten(0, 1)
        return (region[:, :, None] != region[:, None, :]).to(like.dtype) * -100.0


class FewerWindowHeads(_FewerHeads, swin.ShiftedWindowAttention):
    """Attention of Swin."""


class FewerWindowHeadsV2(_FewerHeads, swin.ShiftedWindowAttentionV2):
    """Attention of Swin V2: by cosines, and keys without a bias."""

    def _bias(self) -> torch.Tensor | None:
        if self.qkv.bias is None:
            return None
        q, k, v = self.qkv.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()


FEWER = {swin.ShiftedWindowAttention: FewerWindowHeads, swin.ShiftedWindowAttentionV2: FewerWindowHeadsV2}
