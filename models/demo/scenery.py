"""The five scenes of the miniature world."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .shapes import UNIT, box, column, coverage, ellipse, paint, pixel_grid, triangle


class _Canvas:
    """One scene kind under way: the picture, its grid and the numbers that vary it."""

    def __init__(self, parameters: Tensor, pixels: int):
        self.n, self.pixels, self.vary = parameters.shape[0], pixels, parameters
        x, y = pixel_grid(pixels)
        shape = (self.n, pixels, pixels)
        self.x, self.y = x.expand(shape), y.expand(shape)
        self.picture = torch.zeros(self.n, 3, pixels, pixels)
        self.horizon = column(36 + 4 * parameters[:, 0])

    def p(self, index: int) -> Tensor:
        return column(self.vary[:, index])

    def sky(self, top, bottom, end: float) -> None:
        t = (self.y / end).clamp(0, 1)[:, None]
        low, high = (torch.tensor(c).view(1, 3, 1, 1) for c in (top, bottom))
        self.picture = low * (1 - t) + high * t

    def add(self, colour, distance: Tensor, cut: Tensor | None = None) -> None:
        cover = coverage(distance, self.pixels / UNIT)
        if cut is not None:
            cover = cover * (1 - coverage(cut, self.pixels / UNIT))
        self.picture = paint(self.picture, colour, cover)


def _beach(c: _Canvas) -> None:
    c.sky((0.45, 0.78, 0.98), (0.80, 0.93, 1.0), 36)
    c.add((1.0, 0.93, 0.45), ellipse(c.x, c.y, 8 + 48 * c.p(1), 9.0, 6.0, 6.0))
    c.add((0.12, 0.52, 0.78), c.horizon - 8 - c.y)
    c.add((0.98, 0.90, 0.66), c.horizon + 3 + 1.2 * torch.sin(c.x / 5 + 6 * c.p(2)) - c.y)


def _forest(c: _Canvas) -> None:
    c.sky((0.72, 0.90, 0.70), (0.55, 0.80, 0.55), 40)
    for tree in range(5):
        odd = tree % 2
        cx = 6 + 13 * tree + 6 * (c.p(1 + tree) - 0.5)
        c.add((0.35, 0.24, 0.14), box(c.x, c.y, cx, 38.0, 1.5, 6.0, 0.3))
        c.add((0.10 + 0.05 * odd, 0.42 + 0.08 * odd, 0.20), triangle(c.x, c.y, cx, 5.0 + 5 * odd, 34.0, 8.0))
    c.add((0.30, 0.55, 0.22), c.horizon + 1 - c.y)


def _night(c: _Canvas) -> None:
    c.sky((0.03, 0.04, 0.16), (0.16, 0.14, 0.36), 44)
    cx = 8 + 48 * c.p(1)
    c.add((0.98, 0.96, 0.80), ellipse(c.x, c.y, cx, 10.0, 6.0, 6.0), ellipse(c.x, c.y, cx + 3, 8.0, 5.5, 5.5))
    for star in range(7):
        sx, sy = (9.1 * star + 60 * c.p(2)) % 64, (5.3 * star * (1 + c.p(3))) % 26 + 4
        c.add((1.0, 1.0, 0.9), ellipse(c.x, c.y, sx, sy, 0.9, 0.9))
    c.add((0.07, 0.08, 0.20), c.horizon + 2 - 2 * torch.sin(c.x / 9 + 6 * c.p(4)) - c.y)


def _snow(c: _Canvas) -> None:
    c.sky((0.66, 0.76, 0.88), (0.86, 0.90, 0.96), 38)
    c.add((0.70, 0.78, 0.90), triangle(c.x, c.y, 10 + 10 * c.p(1), 14.0, 45.0, 22.0))
    c.add((0.60, 0.70, 0.86), triangle(c.x, c.y, 44 + 12 * c.p(2), 9.0, 45.0, 22.0))
    c.add((0.97, 0.98, 1.0), c.horizon + torch.sin(c.x / 7 + 6 * c.p(3)) - c.y)
    for flake in range(9):
        c.add((1.0, 1.0, 1.0), ellipse(c.x, c.y, (7.3 * flake + 60 * c.p(4)) % 64, (13.7 * flake + 60 * c.p(5)) % 40, 1.0, 1.0))


def _room(c: _Canvas) -> None:
    c.sky((0.93, 0.84, 0.72), (0.90, 0.79, 0.66), 40)
    cx = 14 + 36 * c.p(1)
    frame = (0.98, 0.97, 0.94)
    c.add(frame, box(c.x, c.y, cx, 14.0, 9.0, 8.5, 0.5))
    c.add((0.60, 0.83, 0.95), box(c.x, c.y, cx, 14.0, 7.5, 7.0, 0.3))
    c.add(frame, torch.maximum((c.x - cx).abs() - 0.8, (c.y - 14.0).abs() - 7.0))
    c.add(frame, torch.maximum((c.y - 14.0).abs() - 0.8, (c.x - cx).abs() - 7.5))
    c.add((0.66, 0.42, 0.26), c.horizon - c.y)
    c.add((0.97, 0.95, 0.92), (c.y - c.horizon).abs() - 0.9)
    for board in (9, 18):
        c.add((0.57, 0.35, 0.21), (c.y - c.horizon - board).abs() - 0.5)


_PAINTERS: tuple[Callable[[_Canvas], None], ...] = (_beach, _forest, _night, _snow, _room)


def draw_scenes(scene: Tensor, parameters: Tensor, pixels: int = 64) -> Tensor:
    """Backgrounds (n, 3, p, p) in 0..1 for scene numbers (n,) and their parameters (n, 8)."""
    picture = torch.zeros(scene.shape[0], 3, pixels, pixels)
    for number, painter in enumerate(_PAINTERS):
        rows = (scene == number).nonzero()[:, 0]
        if rows.numel():
            canvas = _Canvas(parameters[rows], pixels)
            painter(canvas)
            picture[rows] = canvas.picture
    return picture
