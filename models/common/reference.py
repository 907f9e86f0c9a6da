"""A reference picture on its way to the encoders: where the subject is, and what to do when there is none."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import LikenessError
from .images import pad_to_square, resize, split_alpha, to_rgb
from .masks import as_mask, cut_out

PRESETS = {"subject on white": "white"}  # name: background
ON_MISSING = ("error", "pass through")


class Prepared(NamedTuple):
    """image (b, s, s, 3), mask (b, s, s), and for each picture whether a subject was found."""
    image: Tensor
    mask: Tensor
    found: tuple[bool, ...]


def subject_mask(image: Tensor, mask: Tensor | None) -> Tensor | None:
    """(b, h, w) of the subject in its own picture: the mask, else the alpha channel, else None."""
    rgb, alpha = split_alpha(image)
    if mask is None:
        return alpha
    return as_mask(mask, *rgb.shape[:3])


def check_found(found: Sequence[bool], on_missing: str) -> None:
    """LikenessError that names the pictures without a subject, unless they shall pass."""
    missing = [str(number) for number, ok in enumerate(found, 1) if not ok]
    if not missing or on_missing != "error":
        return
    which = f"The mask of picture {', '.join(missing)} of {len(found)}" if len(found) > 1 else "The mask"
    raise LikenessError(f"{which} is empty, so there is no subject to take; make the subject white in the mask "
                        "(MASK of Load Image: for a transparent picture put Invert Mask between, a mask painted in "
                        "the mask editor is right as it is), or set on_missing to pass through.")


def prepare(image: Tensor, mask: Tensor | None, preset: str, margin: float, size: int,
            on_missing: str = "error") -> Prepared:
    """Any picture (b, h, w, c) -> the subject cut out, on the preset's background, in a square with a margin.

    size 0 keeps the pixels as they are. A picture without a subject passes whole with an empty mask, or
    raises LikenessError."""
    background = PRESETS[preset]
    cut = cut_out(image, mask, background, margin, size or None)
    check_found(cut.found, on_missing)
    if all(cut.found):
        return Prepared(cut.image, cut.mask, tuple(cut.found))
    side = cut.image.shape[1]
    whole = resize(pad_to_square(to_rgb(image, background), background), side, side)
    keep = torch.tensor(cut.found, device=whole.device)[:, None, None]
    return Prepared(torch.where(keep[..., None], cut.image, whole), cut.mask * keep, tuple(cut.found))
