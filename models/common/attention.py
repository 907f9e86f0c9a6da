"""Plain attention with the signature of the host's function, so that the host's can take its place."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention: q (b, n, c), k and v (b, m, c) -> (b, n, c).

    `mask` broadcasts to (b, heads, n, m): True (or 0.0 for a float mask) lets a pair through.
    """
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b h n d -> b n (h d)")
