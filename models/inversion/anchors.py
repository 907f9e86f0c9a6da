"""The way up: from a picture to noise, one anchor a level.

x*_{k+1} = x*_k + (s_{k+1} - s_k) e_k; the estimates differ in where e_k is evaluated. Exactness never depends on it: residuals
repair whatever the anchors are. It decides how large they get, and how gently an edit behaves.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError
from .steps import derivative

Denoise = Callable[[Tensor, Tensor], Tensor]      # (x, sigma of one number) -> D(x, sigma)
Rescale = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, from level, to level) -> x that the network sees alike


class Anchor(NamedTuple):
    """level k; x (b, c, ...); denoised: D(x*_{k-1}, s_{k-1}) if it was evaluated exactly there on the way, else None."""
    level: int
    x: Tensor
    denoised: Tensor | None


def climb(x: Tensor, levels: Tensor, denoise: Denoise, rescale: Rescale, estimate: str = "source",
          refine: int = 0) -> Iterator[Anchor]:
    """Anchors 1 to L of a picture x = x*_0, one at a time, so that only one level is on the device.

    source: e_k at (x*_k, s_k), the same points that the residuals need; only the first step, where d is 0 / 0, takes s_1.
    target: e_k at (x*_k, s_{k+1}), the DDIM inversion of null-text work. midpoint: explicit midpoint, two evaluations.
    refine: rounds of x*_{k+1} = x*_k + h d(x*_{k+1}, s_{k+1}) after it. rescale: a latent written at one level for the
    network input of another (the factor between variance-exploding x and the input, 1 for flow models).
    Raises LikenessError when the network answers with no number.
    """
    check_finite(x, "The latent holds values that are no numbers (NaN or infinite); look at the picture or the VAE before it.")
    for k in range(len(levels) - 1):
        low, high = levels[k], levels[k + 1]
        exact = k > 0 and estimate in ("source", "midpoint")
        at = low if exact else high
        seen = x if exact else rescale(x, low, high)
        denoised = denoise(seen, at)
        slope = derivative(seen, denoised, at)
        if estimate == "midpoint":
            # between two noise levels the path is straightest over log sigma; there is none at 0
            middle = (low * high).sqrt() if k else high / 2
            there = x + (middle - low) * slope
            slope = derivative(there, denoise(there, middle), middle)
        for _ in range(refine):
            there = x + (high - low) * slope
            slope = derivative(there, denoise(there, high), high)
        x = x + (high - low) * slope
        check_finite(x, f"The model gave no numbers (NaN or infinite) at step {k + 1} of {len(levels) - 1} of the inversion, "
                        f"sigma {float(high):.4g}; try full precision, or another model or prompt.")
        yield Anchor(k + 1, x, denoised if exact else None)


def check_finite(x: Tensor, sentence: str) -> None:
    """Raises LikenessError with this sentence if x holds NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise LikenessError(sentence)
