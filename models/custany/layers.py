"""The building blocks of the adapter: a three-step MLP and the new attention layer."""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.attention import Attention
from ..common.errors import LikenessError


class Mlp(nn.Module):
    """LayerNorm -> Linear -> GELU -> Linear, the shape of every MLP in CustAny."""

    def __init__(self, width: int, hidden: int, out: int, zero: bool = False, operations: Any = nn,
                 dtype=None, device=None):
        super().__init__()
        self.zero = zero
        self.norm = operations.LayerNorm(width, dtype=dtype, device=device)
        self.hidden = operations.Linear(width, hidden, dtype=dtype, device=device)
        self.act = nn.GELU()
        self.out = operations.Linear(hidden, out, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        return self.out(self.act(self.hidden(self.norm(x))))

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all weights; the last layer with zeros when it was asked for."""
        init_norm(self.norm)
        init_linear(self.hidden, generator)
        init_linear(self.out, generator, self.zero)


class LocalAttention(nn.Module):
    """Cross-attention of picture tokens (b, t, channels) to patch tokens (b, l, width), no residual."""

    def __init__(self, channels: int, width: int, head_dim: int, operations: Any = nn, dtype=None,
                 device=None):
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.heads = channels // head_dim
        self.norm = operations.LayerNorm(channels, **kwargs)
        self.to_q = operations.Linear(channels, channels, bias=False, **kwargs)
        self.to_k = operations.Linear(width, channels, bias=False, **kwargs)
        self.to_v = operations.Linear(width, channels, bias=False, **kwargs)
        self.to_out = operations.Linear(channels, channels, **kwargs)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, width) -> keys and values (b, l, channels)."""
        return self.to_k(tokens), self.to_v(tokens)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """(b, t, channels) -> (b, t, channels)."""
        return self.to_out(attention(self.to_q(self.norm(x)), k, v, self.heads))

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all weights; the output is zero, so an untrained layer changes nothing."""
        init_norm(self.norm)
        for layer in (self.to_q, self.to_k, self.to_v):
            init_linear(layer, generator)
        init_linear(self.to_out, generator, zero=True)


def init_norm(layer: nn.LayerNorm) -> None:
    """Weight one, bias zero."""
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)


def init_linear(layer: nn.Linear, generator: torch.Generator, zero: bool = False) -> None:
    """Uniform within 1 / sqrt(fan in), or zeros; drawn on the CPU, so that a seed is the same everywhere."""
    bound = 1 / math.sqrt(layer.weight.shape[1])
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            if tensor is None:
                continue
            if zero:
                tensor.zero_()
            else:
                tensor.copy_((torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound)


def resample_grid(tokens: Tensor, side: int) -> Tensor:
    """Raster-ordered tokens (b, n, d) of a square grid -> (b, side * side, d), bilinear on the token grid."""
    b, n, d = tokens.shape
    if n == side * side:
        return tokens
    old = math.isqrt(n)
    if old * old != n:
        raise LikenessError(f"CustAny can only bring square token grids to {side} x {side}, got {n} patch "
                            "tokens; give the encoder a square picture.")
    # Float 32, because antialiased resizing is missing in half precision on some devices.
    image = tokens.transpose(1, 2).reshape(b, d, old, old).float()
    image = F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=old > side)
    return image.flatten(2).transpose(1, 2).to(tokens.dtype)


def word_mean(rows: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Mean of each word's rows: rows (b, t, d), first and count (b,) -> float32 (b, d); what the global MLP reads.

    Without a word (first -1) the first row stands in, so that shapes hold; it is switched off by the caller."""
    index = torch.arange(rows.shape[1], device=rows.device)[None]
    start, size = first.clamp(min=0)[:, None], count.clamp(min=1)[:, None]
    inside = (index >= start) & (index < start + size)
    return (rows.float() * inside[..., None]).sum(1) / size


def replace_word(rows: Tensor, first: Tensor, count: Tensor, delta: Tensor,
                 mode: str = "keep_rest") -> Tensor:
    """Add delta (b, d) to the word's first row of rows (b, t, d); first and count (b,), first -1 = no word.

    mode "drop_rest" also takes the word's other tokens out: what follows moves up, zero rows fill the end.
    """
    index = torch.arange(rows.shape[1], device=rows.device)
    hit = index[None] == first[:, None]
    rows = rows + hit[..., None] * delta[:, None].to(rows.dtype)
    if mode == "keep_rest":
        return rows
    after = (index[None] > first[:, None]) & (first[:, None] >= 0)
    source = index[None] + after * (count.clamp(min=1) - 1)[:, None]
    inside = source < rows.shape[1]
    source = source.clamp(max=rows.shape[1] - 1)[..., None].expand_as(rows)
    return rows.gather(1, source) * inside[..., None]
