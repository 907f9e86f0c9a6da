"""CustAny's three losses: 2.0 L_normal + 1.0 L_decouple + 0.5 L_contrast."""
from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError

Number = TypeVar("Number", float, Tensor)
CONTRAST_MODES = ("raw", "clamp", "abs")


def denoise(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in float 32; weight (c,) is one factor per channel, any other shape is broadcast."""
    error = (prediction.float() - target.float()).square()
    if weight is not None:
        error = error * over_channels(weight.to(error), error.ndim)
    return error.mean()


def over_channels(weight: Tensor, ndim: int) -> Tensor:
    """One factor per channel (c,) as (1, c, 1, ...) of so many axes; any other shape as it is."""
    return weight.view(1, -1, *[1] * (ndim - 2)) if weight.ndim == 1 else weight


def contrast(fused: Tensor, masked: Tensor, mode: str = "raw", keep: Tensor | None = None) -> Tensor:
    """Mean cosine of the fused word row (b, d) and f_msk (b, d); keep (b,) of 0 and 1 leaves samples out.

    mode: "raw" the signed cosine as printed in the paper, "clamp" only what is positive, "abs" its size.
    """
    value = cosine(fused, masked)
    if mode == "clamp":
        value = value.clamp(min=0)
    elif mode == "abs":
        value = value.abs()
    elif mode != "raw":
        raise LikenessError(f"The contrast loss knows the modes {', '.join(CONTRAST_MODES)}, got '{mode}'.")
    return mean(value, keep)


def cosine(fused: Tensor, masked: Tensor) -> Tensor:
    """Cosine per sample (b,), in float 32."""
    return F.cosine_similarity(fused.float(), masked.float(), dim=-1)


def mean(value: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean of (b,) over the kept samples; zero when none is kept."""
    return value.mean() if keep is None else (value * keep).sum() / keep.sum().clamp(min=1)


def total(normal: Number, decouple: Number, contrast_: Number,
          weights: tuple[float, float, float] = (2.0, 1.0, 0.5)) -> Number:
    """Weighted sum of the three."""
    return weights[0] * normal + weights[1] * decouple + weights[2] * contrast_
