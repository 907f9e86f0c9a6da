"""The release's schedule: DDIM of even distances, whose first step is left out and whose last one is not quite clean."""
from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import LikenessError

TRAINED = 1000
STEPS, CFG = 50, 3.0  # the release's own settings


def timesteps(steps: int) -> list[int]:
    """From the noisiest to 1; 50 steps are 961, 941, ..., 1: the release drops 981, so it evaluates 49 times."""
    every = list(range(1, TRAINED, TRAINED // steps))
    return every[-2::-1] if len(every) > 1 else every


def sigmas(table: Tensor, steps: int) -> Tensor:
    """(evaluations + 1,) from a model's own table (1000,), least noise first; the last is that of timestep 0, not 0.

    Raises LikenessError for fewer than 3 steps."""
    if steps < 3:
        raise LikenessError(f"CustomNet's release leaves out the noisiest of its steps, so of {steps} step(s) none would begin "
                            "at noise; take at least 3.")
    return torch.cat([table[timesteps(steps)], table[:1]]).float()
