"""Pictures of the miniature world, rendered once for a training run and kept as bytes."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import world
from .creatures import draw_creature, draw_pictures, draw_references, standing
from .world import Rows, Variation

_BLOCK = 256  # small blocks are several times dearer a picture, large ones need much memory


class Pool(NamedTuple):
    picture: Tensor    # (n, 3, 64, 64) uint8
    mask: Tensor       # (n, 64, 64) uint8, the first creature
    reference: Tensor  # (n, 3, 64, 64) uint8, the first creature alone in another pose, cut out on white
    identity: Rows
    other: Rows        # the second creature; kind -1 where there is none
    pose: Rows
    scene: Tensor      # (n,)


def _bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def _block(n: int, generator: torch.Generator, variation: Variation, training: bool) -> Pool:
    identity, scene = world.draw_split(n, generator, training)
    other, _ = world.draw_split(n, generator, training)
    pose = world.draw_poses(n, generator, variation)
    second = world.draw_poses(n, generator, variation)
    two = torch.rand(n, generator=generator) < variation.pairs
    pose["place"] = torch.where(two, torch.zeros_like(pose["place"]), pose["place"])
    second["place"] = torch.full_like(pose["place"], 2)
    drawn = draw_pictures(identity, pose, scene, world.draw_scene_parameters(n, generator, variation))
    picture = drawn.picture
    if two.any():
        rows = two.nonzero()[:, 0]
        other_pose = world.select(second, rows)
        picture[rows] = draw_creature(picture[rows], world.select(other, rows), other_pose, standing(other_pose)).picture
    other = {**other, "kind": torch.where(two, other["kind"], torch.full_like(other["kind"], -1))}
    free = world.draw_poses(n, generator, variation)
    reference = draw_references(identity, free).picture
    return Pool(_bytes(picture), _bytes(drawn.mask), _bytes(reference), identity, other, pose, scene)


def render_pool(n: int, seed: int, variation: Variation, training: bool = True) -> Pool:
    """n pictures with their truth; training=False draws held-out identities only."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [_block(min(_BLOCK, n - start), generator, variation, training) for start in range(0, n, _BLOCK)]
    tensors = {name: torch.cat([getattr(b, name) for b in blocks]) for name in ("picture", "mask", "reference", "scene")}
    rows = {name: world.join([getattr(b, name) for b in blocks]) for name in ("identity", "other", "pose")}
    return Pool(tensors["picture"], tensors["mask"], tensors["reference"], rows["identity"], rows["other"], rows["pose"],
                tensors["scene"])
