"""From the sums of a guidance pass to masks over the whole picture: prompts that see a part, the artist's mask, overlaps."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.records import Guidance
from ..realcustom.masks import MaskSum
from .row_masks import area_of

Area = tuple[int, int, int, int]  # height, width, y, x in latent cells


class Made(NamedTuple):
    """The mask (b, 1, h, w) of a word in one prompt, which sees the whole picture or an area of it."""
    mask: Tensor
    area: Area | None


def finished(total: MaskSum, guidance: Guidance, area: Area | None, region: Tensor | None, latent: tuple[int, int]) -> Made:
    """The mask of one prompt. region (n, h, w): mask of the prompt itself (Set Mask). Raises LikenessError for an area that
    is too small for the scope."""
    height, width = total.size
    if "threshold" not in total.words and int(height * width * guidance.scope) < 1:
        where = (f"the area of {8 * area[1]} x {8 * area[0]} pixels at {8 * area[3]}, {8 * area[2]}" if area is not None
                 else f"the picture of {8 * latent[1]} x {8 * latent[0]} pixels")
        raise LikenessError(f"The mask of \"{guidance.word.text}\" cannot follow {where}: at scope {guidance.scope:g} not one "
                            f"of its {width} x {height} places is left; make it larger, or raise the scope.")
    if region is not None:
        cells = torch.stack([area_of(one.float(), area, latent, (height, width)) for one in region])
        assert total.total is not None
        region = cells[[k % len(cells) for k in range(total.total.shape[0])], None].to(total.total)
    return Made(total.finish(guidance.scope, region=region), area)


def fitted(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, h, w) -> (b, 1, *size) by area."""
    return F.interpolate(mask[:, None].float(), size, mode="area")


def composed(made: list[Made], latent: tuple[int, int], mask: Tensor | None) -> Tensor:
    """(b, 1, h, w) over the whole picture: the larger one where several prompts hold the word, times the artist's mask."""
    if all(one.area is None for one in made):
        out = torch.stack([one.mask for one in made]).amax(0)
    else:
        out = made[0].mask.new_zeros(made[0].mask.shape[0], 1, *latent)
        for one in made:
            height, width, y, x = one.area or (*latent, 0, 0)
            place = out[..., y:y + height, x:x + width]
            place.copy_(torch.maximum(place, F.interpolate(one.mask, (height, width), mode="nearest-exact")))
    if mask is None:
        return out
    own = fitted(mask, (out.shape[-2], out.shape[-1])).to(out)
    return out * own[[k % own.shape[0] for k in range(out.shape[0])]]


def shared(masks: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """All divided by their sum where that is above 1 as soon as one of `names`, which ask for it, is there: overlapping
    subjects share a place."""
    if not names & masks.keys() or len(masks) < 2:
        return dict(masks)
    size = max((tuple(mask.shape[-2:]) for mask in masks.values()), key=lambda pair: pair[0] * pair[1])
    even = {name: F.interpolate(mask, size, mode="nearest-exact") for name, mask in masks.items()}
    batch = max(mask.shape[0] for mask in even.values())
    rows = {name: mask[[k % mask.shape[0] for k in range(batch)]] for name, mask in even.items()}
    total = torch.stack(list(rows.values())).sum(0).clamp(min=1.0)
    return {name: one / total for name, one in rows.items()}
