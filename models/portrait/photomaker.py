"""PhotoMaker (arXiv 2312.04461), v1 and v2: one stacked identity out of several pictures, fused into the class word."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import LikenessError
from ..vision.load import load_vit
from ..vision.vit import ViT
from .perceiver import Perceiver, PerceiverConfig, perceiver_config
from .weights import fill, part, shapes_of

SPACE, PACK = "w600k_r50", "buffalo_l"  # the recogniser that v2 was trained on, and the pack that has it
VISION, QFORMER = "vision_model.", "qformer_perceiver."
CLIP_HEAD_DIM, QFORMER_HEAD_DIM = 64, 128


class PhotoMakerConfig(NamedTuple):
    """width: of the text, the sum of both projections. qformer None: v1. per: tokens a picture."""
    vision: int
    projections: tuple[int, int]
    qformer: PerceiverConfig | None = None
    embedding: int = 0
    hidden: int = 0  # inside the projection of the embedding
    per: int = 1

    @property
    def width(self) -> int:
        return sum(self.projections)

    @property
    def version(self) -> int:
        return 1 if self.qformer is None else 2


def is_photomaker(names: Iterable[str]) -> bool:
    """Whether these are the tensor names of an identity encoder, without the part's own prefix."""
    return {"visual_projection.weight", "visual_projection_2.weight", "fuse_module.layer_norm.weight"} <= set(names)


def identify(state: Mapping[str, Any]) -> PhotoMakerConfig:
    """From names and shapes alone; v2 is told by its perceiver. Raises LikenessError when a part is missing."""
    shapes = shapes_of(state)
    try:
        first, vision = shapes["visual_projection.weight"]
        config = PhotoMakerConfig(vision, (first, shapes["visual_projection_2.weight"][0]))
        if QFORMER + "token_norm.weight" not in shapes:
            return config
        hidden, embedding = shapes[QFORMER + "token_proj.0.weight"]
        per = shapes[QFORMER + "token_proj.2.weight"][0] // config.width
    except (KeyError, ValueError) as error:
        raise LikenessError("This PhotoMaker file lacks a part of its identity encoder; download it again.") from error
    resampler = perceiver_config(part(shapes, QFORMER + "perceiver_resampler."), QFORMER_HEAD_DIM, "This PhotoMaker v2 file")
    return config._replace(qformer=resampler, embedding=embedding, hidden=hidden, per=per)


class Mlp(nn.Module):
    """Norm, two layers with GELU between; a residual round it where width in is width out."""

    def __init__(self, source: int, width: int, residual: bool, operations: Any, place: dict[str, Any]):
        super().__init__()
        self.residual = residual
        self.layernorm = operations.LayerNorm(source, **place)
        self.fc1 = operations.Linear(source, width, **place)
        self.fc2 = operations.Linear(width, width, **place)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(self.layernorm(x))))
        return x + y if self.residual else y


class Fuse(nn.Module):
    """The class word's vector (k, width) and an identity (k, width) -> the fused vector (section 3.2)."""

    def __init__(self, width: int, operations: Any, place: dict[str, Any]):
        super().__init__()
        self.mlp1 = Mlp(2 * width, width, False, operations, place)
        self.mlp2 = Mlp(width, width, True, operations, place)
        self.layer_norm = operations.LayerNorm(width, **place)

    def forward(self, text: Tensor, identity: Tensor) -> Tensor:
        return self.layer_norm(self.mlp2(self.mlp1(torch.cat([text, identity], -1)) + text))


class Qformer(nn.Module):
    """A face embedding (n, 512) becomes tokens (n, per, width), which then look at the picture's own (n, 257, vision)."""

    def __init__(self, config: PhotoMakerConfig, operations: Any, place: dict[str, Any]):
        super().__init__()
        assert config.qformer is not None
        self.per = config.per
        self.token_proj = nn.Sequential(operations.Linear(config.embedding, config.hidden, **place), nn.GELU(),
                                        operations.Linear(config.hidden, config.per * config.width, **place))
        self.token_norm = operations.LayerNorm(config.width, **place)
        self.perceiver_resampler = Perceiver(config.qformer, operations, **place)

    def forward(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.token_norm(self.token_proj(embedding).unflatten(-1, (self.per, -1)))
        return tokens + self.perceiver_resampler(tokens, hidden)


class PhotoMaker(nn.Module):
    """The identity encoder, tensors named as in the file but for the vision tower, which is the pack's own ViT."""

    def __init__(self, config: PhotoMakerConfig, operations: Any = nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.config = config
        self.visual_projection, self.visual_projection_2 = (
            operations.Linear(config.vision, width, bias=False, **place) for width in config.projections)
        self.fuse_module = Fuse(config.width, operations, place)
        self.qformer_perceiver = None if config.qformer is None else Qformer(config, operations, place)
        self.vision: ViT

    @property
    def size(self) -> int:
        """Side in pixels of the pictures that the tower reads."""
        return self.vision.config.grid * self.vision.config.patch

    def identities(self, pixels: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Normalised pixels (n, 3, s, s), for v2 raw face embeddings (n, 512) -> identity tokens (n, per, width)."""
        if self.qformer_perceiver is None:
            pooled = self.vision(pixels).cls
            return torch.cat([self.visual_projection(pooled), self.visual_projection_2(pooled)], -1)[:, None]
        # the last block's own output: the final norm belongs to the class token alone
        hidden = self.vision(pixels, layers=(-1,)).hidden[0]
        return self.qformer_perceiver(embeddings, hidden)

    def fuse(self, text: Tensor, identities: Tensor) -> Tensor:
        """Vectors of the repeated class word (k, width) and identity tokens (k, width) -> (k, width)."""
        return self.fuse_module(text, identities)


def build(state: Mapping[str, Tensor], operations: Any = nn, dtype: torch.dtype | None = None) -> PhotoMaker:
    """The encoder with these weights (names without `id_encoder.`). Raises LikenessError when they are not exactly its own."""
    config = identify(state)
    tower = {name: value for name, value in state.items() if name.startswith(VISION)}
    # the width of a head stands in no shape: CLIP's are 64 wide
    heads = {"num_heads": str(max(1, config.vision // CLIP_HEAD_DIM)), "likeness.family": "clip"}
    rest = {name: value for name, value in state.items() if not name.startswith(VISION)}
    module = fill(lambda ops: PhotoMaker(config, ops, dtype, "meta"), rest, "This PhotoMaker file", operations, dtype)
    vision, found = load_vit(tower, heads, operations, dtype)
    if found.width != config.vision:
        raise LikenessError(f"This PhotoMaker file has a vision tower of width {found.width} and projections for "
                            f"{config.vision}; download it again.")
    module.vision = vision
    return module
