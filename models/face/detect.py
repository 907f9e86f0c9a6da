"""SCRFD: letterbox, decoding and suppression of double finds, with the size of each call chosen by the caller."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from .contract import Contract
from .faces import Face
from .networks import Network

LADDER = (640, 320, 192)  # a face that fills the picture is too large for 640, so smaller ones follow
THRESHOLD, OVERLAP = 0.5, 0.4
# number of outputs: (strides, anchors of a cell, whether it finds the five points)
LAYOUTS = {6: ((8, 16, 32), 2, False), 9: ((8, 16, 32), 2, True), 10: ((8, 16, 32, 64, 128), 1, False),
           15: ((8, 16, 32, 64, 128), 1, True)}


class Found(NamedTuple):
    """boxes (n, 4), scores (n,), keypoints (n, 5, 2) in pixels of the picture, the best first."""
    boxes: Tensor
    scores: Tensor
    keypoints: Tensor


def check_detector(name: str, contract: Contract) -> None:
    """Raises LikenessError for a detector that gives boxes alone."""
    if not LAYOUTS[len(contract.outputs)][2]:
        raise LikenessError(f"The detector {name} finds boxes but no eyes, nose and mouth, which alignment needs: use a pack "
                            "whose detector has them, such as det_10g or scrfd_10g_bnkps.")


def fixed_size(contract: Contract) -> tuple[int, int] | None:
    """(height, width) where the file allows only one."""
    height, width = contract.inputs[0][1][2:]
    return (height, width) if height and width else None


def letterbox(picture: Tensor, height: int, width: int, mean: float, std: float) -> tuple[Tensor, float]:
    """Picture (h, w, 3) in 0..1 -> (1, 3, height, width) as the detector wants it, and its scale: top left, rest black."""
    h, w = picture.shape[:2]
    if h / w > height / width:
        tall, wide = height, max(int(height / (h / w)), 1)
    else:
        tall, wide = max(int(width * (h / w)), 1), width
    small = F.interpolate(picture.movedim(-1, 0)[None].float(), (tall, wide), mode="bilinear", align_corners=False)
    canvas = small.new_zeros(1, 3, height, width)
    canvas[:, :, :tall, :wide] = small
    return (canvas * 255 - mean) / std, tall / h


def decode(outputs: list[Tensor], height: int, width: int, threshold: float = THRESHOLD) -> Found:
    """What the network says of an input of height x width -> boxes, scores and points in its pixels, unsuppressed.

    Rows run over y, x, anchor; centres are corners of cells; distances are in strides."""
    strides, anchors, _ = LAYOUTS[len(outputs)]
    levels = len(strides)
    boxes, scores, points = [], [], []
    for level, stride in enumerate(strides):
        score = outputs[level].reshape(-1).float().cpu()
        keep = score >= threshold
        rows = keep.nonzero()[:, 0]
        cell = rows // anchors
        across = width // stride
        centre = torch.stack([cell % across, cell // across], 1).float() * stride
        reach = outputs[levels + level].reshape(-1, 4)[rows.to(outputs[levels + level].device)].float().cpu() * stride
        moved = outputs[2 * levels + level].reshape(-1, 5, 2)[rows.to(outputs[2 * levels + level].device)].float().cpu() * stride
        boxes.append(torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], 1))
        points.append(centre[:, None] + moved)
        scores.append(score[rows])
    return Found(torch.cat(boxes), torch.cat(scores), torch.cat(points))


def suppress(boxes: Tensor, scores: Tensor, overlap: float = OVERLAP) -> list[int]:
    """Places of the boxes that stay, the best first: greedy, by intersection over union with both edge pixels counted."""
    order = torch.sort(scores, descending=True, stable=True).indices
    keep = []
    while order.numel():
        best, rest = order[0], order[1:]
        keep.append(int(best))
        order = rest[_shares(boxes[best], boxes[rest]) <= overlap]
    return keep


def _shares(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of box (4,) with each of boxes (n, 4)."""
    one, areas = (box[2:] - box[:2] + 1).prod(), (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    common = (high - low + 1).clamp(min=0).prod(1)
    return common / (one + areas - common)


def detect_at(network: Network, picture: Tensor, size: tuple[int, int], threshold: float = THRESHOLD) -> Found:
    """Faces of one picture (h, w, 3) in 0..1 at one input size (height, width)."""
    contract = network.contract
    tensor, scale = letterbox(picture.to(network.device), *size, contract.mean, contract.std)
    found = decode(network(tensor), *size, threshold)
    keep = suppress(found.boxes / scale, found.scores)
    return Found(found.boxes[keep] / scale, found.scores[keep], found.keypoints[keep] / scale)


def detect(network: Network, picture: Tensor, sizes: tuple[int, ...] = LADDER, threshold: float = THRESHOLD) -> list[Face]:
    """Faces at the first of the sizes that finds any; a file that allows one size only is asked once."""
    only = fixed_size(network.contract)
    for size in ([only] if only else [(side, side) for side in sizes]):
        found = detect_at(network, picture, size, threshold)
        if found.scores.numel():
            return [Face(box, points, float(score)) for box, score, points in zip(*found, strict=True)]
    return []


def inside(network: Network, picture: Tensor, boxes: list[tuple[float, float, float, float]], sizes: tuple[int, ...] = LADDER,
           threshold: float = THRESHOLD, margin: float = 0.25) -> list[Face]:
    """A face for each box (x0, y0, x1, y1) that another detector drew, the best that no other box takes; boxes without one
    give none."""
    found = [_in_box(network, picture, box, sizes, threshold, margin) for box in boxes]
    every = [face for faces in found for face in faces]
    if not every:
        return []
    outlines = torch.stack([face.box for face in every])
    who = outlines[suppress(outlines, torch.tensor([face.score for face in every]))]  # the same face may lie in several boxes
    named = [{int(_shares(face.box, who).argmax()): face for face in reversed(faces)} for faces in found]
    dealt = deal([sorted(faces, key=lambda name: -faces[name].score) for faces in named])
    return [faces[name] for faces, name in zip(named, dealt, strict=True) if name is not None]


def deal(wishes: list[list[int]]) -> list[int | None]:
    """For each row one of the names that it wishes for, the best first; none twice, and as many rows served as can be."""
    owner: dict[int, int] = {}

    def serve(row: int, asked: set[int]) -> bool:
        free = next((name for name in wishes[row] if name not in owner), None)
        if free is not None:
            owner[free] = row
            return True
        for name in wishes[row]:
            if name not in asked:
                asked.add(name)
                if serve(owner[name], asked):  # who has it takes another one
                    owner[name] = row
                    return True
        return False

    for row in range(len(wishes)):
        serve(row, set())
    has = {row: name for name, row in owner.items()}
    return [has.get(row) for row in range(len(wishes))]


def _in_box(network: Network, picture: Tensor, box: tuple[float, float, float, float], sizes: tuple[int, ...], threshold: float,
            margin: float) -> list[Face]:
    """Faces whose centre lies in the box, the best first."""
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = box
    space = margin * max(x1 - x0, y1 - y0)
    left, top = max(int(x0 - space), 0), max(int(y0 - space), 0)
    right, bottom = min(int(x1 + space) + 1, width), min(int(y1 + space) + 1, height)
    if right <= left or bottom <= top:
        return []
    shift = torch.tensor([left, top], dtype=torch.float32)
    found = [face._replace(box=face.box + shift.repeat(2), keypoints=face.keypoints + shift)
             for face in detect(network, picture[top:bottom, left:right], sizes, threshold)]
    # The margin may show a neighbour, whose centre lies outside of the box.
    low, high = torch.tensor([x0, y0]), torch.tensor([x1, y1])
    middles = [face.box.reshape(2, 2).mean(0) for face in found]
    here = [face for face, middle in zip(found, middles, strict=True) if bool(((low <= middle) & (middle <= high)).all())]
    return sorted(here, key=lambda face: -face.score)
