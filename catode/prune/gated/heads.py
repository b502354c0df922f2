"""Attention of torch and torchvision in forms that can lose heads.

`nn.MultiheadAttention` takes the size of its heads from the width of what it reads, so that it cannot run with fewer of them, and
reads the weight of its last layer without calling that. `FewerHeads` is a subclass of the same parameters under the same names that
does neither; an attention module becomes one by its class alone. The same holds for torchvision's Swin (`windows`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from catode.structures.description import CONSUMER, Block


class FewerHeads(nn.MultiheadAttention):
    """Multi-head attention whose heads are as many as its parameters hold, of size `head_dim` each."""

    _qkv_same_embed_dim = property(lambda self: False)  # so that a layer around it takes no shortcut past forward()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention, as `nn.MultiheadAttention` documents it.

        Args:
            query: Shape (batch, targets, width), or without the batch, or with the first two exchanged if not `batch_first`.
            key: The same with sources in place of targets.
            value: As `key`.
            key_padding_mask: Shape (batch, sources), or without the batch: what not to look at.
            need_weights: Whether to return the weights.
            attn_mask: Shape (targets, sources) or (batch * heads of the whole module, targets, sources).
            average_attn_weights: Whether to average the weights over the heads.
            is_causal: Whether `attn_mask` is causal.

        Raises:
            ValueError: for a mask of every head, whose rows would not say which heads are left.
        """
        batched, first = query.dim() == 3, self.batch_first
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = self.in_proj_weight.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        found = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            found = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            x = found @ v
            found = found.mean(1) if average_attn_weights else found
        else:
            causal = is_causal and mask is None
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        if not batched:
            return x.squeeze(0), None if found is None else found.squeeze(0)
        return x if first else x.transpose(0, 1), found

    def _mask(
        self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is added to the scores, of shape (batch or 1, 1, targets or 1, sources)."""
        if mask is not None and mask.dim() == 3:
            if len(mask) % len(q) or len(mask) // len(q) != self.num_heads:
                raise ValueError(
                    f"`attn_mask` must have the shape (targets, sources) once heads have gone; got {tuple(mask.shape)}. Leave the "
                    "heads in."
                )
            mask = mask.unflatten(0, (len(q), self.num_heads))
        parts = [None if mask is None else _added(mask, q)]
        if padding is not None:
            parts.append(_added(padding, q).view(-1, 1, 1, k.shape[-2]))
        parts = [part for part in parts if part is not None]
        return sum(parts[1:], parts[0]) if parts else None


def _added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask as numbers to add."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, float("-inf"))


def fewer(module: nn.Module) -> tuple[type, str] | None:
    """Class of an attention module's form that can lose heads, and name of the layer that reads them; None if there is none."""
    if type(module) is nn.MultiheadAttention:
        plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        return (FewerHeads, "out_proj") if plain else None
    if type(module).__module__ != "torchvision.models.swin_transformer":
        return None
    from catode.prune.gated.windows import FEWER

    return (FEWER[type(module)], "proj") if type(module) in FEWER else None


def convert(model: nn.Module) -> None:
    """Turn every attention module that can lose heads into one that runs with fewer, in place."""
    for module in model.modules():
        if (form := fewer(module)) is not None:
            module.__class__ = form[0]


def adopt(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Turn the attention modules that a description wants gated inside into forms that can lose heads, in place.

    Args:
        model: The network that the blocks describe; nothing that it computes changes.
        blocks: Its description.
    """
    called: set[str] = set()
    for block in blocks:
        called |= {block.output} if block.removable and not block.reader else set()
        for site in block.sites:
            called |= {part.tensor.rpartition(".")[0] for part in site.parts if part.role == CONSUMER}
    for path, module in model.named_modules():
        form = fewer(module)
        if form is not None and f"{path}.{form[1]}".removeprefix(".") in called:
            module.__class__ = form[0]


def release(model: nn.Module) -> None:
    """Turn attention modules that lost no head back into those of their library, in place."""
    for module in model.modules():
        own = type(module).__mro__
        if own[0] is FewerHeads and module.in_proj_weight.shape == (3 * module.embed_dim, module.embed_dim):
            module.__class__ = nn.MultiheadAttention
        elif (
            own[0].__module__ == "catode.prune.gated.windows" and module.qkv.out_features == 3 * module.qkv.in_features
        ):
            module.__class__ = own[2]
