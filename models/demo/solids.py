"""Toy buildings: convex shaded solids with coloured faces, whose true view from any camera the renderer knows.

X is to the right, Y up, Z to the front. A camera at azimuth 0 sees the front; positive azimuth goes to the right.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import UNIT, coverage, paint, pixel_grid

KINDS = ("block", "house", "tower")
FRONT, SIDE, ROOF = range(3)  # which colour a face has; back as front, left as right, bottom as roof
INK = (0.16, 0.12, 0.20)
_LIGHT = torch.nn.functional.normalize(torch.tensor([-0.4, 0.8, 0.45]), dim=0)  # moves with the camera
_EDGE = 0.45  # pixels of a face's border that its ink takes, at 64 pixels


class Solid(NamedTuple):
    """vertices (v, 3); faces: vertex numbers, counter-clockwise from outside, and which colour they have."""
    vertices: Tensor
    faces: tuple[tuple[tuple[int, ...], int], ...]


def _walls(w: float, h: float, d: float) -> list[tuple[float, float, float]]:
    """Corners of the walls, 0..3 at the bottom, 4..7 at height h: front left, front right, back right, back left."""
    ring = ((-w, d), (w, d), (w, -d), (-w, -d))
    return [(x, y, z) for y in (0.0, h) for x, z in ring]


_BASE = (((0, 1, 5, 4), FRONT), ((2, 3, 7, 6), FRONT), ((1, 2, 6, 5), SIDE), ((3, 0, 4, 7), SIDE), ((3, 2, 1, 0), ROOF))


def _solids() -> tuple[Solid, ...]:
    block = Solid(torch.tensor(_walls(0.5, 0.9, 0.5)), (*_BASE, ((4, 5, 6, 7), ROOF)))
    house = Solid(torch.tensor([*_walls(0.5, 0.6, 0.6), (0.0, 1.05, 0.6), (0.0, 1.05, -0.6)]),
                  (((0, 1, 5, 8, 4), FRONT), ((2, 3, 7, 9, 6), FRONT), *_BASE[2:],
                   ((5, 6, 9, 8), ROOF), ((7, 4, 8, 9), ROOF)))
    tower = Solid(torch.tensor([*_walls(0.4, 0.9, 0.4), (0.0, 1.5, 0.0)]),
                  (*_BASE, ((4, 5, 8), ROOF), ((5, 6, 8), ROOF), ((6, 7, 8), ROOF), ((7, 4, 8), ROOF)))
    return block, house, tower


SOLIDS = _solids()


class Drawn(NamedTuple):
    picture: Tensor  # (n, 3, p, p) in 0..1
    mask: Tensor     # (n, p, p), the solid with its ink


def turned(points: Tensor, azimuth: Tensor, elevation: Tensor) -> Tensor:
    """(v, 3) seen by n cameras (degrees) -> (n, v, 3): x to the right, y up, z towards the camera."""
    a, e = torch.deg2rad(azimuth)[:, None], torch.deg2rad(elevation)[:, None]
    x, y, z = points.T
    side, depth = x * a.cos() - z * a.sin(), x * a.sin() + z * a.cos()
    return torch.stack([side, y * e.cos() - depth * e.sin(), y * e.sin() + depth * e.cos()], -1)


def extent(kind: int, azimuth: Tensor, elevation: Tensor) -> Tensor:
    """(n, 4) x0 y0 x1 y1 of the outline in the solid's own units, y up."""
    flat = turned(SOLIDS[kind].vertices, azimuth, elevation)[..., :2]
    return torch.cat([flat.amin(1), flat.amax(1)], 1)


def draw_solids(background: Tensor, kind: Tensor, colours: Tensor, azimuth: Tensor, elevation: Tensor, centre: Tensor,
                scale: Tensor) -> Drawn:
    """Solids over backgrounds (n, 3, p, p); the outline's middle at `centre` (n, 2), `scale` (n,) world units each."""
    picture = background.clone()
    mask = torch.zeros(background.shape[0], *background.shape[2:])
    for number in range(len(SOLIDS)):
        rows = (kind == number).nonzero()[:, 0]
        if rows.numel():
            drawn = _draw(background[rows], number, colours[rows], azimuth[rows], elevation[rows], centre[rows], scale[rows])
            picture[rows], mask[rows] = drawn
    return Drawn(picture, mask)


def _draw(picture: Tensor, kind: int, colours: Tensor, azimuth: Tensor, elevation: Tensor, centre: Tensor,
          scale: Tensor) -> Drawn:
    solid, pixels = SOLIDS[kind], picture.shape[-1]
    x, y = pixel_grid(pixels)
    per_unit = pixels / UNIT
    seen = turned(solid.vertices, azimuth, elevation)
    box = extent(kind, azimuth, elevation)
    middle = (box[:, None, :2] + box[:, None, 2:]) / 2
    # the world's y goes down
    flat = (seen[..., :2] - middle) * scale[:, None, None] * torch.tensor([1.0, -1.0]) + centre[:, None]
    faces = []
    outline = torch.full((picture.shape[0], pixels, pixels), float("inf"))
    for corners, role in solid.faces:
        points = seen[:, list(corners)]
        normal = torch.linalg.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
        normal = torch.nn.functional.normalize(normal, dim=-1)
        rows = (normal[:, 2] > 0.02).nonzero()[:, 0]  # those that see this face
        distance = _polygon(x, y, flat[rows][:, list(corners)])
        outline[rows] = torch.minimum(outline[rows], distance)
        shade = 0.78 + 0.22 * (normal[rows] @ _LIGHT)
        faces.append((rows, distance, (colours[rows, role] * shade[:, None]).clamp(0, 1)))
    mask = coverage(outline - _EDGE, per_unit)
    picture = paint(picture, INK, mask)
    for rows, distance, colour in faces:
        picture[rows] = paint(picture[rows], colour, coverage(distance + _EDGE, per_unit))
    return Drawn(picture, mask)


def _polygon(x: Tensor, y: Tensor, corners: Tensor) -> Tensor:
    """Distance to a convex polygon: corners (n, k, 2) in drawing order of a visible face -> (n, p, p), negative inside."""
    inside, outside = [], []
    for start, end in zip(corners.unbind(1), corners.roll(-1, 1).unbind(1), strict=True):
        edge = end - start
        length = edge.norm(dim=-1).clamp(min=1e-6)
        ex, ey = ((edge[:, k] / length)[:, None, None] for k in range(2))
        dx, dy = x - start[:, 0, None, None], y - start[:, 1, None, None]
        # counter-clockwise with y up is clockwise on the picture, so the inside lies to the left of each edge there
        inside.append(dy * ex - dx * ey)
        along = (dx * ex + dy * ey).clamp(min=0).minimum(length[:, None, None])
        outside.append((dx - along * ex).square() + (dy - along * ey).square())
    side = torch.stack(inside).amax(0)
    # round corners outside: with the edges' own distances a sharp corner would grow a spike of ink
    return torch.where(side > 0, torch.stack(outside).amin(0).sqrt(), side)


def outline_scale(kind: Tensor, side: Tensor, azimuth: float, elevation: float) -> Tensor:
    """(n,) world units a solid's unit, so that the longer side of its outline from this camera is `side` (n,)."""
    cameras = torch.tensor([azimuth]), torch.tensor([elevation])
    spans = torch.stack([(e := extent(k, *cameras)[0])[2:] - e[:2] for k in range(len(SOLIDS))]).amax(1)
    return side / spans[kind]

