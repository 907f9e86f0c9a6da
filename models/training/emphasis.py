"""Which timesteps and which places of a picture a step learns most from: `noisiest_of` and `subject_weight`."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..custany.losses import over_channels
from .base import Base


def timesteps(base: Base, n: int, draws: int, generator: torch.Generator) -> Tensor:
    """(n,) the noisiest of so many draws each."""
    if draws == 1:
        return base.timesteps(n, generator)
    # mixed, since a base may spread its draws evenly in order
    t = base.timesteps(draws * n, generator)
    return t[torch.randperm(draws * n, generator=generator).to(t.device)].view(draws, n).amax(0)


def loss_weight(weight: Tensor | None, mask: Tensor | None, latents: Tensor, more: float) -> Tensor | None:
    """The base's weight, times 1 + more * mask where the data knows where the subject is: mask (n, h, w) or None."""
    if mask is None or not more:
        return weight
    inside = F.adaptive_avg_pool2d(mask[:, None].float().to(latents.device), (latents.shape[-2], latents.shape[-1]))
    counts = 1 + more * inside
    return counts if weight is None else counts * over_channels(weight, latents.ndim)
