"""Trains the miniature's three face networks on rendered heads, in a few minutes on one thread."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import heads
from .face_nets import HeadDetector, HeadRecogniser, HeadSwapper
from .world import PALETTE

DETECTOR_STEPS, RECOGNISER_STEPS, READER_STEPS, SWAPPER_STEPS = 1500, 500, 150, 800
BATCH = 32
NEAR, FAR = 32.0, 68.0  # sides of heads, in pixels of a level, that the level shall find
FITTING, ZOOMS = torch.tensor([1.6, 4.2]), torch.tensor([0.75, 10.5])  # the views' scales: heads that fit, and all
WINDOW, DETECTOR_BATCH = 160, 12
WHOLE, EACH = 0.8, 0.5  # how far off a found face and each of its points are, in pixels of a picture of 64
_BLOCK = 256

Log = Callable[[str], None]
Crops = Callable[[Tensor, Tensor, int], Tensor]  # pictures (n, 3, p, p), points (n, 5, 2), size -> (n, 3, size, size)


class Pairs(NamedTuple):
    """Aligned heads as bytes (n, 3, size, size): one creature, the same with another face, that face on another creature."""
    head: Tensor
    swapped: Tensor
    source: Tensor
    look: Tensor    # (n,) of `head`
    other: Tensor   # (n,) of `swapped` and `source`


def _bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


class Drawn(NamedTuple):
    """Whole pictures (n, 3, 64, 64) of what Pairs tells, with the five points (n, 5, 2) of `head`, `swapped` and of `source`."""
    head: Tensor
    swapped: Tensor
    source: Tensor
    points: Tensor
    source_points: Tensor
    look: Tensor
    other: Tensor


def draw_swaps(n: int, generator: torch.Generator, training: bool = True) -> Drawn:
    """n creatures before and after a swap of faces, softened as the miniature's own pictures are."""
    mine, theirs = (heads.draw_faces(n, generator, training) for _ in range(2))
    one, draw = heads.render(mine, generator)
    two = heads.again(heads.with_face(mine, theirs), draw)
    three, _ = heads.render(theirs, generator)
    state = generator.get_state()
    first = heads.soften(one.picture, generator)
    generator.set_state(state)  # the very same noise on both: it is no part of the face
    second = heads.soften(two.picture, generator)
    third = heads.soften(three.picture, generator)
    return Drawn(first, second, third, one.keypoints, three.keypoints, heads.look_of(mine), heads.look_of(theirs))


def draw_pairs(n: int, seed: int, crops: Crops, off: float = 1.0) -> Pairs:
    """n pairs of faces to learn from; all are cut at 128 pixels, as far off as the detector's points are (off 0: exactly)."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, _BLOCK):
        drawn = draw_swaps(min(_BLOCK, n - start), generator)
        there, given = (points + off * (WHOLE * torch.randn(len(points), 1, 2, generator=generator)
                                        + EACH * torch.randn(points.shape, generator=generator))
                        for points in (drawn.points, drawn.source_points))
        cut = [_bytes(crops(picture, points, 128)) for picture, points in (
            (drawn.head, there), (drawn.swapped, there), (drawn.source, given))]
        parts.append(Pairs(cut[0], cut[1], cut[2], drawn.look, drawn.other))
    return Pairs(*(torch.cat([part[i] for part in parts]) for i in range(5)))


def _optimise(parameters: list[nn.Parameter], steps: int, lr: float, loss_of: Callable[[int], Tensor], name: str,
              log: Log) -> None:
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            log(f"{name} {step + 1}: loss {loss.item():.4f}")


def _to_recognise(crops: Tensor) -> Tensor:
    """What the recogniser's own alignment at 112 pixels cuts out, from crops (n, 3, 128, 128): the same pixels, fewer of them."""
    return crops[:, :, :112, 8:120]


def train_recogniser(pairs: Pairs, steps: int, log: Log, seed: int = 0) -> HeadRecogniser:
    """Heads of one look together, all others apart (supervised contrast); the attributes help at the start."""
    torch.manual_seed(seed)
    model = HeadRecogniser()
    guess = nn.Linear(512, 8 + 8 + 3)
    generator = torch.Generator().manual_seed(seed + 1)

    def loss_of(step: int) -> Tensor:
        index = torch.randint(0, pairs.look.numel(), (BATCH,), generator=generator)
        pictures = torch.cat([pairs.swapped[index], pairs.source[index]]).float() / 127.5 - 1
        look = pairs.other[index].repeat(2)
        e = F.normalize(model(_to_recognise(pictures)), dim=1)
        alike = e @ e.T / 0.1 - 1e9 * torch.eye(2 * BATCH)
        same = (look[:, None] == look).float() * (1 - torch.eye(2 * BATCH))
        contrast = -(alike.log_softmax(1) * same).sum(1) / same.sum(1)
        parts = guess(8 * e).split([8, 8, 3], 1)
        right = (look // 24, look // 3 % 8, look % 3)
        return contrast.mean() + sum(F.cross_entropy(p, r) for p, r in zip(parts, right, strict=True))

    _optimise([*model.parameters(), *guess.parameters()], steps, 3e-3, loss_of, "recogniser", log)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def embed(model: HeadRecogniser, crops: Tensor) -> Tensor:
    """Aligned heads (n, 3, 128, 128) as bytes -> unit embeddings (n, 512)."""
    rows = [model(_to_recognise(part.float() / 127.5 - 1)) for part in crops.split(64)]
    return F.normalize(torch.cat(rows), dim=1)


def _attributes(look: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Main colour, second colour and pattern of looks (n,)."""
    return look // 24, look // 3 % 8, look % 3


def _inner_size(crops: Tensor) -> Tensor:
    """Aligned heads (n, 3, 128, 128) as bytes -> (n, 3, 32, 32) in 0..1, the swapper's inner picture."""
    return torch.cat([F.avg_pool2d(part.float() / 255, 4) for part in crops.split(64)])


def _teach_reading(model: HeadSwapper, embeddings: Tensor, look: Tensor, seed: int) -> None:
    """Which paints and which pattern an embedding (n, 512) stands for: a linear rule, found on all faces at once."""
    generator = torch.Generator().manual_seed(seed + 4)
    optimizer = torch.optim.AdamW(model.read.parameters(), 0.1, weight_decay=0.1)
    for _ in range(READER_STEPS):
        seen = embeddings + 0.02 * torch.randn(embeddings.shape, generator=generator)
        parts = model.read(seen).split(model.parts, 1)
        loss = sum(F.cross_entropy(part, right) for part, right in zip(parts, _attributes(look), strict=True))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()


def train_swapper(pairs: Pairs, recogniser: HeadRecogniser, steps: int, log: Log, seed: int = 0) -> HeadSwapper:
    """The rendered truth of the same creature with another face is what the swap shall give.

    Reading the identity comes first: as long as its paints are wrong, every pixel learns to stay. Then each pixel is taught which
    of the three to take, because a mixture of colours alone has its nearest optimum where nothing changes."""
    torch.manual_seed(seed + 2)
    model = HeadSwapper()
    source, own = embed(recogniser, pairs.source), embed(recogniser, pairs.head)
    before, swapped = _inner_size(pairs.head), _inner_size(pairs.swapped)
    _teach_reading(model, torch.cat([own, source]), torch.cat([pairs.look, pairs.other]), seed)
    generator = torch.Generator().manual_seed(seed + 3)

    def loss_of(step: int) -> Tensor:
        index = torch.randint(0, pairs.look.numel(), (BATCH,), generator=generator)
        still = torch.arange(BATCH) < BATCH // 8  # an eighth keeps its own face
        head = before[index]
        want = torch.where(still[:, None, None, None], head, swapped[index])
        z = torch.where(still[:, None], own[index], source[index])
        main, second, _ = _attributes(torch.where(still, pairs.look[index], pairs.other[index]))
        logits, paints = model.choose(head, z)
        gap = torch.stack([(head - want).abs().sum(1) - 0.05,  # what is right already stays
                           *((PALETTE[paint][:, :, None, None] - want).abs().sum(1) for paint in (main, second))], 1)
        return F.cross_entropy(logits, gap.argmin(1)) + (model.paint(head, logits, paints) - want).abs().mean()

    _optimise(list(model.parameters()), steps, 4e-3, loss_of, "swapper", log)
    return model.eval().requires_grad_(False)


class Scenes(NamedTuple):
    """Pictures as bytes (n, 3, 64, 64) with up to two heads each: points (n, 2, 5, 2), boxes (n, 2, 4), NaN for none."""
    picture: Tensor
    keypoints: Tensor
    box: Tensor


def draw_scenes(n: int, seed: int) -> Scenes:
    """A quarter with two creatures, a tenth with none."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, _BLOCK):
        count = min(_BLOCK, n - start)
        mine, theirs = (heads.draw_faces(count, generator, True) for _ in range(2))
        one, draw = heads.render(mine, generator)
        pair, both = heads.add_second(one, draw, theirs, generator)
        empty = heads.draw_scenes(draw["scene"], draw["parameters"])
        chance = torch.rand(count, generator=generator)
        none = torch.full((count, 2, 5, 2), float("nan"))
        points = torch.where((chance < 0.25)[:, None, None, None], both.keypoints,
                             torch.stack([one.keypoints, none[:, 0]], 1))
        boxes = torch.where((chance < 0.25)[:, None, None], both.box, torch.stack([one.box, none[:, 0, 0].repeat(1, 2)], 1))
        vacant = chance > 0.9
        points[vacant], boxes[vacant] = float("nan"), float("nan")
        picture = torch.where((chance < 0.25)[:, None, None, None], pair, one.picture)
        picture = torch.where(vacant[:, None, None, None], empty, picture)
        parts.append(Scenes(_bytes(heads.soften(picture, generator)), points, boxes))
    return Scenes(*(torch.cat([part[i] for part in parts]) for i in range(3)))


def _targets(boxes: Tensor, points: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a level of side x side cells of 8 pixels: whether a cell must fire (1), must not (0) or may (-1), its box distances
    and its points, in strides, for all cells that may fire: finds of two levels that agree are one."""
    n = boxes.shape[0]
    axis = torch.arange(side) * 8.0
    cells = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (side, side, 2): x, y
    fire = torch.zeros(n, side, side)
    reach, where = torch.zeros(n, side, side, 4), torch.zeros(n, side, side, 10)
    for k in range(boxes.shape[1]):
        box = boxes[:, k]
        size = (box[:, 2:] - box[:, :2]).amax(1)[:, None, None]
        middle = (box[:, :2] + box[:, 2:]) / 2
        gap = (cells[None] - middle[:, None, None]).abs().amax(-1)
        hit = (size >= NEAR) & (size <= FAR) & (gap <= size / 5)
        may = (size > 0.7 * NEAR) & (size < 1.4 * FAR) & (gap <= size / 2.5)
        fire = torch.where(hit, 1.0, torch.where(may & (fire < 1), -1.0, fire))
        distances = torch.cat([cells[None] - box[:, None, None, :2], box[:, None, None, 2:] - cells[None]], -1) / 8
        reach = torch.where(may[..., None], distances, reach)
        moved = (points[:, k, None, None] - cells[None, :, :, None]) / 8
        where = torch.where(may[..., None], moved.flatten(-2), where)
    return fire, reach, where


def _windows(scenes: Scenes, index: Tensor, generator: torch.Generator) -> Scenes:
    """Square views of WINDOW pixels, each at a scale and a place of its own, black beside the picture as after a letterbox.

    Half of them show heads of the level's own sizes; the rest any size, down to a single eye that fills the view."""
    n = index.numel()
    share, wide = torch.rand(2, n, generator=generator)
    low, high = (torch.where(wide < 0.5, *ends) for ends in zip(FITTING, ZOOMS, strict=True))
    zoom = low * (high / low) ** share
    middle = torch.rand(n, 2, generator=generator) * 64 - 0.5
    corner = middle + 0.5 - WINDOW / 2 / zoom[:, None]  # of the view, in pixels of the picture from its edge
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = WINDOW / zoom / 64
    theta[:, :, 2] = (middle + 0.5) / 32 - 1
    grid = F.affine_grid(theta, [n, 3, WINDOW, WINDOW], align_corners=False)
    picture = F.grid_sample(scenes.picture[index].float() / 255, grid, mode="bilinear", align_corners=False)
    scale = zoom[:, None, None]
    points = (scenes.keypoints[index] + 0.5 - corner[:, None, None]) * scale[..., None] - 0.5
    boxes = (scenes.box[index] + 0.5 - corner[:, None].repeat(1, 1, 2)) * scale - 0.5
    return Scenes(picture, points, boxes)


def train_detector(scenes: Scenes, steps: int, log: Log, seed: int = 0) -> HeadDetector:
    """In views at random scales, so that a level learns the sizes that are its own and leaves the rest to the others; the
    surest mistakes count most (focal loss)."""
    torch.manual_seed(seed + 5)
    model = HeadDetector()
    with torch.no_grad():
        model.head.get_parameter("bias")[0] = -4.0  # at the start nothing is a head
    generator = torch.Generator().manual_seed(seed + 6)

    def loss_of(step: int) -> Tensor:
        index = torch.randint(0, scenes.picture.shape[0], (DETECTOR_BATCH,), generator=generator)
        views = _windows(scenes, index, generator)
        fire, reach, where = _targets(views.box, views.keypoints, WINDOW // 8)
        out = model.look((views.picture * 255 - 127.5) / 128).permute(0, 2, 3, 1)
        hit = fire > 0
        entropy = F.binary_cross_entropy_with_logits(out[..., 0], fire.clamp(min=0), reduction="none")
        mistaken = (out[..., 0].detach().sigmoid() - fire).abs()
        weight = (fire >= 0) * torch.where(hit, 1.0, 3.0)  # a head too many is worse than one of a head's cells too few
        score = (entropy * mistaken * weight).sum() / (hit.sum() + 4)
        near = fire != 0
        if not near.any():
            return score
        return 2 * score + F.l1_loss(out[..., 1:5][near], reach[near]) + 2 * F.l1_loss(out[..., 5:][near], where[near])

    _optimise(list(model.parameters()), steps, 3e-3, loss_of, "detector", log)
    return model.eval().requires_grad_(False)
