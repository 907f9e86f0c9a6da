"""Pictures as the authors' code prepares them: the object on white, and what the CLIP image tower sees."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.masks import bounding_box

CANVAS, OBJECT = 256, 200  # pixels: side of the reference, longest side of the object in it
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def object_canvas(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Picture (h, w, 3) and mask (h, w) in 0..1 -> object on white (256, 256, 3) and its mask (256, 256).

    A pixel belongs to the object or not (mask above 127 of 255). The cut-out is shrunk, never enlarged, to 200 pixels.
    Works on 8 bits as the authors' code does. Raises LikenessError for an empty mask."""
    image, mask = image.cpu(), mask.cpu()
    inside = (mask * 255).round() > 127
    box = bounding_box(inside.float())
    if box is None:
        raise LikenessError("The mask is nowhere above one half, so there is no object to take; paint the object white.")
    x0, y0, x1, y1 = box
    levels = torch.where(inside[..., None], (image * 255).round(), 255.0)[y0:y1, x0:x1]
    small = shrunk(levels) / 255
    height, width = small.shape[:2]
    top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
    canvas, silhouette = torch.ones(CANVAS, CANVAS, 3), torch.zeros(CANVAS, CANVAS)
    canvas[top:top + height, left:left + width] = small
    covered = F.interpolate(inside[None, None, y0:y1, x0:x1].float(), (height, width), mode="area")[0, 0]
    silhouette[top:top + height, left:left + width] = covered
    return canvas, silhouette


def shrunk(levels: Tensor, limit: int = OBJECT) -> Tensor:
    """(h, w, 3) of whole numbers in 0..255 -> no longer than `limit` either way, as Pillow's thumbnail makes it with Lanczos."""
    from PIL import Image

    picture = Image.fromarray(levels.byte().numpy())
    picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).float()


def squashed(images: Tensor) -> Tensor:
    """Pictures (b, h, w, 3) in 0..1 of any shape -> (b, 256, 256, 3), as Pillow's bicubic resize makes them on 8 bits; those of
    that size: unchanged."""
    from PIL import Image

    if images.shape[1:3] == (CANVAS, CANVAS):
        return images
    levels = (images.cpu().clamp(0, 1) * 255).round().byte().numpy()
    rows = [np.array(Image.fromarray(one).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)) for one in levels]
    return torch.from_numpy(np.stack(rows)).to(images) / 255


def pixel_values(image: Tensor, side: int = 224, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """(b, 3, h, w) in -1..1 -> (b, 3, side, side) for the image tower: plain bicubic, corners aligned, neither cropped nor
    rounded nor clamped."""
    resized = F.interpolate(image.float(), (side, side), mode="bicubic", align_corners=True)
    middle, spread = (torch.tensor(t, device=image.device).view(1, 3, 1, 1) for t in (mean, std))
    return ((resized + 1) / 2 - middle) / spread
