"""The creatures of the miniature world, drawn from signed distances with a dark ink line round every part."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .scenery import draw_scenes
from .shapes import UNIT, box, column, coverage, ellipse, paint, pixel_grid, triangle
from .world import PALETTE, PLACE_X, Rows

INK = (0.13, 0.10, 0.14)
CAT, DOG, BEAR, BUNNY, ROBOT, DUCK = range(6)
SCALES = torch.tensor([0.80, 1.08, 0.98])  # small, big, the easy world's one size


class Frame(NamedTuple):
    """Where the creature's own coordinates lie in the picture: centre (n,), scale (n,)."""
    x: Tensor
    y: Tensor
    scale: Tensor


class Drawn(NamedTuple):
    picture: Tensor    # (n, 3, p, p) in 0..1
    mask: Tensor       # (n, p, p): the whole creature
    accessory: Tensor  # (n, p, p): its hat or scarf alone


def standing(pose: Rows) -> Frame:
    """The frame of a creature that stands in a scene: feet on one line whatever its size."""
    scale = SCALES[pose["size"]]
    return Frame(PLACE_X[pose["place"]] + pose["dx"], 55.0 - 16.0 * scale + pose["dy"], scale)


def _parts(kind: Tensor, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Signed distances of the body parts in the creature's own units."""
    far = torch.full_like(u, 99.0)
    au = u.abs()

    def pick(options: dict[int, Tensor], default: Tensor) -> Tensor:
        out = default
        for number, distance in options.items():
            out = torch.where(kind == number, distance, out)
        return out

    antenna = torch.minimum(box(u, v, 0.0, -16.5, 0.9, 3.5, 0.3), ellipse(u, v, 0.0, -20.3, 2.2, 2.2))
    curl = (torch.hypot(u + 12.5, v - 5.0) - 4.2).abs() - 1.3 + 8 * ((u > -11.5) & (v < 5.0)).float()
    return {
        "head": pick({ROBOT: box(u, v, 0.0, -7.0, 8.5, 7.0, 2.5), DUCK: ellipse(u, v, 1.0, -7.0, 7.0, 7.0)},
                     ellipse(u, v, 0.0, -7.0, 9.0, 7.8)),
        "body": pick({ROBOT: box(u, v, 0.0, 7.0, 8.5, 7.5, 1.5), DUCK: ellipse(u, v, -2.0, 7.0, 10.5, 7.5)},
                     ellipse(u, v, 0.0, 6.5, 8.2, 8.0)),
        "ear": pick({CAT: triangle(au * 0.93 + 0.25 * (v + 12), v, 5.4, -20.0, -9.0, 4.2),
                     DOG: ellipse(au + (v + 7) * 0.12, v, 9.0, -6.0, 2.8, 6.2),
                     BEAR: ellipse(au, v, 6.6, -13.2, 3.3, 3.3),
                     BUNNY: ellipse(au, v, 3.9, -18.5, 2.5, 7.2),
                     ROBOT: antenna}, ellipse(u, v, -1.0, -15.0, 1.6, 2.8)),
        "leg": pick({ROBOT: box(au, v, 4.8, 15.0, 2.5, 2.5, 0.5)}, ellipse(au, v, 4.4, 14.2, 3.2, 2.3)),
        "arm": pick({DUCK: far, ROBOT: box(au, v, 10.5, 6.0, 1.8, 4.8, 1.0)},
                    ellipse(au - (v - 5) * 0.35, v, 8.3, 5.0, 2.3, 4.6)),
        "tail": pick({CAT: curl, DUCK: triangle(v, -u, 5.0, 9.0, 15.0, 3.0), ROBOT: far},
                     ellipse(u, v, -9.5, 10.0, 3.0, 3.0)),
    }


def _pattern(pattern: Tensor, u: Tensor, v: Tensor) -> Tensor:
    stripes = -1.1 * torch.sin(v * 1.15)
    belly = torch.minimum(ellipse(u, v, 0.0, 7.5, 5.2, 5.4), ellipse(u, v, 1.0, -4.6, 4.6, 3.4))
    return torch.where(pattern == 0, stripes, torch.where(pattern == 1, -u, belly))


class _Brush:
    """Paints parts in order and remembers what they cover."""

    def __init__(self, picture: Tensor, density: Tensor, line: Tensor):
        self.picture, self.density, self.line = picture, density, line
        self.mask = torch.zeros_like(picture[:, 0])

    def cover(self, distance: Tensor) -> Tensor:
        return coverage(distance, self.density)

    def ink(self, distance: Tensor, where: Tensor | float = 1.0) -> Tensor:
        cover = self.cover(distance - self.line) * where
        self.picture = paint(self.picture, INK, cover)
        self.mask = torch.maximum(self.mask, cover)
        return cover

    def fill(self, colour, cover: Tensor) -> None:
        self.picture = paint(self.picture, colour, cover)


def draw_creature(picture: Tensor, identity: Rows, pose: Rows, frame: Frame) -> Drawn:
    """Paints identity in pose over picture (n, 3, p, p) at frame (world units)."""
    pixels = picture.shape[-1]
    x, y = pixel_grid(pixels)
    scale = column(frame.scale)
    cos, sin = column(torch.cos(pose["turn"])), column(torch.sin(pose["turn"]))
    dx, dy = (x - column(frame.x)) / scale, (y - column(frame.y)) / scale
    facing = column(1.0 - 2.0 * pose["mirror"].float())
    u, v = (cos * dx + sin * dy) * facing, -sin * dx + cos * dy
    density = scale * (pixels / UNIT)
    kind, accessory = column(identity["kind"]), column(identity["accessory"])
    main, second, accent = (PALETTE[identity[key]] for key in ("colour", "second", "accent"))
    part = _parts(kind, u, v)
    # the ink line is 0.9 pixels of a 64-pixel picture wide, whatever the size of creature and picture
    brush = _Brush(picture, density, 0.9 / scale)
    brush.ink(torch.stack(list(part.values())).amin(0))

    pattern = brush.cover(_pattern(column(identity["pattern"]), u, v))
    for name, colour, patterned in (("tail", second, False), ("arm", main, False), ("leg", second, False),
                                    ("body", main, True), ("ear", second, False), ("head", main, True)):
        brush.ink(part[name])
        inside = brush.cover(part[name])
        brush.fill(colour, inside)
        if patterned:
            brush.fill(second, pattern * inside)

    _face(brush, kind, u, v)
    worn = _wear(brush, accessory, accent, u, v)
    return Drawn(brush.picture, brush.mask, worn)


def _face(brush: _Brush, kind: Tensor, u: Tensor, v: Tensor) -> None:
    eye_white = ellipse((u - 1.2).abs() - 3.4, v, 0.0, -8.2, 2.3, 2.6)
    pupil = ellipse((u - 1.7).abs() - 3.4, v, 0.0, -8.0, 1.45, 1.8)
    brush.fill((1.0, 1.0, 1.0), brush.cover(eye_white))
    brush.fill((0.08, 0.07, 0.10), brush.cover(pupil))
    brush.fill((0.98, 0.62, 0.10), brush.cover(ellipse(u, v, 6.8, -5.0, 4.0, 2.0)) * (kind == DUCK))
    brush.fill((0.2, 0.2, 0.25), brush.cover(box(u, v, 1.0, -4.0, 3.0, 0.8, 0.4)) * (kind == ROBOT))
    nose = brush.cover(ellipse(u, v, 1.2, -4.4, 1.5, 1.1))
    brush.fill((0.20, 0.10, 0.12), nose * ((kind != DUCK) & (kind != ROBOT)))


def _wear(brush: _Brush, accessory: Tensor, accent: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Hat or scarf in the accent colour, both with a pale trim; returns what it covers."""
    hatted, scarfed = (accessory == 1).float(), (accessory == 2).float()
    trim = (1.0, 0.98, 0.92)
    cone, bobble = triangle(u, v, 0.0, -24.0, -13.2, 5.2), ellipse(u, v, 0.0, -24.0, 1.9, 1.9)
    hat = brush.ink(torch.minimum(cone, bobble), hatted)
    brush.fill(accent, brush.cover(cone) * hatted)
    brush.fill(trim, brush.cover(bobble) * hatted)
    brush.fill(trim, brush.cover((v + 16.0).abs() - 1.0) * brush.cover(cone) * hatted)
    cloth = torch.minimum(box(u, v, 0.0, 0.3, 7.6, 1.9, 1.0), box(u, v, -4.0, 4.5, 1.8, 4.0, 0.6))
    scarf = brush.ink(cloth, scarfed)
    brush.fill(accent, brush.cover(cloth) * scarfed)
    brush.fill(trim, brush.cover((u % 4.0) - 1.2) * brush.cover(cloth) * scarfed)
    return torch.maximum(hat, scarf)


def draw_pictures(identity: Rows, pose: Rows, scene: Tensor, parameters: Tensor, pixels: int = 64) -> Drawn:
    """One creature in one scene a picture."""
    return draw_creature(draw_scenes(scene, parameters, pixels), identity, pose, standing(pose))


def _fit(mask: Tensor, margin: float | Tensor) -> Frame:
    """Square round each mask (n, p, p) with a margin (share of the longer side), as centre and side in units."""
    pixels = mask.shape[-1]
    axis = torch.arange(pixels, dtype=torch.float32)

    def ends(profile: Tensor) -> tuple[Tensor, Tensor]:
        inside = profile > 0.5
        low = torch.where(inside, axis, torch.tensor(1e9)).amin(1)
        high = torch.where(inside, axis, torch.tensor(-1e9)).amax(1) + 1
        return low, high

    x0, x1 = ends(mask.amax(1))
    y0, y1 = ends(mask.amax(2))
    unit = UNIT / pixels
    side = torch.maximum(x1 - x0, y1 - y0) * (1 + 2 * margin) * unit
    return Frame((x0 + x1) / 2 * unit, (y0 + y1) / 2 * unit, side)


def draw_references(identity: Rows, pose: Rows, part: Tensor | None = None, margin: float | Tensor = 0.1,
                    pixels: int = 64) -> Drawn:
    """The creature alone on white, cropped to itself as ExtractID does; margin: share of its longer side, or (n,).

    `part` (n,) True crops to the accessory and wipes the rest: the reference of a garment."""
    n = identity["kind"].shape[0]
    centre = torch.full((n,), UNIT / 2)
    start = Frame(centre, centre + 4, torch.full((n,), 1.3))
    paper = torch.ones(n, 3, pixels, pixels)
    first = draw_creature(paper, identity, pose, start)
    mask = first.mask if part is None else torch.where(column(part), first.accessory, first.mask)
    square = _fit(mask, margin)
    zoom = UNIT / square.scale
    frame = Frame(centre + (start.x - square.x) * zoom, centre + (start.y - square.y) * zoom, start.scale * zoom)
    drawn = draw_creature(paper, identity, pose, frame)
    mask = drawn.mask if part is None else torch.where(column(part), drawn.accessory, drawn.mask)
    picture = 1 + (drawn.picture - 1) * mask[:, None]
    return Drawn(picture, mask, drawn.accessory)
