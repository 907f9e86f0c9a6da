"""Heads of creatures as faces: where their five points and boxes lie, and pictures to learn from."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import world
from .creatures import draw_creature, draw_pictures, standing
from .scenery import draw_scenes
from .shapes import column
from .world import PATTERNS, Rows, Variation

VARIATION = Variation(scene=0.6, offset=1.5, turn=0.12, mirror=True)
# In the creature's own units: eyes, nose and corners of the mouth of one that looks to the right; box of the head.
EYES, NOSE, MOUTH, BOX = ((-2.2, -8.2), (4.6, -8.2)), (1.2, -4.4), ((-1.6, -0.4), (4.0, -0.4)), (-9.0, -15.0, 9.0, 1.0)
LOOKS = len(world.COLOURS) ** 2 * len(PATTERNS)


class Heads(NamedTuple):
    """picture (n, 3, p, p) in 0..1, keypoints (n, 5, 2) and box (n, 4) in pixels, identity rows."""
    picture: Tensor
    keypoints: Tensor
    box: Tensor
    identity: Rows


def places(pose: Rows, pixels: int = 64) -> tuple[Tensor, Tensor]:
    """Five points (n, 5, 2), left and right as the picture shows them, and upright box (n, 4) of each head."""
    frame = standing(pose)
    facing = 1.0 - 2.0 * pose["mirror"].float()[:, None]
    cos, sin = torch.cos(pose["turn"])[:, None], torch.sin(pose["turn"])[:, None]
    unit = pixels / 64

    def moved(points: Tensor) -> Tensor:
        u, v = points[:, 0] * facing, points[:, 1]
        x = frame.x[:, None] + frame.scale[:, None] * (cos * u - sin * v)
        y = frame.y[:, None] + frame.scale[:, None] * (sin * u + cos * v)
        return torch.stack([x, y], -1) * unit - 0.5  # whole numbers are pixel centres

    points = moved(torch.tensor([*EYES, NOSE, *MOUTH]))
    swapped = points[:, [1, 0, 2, 4, 3]]
    keypoints = torch.where((pose["mirror"] > 0)[:, None, None], swapped, points)
    x0, y0, x1, y1 = BOX
    middle = moved(torch.tensor([[(x0 + x1) / 2, (y0 + y1) / 2]]))[:, 0]
    half = torch.tensor([(x1 - x0) / 2, (y1 - y0) / 2]) * frame.scale[:, None] * unit
    return keypoints, torch.cat([middle - half, middle + half], 1)


def unseen(identity: Rows) -> Tensor:
    """(n,) True for the tenth of all faces that no training sees: colours and pattern, whatever else is worn."""
    return world.held_out({**identity, "accessory": torch.zeros_like(identity["accessory"])})


def look_of(identity: Rows) -> Tensor:
    """(n,) one number for each face: main colour, second colour, pattern. Kind and clothes are no part of it."""
    return (identity["colour"] * len(world.COLOURS) + identity["second"]) * len(PATTERNS) + identity["pattern"]


def draw_faces(n: int, generator: torch.Generator, training: bool) -> Rows:
    """n identities, either with faces to learn or with faces kept for the test."""
    parts: list[Rows] = []
    have = 0
    while have < n:
        rows = world.draw_identities(4 * n + 64, generator)
        keep = unseen(rows) != training
        parts.append(world.select(rows, keep.nonzero()[:, 0]))
        have += int(keep.sum())
    return world.select(world.join(parts), torch.arange(n))


def with_face(identity: Rows, other: Rows) -> Rows:
    """The same creature with the face of another: its kind and clothes stay."""
    return {**identity, **{name: other[name] for name in ("colour", "second", "pattern")}}


def render(identity: Rows, generator: torch.Generator, pixels: int = 64, variation: Variation = VARIATION) -> tuple[Heads, Rows]:
    """One creature a picture in a random scene, and the draw (pose, scene, parameters) that repeats it."""
    n = identity["kind"].shape[0]
    pose = world.draw_poses(n, generator, variation)
    size = torch.randint(0, 3, (n,), generator=generator)
    draw = {**pose, "size": size, "scene": torch.randint(0, len(world.SCENES), (n,), generator=generator),
            "parameters": world.draw_scene_parameters(n, generator, variation)}
    return again(identity, draw, pixels), draw


def again(identity: Rows, draw: Rows, pixels: int = 64) -> Heads:
    """The creatures of another identity in the very same poses and scenes."""
    picture = draw_pictures(identity, draw, draw["scene"], draw["parameters"], pixels).picture
    keypoints, box = places(draw, pixels)
    return Heads(picture, keypoints, box, identity)


def add_second(heads: Heads, draw: Rows, other: Rows, generator: torch.Generator, pixels: int = 64) -> tuple[Tensor, Heads]:
    """Pictures with a second creature beside the first, and the second's truth; both stand at the sides."""
    left = {**draw, "place": torch.zeros_like(draw["place"])}
    right = {**draw, "place": torch.full_like(draw["place"], 2), "turn": -draw["turn"], "mirror": 1 - draw["mirror"],
             "size": torch.randint(0, 3, draw["size"].shape, generator=generator)}
    ground = draw_scenes(draw["scene"], draw["parameters"], pixels)
    picture = draw_creature(ground, heads.identity, left, standing(left)).picture
    picture = draw_creature(picture, other, right, standing(right)).picture
    first, second = places(left, pixels), places(right, pixels)
    return picture, Heads(picture, torch.stack([first[0], second[0]], 1), torch.stack([first[1], second[1]], 1), other)


def soften(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A little blur and noise, as the miniature's own pictures have."""
    import torch.nn.functional as F
    n = picture.shape[0]
    blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share, noise = torch.rand(2, n, generator=generator)
    mixed = torch.lerp(picture, blurred, column(share)[:, None])
    return (mixed + 0.04 * column(noise)[:, None] * torch.randn(picture.shape, generator=generator)).clamp(0, 1)
