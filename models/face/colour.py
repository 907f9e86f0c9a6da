"""Colours of a swapped face brought to those of the face that was there, in Oklab."""
from __future__ import annotations

import torch
from torch import Tensor

_TO_CONES = torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                          [0.0883024619, 0.2817188376, 0.6299787005]])
_TO_LAB = torch.tensor([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                        [0.0259040371, 0.7827717662, -0.8086757660]])


def to_oklab(rgb: Tensor) -> Tensor:
    """sRGB (..., 3) in 0..1 -> Oklab (..., 3)."""
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = (linear @ _TO_CONES.to(rgb).T).clamp(min=0)
    return cones ** (1 / 3) @ _TO_LAB.to(rgb).T


def to_rgb(lab: Tensor) -> Tensor:
    """Oklab (..., 3) -> sRGB (..., 3), clamped to 0..1."""
    cones = (lab @ torch.linalg.inv(_TO_LAB).to(lab).T) ** 3
    linear = (cones @ torch.linalg.inv(_TO_CONES).to(lab).T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).clamp(0, 1)


def match(fake: Tensor, real: Tensor, mask: Tensor, strength: float) -> Tensor:
    """fake (3, s, s) with mean and spread of real (3, s, s) where mask (s, s) weighs, mixed in by strength 0..1."""
    if strength <= 0 or float(mask.sum()) < 1:
        return fake
    a, b = to_oklab(fake.movedim(0, -1)), to_oklab(real.movedim(0, -1))
    weight = (mask / mask.sum())[..., None]

    def moments(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = (values * weight).sum((0, 1))
        return mean, ((values - mean) ** 2 * weight).sum((0, 1)).sqrt()

    (mean_a, spread_a), (mean_b, spread_b) = moments(a), moments(b)
    # a flat channel has no spread to stretch
    factor = torch.where(spread_a > 1e-4, spread_b / spread_a.clamp(min=1e-4), torch.ones_like(spread_a)).clamp(0.25, 4)
    moved = to_rgb((a - mean_a) * factor + mean_b)
    return torch.lerp(fake, moved.movedim(-1, 0), strength)
