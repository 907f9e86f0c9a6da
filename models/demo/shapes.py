"""Signed distances and painting: the two tools every picture of the miniature world is drawn with."""
from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 64.0  # the world is 64 units wide and high, whatever the number of pixels


def column(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1), so that one number a picture meets the pixel grid."""
    return values.view(-1, 1, 1)


def pixel_grid(pixels: int) -> tuple[Tensor, Tensor]:
    """World coordinates of the pixel centres: x (1, 1, p) and y (1, p, 1)."""
    axis = (torch.arange(pixels, dtype=torch.float32) + 0.5) * (UNIT / pixels)
    return axis.view(1, 1, pixels), axis.view(1, pixels, 1)


def ellipse(x: Tensor, y: Tensor, cx, cy, rx: float, ry: float) -> Tensor:
    """Approximate signed distance to an ellipse, exact on its border."""
    return (torch.hypot((x - cx) / rx, (y - cy) / ry) - 1.0) * min(rx, ry)


def box(x: Tensor, y: Tensor, cx, cy, half_width: float, half_height: float, radius: float) -> Tensor:
    """Signed distance to a box with round corners."""
    dx, dy = (x - cx).abs() - (half_width - radius), (y - cy).abs() - (half_height - radius)
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0) - radius


def triangle(x: Tensor, y: Tensor, cx, top: float, base: float, half_width: float) -> Tensor:
    """Signed distance to an upright triangle with its apex at (cx, top)."""
    height = base - top
    edge = ((x - cx).abs() * height - (y - top) * half_width) / math.hypot(height, half_width)
    return torch.maximum(edge, y - base)


def coverage(distance: Tensor, pixels_per_unit: Tensor | float) -> Tensor:
    """How much of a pixel lies inside: a ramp one pixel wide."""
    return (0.5 - distance * pixels_per_unit).clamp(0, 1)


def paint(picture: Tensor, colour, cover: Tensor) -> Tensor:
    """Lays `colour` (three floats or (n, 3)) over picture (n, 3, p, p) where cover (n, p, p) says."""
    if not torch.is_tensor(colour):
        colour = torch.tensor(colour).view(1, 3)
    return picture + (colour[:, :, None, None] - picture) * cover[:, None]
