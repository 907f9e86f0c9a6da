"""One face swapped and pasted back: insightface's INSwapper in floats, at several times its resolution if wished."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .analyse import unit
from .colour import match
from .faces import Face
from .geometry import align, crop, paste_rect, pixel_points, spread_sample
from .masks import HULL, face_mask
from .networks import Network, run_all

BOOSTS = 4
SPREAD = 16
Restore = Callable[[Tensor], Tensor]


class Paste(NamedTuple):
    """How a face is swapped: boost 1..4 times the swapper's resolution; mask kind and feather (share of the crop's side);
    colour 0..1 of the old face; visibility 0..1 of the restored crop."""
    boost: int = 1
    mask: str = HULL
    feather: float = 0.15
    colour: float = 0.0
    visibility: float = 1.0


def identity(source: Tensor, emap: Tensor, target: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Source embedding (512,) -> what the swapper wants (1, 512): e / |e| times the map, to length 1.

    weight 1 is the source; 0 is the target's own face; above 1 leads away from the target."""
    mixed = unit(source.float())
    if target is not None and weight != 1:
        mixed = unit(torch.lerp(unit(target.float()), mixed, weight))
    return unit(mixed @ emap.to(mixed))[None]


def swap_crop(network: Network, square: Tensor, latent: Tensor, boost: int) -> Tensor:
    """Crop (3, boost s, boost s) in 0..1 -> swapped. Each of the boost x boost interleaved pictures is a whole face."""
    side = network.contract.size
    parts = F.pixel_unshuffle(square[None], boost).reshape(3, boost * boost, side, side).transpose(0, 1)
    done = run_all(network, parts.contiguous().to(network.device), latent.to(network.device))
    joined = done.transpose(0, 1).reshape(1, 3 * boost * boost, side, side)
    return F.pixel_shuffle(joined, boost)[0].clamp(0, 1).to(square)


def restored(fake: Tensor, restore: Restore | None, visibility: float) -> Tensor:
    """The crop (3, s, s) through an upscale model, mixed with itself enlarged: (3, r, r)."""
    if restore is None or visibility <= 0:
        return fake
    better = restore(fake)
    plain = F.interpolate(fake[None], better.shape[1:], mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return torch.lerp(plain, better.to(plain), visibility)


def _spread(ratio: float) -> int:
    """Values to a side of one pixel of the picture, where that covers `ratio` pixels of the crop: without a mean over all of
    them the detail of a face that is made smaller turns into noise, which flickers in a video."""
    return min(max(math.ceil(ratio - 0.01), 1), SPREAD)


def _sound(picture: Tensor) -> Tensor:
    """One broken pixel of a VAE's overflow would make the whole face NaN."""
    return torch.nan_to_num(picture, posinf=1.0, neginf=0.0)


def swap_face(network: Network, picture: Tensor, covered: Tensor, face: Face, latent: Tensor, paste: Paste,
              limit: Tensor | None = None, restore: Restore | None = None) -> bool:
    """Writes the swapped face into picture (h, w, 3) and its mask into covered (h, w), only where the mask is not 0;
    whether there is such a place.

    limit (h, w): where anything may change. Only the face's own rectangle is read and written."""
    size = network.contract.size * paste.boost
    matrix = align(face.keypoints, size)
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = paste_rect(matrix, size, height, width)
    if x0 >= x1 or y0 >= y1:
        return False
    device = network.device
    turn, shift = matrix[:, :2].float(), (matrix[:, 2] + matrix[:, :2] @ torch.tensor([x0, y0], dtype=torch.float64)).float()
    # Counted from the rectangle's corner: small numbers keep their digits in float32.
    points = pixel_points((0, 0, x1 - x0, y1 - y0), device) @ turn.T.to(device) + shift.to(device)
    mask = face_mask(paste.mask, points, size, paste.feather, face, matrix)
    if limit is not None:
        mask = mask * limit[y0:y1, x0:x1].to(mask)
    if not bool((mask > 0).any()):
        return False
    real = _sound(crop(picture, matrix, size, device))
    fake = swap_crop(network, real, latent, paste.boost)
    if paste.colour > 0:
        # the face alone, without the feather: hair and ground have colours of their own
        flat = face_mask(HULL, pixel_points((0, 0, size, size), device), size, 0.0, face, matrix)
        fake = match(fake, real, flat, paste.colour)
    fake = restored(fake, restore, paste.visibility)
    finer = fake.shape[-1] / size
    # the swapper's own crop goes in as insightface lays it; what was boosted or restored is finer and would grain a small face
    count = 1 if fake.shape[-1] == network.contract.size else _spread(finer * float(torch.linalg.det(turn)) ** 0.5)
    pasted = spread_sample(fake.movedim(0, -1), points if finer == 1 else (points + 0.5) * finer - 0.5, turn * finer, count)
    old = picture[y0:y1, x0:x1]
    new = torch.lerp(_sound(old.to(pasted)), pasted, mask[..., None]).to(old)
    touched = (mask > 0).to(old.device)
    picture[y0:y1, x0:x1] = torch.where(touched[..., None], new, old)
    covered[y0:y1, x0:x1] = torch.maximum(covered[y0:y1, x0:x1], mask.to(covered))
    return True
