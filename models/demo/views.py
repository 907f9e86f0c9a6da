"""What the miniature CustomNet learns from: toy buildings turned, placed and set into the world's scenes.

The reference always shows its building from the same camera, as the authors' references always lie in the middle of the
same canvas; all angles are relative to it. Boxes lie on the latent's cells, which is what a small net can learn.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .first_stage import PATCH
from .scenery import draw_scenes
from .shapes import UNIT
from .solids import KINDS, draw_solids, outline_scale
from .world import PALETTE, SCENES, Rows, select

REFERENCE = (30.0, 25.0)  # azimuth and elevation of the camera of every reference: front, right side and roof are seen
AZIMUTH, ELEVATION, DISTANCE = 60.0, 20.0, (-0.15, 0.3)  # degrees both ways; how much nearer and further away
SHARE = 200 / 256  # of the canvas that the object takes, as the authors prepare references
SIDES = (40, 48, 56)  # of boxes, in pixels
EASY_BOX = (8, 8, 56, 56)
_BLOCK = 256


class Scene(NamedTuple):
    """n pictures: identity rows (kind, front, side, roof), camera rows (azimuth, elevation, distance), box (n, 4) pixels."""
    identity: Rows
    camera: Rows
    scene: Tensor
    box: Tensor


def identities() -> Rows:
    """Every building: kind, and three different colours."""
    count = len(PALETTE)
    every = torch.cartesian_prod(torch.arange(len(KINDS)), *(torch.arange(count),) * 3)
    kind, front, side, roof = every[(every[:, 1] != every[:, 2]) & (every[:, 1] != every[:, 3]) & (every[:, 2] != every[:, 3])].T
    return {"kind": kind, "front": front, "side": side, "roof": roof}


def number_of(identity: Rows) -> Tensor:
    """(n,) where each building stands in `identities()`."""
    every = identities()
    table = torch.full((len(KINDS), *(len(PALETTE),) * 3), -1)
    table[every["kind"], every["front"], every["side"], every["roof"]] = torch.arange(every["kind"].shape[0])
    return table[identity["kind"], identity["front"], identity["side"], identity["roof"]]


def held_out(identity: Rows) -> Tensor:
    """(n,) True for the tenth of all colourings that no training ever sees, in any kind."""
    code = (identity["front"] * len(PALETTE) + identity["side"]) * len(PALETTE) + identity["roof"]
    return (code * 2654435761 + 97) % 4294967296 // 65536 % 10 == 0


def held_out_scene(identity: Rows, scene: Tensor) -> Tensor:
    """(n,) True for the fifth of colouring x scene pairs that no training sees."""
    code = (identity["front"] * len(PALETTE) + identity["side"]) * len(PALETTE) + identity["roof"]
    return ((code * len(SCENES) + scene) * 2246822519 + 31) % 4294967296 // 65536 % 5 == 0


def draw_split(n: int, generator: torch.Generator, training: bool = True) -> tuple[Rows, Tensor]:
    """n buildings with a scene each, from the training side or (training=False) held-out buildings."""
    every = identities()
    wanted = select(every, (held_out(every) != training).nonzero()[:, 0])
    index = torch.randint(0, wanted["kind"].shape[0], (4 * n + 64,), generator=generator)
    rows, scene = select(wanted, index), torch.randint(0, len(SCENES), (4 * n + 64,), generator=generator)
    if training:
        keep = (~held_out_scene(rows, scene)).nonzero()[:, 0]
        rows, scene = select(rows, keep), scene[keep]
    return select(rows, torch.arange(n)), scene[:n]


def draw_cameras(n: int, generator: torch.Generator) -> Rows:
    """Angles and distance relative to the reference, uniform over what is trained."""
    u = torch.rand(n, 3, generator=generator)
    low, high = DISTANCE
    return {"azimuth": (2 * u[:, 0] - 1) * AZIMUTH, "elevation": (2 * u[:, 1] - 1) * ELEVATION,
            "distance": low + (high - low) * u[:, 2]}


def draw_boxes(n: int, generator: torch.Generator) -> Tensor:
    """(n, 4) square boxes x0 y0 x1 y1 on the cells, inside the frame."""
    side = torch.tensor(SIDES)[torch.randint(0, len(SIDES), (n,), generator=generator)]
    free = (int(UNIT) - side) // PATCH + 1
    place = (torch.rand(n, 2, generator=generator) * free[:, None]).long() * PATCH
    return torch.cat([place, place + side[:, None]], 1)


def render(scene: Scene, background: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 64, 64) in 0..1 and masks of the buildings (n, 64, 64)."""
    if background is None:
        background = draw_scenes(scene.scene, torch.full((scene.scene.shape[0], 8), 0.5))
    identity, camera, box = scene.identity, scene.camera, scene.box.float()
    side = (box[:, 2] - box[:, 0]) * SHARE / (1 + camera["distance"])
    return draw_solids(background, identity["kind"], colours_of(identity), REFERENCE[0] + camera["azimuth"],
                       REFERENCE[1] + camera["elevation"], (box[:, :2] + box[:, 2:]) / 2,
                       outline_scale(identity["kind"], side, *REFERENCE))


def references(identity: Rows, pixels: int = 64, paper: float = 1.0) -> Tensor:
    """(n, 3, p, p): each building on white (or another grey) from the reference camera."""
    n = identity["kind"].shape[0]
    zero, whole = torch.zeros(n), torch.full((n,), UNIT)
    at = torch.tensor([float(a) for a in REFERENCE]).expand(n, 2)
    return draw_solids(torch.full((n, 3, pixels, pixels), paper), identity["kind"], colours_of(identity), at[:, 0], at[:, 1],
                       torch.full((n, 2), UNIT / 2) + zero[:, None],
                       outline_scale(identity["kind"], whole * SHARE, *REFERENCE)).picture


def colours_of(identity: Rows) -> Tensor:
    """(n, 3, 3) RGB of front, side and roof."""
    return PALETTE[torch.stack([identity[name] for name in ("front", "side", "roof")], 1)]


def captions(identity: Rows, scene: Tensor, generator: torch.Generator | None = None) -> list[str]:
    """"a photo of a house on the beach"; with a generator the beginning is left out now and then."""
    said = torch.rand(scene.shape[0], generator=generator).tolist() if generator is not None else [0.0] * scene.shape[0]
    return [("a photo of " if chance < 0.7 else "") + f"a {KINDS[int(kind)]} {SCENES[int(place)]}"
            for chance, kind, place in zip(said, identity["kind"], scene, strict=True)]


def draw(n: int, seed: int, training: bool = True, easy: bool = False) -> Scene:
    """n scenes; easy: one place and one distance, so that turning is all there is to learn."""
    generator = torch.Generator().manual_seed(seed)
    identity, scene = draw_split(n, generator, training)
    camera, box = draw_cameras(n, generator), draw_boxes(n, generator)
    if easy:
        camera, box = {**camera, "distance": torch.zeros(n)}, torch.tensor([EASY_BOX]).repeat(n, 1)
    return Scene(identity, camera, scene, box)


def blocks(scene: Scene, size: int = _BLOCK) -> list[Scene]:
    """The same in pieces: small ones are dearer a picture, large ones need much memory."""
    n = scene.scene.shape[0]
    pieces = [torch.arange(start, min(n, start + size)) for start in range(0, n, size)]
    return [Scene(select(scene.identity, i), select(scene.camera, i), scene.scene[i], scene.box[i]) for i in pieces]
