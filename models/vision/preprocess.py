"""Pictures as the vision encoders want them: size and normalisation of each family."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..common.images import resize, to_chw, to_rgb
from .vit import VitConfig

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALISATION = {"dinov2": _IMAGENET, "mae": _IMAGENET, "siglip": _HALF, "clip": _OPENAI}


def default_size(config: VitConfig) -> int:
    """Side in pixels of the square picture that this encoder gets when it is used alone."""
    side = config.grid * config.patch
    if config.family == "dinov2" and config.patch == 14:
        return 224  # trained at 518, made for any size; 16 x 16 tokens are enough for a subject
    if config.family == "siglip" and side == 378:
        return 384  # the release is fed 384 pixels: its patch layer leaves the last 6 out
    return side


def common_size(configs: Sequence[VitConfig], first: int | None = None) -> tuple[int, ...]:
    """Sides in pixels, one an encoder, so that all token grids equal the first one's (`first`: its side)."""
    if not configs:
        return ()
    size = default_size(configs[0]) if first is None else first
    grid = size // configs[0].patch
    return (size, *(grid * config.patch for config in configs[1:]))


def normalise(pixels: Tensor, config: VitConfig) -> Tensor:
    """(b, 3, h, w) in 0..1 -> the same with the family's mean and standard deviation taken out."""
    mean, std = (pixels.new_tensor(row).view(1, 3, 1, 1) for row in NORMALISATION[config.family])
    return (pixels - mean) / std


def preprocess(image: Tensor, config: VitConfig, size: int | None = None) -> Tensor:
    """Picture (b, h, w, 3) in 0..1 -> normalised float32 (b, 3, s, s); bicubic, antialias, nothing cropped.

    A picture that is not square is squeezed, so cut_out or pad_to_square goes first where the shape matters.
    """
    side = default_size(config) if size is None else size
    return normalise(to_chw(resize(to_rgb(image), side, side)), config)
