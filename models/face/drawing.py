"""Pictures of found faces: marks on the picture, and the keypoint drawings that ControlNets read."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LikenessError
from .faces import Face
from .geometry import pixel_points

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]]) / 255
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
HALF_WIDTH, RADIUS, DIM = 4, 10, 0.6  # of InstantID's drawing, in pixels whatever the picture's size
STYLES = ("InstantID", "plain")


def annotate(picture: Tensor, faces: Sequence[Face]) -> Tensor:
    """Picture (h, w, 3) with box, number and five points of each face, as large as the picture allows; where and
    of what kind the picture is."""
    if not faces:
        return picture
    from PIL import Image, ImageDraw

    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
    draw = ImageDraw.Draw(image)
    unit = max(min(image.size) // 200, 1)
    colours = [tuple(int(255 * value) for value in row) for row in COLOURS.tolist()]
    for number, face in enumerate(faces):
        x0, y0, x1, y1 = face.box.tolist()
        draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255), width=2 * unit)
        draw.rectangle((x0 + unit, y0 + unit, max(x1 - unit, x0 + unit), max(y1 - unit, y0 + unit)), outline=(20, 20, 20),
                       width=unit)
        for (x, y), colour in zip(face.keypoints.tolist(), colours, strict=True):
            draw.ellipse((x - 2 * unit, y - 2 * unit, x + 2 * unit, y + 2 * unit), fill=colour)
        draw.text((x0 + 3 * unit, y0 + 2 * unit), str(number), fill=(255, 255, 255), stroke_width=unit, stroke_fill=(20, 20, 20),
                  font_size=max(10, 8 * unit))
    return (torch.from_numpy(np.asarray(image).copy()).float() / 255).to(picture)


def keypoint_size(width: int, height: int, own_width: int, own_height: int) -> tuple[int, int]:
    """(width, height) of a drawing where 0 stands for what keeps the picture's shape, in whole eights as latents have them."""
    if not width and not height:
        return own_width, own_height
    return (width or max(round(height * own_width / own_height / 8), 1) * 8,
            height or max(round(width * own_height / own_width / 8), 1) * 8)


def draw_keypoints(faces: Sequence[Face], height: int, width: int, style: str = STYLES[0],
                   scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Five points of each face on black (height, width, 3); `scale` (x, y) brings their pixels to this picture.

    InstantID: four coloured limbs, dimmed, under dots of 10 pixels, as its ControlNet was trained. plain: small white dots.
    Raises LikenessError for faces without points."""
    if any(not face.keypoints.any() for face in faces):
        raise LikenessError("A face has no five points, as in some saved face models: connect faces of Analyze Faces.")
    canvas = torch.zeros(height, width, 3)
    every = [face.keypoints * torch.tensor(scale) for face in faces]
    if style != STYLES[0]:
        for point in (point for points in every for point in points):
            _dot(canvas, point.trunc(), max(min(height, width) // 200, 2), torch.ones(3))
        return canvas
    dimmed = (COLOURS * DIM * 255).floor() / 255
    for points in every:
        for first, last in LIMBS:
            _limb(canvas, points[first], points[last], dimmed[first])
    for points in every:
        for point, colour in zip(points, COLOURS, strict=True):
            _dot(canvas, point.trunc(), RADIUS, colour)
    return canvas


def _near(canvas: Tensor, centre: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The part of the canvas (h, w, 3) within `reach` pixels of a centre, and where its pixels lie from there (h, w, 2)."""
    height, width = canvas.shape[:2]
    x, y = (int(side) for side in centre.tolist())
    x0, x1 = (min(max(side, 0), width) for side in (x - reach, x + reach + 1))
    y0, y1 = (min(max(side, 0), height) for side in (y - reach, y + reach + 1))
    return canvas[y0:y1, x0:x1], pixel_points((x0, y0, x1, y1)) - centre


def _dot(canvas: Tensor, centre: Tensor, radius: int, colour: Tensor) -> None:
    part, away = _near(canvas, centre, radius)
    part[(away ** 2).sum(-1) <= radius * radius] = colour


def _limb(canvas: Tensor, first: Tensor, last: Tensor, colour: Tensor) -> None:
    """A filled ellipse along the way from first to last, its angle in whole degrees."""
    dx, dy = (first - last).tolist()
    angle = math.radians(int(math.degrees(math.atan2(dy, dx))))
    centre = ((first + last) / 2).trunc()
    half = max(int(math.hypot(dx, dy) / 2), 1)
    part, away = _near(canvas, centre, max(half, HALF_WIDTH) + 1)
    x, y = away.unbind(-1)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    # half a pixel more: the polygon that OpenCV fills covers the pixels on its edge
    part[(along / (half + 0.5)) ** 2 + (across / (HALF_WIDTH + 0.5)) ** 2 <= 1] = colour
