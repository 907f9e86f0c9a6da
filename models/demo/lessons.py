"""Training pairs of the miniature world for subject adapters: a reference, a target picture, a caption with the word.

Most pairs show one creature twice in other poses. In some the reference is a creature of another kind with the same
look (the word decides the kind), in some it is only a hat or a scarf (the word is the garment). `correlate` makes the
reference stand as the target does in a share of the pairs, as frames of one video would: a pose that can leak.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import world
from .captions import captions
from .creatures import draw_pictures, draw_references
from .world import ACCESSORIES, KINDS, Rows, Variation

OTHER_KIND, GARMENT = 0.2, 0.45  # share of pairs; GARMENT counts among those that wear something
REFERENCE_VARIATION = Variation(turn=0.1, mirror=True)  # what a reference may look like
CORRELATED = ("mirror", "turn")  # what a cropped reference can tell of a pose, and no caption names
_BLOCK = 256
CELLS = 8

Features = list[tuple[Tensor, Tensor]]


class Lessons(NamedTuple):
    """n pairs. features: per encoder (class token (n, d), patch tokens (n, t, d)) in half precision."""
    latents: Tensor
    embeds: Tensor
    features: Features
    identity: Rows
    pose: Rows
    scene: Tensor
    garment: Tensor  # (n,) True where the reference is the accessory alone
    mask: Tensor     # (n, 8, 8) share of each latent cell that the word's object covers


class Pair(NamedTuple):
    target: Tensor
    reference: Tensor
    identity: Rows
    pose: Rows
    scene: Tensor
    garment: Tensor
    mask: Tensor  # (n, 64, 64): what the word names, in the target


class Story(Protocol):
    """What captions are told from."""
    @property
    def identity(self) -> Rows: ...
    @property
    def pose(self) -> Rows: ...
    @property
    def scene(self) -> Tensor: ...
    @property
    def garment(self) -> Tensor: ...


def draw_pairs(n: int, generator: torch.Generator, variation: Variation, seen: Variation = REFERENCE_VARIATION,
               margin: float | Tensor = 0.1, pixels: int = 64, correlate: float = 0.0) -> Pair:
    """n pairs of training identities, targets (n, 3, 64, 64) in 0..1. References: poses vary as `seen`, `margin` (share of
    the creature's longer side, or (n,)) round them, `pixels` a side.

    correlate: share of pairs whose reference faces and turns as its target does; the others stand at random. Place and
    size are no part of it: a reference is cropped to its subject, so nobody could read them off it."""
    identity, scene = world.draw_split(n, generator)
    pose = world.draw_poses(n, generator, variation)
    other = world.draw_poses(n, generator, seen)
    target = draw_pictures(identity, pose, scene, world.draw_scene_parameters(n, generator, variation))
    chance = torch.rand(n, 2, generator=generator)
    garment = (identity["accessory"] > 0) & (chance[:, 0] < GARMENT)
    kind = torch.where((chance[:, 1] < OTHER_KIND) & ~garment,
                       torch.randint(0, len(KINDS), (n,), generator=generator), identity["kind"])
    if correlate:  # drawn only when asked, so that the other pairs of a seed stay what they were
        same = torch.rand(n, generator=generator) < correlate
        other |= {name: torch.where(same, pose[name], other[name]) for name in CORRELATED}
    # no tint and no shift in the reference: its own pose is what must not leak
    reference = draw_references({**identity, "kind": kind}, other, garment, margin, pixels).picture
    mask = torch.where(garment.view(-1, 1, 1), target.accessory, target.mask)
    return Pair(target.picture, reference, identity, pose, scene, garment, mask)


def covered(pair: Pair) -> Tensor:
    """(n, 8, 8) how much of each latent cell of the target the word's object covers."""
    return F.adaptive_avg_pool2d(pair.mask[:, None], CELLS)[:, 0]


def prepare(n: int, seed: int, variation: Variation, encode: Callable[[Tensor], Tensor],
            features: Callable[[Tensor], Features], embed: Callable[[Tensor], Tensor], correlate: float = 0.0) -> Lessons:
    """n pairs with all that the frozen networks say of them, so that a training step needs none of them; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, _BLOCK):
        pair = draw_pairs(min(_BLOCK, n - start), generator, variation, correlate=correlate)
        tokens = [(c.half().cpu(), p.half().cpu()) for c, p in features(pair.reference)]
        parts.append(Lessons(encode(pair.target).cpu(), embed(pair.target).cpu(), tokens, pair.identity, pair.pose, pair.scene,
                             pair.garment, covered(pair)))
    joined = [(torch.cat([p.features[e][0] for p in parts]), torch.cat([p.features[e][1] for p in parts]))
              for e in range(len(parts[0].features))]
    return Lessons(torch.cat([p.latents for p in parts]), torch.cat([p.embeds for p in parts]), joined,
                   world.join([p.identity for p in parts]), world.join([p.pose for p in parts]),
                   torch.cat([p.scene for p in parts]), torch.cat([p.garment for p in parts]),
                   torch.cat([p.mask for p in parts]))


def told(lessons: Story, index: Tensor, generator: torch.Generator) -> tuple[list[str], list[str]]:
    """Captions and words. A creature's look is never told when it is the subject; with a garment it is, but for the
    garment's colour."""
    identity, pose = world.select(lessons.identity, index), world.select(lessons.pose, index)
    scene, garment = lessons.scene[index], lessons.garment[index]
    plain = captions(identity, pose, scene, generator, described=False)
    full = captions(identity, pose, scene, generator)
    texts, words = [], []
    for k in range(index.shape[0]):
        if not garment[k]:
            texts.append(plain[k])
            words.append(KINDS[int(identity["kind"][k])])
            continue
        worn = ACCESSORIES[int(identity["accessory"][k])]
        colour = world.COLOUR_NAMES[int(identity["accent"][k])]
        text = full[k].replace(f"a {colour} {worn}", f"a {worn}").replace(f"an {colour} {worn}", f"a {worn}")
        if worn not in text.split(" ") and f"{worn}," not in text.split(" "):
            kind = KINDS[int(identity["kind"][k])]
            text = text.replace(kind, f"{kind} with a {worn}", 1)
        texts.append(text)
        words.append(worn)
    return texts, words
