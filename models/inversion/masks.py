"""A mask over the picture, brought to the cells of a latent."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError


def fit_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n, h, w) or (n, 1, h, w) -> (n or b, 1, ...) for a latent (b, c, h, w) or a video (b, c, frames, h, w).

    Raises LikenessError for an empty mask, and for a number of masks that fits neither pictures nor frames.
    """
    mask = torch.nan_to_num(mask.float()).reshape(-1, 1, *mask.shape[-2:]).clamp(0, 1)
    if float(mask.max()) <= 0.0:
        raise LikenessError("The mask is empty, so nothing may change; paint where the picture may change, or disconnect the "
                            "mask.")
    count, batch = mask.shape[0], shape[0]
    # the mean of a cell's own pixels: a wider filter would make cells outside of a hard mask a little less than black
    finer = mask.shape[-2] >= shape[-2] and mask.shape[-1] >= shape[-1]
    mask = F.interpolate(mask, shape[-2:], mode="area") if finer else F.interpolate(mask, shape[-2:], mode="bilinear")
    if len(shape) == 5:
        if count not in (shape[2], shape[2] * batch):
            raise LikenessError(f"The latent is a video of {shape[2]} frames, the MASK has {count}; give one mask a latent "
                                "frame.")
        return mask.reshape(-1, 1, shape[2], *shape[-2:])
    if count not in (1, batch):
        raise LikenessError(f"There are {count} masks for {batch} pictures; connect one mask, or one for each picture.")
    return mask
