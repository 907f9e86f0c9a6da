"""The training-only branch that takes what is not identity from the target picture."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LikenessError
from .layers import Mlp, init_linear

KINDS = ("channel", "token")


class Decouple(nn.Module):
    """Frozen target embedding -> masked embedding f_msk (b, width) with a learnable mask, as in DisenBooth.

    kind "channel": one learnable gate per channel (starts at one half). "token": one gate per patch token.
    """

    def __init__(self, embed_dim: int, width: int, kind: str = "channel", operations: Any = nn, dtype=None,
                 device=None):
        super().__init__()
        if kind not in KINDS:
            raise LikenessError(f"The decoupling mask is of the kind {' or '.join(KINDS)}, got '{kind}'.")
        kwargs = {"operations": operations, "dtype": dtype, "device": device}
        self.kind = kind
        if kind == "channel":
            self.mask = nn.Parameter(torch.zeros(embed_dim, dtype=dtype, device=device))
        else:
            self.gate = Mlp(embed_dim, max(8, embed_dim // 4), 1, zero=True, **kwargs)
        self.mlp = Mlp(embed_dim, embed_dim, embed_dim, **kwargs)
        self.project = nn.Identity()
        if embed_dim != width:
            self.project = operations.Linear(embed_dim, width, dtype=dtype, device=device)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every weight; the mask starts at zero, which lets half of each channel through."""
        if self.kind == "channel":
            nn.init.zeros_(self.mask)
        else:
            self.gate.init_weights(generator)
        self.mlp.init_weights(generator)
        if not isinstance(self.project, nn.Identity):
            init_linear(self.project, generator)

    def forward(self, embeds: Tensor) -> Tensor:
        """(b, e) or tokens (b, n, e) -> (b, width): f = sigmoid(m) e, f + MLP(f), projected to width."""
        if self.kind == "channel":
            pooled = embeds if embeds.ndim == 2 else embeds.mean(1)
            f = torch.sigmoid(self.mask) * pooled
        else:
            tokens = embeds[:, None] if embeds.ndim == 2 else embeds
            f = (torch.sigmoid(self.gate(tokens)) * tokens).mean(1)
        return self.project(f + self.mlp(f))
