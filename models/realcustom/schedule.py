"""The release's schedule and solver, in the host's variables: x = latent / alpha, sigma = noise over signal."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TRAINED = 1000
STEPS, CFG, SCOPE, REUSE = 25, 3.5, 0.25, 12  # the release's own settings


def alphas_cumprod() -> Tensor:
    """(1000,) of Stable Diffusion's schedule in float32, as the release has it."""
    return (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, TRAINED) ** 2).cumprod(0)


def timesteps(steps: int) -> list[int]:
    """"Trailing": from the noisiest step on in even distances, rounded (the host's "simple" cuts off)."""
    return [round(TRAINED - 1 - i * TRAINED / steps) for i in range(steps)]


def sigmas(table: Tensor, steps: int) -> Tensor:
    """(steps + 1,) from a model's own table (1000,), least noise first; the last is 0."""
    return torch.cat([table[timesteps(steps)].float(), table.new_zeros(1, dtype=torch.float32)])


def single_step(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor,
                callback: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
    """DPM-Solver++(2S), midpoint, one evaluation a step: orders 1, 1, 2, 1, 2, ... -> (b, c, h, w).

    A second-order step starts again from where the first-order step before it started:
    x' = r x_p - (r - 1)(D0 + D1 / 2), r = sigma' / sigma_p, D0 = x0_p, D1 = (x0 - x0_p) / r0. callback(step, x, x0).
    """
    log = levels.double().log()
    before = x0_before = x
    for step in range(len(levels) - 1):
        x0 = denoise(x, levels[step])
        if callback is not None:
            callback(step, x, x0)
        if levels[step + 1] == 0:  # the release decodes the last prediction itself
            return x0
        second = step >= 2 and step % 2 == 0
        start = step - 1 if second else step
        ratio = float(levels[step + 1].double() / levels[start].double())
        if second:
            r0 = float((log[step] - log[start]) / (log[step + 1] - log[start]))
            x = ratio * before - (ratio - 1) * (x0_before + (x0 - x0_before) / (2 * r0))
        else:
            before, x0_before = x, x0
            x = ratio * x - (ratio - 1) * x0
    return x


def size_rows(width: int, height: int) -> dict[str, int]:
    """The size keys of a conditioning as the release fills them, width first; equal to core's on square pictures."""
    return {"height": width, "width": height, "crop_h": 0, "crop_w": 0, "target_height": width, "target_width": height}
