"""RealCustom++'s pairs in the miniature world: the same creature in another context, pose and size.

Beside some creatures that stand left or right another one of another kind stands, whom no word means: in a picture of several
subjects each is drawn, under its own mask, while the others appear.

The curriculum: pair k of n was drawn at progress k / n, from references that stand as close as in the target's world to
turned ones, many of them further away. Training opens them in this order.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import world
from .creatures import draw_creature, standing
from .lessons import CELLS, GARMENT, OTHER_KIND, Pair, covered, draw_pairs
from .world import Rows, Variation

BLOCK = 128
# at the start and at the end of the curriculum: turn in radians, largest margin as a share of the creature
STAGES = ((0.05, 0.1), (0.2, 0.4))
NEARNESS = 2  # power of the margin's draw: most stand near at any time, since a far one of 64 pixels hardly shows who it is
OPEN_AT_START, ALL_OPEN_AT = 0.4, 0.67  # share of the pairs; share of the steps
NEIGHBOURS = 0.3  # share of the targets at a side with another creature at the other, where no split forbids it
# all that decides what is drawn and when: what a cache of pairs and a run of training hang on
LAW = (STAGES, NEARNESS, BLOCK, CELLS, OPEN_AT_START, ALL_OPEN_AT, NEIGHBOURS, OTHER_KIND, GARMENT)

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
        pair = with_neighbours(pair, generator)
        deep, local = encode(pair.reference)
        parts.append(Recontext(encode_image(pair.target).cpu(), deep.half().cpu(), local.half().cpu(), covered(pair),
                               pair.identity, pair.pose, pair.scene, pair.garment))
    tensors = {name: torch.cat([getattr(part, name) for part in parts])
               for name in ("latents", "deep", "local", "mask", "scene", "garment")}
    return Recontext(identity=world.join([part.identity for part in parts]), pose=world.join([part.pose for part in parts]),
                     **tensors)


def with_neighbours(pair: Pair, generator: torch.Generator) -> Pair:
    """The pairs, some of them with another training identity across the target; the word and its mask stay the first one's."""
    n = len(pair.scene)
    others, _ = world.draw_split(n, generator)
    count = len(world.KINDS)
    others["kind"] = (pair.identity["kind"] + 1 + others["kind"] % (count - 1)) % count  # so that the word means one of the two
    last = len(world.PLACES) - 1
    aside = pair.pose["place"] != last // 2
    pose = pair.pose | {"place": last - pair.pose["place"], "mirror": pair.pose["mirror"].flip(0)}
    drawn = draw_creature(pair.target, others, pose, standing(pose))
    seen = ~world.held_out_scene(others, pair.scene)
    there = (aside & seen & (torch.rand(n, generator=generator) < NEIGHBOURS)).view(-1, 1, 1)
    return pair._replace(target=torch.where(there[:, None], drawn.picture, pair.target),
                         mask=torch.where(there, pair.mask * (1 - drawn.mask), pair.mask))


def open_pairs(n: int, progress: float) -> int:
    """How many of the n pairs are open when this share of the steps is done."""
    share = OPEN_AT_START + (1 - OPEN_AT_START) * min(1.0, progress / ALL_OPEN_AT)
    return max(1, round(n * share))
