"""One vision transformer for DINOv2, MAE, SigLIP and CLIP: they differ in options only, not in structure."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..common.attention import Attention, sdpa
from ..common.errors import LikenessError


class VitConfig(NamedTuple):
    """All that a ViT needs to be built; everything but `heads` can be read from the shapes of a file."""

    family: str  # "dinov2", "mae", "siglip" or "clip": chooses normalisation, input size, eps and activation
    style: str  # key style of the file: "timm" (also the original releases), "transformers" or "open_clip"
    width: int
    depth: int
    heads: int
    mlp: int  # width inside the MLP, after the gate if there is one
    patch: int
    grid: int  # patches a side of the position table
    cls: bool = True
    cls_position: bool = True  # the position table has a row for the class token
    registers: int = 0
    pre_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    layer_scale: bool = False
    swiglu: bool = False
    activation: str = "gelu"
    eps: float = 1e-6
    antialias: bool = False  # how the position table is resampled to another grid

    @property
    def prefix(self) -> int:
        """Number of tokens (class, registers) before the patch tokens."""
        return int(self.cls) + self.registers


class VitOutput(NamedTuple):
    """cls (b, d) or None, patches (b, n, d) in raster order, both after the final norm; grid (rows, columns).

    hidden: for each asked block the raw residual stream (b, config.prefix + n, d), prefix tokens first.
    """

    cls: Tensor | None
    patches: Tensor
    grid: tuple[int, int]
    hidden: tuple[Tensor, ...] = ()


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the GELU of the OpenAI CLIP models."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


class Block(nn.Module):
    """Pre-norm transformer block with optional layer scale and optional gated MLP (SwiGLU)."""

    def __init__(self, config: VitConfig, operations: Any, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        width, bias = config.width, config.qkv_bias
        self.heads = config.heads
        self.swiglu = config.swiglu
        self.activation = ACTIVATIONS[config.activation]
        self.norm1 = operations.LayerNorm(width, eps=config.eps, **place)
        self.q = operations.Linear(width, width, bias=bias, **place)
        self.k = operations.Linear(width, width, bias=bias, **place)
        self.v = operations.Linear(width, width, bias=bias, **place)
        self.o = operations.Linear(width, width, **place)
        self.norm2 = operations.LayerNorm(width, eps=config.eps, **place)
        self.fc1 = operations.Linear(width, config.mlp * (2 if config.swiglu else 1), **place)
        self.fc2 = operations.Linear(config.mlp, width, **place)
        self.ls1 = nn.Parameter(torch.ones(width, **place)) if config.layer_scale else None
        self.ls2 = nn.Parameter(torch.ones(width, **place)) if config.layer_scale else None

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        y = self.norm1(x)
        y = self.o(attention(self.q(y), self.k(y), self.v(y), self.heads))
        x = x + (y if self.ls1 is None else y * self.ls1.to(y))
        y = self.fc1(self.norm2(x))
        if self.swiglu:
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        else:
            y = self.activation(y)
        y = self.fc2(y)
        return x + (y if self.ls2 is None else y * self.ls2.to(y))


class ViT(nn.Module):
    """Vision transformer; its attribute `attention` may be replaced by any function (q, k, v, heads)."""

    def __init__(self, config: VitConfig, operations: Any = nn, dtype=None, device=None,
                 attention: Attention = sdpa):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        width = config.width
        self.config = config
        self.attention = attention

        def rows(count: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(1, count, width, **place))

        self.patch = operations.Conv2d(3, width, config.patch, stride=config.patch, bias=config.patch_bias,
                                       **place)
        self.cls = rows(1) if config.cls else None
        self.registers = rows(config.registers) if config.registers else None
        self.position = rows(config.grid ** 2 + int(config.cls_position))
        self.pre_norm = operations.LayerNorm(width, eps=config.eps, **place) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config, operations, dtype, device) for _ in range(config.depth))
        self.norm = operations.LayerNorm(width, eps=config.eps, **place)

    def positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Patch part of the position table (1, rows * columns, d), resampled if the grid is not its own."""
        side = self.config.grid
        table = self.position[:, int(self.config.cls_position):]
        if (rows, columns) == (side, side):
            return table.to(like)
        # In float32 whatever the type of the weights; by size, not by a scale factor: as transformers does.
        table = rearrange(table.to(like.device, torch.float32), "1 (h w) d -> 1 d h w", h=side)
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False,
                              antialias=self.config.antialias)
        return rearrange(table, "1 d h w -> 1 (h w) d").to(like)

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised pixels (b, 3, h, w) -> tokens before the first block (b, prefix + n, d), token grid."""
        size = self.config.patch
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < size:
            raise LikenessError(f"The vision encoder expects pictures (batch, 3, height, width) of at least "
                                f"{size} x {size} pixels, but {tuple(pixels.shape)} came: resize them first.")
        x = self.patch(pixels)
        grid = (x.shape[2], x.shape[3])
        x = rearrange(x, "b d h w -> b (h w) d")
        x = x + self.positions(*grid, like=x)
        prefix = []
        if self.cls is not None:
            cls = self.cls.to(x)
            if self.config.cls_position:
                cls = cls + self.position[:, :1].to(x)
            prefix.append(cls.expand(x.shape[0], -1, -1))
        if self.registers is not None:
            prefix.append(self.registers.to(x).expand(x.shape[0], -1, -1))
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        return (x if self.pre_norm is None else self.pre_norm(x)), grid

    def forward(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> VitOutput:
        """Normalised pixels (b, 3, h, w) -> VitOutput; `layers`: blocks (negative: from the end) to keep."""
        depth = len(self.blocks)
        if any(not -depth <= index < depth for index in layers):
            raise LikenessError(f"The vision encoder has {depth} blocks, but its layers {tuple(layers)} were "
                                f"asked for: choose smaller numbers.")
        wanted = [index % depth for index in layers]
        x, grid = self.embed(pixels)
        kept = {}
        for index, block in enumerate(self.blocks):
            x = block(x, self.attention)
            if index in wanted:
                kept[index] = x
        x = self.norm(x)
        return VitOutput(x[:, 0] if self.config.cls else None, x[:, self.config.prefix:], grid,
                         tuple(kept[index] for index in wanted))
