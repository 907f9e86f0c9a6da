"""Where the object shall stand: boxes from numbers, masks, or whatever core's detectors send."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.masks import as_mask, bounding_box
from .pixels import CANVAS, OBJECT

Box = tuple[float, float, float, float]  # x, y, width, height
Corners = tuple[int, int, int, int]  # x0, y0, x1, y1
FITS = ("square, cropped at the frame", "stretched")
MEANS = ("object", "whole reference")
SMALLEST = 8  # pixels: one cell of the latent


class Placement(NamedTuple):
    """LIKENESS_PLACEMENT: boxes as fractions of the frame (may leave it), one row a picture.

    fit "square": the longer side in the new picture's own pixels counts, as in training, where the object filled 200 of 256
    pixels of a square; means: whether a box shows the object itself, or the whole reference with its margin."""
    boxes: tuple[Box, ...]
    fit: str = FITS[1]
    means: str = MEANS[1]

    def pixels(self, width: int, height: int) -> list[Corners]:
        """x0 y0 x1 y1 of each row's whole reference in a picture of this size. Raises LikenessError for a box too small or
        outside."""
        grow = CANVAS / OBJECT if self.means == MEANS[0] else 1.0
        # what has to be in the picture is what the box was drawn for, not the white margin round the object
        return [_checked(self._corners(box, width, height, grow), self._corners(box, width, height, 1.0), width, height)
                for box in self.boxes]

    def _corners(self, box: Box, width: int, height: int, grow: float) -> Corners:
        x, y, w, h = box[0] * width, box[1] * height, box[2] * width, box[3] * height
        wide, high = (max(w, h) * grow,) * 2 if self.fit == FITS[0] else (w * grow, h * grow)
        left, top = round(x + (w - wide) / 2), round(y + (h - high) / 2)
        return left, top, left + round(wide), top + round(high)


WHOLE = Placement(((0.0, 0.0, 1.0, 1.0),))


def _checked(box: Corners, own: Corners, width: int, height: int) -> Corners:
    x0, y0, x1, y1 = box
    if x1 - x0 < SMALLEST or y1 - y0 < SMALLEST:
        raise LikenessError(f"The box of the object is {x1 - x0} x {y1 - y0} pixels in a picture of {width} x {height}, it needs "
                            f"at least {SMALLEST} x {SMALLEST}; make it larger.")
    x0, y0, x1, y1 = own
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise LikenessError(f"The box {x0}, {y0} to {x1}, {y1} lies outside of the picture of {width} x {height}; move it in.")
    return box


def place(boxes: Sequence[Box], width: int, height: int, fit: str, means: str) -> Placement:
    """Pixel boxes (x, y, w, h) in a frame of this size -> PLACEMENT. Raises LikenessError for boxes without area or outside."""
    out = []
    for x, y, w, h in boxes:
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            raise LikenessError(f"The box {x:g}, {y:g} of {w:g} x {h:g} has no area; draw it from its upper left corner, larger.")
        out.append((x / width, y / height, w / width, h / height))
    placement = Placement(tuple(out), fit, means)
    placement.pixels(width, height)
    return placement


def mask_boxes(mask: Tensor, needed: bool = True) -> tuple[list[Box | None], int, int]:
    """Tight boxes of masks (b, h, w) or like, and the masks' width and height; None for an empty one, for which LikenessError is
    raised where it is needed."""
    mask = mask if mask.ndim > 2 else mask[None]
    mask = mask[..., 0] if mask.ndim == 4 and mask.shape[-1] == 1 else mask
    rows = as_mask(mask, mask.shape[0], *mask.shape[-2:])
    out: list[Box | None] = []
    for number, row in enumerate(rows, 1):
        box = bounding_box(row)
        if box is None:
            if needed:
                raise LikenessError(f"Mask {number} of {len(rows)} is empty, so it gives no place; paint where the object shall "
                                    "stand.")
            out.append(None)
            continue
        x0, y0, x1, y1 = map(float, box)
        out.append((x0, y0, x1 - x0, y1 - y0))
    return out, rows.shape[-1], rows.shape[-2]


def detected_boxes(value: Any, needed: bool = True) -> list[Box | None]:
    """BOUNDING_BOX of any node -> one pixel box a picture: the surest of its boxes, else the largest; None where a picture has
    none and needs none.

    Taken: one box, a list of boxes of one picture, a list of such lists. Raises LikenessError."""
    frames = [[]] if not needed and isinstance(value, Sequence) and not value else _frames(value)
    return [None if not frame and not needed else _best(frame, number) for number, frame in enumerate(frames, 1)]


def _frames(value: Any) -> list[list[Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        return [[value]]
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        if all(isinstance(entry, Mapping) for entry in value):
            return [list(value)]
        if all(isinstance(entry, (list, tuple)) and all(isinstance(box, Mapping) for box in entry) for entry in value):
            return [list(entry) for entry in value]
    what = "an empty list" if isinstance(value, Sequence) and not value else f"a {type(value).__name__}"
    raise LikenessError(f"A box with x, y, width and height was expected, {what} came; connect a detector that finds the object, "
                        "or core's Bounding Box.")


def _best(frame: list[Mapping[str, Any]], number: int) -> Box:
    if not frame:
        raise LikenessError(f"The detector found nothing in picture {number}; lower its threshold, or give the place by hand.")
    try:
        boxes = [tuple(float(box[name]) for name in ("x", "y", "width", "height")) for box in frame]
        scores = [(float(box.get("score") or 0.0), box_[2] * box_[3]) for box, box_ in zip(frame, boxes, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise LikenessError(f"A box with the numbers x, y, width and height was expected, {dict(frame[0])} came; connect another "
                            "BOUNDING_BOX.") from error
    x, y, w, h = boxes[max(range(len(boxes)), key=scores.__getitem__)]
    return x, y, w, h


def preview(placement: Placement, width: int, height: int, image: Tensor | None = None) -> Tensor:
    """(n, height, width, 3): the place of the whole reference as a frame, that of the object shaded, over a picture or grey."""
    out = torch.full((len(placement.boxes), height, width, 3), 0.82) if image is None else image.cpu().clone()
    line = max(1, min(width, height) // 128)
    for row, (x0, y0, x1, y1) in zip(out, placement.pixels(width, height), strict=True):
        margin_x, margin_y = (round((end - start) * (1 - OBJECT / CANVAS) / 2) for start, end in ((x0, x1), (y0, y1)))
        inner = (x0 + margin_x, y0 + margin_y, x1 - margin_x, y1 - margin_y)
        _region(row, inner).mul_(0.5).add_(torch.tensor([0.13, 0.36, 0.49]))
        for edge in ((x0, y0, x1, y0 + line), (x0, y1 - line, x1, y1), (x0, y0, x0 + line, y1), (x1 - line, y0, x1, y1)):
            _region(row, edge).copy_(torch.tensor([0.95, 0.45, 0.1]))
    return out


def _region(row: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    x0, y0, x1, y1 = (max(0, value) for value in box)
    return row[y0:y1, x0:x1]
