"""Cross attention of a few tokens to many, as InstantID's resampler and PhotoMaker v2's perceiver have it."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.attention import sdpa
from ..common.errors import LikenessError
from .weights import Shapes, depth_of


class PerceiverConfig(NamedTuple):
    """Widths of a perceiver; inner: all heads together, hidden: inside the MLPs."""
    dim: int
    source: int  # width of what is read
    output: int
    depth: int
    heads: int
    inner: int
    hidden: int


def perceiver_config(shapes: Shapes, head_dim: int, what: str) -> PerceiverConfig:
    """From shapes alone but for the width of a head, which no shape tells. Raises LikenessError when a part is missing."""
    try:
        dim, source = shapes["proj_in.weight"]
        inner = shapes["layers.0.0.to_q.weight"][0]
        return PerceiverConfig(dim, source, shapes["proj_out.weight"][0], depth_of(shapes, "layers."),
                               max(1, inner // head_dim), inner, shapes["layers.0.1.1.weight"][0])
    except (KeyError, ValueError) as error:
        raise LikenessError(f"{what} lacks a part of its resampler; download the file again.") from error


class PerceiverAttention(nn.Module):
    """Latents ask, the source and the latents themselves answer."""

    def __init__(self, config: PerceiverConfig, operations: Any, place: dict[str, Any]):
        super().__init__()
        self.heads = config.heads
        self.norm1 = operations.LayerNorm(config.dim, **place)
        self.norm2 = operations.LayerNorm(config.dim, **place)
        self.to_q = operations.Linear(config.dim, config.inner, bias=False, **place)
        self.to_kv = operations.Linear(config.dim, 2 * config.inner, bias=False, **place)
        self.to_out = operations.Linear(config.inner, config.dim, bias=False, **place)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).chunk(2, -1)
        return self.to_out(sdpa(self.to_q(latents), k, v, self.heads))


class Perceiver(nn.Module):
    """Latents (b, l, dim) and a source (b, n, source) -> (b, l, output); tensors are named as in the releases."""

    def __init__(self, config: PerceiverConfig, operations: Any = nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.proj_in = operations.Linear(config.source, config.dim, **place)
        self.layers = nn.ModuleList(nn.ModuleList([
            PerceiverAttention(config, operations, place),
            nn.Sequential(operations.LayerNorm(config.dim, **place),
                          operations.Linear(config.dim, config.hidden, bias=False, **place), nn.GELU(),
                          operations.Linear(config.hidden, config.dim, bias=False, **place)),
        ]) for _ in range(config.depth))
        self.proj_out = operations.Linear(config.dim, config.output, **place)
        self.norm_out = operations.LayerNorm(config.output, **place)

    def forward(self, latents: Tensor, source: Tensor) -> Tensor:
        source = self.proj_in(source)
        layers: Any = self.layers
        for attention, mlp in layers:
            latents = latents + attention(source, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))
