"""Any picture of an object -> the reference that CustomNet was trained with."""
from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import pad_to_square, resize, split_alpha, to_rgb
from ..common.reference import Prepared, check_found, subject_mask
from .pixels import CANVAS, object_canvas

PRESET = "CustomNet"


def prepare(image: Tensor, mask: Tensor | None, on_missing: str = "error") -> Prepared:
    """Pictures (b, h, w, c) -> (b, 256, 256, 3) on white, the object 200 pixels long at most.

    A picture without an object passes whole with an empty mask, or raises LikenessError, as does one with neither mask
    nor alpha channel."""
    silhouettes = subject_mask(image, mask)
    if silhouettes is None:
        raise LikenessError("The picture has neither a mask nor an alpha channel, so nothing tells the object from its "
                            "background; connect a mask, for example of core's Remove Background.")
    found = [bool((row * 255 >= 127.5).any()) for row in silhouettes]
    check_found(found, on_missing)
    colours = split_alpha(image)[0]
    rows = []
    for number, there in enumerate(found):
        if there:
            rows.append(object_canvas(colours[number], silhouettes[number]))
        else:
            whole = pad_to_square(to_rgb(image[number:number + 1]))
            rows.append((resize(whole, CANVAS, CANVAS)[0], torch.zeros(CANVAS, CANVAS)))
    return Prepared(torch.stack([picture for picture, _ in rows]), torch.stack([row for _, row in rows]), tuple(found))
