"""What exists in the miniature world: attributes of a subject, poses, scenes, and which of them are held out.

An identity is kind, two colours, pattern, accessory and its colour. Pose (place, size, turn, facing) and scene
are no part of it. All draws take a torch.Generator and give dictionaries of tensors with one row a picture.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError
from .first_stage import PATCH

KINDS = ("cat", "dog", "bear", "bunny", "robot", "duck")
COLOURS = {
    "red": (0.86, 0.16, 0.16), "orange": (0.96, 0.55, 0.12), "yellow": (0.97, 0.86, 0.22),
    "green": (0.25, 0.68, 0.25), "blue": (0.18, 0.35, 0.85), "purple": (0.55, 0.25, 0.75),
    "pink": (0.97, 0.55, 0.72), "white": (0.96, 0.96, 0.94),
}
COLOUR_NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values()))
PATTERNS = ("striped", "half", "round belly")
ACCESSORIES = ("none", "hat", "scarf")
SCENES = ("on the beach", "in the forest", "at night", "in the snow", "in a room")
PLACES = ("left", "center", "right")
PLACE_X = torch.tensor([16.0, 32.0, 48.0])
SIZES = ("small", "big")
IDENTITY_KEYS = ("kind", "colour", "second", "pattern", "accessory", "accent")

Rows = dict[str, Tensor]


class Variation(NamedTuple):
    """How far the world varies: 0 is the easy world, where everything is aligned with the latent cells."""
    scene: float = 0.0     # share of each scene's own random parameters
    offset: float = 0.0    # pixels of random shift, both ways
    cells: int = 0         # up to so many whole latent cells further up, where the turn is all of it one way or the other
    turn: float = 0.0      # radians of random rotation, both ways
    mirror: bool = False   # creatures may face left
    sizes: bool = False    # small and big instead of one size
    pairs: float = 0.0     # share of pictures with two creatures


EASY = Variation()
# Whole cells and whole turns: a first stage of 8-pixel cells shows a creature anew for each shift within a cell, and a base
# that saw all of them drew no clean creature after 5600 steps (EVIDENCE.md).
WIDE = Variation(scene=0.5, cells=1, turn=0.1, mirror=True, sizes=True)
WORLDS = {"easy": EASY, "wide": WIDE}  # what a base can be trained to draw


def world_of(metadata: Mapping[str, str]) -> str:
    """Which of WORLDS a base with this metadata draws; a file that does not tell draws the easy one.

    Raises LikenessError for a world that is not among them."""
    name = metadata.get("world", "easy")
    if name not in WORLDS:
        raise LikenessError(f"The miniature's base draws the world {name!r}, this pack knows {' and '.join(WORLDS)}; make the "
                            "base again with: python dev.py train demo base.")
    return name


def _draw(n: int, below: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, below, (n,), generator=generator)


def draw_identities(n: int, generator: torch.Generator) -> Rows:
    """n random identities; both colours differ, and the accent is the accessory's colour."""
    count = len(COLOURS)
    colour = _draw(n, count, generator)
    second = (colour + 1 + _draw(n, count - 1, generator)) % count
    return {
        "kind": _draw(n, len(KINDS), generator), "colour": colour, "second": second,
        "pattern": _draw(n, len(PATTERNS), generator), "accessory": _draw(n, len(ACCESSORIES), generator),
        "accent": _draw(n, count, generator),
    }


def identity_code(identity: Rows) -> Tensor:
    """(n,) one whole number for each identity without its kind: the accent counts only with an accessory."""
    accent = torch.where(identity["accessory"] > 0, identity["accent"], torch.zeros_like(identity["accent"]))
    count = len(COLOURS)
    code = identity["colour"] * count + identity["second"]
    code = code * len(PATTERNS) + identity["pattern"]
    return (code * len(ACCESSORIES) + identity["accessory"]) * count + accent


def _scramble(code: Tensor) -> Tensor:
    code = (code * 2654435761 + 12345) % 4294967296
    code = ((code // 65536) ^ code) * 2246822519 % 4294967296
    return (code // 8192) % 1000


def held_out(identity: Rows) -> Tensor:
    """(n,) True for the tenth of all looks that no training ever sees, in any kind."""
    return _scramble(identity_code(identity)) < 100


def held_out_scene(identity: Rows, scene: Tensor) -> Tensor:
    """(n,) True for the fifth of identity x scene pairs that no training sees, whoever the identity is."""
    return _scramble(identity_code(identity) * len(SCENES) + scene + 7919) < 200


def select(rows: Rows, index: Tensor) -> Rows:
    return {key: value[index] for key, value in rows.items()}


def join(parts: list[Rows]) -> Rows:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def draw_split(n: int, generator: torch.Generator, training: bool = True) -> tuple[Rows, Tensor]:
    """n identities with a scene each, from the training side or (training=False) held-out identities."""
    parts: list[Rows] = []
    have = 0
    while have < n:
        rows = draw_identities(4 * n + 64, generator)
        rows["scene"] = _draw(4 * n + 64, len(SCENES), generator)
        out = held_out(rows)
        keep = ~out & ~held_out_scene(rows, rows["scene"]) if training else out
        parts.append(select(rows, keep.nonzero()[:, 0]))
        have += int(keep.sum())
    rows = select(join(parts), torch.arange(n))
    return rows, rows.pop("scene")


def draw_poses(n: int, generator: torch.Generator, variation: Variation = EASY) -> Rows:
    """place 0..2, shift in pixels, size 0..1 (2 = the easy world's single size), turn in radians, mirror 0/1."""
    signed = torch.rand(n, 3, generator=generator) * 2 - 1
    size = _draw(n, 2, generator)
    mirror = _draw(n, 2, generator)
    place = _draw(n, len(PLACES), generator)
    # Drawn last and only where it counts, so that worlds without it stay as they were.
    up = _draw(n, variation.cells + 1, generator) if variation.cells else torch.zeros(n)
    turn = signed[:, 2].sign() if variation.cells else signed[:, 2]
    return {
        "place": place,
        "dx": signed[:, 0] * variation.offset, "dy": signed[:, 1] * variation.offset - PATCH * up,
        "turn": turn * variation.turn,
        "size": size if variation.sizes else torch.full_like(size, 2),
        "mirror": mirror if variation.mirror else torch.zeros_like(mirror),
    }


def draw_scene_parameters(n: int, generator: torch.Generator, variation: Variation = EASY) -> Tensor:
    """(n, 8) numbers in 0..1 that move sun, trees, hills; 0.5 everywhere in the easy world."""
    return 0.5 + (torch.rand(n, 8, generator=generator) - 0.5) * variation.scene
