"""The object token: CLIP's embedding of the reference and the camera through one linear layer."""
from __future__ import annotations

import torch
from torch import Tensor, nn

CAMERA = 4  # numbers of `view_vector`


class ObjectToken(nn.Module):
    """cc_projection: Linear(e + 4 -> d) over [embedding, camera] (arXiv 2310.19784, section 3.2; one layer in the release)."""

    def __init__(self, embed: int, width: int, dtype=None, device=None, operations=nn):
        super().__init__()
        self.cc_projection = operations.Linear(embed + CAMERA, width, dtype=dtype, device=device)

    def init_weights(self, generator: torch.Generator) -> None:
        """As the release begins: the embedding passes through, the camera at random."""
        layer = self.cc_projection
        with torch.no_grad():
            camera = torch.rand(layer.out_features, CAMERA, generator=generator) * 2 - 1
            layer.weight[:, -CAMERA:] = camera / layer.in_features ** 0.5
            layer.weight[:, :-CAMERA] = torch.eye(layer.out_features, layer.in_features - CAMERA)
            layer.bias.zero_()

    def forward(self, embed: Tensor, camera: Tensor) -> Tensor:
        """(b, e), (b, 4) -> (b, 1, d)."""
        return self.cc_projection(torch.cat([embed, camera.to(embed)], -1))[:, None]
