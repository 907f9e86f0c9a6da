"""InstantID (arXiv 2401.07519): face tokens from one embedding, and their keys and values for every text attention of SDXL."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.errors import LikenessError
from .perceiver import Perceiver, PerceiverConfig, perceiver_config
from .weights import fill, part, shapes_of

SPACE, PACK = "glintr100", "antelopev2"  # the recogniser that it was trained on, and the pack that has it
HEAD_DIM = 64
EMBEDDING = 512  # what a recogniser of faces gives; the same layout with another width is an IP-Adapter
IMAGE, LAYERS = "image_proj.", "ip_adapter."


class InstantIDConfig(NamedTuple):
    """tokens: how many a face has. layers: (number in the file, channels), in the file's order down, up, middle."""
    resampler: PerceiverConfig
    tokens: int
    layers: tuple[tuple[str, int], ...]

    @property
    def width(self) -> int:
        """Of a token, which is the text width of the base model."""
        return self.resampler.output


def is_instantid(names: Iterable[str]) -> bool:
    """Whether a file with these tensor names has InstantID's layout; IP-Adapter Plus has the same names."""
    names = set(names)
    return {IMAGE + "latents", IMAGE + "proj_in.weight", LAYERS + "1.to_k_ip.weight"} <= names


def identify(state: Mapping[str, Any]) -> InstantIDConfig:
    """From names and shapes alone. Raises LikenessError for a file that lacks a part, and for an IP-Adapter."""
    shapes = shapes_of(state)
    resampler = perceiver_config(part(shapes, IMAGE), HEAD_DIM, "This InstantID file")
    if resampler.source != EMBEDDING:
        raise LikenessError(f"This file reads features of width {resampler.source}, InstantID reads face embeddings of width "
                            f"{EMBEDDING}: it looks like an IP-Adapter; choose InstantID's ip-adapter.bin.")
    numbers = sorted({int(name[len(LAYERS):].split(".")[0]) for name in shapes if name.startswith(LAYERS)})
    layers = tuple((str(number), shapes.get(f"{LAYERS}{number}.to_k_ip.weight", (0,))[0]) for number in numbers)
    return InstantIDConfig(resampler, shapes[IMAGE + "latents"][1], layers)


class Resampler(Perceiver):
    """An embedding (b, 1, 512) -> tokens (b, l, width), from latents that it learned."""

    def __init__(self, config: InstantIDConfig, operations: Any = nn, dtype=None, device=None):
        super().__init__(config.resampler, operations, dtype, device)
        self.latents = nn.Parameter(torch.zeros(1, config.tokens, config.resampler.dim, dtype=dtype, device=device))

    def tokens(self, embedding: Tensor) -> Tensor:
        """(b, 512) -> (b, l, width)."""
        latents = self.latents.to(embedding).expand(embedding.shape[0], -1, -1)
        return self(latents, embedding[:, None])


class FaceAttention(nn.Module):
    """Keys and values of one layer for the face tokens."""

    def __init__(self, width: int, channels: int, operations: Any, place: dict[str, Any]):
        super().__init__()
        self.to_k_ip = operations.Linear(width, channels, bias=False, **place)
        self.to_v_ip = operations.Linear(width, channels, bias=False, **place)


class InstantID(nn.Module):
    """Both parts of ip-adapter.bin, tensors named as in it."""

    def __init__(self, config: InstantIDConfig, operations: Any = nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.image_proj = Resampler(config, operations, dtype, device)
        place = {"dtype": dtype, "device": device}
        self.ip_adapter = nn.ModuleDict({number: FaceAttention(config.width, channels, operations, place)
                                         for number, channels in config.layers})

    def tokens(self, embedding: Tensor) -> Tensor:
        """Raw embeddings (b, 512) -> tokens (b, 16, width). A zero embedding makes the tokens of the negative."""
        return self.image_proj.tokens(embedding)

    def keys_values(self, number: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, l, width) -> keys and values (b, l, channels) of the layer that the file calls `number`."""
        layer: Any = self.ip_adapter[number]
        return layer.to_k_ip(tokens), layer.to_v_ip(tokens)


def build(state: Mapping[str, Tensor], operations: Any = nn, dtype: torch.dtype | None = None) -> InstantID:
    """The module with these weights. Raises LikenessError when they are not exactly InstantID's."""
    config = identify(state)
    return fill(lambda ops: InstantID(config, ops, dtype, "meta"), state, "This InstantID file", operations, dtype)


def layer_keys(blocks: Mapping[str, int]) -> list[str]:
    """The host's layers in the order of the file: all on the way down, then all on the way up, then the middle."""
    return [key for way in ("input", "output", "middle") for key in blocks if key.startswith(f"{way}.")]
