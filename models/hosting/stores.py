"""Keys and values that were made once for all steps, as a network that the host can count and move."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Pair(nn.Module):
    """Keys and values (n, l, channels) of one layer."""

    def __init__(self, k: Tensor, v: Tensor):
        super().__init__()
        self.k, self.v = nn.Parameter(k, requires_grad=False), nn.Parameter(v, requires_grad=False)


class Store(nn.Module):
    """Keys and values of all layers: a network without layers, so that the host can count, load and offload it."""

    def __init__(self, pairs: dict[str, Pair]):
        super().__init__()
        self.pairs = nn.ModuleDict({key.replace(".", "_"): pair for key, pair in pairs.items()})

    def get(self, key: str) -> Pair:
        """Of the layer "output.3.0"."""
        pair: Any = self.pairs[key.replace(".", "_")]
        return pair
