"""Noise levels: a sampler's falling sigmas, checked and turned round."""
from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import LikenessError


def ascending(sigmas: Tensor) -> Tensor:
    """(n + 1,) falling sigmas that end at 0 -> rising float32 levels that begin at 0. Raises LikenessError for others."""
    sigmas = torch.as_tensor(sigmas).detach().float().cpu()
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise LikenessError(f"An inversion needs SIGMAS of at least one step, got {max(0, sigmas.numel() - 1)}; connect a "
                            "scheduler.")
    if not bool(torch.isfinite(sigmas).all()) or float(sigmas.min()) < 0:
        raise LikenessError("The SIGMAS hold numbers that are no noise levels (negative, infinite or not a number); connect a "
                            "scheduler.")
    if float(sigmas[0]) < float(sigmas[-1]):
        raise LikenessError(f"The SIGMAS rise from {float(sigmas[0]):g} to {float(sigmas[-1]):g}, an inversion takes them "
                            "falling, as a sampler does, and turns them round itself; take Flip Sigmas out.")
    if float(sigmas[-1]) != 0.0:
        raise LikenessError(f"The SIGMAS end at {float(sigmas[-1]):g} instead of 0, so the picture itself would never be "
                            "reached; use the low part of a split schedule or a whole one.")
    if bool((sigmas[:-1] == 0).any()):
        raise LikenessError(f"The SIGMAS have a 0 at step {int((sigmas == 0).nonzero()[0])} of {len(sigmas) - 1}, where nothing "
                            "is left to do; leave the zero for the end.")
    if bool((sigmas[1:] >= sigmas[:-1]).any()):
        step = int((sigmas[1:] >= sigmas[:-1]).nonzero()[0])
        raise LikenessError(f"The SIGMAS do not fall between steps {step} and {step + 1} ({float(sigmas[step]):g} to "
                            f"{float(sigmas[step + 1]):g}); use a schedule that falls all the way.")
    return sigmas.flip(0)


def truncated(levels: Tensor, start: int) -> Tensor:
    """Levels without the `start` highest steps. Raises LikenessError when fewer than none would be left."""
    steps = len(levels) - 1
    if not 0 <= start <= steps:
        raise LikenessError(f"The manipulation starts at step {start}, but the schedule has {steps} steps; choose 0 to {steps}.")
    return levels[:steps - start + 1]


def differ(inversion_sigmas: Tensor, sigmas: Tensor, start: int) -> bool:
    """Whether a sampler's sigmas are neither the recorded ones nor the whole schedule that they were cut from."""
    sigmas = sigmas.detach().float().cpu()
    forms = [sigmas] if len(sigmas) <= start else [sigmas, sigmas[start:]]
    return not any(form.shape == inversion_sigmas.shape and torch.allclose(form, inversion_sigmas, rtol=1e-5, atol=0)
                   for form in forms)
