"""Alignment of faces: least-squares similarities and bilinear crops. A matrix (2, 3) takes a point of the picture to one of
the crop; whole numbers are pixel centres."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Eye at the picture's left, eye at its right, nose, mouth left, mouth right in a square of 112 pixels.
TEMPLATE = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                         [70.7299, 92.2041]], dtype=torch.float64)
SHIFT = 8.0  # in a square of 128 the same face lies this much to the right, and not lower

Rect = tuple[int, int, int, int]


def template(size: int) -> Tensor:
    """Five points (5, 2) where a crop of `size` pixels wants them; multiples of 112 and of 128 have their own layout."""
    if size % 112 == 0:
        return TEMPLATE * (size / 112)
    points = TEMPLATE.clone()
    points[:, 0] += SHIFT
    return points * (size / 128)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Rotation, scale and shift (2, 3), float64, with the smallest sum of squares from points (n, 2) to points (n, 2).

    No reflection. All source points in one place: shift alone."""
    s, t = source.double().cpu(), target.double().cpu()
    s0, t0 = s.mean(0), t.mean(0)
    s, t = s - s0, t - t0
    norm = (s * s).sum()
    if norm < 1e-12:
        a, b = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    else:
        a = (s * t).sum() / norm
        b = (s[:, 0] * t[:, 1] - s[:, 1] * t[:, 0]).sum() / norm
    turn = torch.stack([torch.stack([a, -b]), torch.stack([b, a])])
    return torch.cat([turn, (t0 - turn @ s0)[:, None]], 1)


def align(keypoints: Tensor, size: int) -> Tensor:
    """The matrix that lays a face's five points (5, 2) on the template of a crop of `size` pixels."""
    return similarity(keypoints, template(size))


def box_matrix(box: Tensor, size: int, share: float = 1.5) -> Tensor:
    """The matrix of an upright square crop round a box (4,): `share` times its longer side wide, its centre in the middle."""
    x0, y0, x1, y1 = box.double().tolist()
    scale = size / (share * max(x1 - x0, y1 - y0, 1e-6))
    return torch.tensor([[scale, 0, size / 2 - scale * (x0 + x1) / 2], [0, scale, size / 2 - scale * (y0 + y1) / 2]],
                        dtype=torch.float64)


def invert(matrix: Tensor) -> Tensor:
    """The way back of a matrix (2, 3)."""
    turn = torch.linalg.inv(matrix[:, :2])
    return torch.cat([turn, -(turn @ matrix[:, 2:])], 1)


def move(matrix: Tensor, points: Tensor) -> Tensor:
    """Points (..., 2) through a matrix (2, 3), in the points' type."""
    return (points.to(matrix) @ matrix[:, :2].T + matrix[:, 2]).to(points.dtype)


def rect_of(points: Tensor, height: int, width: int, margin: float = 1.0) -> Rect:
    """Whole pixels (x0, y0, x1, y1), ends outside, round points (n, 2) with a margin, cut by the picture; may be empty."""
    low, high = (points.amin(0) - margin).floor().tolist(), (points.amax(0) + margin).ceil().tolist()
    x0, y0 = min(max(int(low[0]), 0), width), min(max(int(low[1]), 0), height)
    return x0, y0, max(min(int(high[0]) + 1, width), x0), max(min(int(high[1]) + 1, height), y0)


def paste_rect(matrix: Tensor, size: int, height: int, width: int) -> Rect:
    """The part of a picture that a crop of `size` pixels reaches when it is laid back, with a rim of pixels that it does not
    reach: bilinear values fade over one pixel of the crop, which may be many of the picture."""
    back = invert(matrix)
    reach = float(back[:, :2].abs().sum(1).max())
    return rect_of(move(back, corners(size)), height, width, reach + 2)


def corners(size: int) -> Tensor:
    """Centres of the four outermost pixels of a square (4, 2)."""
    last = float(size - 1)
    return torch.tensor([[0, 0], [last, 0], [last, last], [0, last]], dtype=torch.float64)


def pixel_points(rect: Rect, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """x and y of every pixel of a rectangle (h, w, 2)."""
    x0, y0, x1, y1 = rect
    xs, ys = torch.arange(x0, x1, dtype=dtype, device=device), torch.arange(y0, y1, dtype=dtype, device=device)
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)


def sample(picture: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of picture (h, w, c) at points (..., 2), black outside -> (..., c) float32."""
    height, width, channels = picture.shape
    if not picture.numel():
        return torch.zeros(*points.shape[:-1], channels, device=picture.device)
    size = torch.tensor([width, height], dtype=points.dtype, device=points.device)
    grid = ((2 * points + 1) / size - 1).float().reshape(1, 1, -1, 2)
    values = F.grid_sample(picture.movedim(-1, 0)[None].float(), grid, "bilinear", "zeros", align_corners=False)
    return values[0, :, 0].T.reshape(*points.shape[:-1], channels)


def spread_sample(picture: Tensor, points: Tensor, turn: Tensor, count: int) -> Tensor:
    """As `sample`, the mean of count x count values that lie evenly over the pixel of each point; count 1 is `sample`.

    turn (2, 2): how far one pixel to the right and one down lead in `picture`."""
    steps = (torch.arange(count, dtype=points.dtype, device=points.device) + 0.5) / count - 0.5
    across, down = (steps[:, None] * turn[:, side].to(points) for side in (0, 1))
    total = sum(sample(picture, points[..., None, :] + across + shift).mean(-2) for shift in down)  # row by row: flat memory
    return torch.as_tensor(total) / count


def crop(picture: Tensor, matrix: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """The square (3, size, size) float32 that a matrix cuts out of picture (h, w, 3): bilinear, black outside.

    Made on `device`, else where the picture is."""
    back = invert(matrix)
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = rect_of(move(back, corners(size)), height, width)  # so that a large picture is never copied whole
    grid = pixel_points((0, 0, size, size), dtype=torch.float64)  # not every device knows this type
    points = grid @ back[:, :2].T + back[:, 2] - torch.tensor([x0, y0], dtype=torch.float64)
    place = device or picture.device
    return sample(picture[y0:y1, x0:x1].to(place), points.float().to(place)).movedim(-1, 0)
