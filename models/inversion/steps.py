"""One step of deterministic sampling in sigma space, where one formula serves eps, v and flow models.

d(x, s) = (x - D(x, s)) / s is the noise (eps, v) or the velocity (flow); Euler goes x + (s' - s) d. With z = x / sqrt(1 + s^2)
this is deterministic DDIM.
"""
from __future__ import annotations

from torch import Tensor


def derivative(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """d(x, s); sigma is one number in a tensor above 0."""
    return (x - denoised) / sigma


def euler(x: Tensor, denoised: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """The step from `sigma` to `target`, in the order of operations of the host's own Euler sampler."""
    return x + derivative(x, denoised, sigma) * (target - sigma)


def residual(anchor: Tensor, below: Tensor, denoised: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """r_i = x*_{i-1} - (x*_i + (s_{i-1} - s_i) d(x*_i)): what one step misses (CustomEnhancer, arXiv 2509.20775)."""
    return below - euler(anchor, denoised, sigma, target)
