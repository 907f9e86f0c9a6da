"""RealCustom++'s layout for a base and two encoders, and their features in training."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..realcustom.config import RealCustomConfig, base_of
from ..realcustom.preprocess import beside, quarters_beside, views
from ..realcustom.projector import HEAD
from ..vision.preprocess import normalise
from ..vision.vit import VitConfig
from .realcustom import features
from .training_base import CheckpointBase, MiniatureBase

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def config_of(width: int, layers: tuple[tuple[str, int], ...], encoders: Sequence[VitConfig], size: int) -> RealCustomConfig:
    """The published structure with widths from these parts; each encoder is read one block before its last.

    Raises LikenessError for encoders whose features do not fit side by side."""
    vision = sum(config.width for config in encoders)
    names = " + ".join(f"{config.family} {config.width}, patch {config.patch}" for config in encoders)
    if len({config.patch for config in encoders}) > 1 or vision % HEAD:
        raise LikenessError("RealCustom++ lays the tokens of its encoders side by side and needs equal patches and widths that "
                            f"add up to a multiple of {HEAD}, got {names}; take SigLIP SO400M and DINOv2-L with registers.")
    return RealCustomConfig(width, vision, tuple((config.family, config.width) for config in encoders),
                            tuple((config.depth - 2,) for config in encoders), tuple(layers), base=base_of(width), size=size,
                            registers=tuple(config.registers for config in encoders))


def miniature_encode(base: MiniatureBase, config: RealCustomConfig) -> Encode:
    """Reference pictures (n, 3, s, s) in 0..1 -> deep (n, t, v) and local features (n, 4 t, v)."""
    @torch.no_grad()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = views(pixels.movedim(1, -1), config.size)

        def read(picture: Tensor) -> list[Tensor]:
            picture = picture.to(base.device)
            return [model(normalise(picture, vit), layers=blocks).hidden[0][:, vit.prefix:]
                    for (model, vit), blocks in zip(base.encoders, config.blocks, strict=True)]
        return beside(read(seen.whole)), quarters_beside(read(seen.quarters))
    return encode


def checkpoint_encode(base: CheckpointBase, config: RealCustomConfig) -> Encode:
    """The same with encoders under the host's memory manager."""
    @torch.no_grad()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        deep, local = features(base.encoders, views(pixels.movedim(1, -1).cpu(), config.size), config)
        assert deep is not None and local is not None
        return deep.to(base.device).clone(), local.to(base.device).clone()
    return encode
