"""The miniature's text encoder for training: the host's CLIP layout and key names without in-place steps."""
from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .captions import CONTEXT_LENGTH, ROWS

WIDTH, LAYERS, HEADS = 128, 2, 4


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + attn["out_proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))


class TextModel(nn.Module):
    """(n, t) rows of the small token table -> (n, t, 128) encoded rows, as the host's CLIPTextModel gives them."""

    def __init__(self):
        super().__init__()
        tokens, positions = nn.Embedding(len(ROWS) + 3, WIDTH), nn.Embedding(CONTEXT_LENGTH, WIDTH)
        nn.init.normal_(tokens.weight, std=0.3)
        nn.init.normal_(positions.weight, std=0.1)
        embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(WIDTH, HEADS) for _ in range(LAYERS))})
        self.text_model = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder,
                                         "final_layer_norm": nn.LayerNorm(WIDTH)})

    def forward(self, rows: Tensor) -> Tensor:
        model = self.text_model
        embeddings, encoder = cast(nn.ModuleDict, model["embeddings"]), cast(nn.ModuleDict, model["encoder"])
        positions = cast(nn.Embedding, embeddings["position_embedding"]).weight
        x = embeddings["token_embedding"](rows) + positions[:rows.shape[1]]
        for layer in cast(nn.ModuleList, encoder["layers"]):
            x = layer(x)
        return model["final_layer_norm"](x)
