"""Where a swapped face is pasted: insightface's eroded square, a soft box, or the hull of the face."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .faces import Face
from .geometry import SHIFT, move

INSIGHTFACE, BOX, HULL = "insightface", "box", "hull"
KINDS = (HULL, BOX, INSIGHTFACE)
EDGE = 20 / 255  # coverage above which insightface counts a pixel of the warped square
# Outline of a face in the template of 128: centre and half axes.
_OVAL = (56.0 + SHIFT, 68.0, 36.0, 46.0)


def _erode(mask: Tensor, side: int) -> Tensor:
    """Binary mask (h, w): 1 where the whole window of side x side is 1; beyond the border counts as 1."""
    for _ in range(2):  # along x, then along y
        width = mask.shape[1]
        holes = F.pad(1 - mask, (side // 2 + 1, side - side // 2 - 1)).cumsum(1)
        mask = (holes[:, side:] - holes[:, :width] < 0.5).float().T
    return mask


def _mirror(count: int, reach: int, device: torch.device) -> Tensor:
    """Places of a line with `reach` mirrored ones at both ends, the outermost pixel not doubled."""
    places = torch.arange(-reach, count + reach, device=device)
    period = max(2 * (count - 1), 1)
    places = places.remainder(period)
    return torch.where(places < count, places, period - places)


def _gaussian(count: int, reach: int, device: torch.device) -> Tensor:
    """(count, count): row i holds the weights of all places of a line for its place i."""
    sigma = 0.3 * (reach - 1) + 0.8
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32, device=device)
    taps = torch.exp(-0.5 * (steps / sigma) ** 2)
    rows = torch.arange(count, device=device)[:, None]
    columns = _mirror(count, reach, device)[rows + torch.arange(2 * reach + 1, device=device)]
    return torch.zeros(count, count, device=device).scatter_add_(1, columns, (taps / taps.sum()).expand(count, -1))


def blur(mask: Tensor, reach: int) -> Tensor:
    """Gaussian of 2 reach + 1 taps with OpenCV's own sigma for that width, mirrored at the borders: (h, w) -> (h, w).

    As two products of matrices: reach grows with the face, and long convolutions of one channel are slow."""
    height, width = mask.shape
    return _gaussian(height, reach, mask.device) @ mask @ _gaussian(width, reach, mask.device).T


def _square(points: Tensor, size: int) -> Tensor:
    """Coverage (h, w) of the crop's square at crop coordinates (h, w, 2): bilinear, nothing outside."""
    return torch.minimum(points + 1, size - points).clamp(0, 1).prod(-1)


def insightface_mask(points: Tensor, size: int) -> Tensor:
    """insightface's paste mask (h, w) from the crop coordinates (h, w, 2) of a rectangle that holds the square's pixels."""
    inside = (_square(points, size) > EDGE).float()
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    if not rows.numel():
        return inside
    side = int(math.sqrt(int(rows[-1] - rows[0]) * int(columns[-1] - columns[0])))
    return blur(_erode(inside, max(side // 10, 10)), max(side // 20, 5))


def _soft(inside: Tensor, feather: float) -> Tensor:
    """0 at the edge, 1 from `feather` pixels inside, smooth at both ends."""
    t = (inside / max(feather, 1e-3)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def box_mask(points: Tensor, size: int, feather: float) -> Tensor:
    """The crop's square with an edge of `feather` (share of its side)."""
    inside = torch.minimum(points + 0.5, size - 0.5 - points).amin(-1)
    return _soft(inside, feather * size)


def hull_points(points: Tensor) -> Tensor:
    """Corners of the convex hull of points (n, 2), one after the other, by the monotone chain."""
    ordered = sorted({(float(x), float(y)) for x, y in points.tolist()})

    def chain(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
        out: list[tuple[float, float]] = []
        for x, y in line:
            while len(out) > 1 and ((out[-1][0] - out[-2][0]) * (y - out[-2][1])
                                    <= (out[-1][1] - out[-2][1]) * (x - out[-2][0])):
                out.pop()
            out.append((x, y))
        return out[:-1]

    return torch.tensor(chain(ordered) + chain(ordered[::-1]))


def _oval(size: int) -> Tensor:
    x, y, across, down = (value * size / 128 for value in _OVAL)
    angles = torch.arange(32) * (2 * math.pi / 32)
    return torch.stack([x + across * angles.cos(), y + down * angles.sin()], -1)


def hull_mask(points: Tensor, size: int, feather: float, landmarks: Tensor | None) -> Tensor:
    """Convex hull of the landmarks (n, 2) in the crop, else an oval where the aligned face lies; the feather lies round it."""
    hull = hull_points(landmarks if landmarks is not None else _oval(size)).to(points)
    inside = torch.full(points.shape[:-1], float("inf"), device=points.device)
    for (x0, y0), (x1, y1) in zip(hull.tolist(), hull.roll(-1, 0).tolist(), strict=True):
        length = max(math.hypot(x1 - x0, y1 - y0), 1e-6)
        distance = ((x1 - x0) * (points[..., 1] - y0) - (y1 - y0) * (points[..., 0] - x0)) / length
        inside = torch.minimum(inside, distance)
    # Outside of the hull, since brows and eyes lie at its edge; within the crop, since beyond it there are no pixels to paste.
    return torch.minimum(_soft(inside + feather * size, feather * size), box_mask(points, size, feather))


def face_mask(kind: str, points: Tensor, size: int, feather: float, face: Face, matrix: Tensor) -> Tensor:
    """Mask (h, w) in 0..1 of a face at crop coordinates (h, w, 2); `matrix` is the alignment that made them."""
    if kind == INSIGHTFACE:
        return insightface_mask(points, size)
    if kind == BOX:
        return box_mask(points, size, feather)
    landmarks = None if face.landmarks is None else move(matrix, face.landmarks)
    return hull_mask(points, size, feather, landmarks)
