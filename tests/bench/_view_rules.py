"""The renderer's own rules that read a picture of a toy building: camera, outline, background. No network takes part."""
from __future__ import annotations

import torch
from torch import Tensor

from likeness.models.demo import views
from likeness.models.demo.scenery import draw_scenes
from likeness.models.demo.views import Scene, select
from likeness.models.demo.world import SCENES

AZIMUTHS, ELEVATIONS = torch.arange(-72.0, 73.0, 6.0), torch.arange(-24.0, 25.0, 12.0)
SEEN = 0.15  # difference to the bare scene from which a pixel belongs to the building


def held_out(n: int, seed: int) -> dict[str, Tensor]:
    """n different held-out buildings, all kinds among them."""
    every = views.identities()
    rows = views.held_out(every).nonzero()[:, 0]
    return select(every, rows[torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))[:n]])


def bare(scene: Tensor) -> Tensor:
    return draw_scenes(scene, torch.full((scene.shape[0], 8), 0.5))


def inside(box: Tensor, air: int = views.PATCH) -> Tensor:
    """(n, 64, 64) of boxes with a cell of air round them."""
    axis = torch.arange(64)
    low, high = box[:, None, :2] - air, box[:, None, 2:] + air
    x = (axis[None, :] >= low[..., 0]) & (axis[None, :] < high[..., 0])
    y = (axis[None, :] >= low[..., 1]) & (axis[None, :] < high[..., 1])
    return (y[:, :, None] & x[:, None, :]).float()


def distances(pictures: Tensor, candidates: list[Scene]) -> Tensor:
    """(n, candidates): how far each picture is from each candidate's true render, near the box."""
    out = []
    for scene in candidates:
        near = inside(scene.box)
        gap = (pictures - views.render(scene)[0]).abs().mean(1) * near
        out.append(gap.sum((1, 2)) / near.sum((1, 2)))
    return torch.stack(out, 1)


def with_camera(scene: Scene, azimuth: float | Tensor, elevation: float | Tensor) -> Scene:
    n = scene.scene.shape[0]
    rows = {name: torch.as_tensor(value, dtype=torch.float32).expand(n) for name, value in
            (("azimuth", azimuth), ("elevation", elevation))}
    return scene._replace(camera={**scene.camera, **rows})


def cameras(pictures: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """(azimuth, elevation) of the nearest true render, refined once to half of the grid's step."""
    grid = torch.cartesian_prod(AZIMUTHS, ELEVATIONS)
    best = grid[distances(pictures, [with_camera(scene, a, e) for a, e in grid]).argmin(1)]
    around = torch.cartesian_prod(torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0]), torch.tensor([-8.0, -4.0, 0.0, 4.0, 8.0]))
    near = [with_camera(scene, best[:, 0] + a, best[:, 1] + e) for a, e in around]
    best = best + around[distances(pictures, near).argmin(1)]
    return best[:, 0], best[:, 1]


def silhouettes(pictures: Tensor, scene: Scene) -> Tensor:
    """(n, 64, 64) bool: what is not the bare scene, wherever it stands; the asked box is not looked at, and of 5 x 5 pixels
    most must differ, so that grain does not count."""
    differs = ((pictures - bare(scene.scene)).abs().amax(1) > SEEN).float()[:, None]
    return torch.nn.functional.avg_pool2d(differs, 5, 1, 2)[:, 0] > 0.5


def iou(found: Tensor, true: Tensor) -> Tensor:
    """(n,) overlap of the bounding boxes of two masks; 0 where nothing was found."""
    out = []
    for a, b in zip(found, true, strict=True):
        if not a.any():
            out.append(0.0)
            continue
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = _box(a), _box(b)
        both = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
        out.append(both / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - both))
    return torch.tensor(out)


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def backgrounds(pictures: Tensor, box: Tensor) -> Tensor:
    """(n,) number of the scene that the picture outside of the box is nearest to."""
    outside = 1 - inside(box, 0)  # the largest boxes leave no more than a strip of the frame
    scenes = bare(torch.arange(len(SCENES)))
    gaps = [((pictures - one).abs().mean(1) * outside).sum((1, 2)) for one in scenes]
    return torch.stack(gaps, 1).argmin(1)

