"""Where the object stands: the reference pasted at its box on a white canvas, which the network sees beside the noise."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError

WHITE = 1.0
Box = Sequence[int] | Tensor


def _corners(box: Box) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (int(value) for value in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def location_canvas(image: Tensor, box: Box, size: tuple[int, int] | None = None) -> Tensor:
    """Reference (b, 3, h, w) in -1..1, pixel box x0 y0 x1 y1 (x1, y1 outside) on a canvas of `size` -> (b, 3, *size).

    The WHOLE reference with its margin is resized (bilinear, not antialiased, as in training) into the box; what
    leaves the canvas is cropped from the reference first. Raises LikenessError for a box without area or outside."""
    height, width = size or (image.shape[-2], image.shape[-1])
    canvas = image.new_full((image.shape[0], image.shape[1], height, width), WHITE)
    x0, y0, x1, y1 = _corners(box)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if x0 == x1 or y0 == y1:
        raise LikenessError(f"The box {x0}, {y0}, {x1}, {y1} has no area, so there is no room for the object; make it larger.")
    if left >= right or top >= bottom:
        raise LikenessError(f"The box {x0}, {y0}, {x1}, {y1} lies outside of the picture of {width} x {height}; move it in.")
    rows = _part(image.shape[-2], y0, y1, top, bottom)
    columns = _part(image.shape[-1], x0, x1, left, right)
    part = image[:, :, rows, columns]
    canvas[:, :, top:bottom, left:right] = F.interpolate(part, (bottom - top, right - left), mode="bilinear",
                                                         align_corners=False)
    return canvas


def _part(length: int, start: int, end: int, first: int, last: int) -> slice:
    """Which pixels of the reference's `length` fall on first..last when it is spread over start..end."""
    before = int((first - start) * length / (end - start))
    after = int((end - last) * length / (end - start))
    return slice(before, max(before + 1, length - after))


def location_canvases(image: Tensor, boxes: Sequence[Box], size: tuple[int, int] | None = None) -> Tensor:
    """One canvas a row: image (1 or n, 3, h, w), n boxes -> (n, 3, *size)."""
    return torch.cat([location_canvas(image[k % image.shape[0]][None], box, size) for k, box in enumerate(boxes)])


def hole(background: Tensor, box: Box) -> Tensor:
    """Background (b, 3, h, w) in -1..1 with the box made white: what the inpaint variant sees."""
    x0, y0, x1, y1 = _corners(box)
    out = background.clone()
    out[:, :, max(y0, 0):max(y1, 0), max(x0, 0):max(x1, 0)] = WHITE
    return out
