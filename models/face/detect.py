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
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    keep = []
    while order.numel():
        best, rest = order[0], order[1:]
        keep.append(int(best))
        low, high = torch.maximum(boxes[best, :2], boxes[rest, :2]), torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        common = (high - low + 1).clamp(min=0).prod(1)
        order = rest[common / (areas[best] + areas[rest] - common) <= overlap]
    return keep


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
    """The best face in each box (x0, y0, x1, y1) that another detector drew; boxes without one give none."""
    height, width = picture.shape[:2]
    out: list[Face] = []
    for x0, y0, x1, y1 in boxes:
        space = margin * max(x1 - x0, y1 - y0)
        left, top = max(int(x0 - space), 0), max(int(y0 - space), 0)
        right, bottom = min(int(x1 + space) + 1, width), min(int(y1 + space) + 1, height)
        if right <= left or bottom <= top:
            continue
        shift = torch.tensor([left, top], dtype=torch.float32)
        found = [face._replace(box=face.box + shift.repeat(2), keypoints=face.keypoints + shift)
                 for face in detect(network, picture[top:bottom, left:right], sizes, threshold)]
        # The margin may show a neighbour, whose centre lies outside of the box.
        low, high = torch.tensor([x0, y0]), torch.tensor([x1, y1])
        middles = [face.box.reshape(2, 2).mean(0) for face in found]
        here = [face for face, middle in zip(found, middles, strict=True) if bool(((low <= middle) & (middle <= high)).all())]
        if here:
            out.append(max(here, key=lambda face: face.score))
    return out
