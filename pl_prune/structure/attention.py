"""`SlicedAttention`: multi-head attention of any number of heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlicedAttention(nn.Module):
    """`nn.MultiheadAttention` without its rule that the heads divide the embedding.

    Parameters have the same names; the head size is read from them, so that heads can be sliced off.

    Args:
        num_heads: Number of heads.
        batch_first: Whether the batch is the first dimension.
        dropout: Probability of dropping an attention weight in training.

    Shape:
        As `nn.MultiheadAttention`.
    """

    _qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused path, which knows only whole heads

    def __init__(self, num_heads: int, batch_first: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.batch_first, self.dropout = num_heads, batch_first, dropout
        self.embed_dim = 0

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> SlicedAttention:
        """Take over an attention module.

        Args:
            module: The module; its parameters, hooks and mode are taken over, not copied.

        Returns:
            A module that computes the same.
        """
        new = cls(module.num_heads, module.batch_first, module.dropout)
        state = {
            k: v
            for k, v in vars(module).items()
            if "hook" in k or k in ("training", "embed_dim", "add_zero_attn", "bias_k", "bias_v")
        }
        new.__dict__.update(state)
        new._parameters.update(module._parameters)
        new.out_proj = module.out_proj
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (N, L, E) if `batch_first`, else (L, N, E), or (L, E).
            key: The same with S tokens.
            value: The same with S tokens.
            key_padding_mask: (N, S), True or -inf where a token is to be ignored.
            need_weights: Whether the attention weights are returned.
            attn_mask: (L, S) or (N * heads, L, S), True or -inf where attention is not allowed.
            average_attn_weights: Whether the weights are averaged over heads.
            is_causal: A hint that `attn_mask` is the causal mask; the mask is used.

        Returns:
            The output, of the query's shape, and the weights (N, L, S) or (N, heads, L, S), or None.
        """
        single = query.ndim == 2
        if single:
            query, key, value = (t[None] for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        count = query.shape[0]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(count, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(key_padding_mask, attn_mask, q, k.shape[2])
        drop = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            attention = F.dropout((scores if mask is None else scores + mask).softmax(3), drop)
            mixed = attention @ v
        else:
            attention = None
            mixed = F.scaled_dot_product_attention(q, k, v, mask, drop)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        if single:
            return out[0], None if attention is None else attention[0]
        return out if self.batch_first else out.transpose(0, 1), attention

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """Join both masks to one that is added to the scores."""
        joined = None
        for part, shape in ((mask, (-1, self.num_heads)), (padding, None)):
            if part is None:
                continue
            if part.dtype == torch.bool:
                part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, float("-inf"))
            part = F.pad(part, (0, keys - part.shape[-1]))
            part = (
                part.view(q.shape[0], 1, 1, keys)
                if shape is None
                else part.unflatten(0, shape)
                if part.ndim == 3
                else part
            )
            joined = part if joined is None else joined + part
        return joined
