"""RealCustom++'s pairs in the miniature world: the same creature in another context, pose and size.

The curriculum: pair k of n was drawn at progress k / n, from references that stand as close as in the target's world to
turned ones, many of them further away. Training opens them in this order.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import world
from .lessons import CELLS, GARMENT, OTHER_KIND, covered, draw_pairs
from .world import Rows, Variation

BLOCK = 128
# at the start and at the end of the curriculum: turn in radians, largest margin as a share of the creature
STAGES = ((0.05, 0.1), (0.2, 0.4))
NEARNESS = 2  # power of the margin's draw: most stand near at any time, since a far one of 64 pixels hardly shows who it is
OPEN_AT_START, ALL_OPEN_AT = 0.4, 0.67  # share of the pairs; share of the steps
# all that decides what is drawn and when: what a cache of pairs and a run of training hang on
LAW = (STAGES, NEARNESS, BLOCK, CELLS, OPEN_AT_START, ALL_OPEN_AT, OTHER_KIND, GARMENT)

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class Recontext(NamedTuple):
    """n pairs with all that the frozen networks say of them; features in half precision."""
    latents: Tensor   # (n, 48, 8, 8) of the target
    deep: Tensor      # (n, t, v)
    local: Tensor     # (n, 4 t, v)
    mask: Tensor      # (n, 8, 8) share of each cell that the word's object covers
    identity: Rows
    pose: Rows
    scene: Tensor
    garment: Tensor


def prepare(n: int, seed: int, variation: Variation, side: int, encode_image: Callable[[Tensor], Tensor],
            encode: Encode) -> Recontext:
    """n pairs; references of `side` pixels go through `encode`, targets, which vary as `variation`, through `encode_image`."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, BLOCK):
        count, progress = min(BLOCK, n - start), start / n
        turn, most = (a + (b - a) * progress for a, b in zip(*STAGES, strict=True))
        margin = STAGES[0][1] + (most - STAGES[0][1]) * torch.rand(count, generator=generator) ** NEARNESS
        pair = draw_pairs(count, generator, variation, Variation(turn=turn, mirror=True), margin, side)
        deep, local = encode(pair.reference)
        parts.append(Recontext(encode_image(pair.target).cpu(), deep.half().cpu(), local.half().cpu(), covered(pair),
                               pair.identity, pair.pose, pair.scene, pair.garment))
    tensors = {name: torch.cat([getattr(part, name) for part in parts])
               for name in ("latents", "deep", "local", "mask", "scene", "garment")}
    return Recontext(identity=world.join([part.identity for part in parts]), pose=world.join([part.pose for part in parts]),
                     **tensors)


def open_pairs(n: int, progress: float) -> int:
    """How many of the n pairs are open when this share of the steps is done."""
    share = OPEN_AT_START + (1 - OPEN_AT_START) * min(1.0, progress / ALL_OPEN_AT)
    return max(1, round(n * share))
