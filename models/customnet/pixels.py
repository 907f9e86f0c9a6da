"""Pictures as the authors' code prepares them: the object on white, and what the CLIP image tower sees."""
from __future__ import annotations

import math
from collections.abc import Sequence

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
    image, mask = image.cpu(), mask.cpu()  # what follows counts in float64, pixel by pixel
    inside = (mask * 255).round() > 127
    box = bounding_box(inside.float())
    if box is None:
        raise LikenessError("The mask is nowhere above one half, so there is no object to take; paint the object white.")
    x0, y0, x1, y1 = box
    levels = torch.where(inside[..., None], (image * 255).round(), 255.0)[y0:y1, x0:x1]
    height, width = fitted(y1 - y0, x1 - x0)
    shrunk = shrink(levels, height, width) / 255
    top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
    canvas, silhouette = torch.ones(CANVAS, CANVAS, 3), torch.zeros(CANVAS, CANVAS)
    canvas[top:top + height, left:left + width] = shrunk
    covered = F.interpolate(inside[None, None, y0:y1, x0:x1].float(), (height, width), mode="area")[0, 0]
    silhouette[top:top + height, left:left + width] = covered
    return canvas, silhouette


def fitted(height: int, width: int, limit: int = OBJECT) -> tuple[int, int]:
    """The size that fits into a square of `limit` and keeps the shape best; a smaller one stays as it is."""
    if height <= limit and width <= limit:
        return height, width
    long, short = max(height, width), min(height, width)
    exact = limit * short / long
    other = max(1, min(math.floor(exact), math.ceil(exact), key=lambda n: abs(long / short - limit / n) if n else 0))
    return (limit, other) if height >= width else (other, limit)


def shrink(levels: Tensor, height: int, width: int) -> Tensor:
    """(h, w, c) in 0..255 -> (height, width, c): Lanczos of three lobes, columns first, rounded to 8 bits after each pass."""
    across = _lanczos(levels.shape[1], width)
    down = _lanczos(levels.shape[0], height)
    rows = torch.einsum("ow,hwc->hoc", across, levels.double()).add(0.5).floor().clamp(0, 255)
    return torch.einsum("oh,hwc->owc", down, rows).add(0.5).floor().clamp(0, 255).float()


def _lanczos(length: int, out: int) -> Tensor:
    """(out, length) weights; below one pixel a pixel the kernel widens, so that nothing is skipped."""
    if length == out:
        return torch.eye(length, dtype=torch.float64)
    scale = length / out
    wide = max(1.0, scale)
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * scale
    first = (centre - 3 * wide + 0.5).floor().clamp(min=0)[:, None]
    last = (centre + 3 * wide + 0.5).floor().clamp(max=length)[:, None]
    place = torch.arange(length, dtype=torch.float64)[None]
    x = (place - centre[:, None] + 0.5) / wide
    weight = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    weight = torch.where((place >= first) & (place < last), weight, 0.0)
    return weight / weight.sum(1, keepdim=True)


def pixel_values(image: Tensor, side: int = 224, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """(b, 3, h, w) in -1..1 -> (b, 3, side, side) for the image tower: plain bicubic, corners aligned, neither cropped nor
    rounded nor clamped."""
    resized = F.interpolate(image.float(), (side, side), mode="bicubic", align_corners=True)
    middle, spread = (torch.tensor(t, device=image.device).view(1, 3, 1, 1) for t in (mean, std))
    return ((resized + 1) / 2 - middle) / spread
