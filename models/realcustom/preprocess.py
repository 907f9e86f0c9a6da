"""The release's way from a reference picture to the pixels of its encoders, and their features side by side."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..common.images import to_chw

SIDE = 384


class Views(NamedTuple):
    """whole (b, 3, s, s); quarters (4 b, 3, s, s): every second pixel, batch outermost, then row, then column phase."""
    whole: Tensor
    quarters: Tensor


def views(picture: Tensor, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Views:
    """Picture (b, h, w, 3) in 0..1 -> what both encoders see, before the normalisation of each.

    Squeezed to 2s x 2s, then once more to s x s with aligned corners, never antialiased; the quarters are the four
    phases of 2s x 2s, no tiles. dtype bfloat16: as the release's app, which rounds the large picture first.
    """
    large = F.interpolate(to_chw(picture).float(), (2 * side, 2 * side), mode="bilinear", align_corners=False).to(dtype)
    # in float32 and rounded once: the CPU's own bfloat16 resampling depends on the number of threads
    whole = F.interpolate(large.float(), (side, side), mode="bilinear", align_corners=True).to(dtype)
    quarters = rearrange(large, "b c (h p) (w q) -> (b p q) c h w", p=2, q=2)
    return Views(as_bytes(whole), as_bytes(quarters))


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels on their way through a PIL picture: cut off to whole bytes, not rounded; float32 in 0..1."""
    return (pixels * 255).to(torch.uint8).float() / 255


def beside(features: Sequence[Tensor]) -> Tensor:
    """Patch tokens (b, n, d) of every encoder in their order -> (b, n, sum of d)."""
    return torch.cat([one.float() for one in features], -1)


def quarters_beside(features: Sequence[Tensor]) -> Tensor:
    """Patch tokens (4 b, n, d) of the quarters -> (b, 4 n, sum of d), the four phases of a place next to each other."""
    return rearrange(beside(features), "(b p) n d -> b (n p) d", p=4)
