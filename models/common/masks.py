"""Masks of a subject (1 = subject): to (b, h, w), bounding boxes, and the cut-out that the encoders see."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LikenessError
from .images import Background, background_color, composite, resize, split_alpha, to_rgb

Box = tuple[int, int, int, int]


class CutOut(NamedTuple):
    """image (b, s, s, 3), mask (b, s, s), and for each picture whether its mask held anything."""

    image: Tensor
    mask: Tensor
    found: list[bool]


def _area(mask: Tensor, height: int, width: int) -> Tensor:
    if mask.shape[1:] == (height, width):
        return mask
    return F.interpolate(mask[:, None], size=(height, width), mode="area")[:, 0]


def in_rows(mask: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Any mask (h, w), (b, h, w), (b, 1, h, w) or (b, h, w, 1) -> float32 (b, h, w) in 0..1.

    size: height and width of its picture, which alone can tell a row of pixels from a column; a column without it.
    Raises LikenessError for any other shape.
    """
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    elif mask.ndim == 4 and shape[1] == shape[3] == 1:
        mask = mask[..., 0] if size == shape[1:3] else mask[:, 0]
    elif mask.ndim == 4 and shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 4 and shape[3] == 1:
        mask = mask[..., 0]
    if mask.ndim != 3 or mask.numel() == 0:
        raise LikenessError(f"A mask of shape (batch, height, width) was expected, but {shape} came: connect "
                            f"a MASK, or turn a picture into one first.")
    bytes_255 = mask.dtype == torch.uint8 and mask.max() > 1
    mask = mask.float() / 255 if bytes_255 else mask.float()
    return torch.nan_to_num(mask).clamp(0, 1)


def as_mask(mask: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Any mask (h, w), (b, h, w), (b, 1, h, w) or (b, h, w, 1) -> float32 (batch, height, width) in 0..1.

    Another size is resized by area; one mask serves all pictures, any other count raises LikenessError.
    """
    mask = in_rows(mask, (height, width))
    if mask.shape[0] not in (1, batch):
        raise LikenessError(f"There are {batch} pictures but {mask.shape[0]} masks: connect one mask for "
                            f"all, or as many masks as pictures.")
    mask = _area(mask, height, width)
    return mask if mask.shape[0] == batch else mask.repeat(batch, 1, 1)


def bounding_box(mask: Tensor, threshold: float = 0.1) -> Box | None:
    """Box (x0, y0, x1, y1) in pixels, x1 and y1 outside, of one mask (h, w); None if the mask is empty.

    A pixel counts above `threshold` times the mask's maximum: the faint haze of a soft mask does not, yet a
    thin subject that was scaled down to a low maximum does.
    """
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    peak = float(mask.max())
    if peak < 1.5 / 255:  # nothing but the darkest grey of a picture file
        return None
    inside = mask > threshold * peak
    rows = inside.any(dim=1).nonzero()[:, 0]
    columns = inside.any(dim=0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _square_window(box: Box, margin: float, height: int, width: int) -> tuple[Box, int, int, int]:
    """(part of the picture to take, its left and top inside the square, side of the square)."""
    x0, y0, x1, y1 = box
    space = round(margin * max(x1 - x0, y1 - y0))
    side = max(x1 - x0, y1 - y0) + 2 * space
    # The square is centred on the subject and may reach over the border; beyond it lies the background.
    left, top = x0 - (side - (x1 - x0)) // 2, y0 - (side - (y1 - y0)) // 2
    part = (max(x0 - space, 0), max(y0 - space, 0), min(x1 + space, width), min(y1 + space, height))
    return part, part[0] - left, part[1] - top, side


def cut_out(image: Tensor, mask: Tensor | None = None, background: Background = "white", margin: float = 0.1,
            size: int | None = None) -> CutOut:
    """Picture (b, h, w, c), mask -> subject on a plain background, cropped to its box + margin, in a square.

    Without a mask the alpha channel serves, without alpha the whole picture. `margin`, on each side, is a
    fraction of the box's longer side. `size` None: the largest square of the batch. An empty mask gives an
    empty picture and found False. Raises LikenessError if the counts of pictures and masks do not fit.
    """
    if mask is None:
        rgb, mask = split_alpha(image)
        mask = torch.ones_like(rgb[..., 0]) if mask is None else mask
    else:
        rgb = to_rgb(image, background)
    batch, height, width = rgb.shape[:3]
    mask = as_mask(mask, batch, height, width).to(rgb.device)
    picture = composite(rgb, mask, background)

    boxes = [bounding_box(row) for row in mask]
    windows = [None if box is None else _square_window(box, margin, height, width) for box in boxes]
    side = size or max((window[3] for window in windows if window), default=max(height, width))
    color = rgb.new_tensor(background_color(background))
    images, masks = [], []
    for index, window in enumerate(windows):
        own = side if window is None else window[3]
        square, square_mask = color.repeat(1, own, own, 1), rgb.new_zeros(1, own, own)
        if window is not None:
            (x0, y0, x1, y1), left, top, _ = window
            rows, columns = slice(top, top + y1 - y0), slice(left, left + x1 - x0)
            square[0, rows, columns] = picture[index, y0:y1, x0:x1]
            square_mask[0, rows, columns] = mask[index, y0:y1, x0:x1]
        images.append(resize(square, side, side))
        masks.append(_area(square_mask, side, side))
    return CutOut(torch.cat(images), torch.cat(masks), [box is not None for box in boxes])
