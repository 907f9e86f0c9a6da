"""Candidates for retrieval: the identities of a row, and for each of them the looks that are hardest to tell from it."""
from __future__ import annotations

import torch
from torch import Tensor

HARD = 64


def all_looks() -> dict[str, Tensor]:
    """Every look of the world, one row each, without kinds; accent 0 where nothing is worn."""
    from likeness.models.demo import world

    n, patterns, worn = len(world.COLOURS), len(world.PATTERNS), len(world.ACCESSORIES)
    names = ("colour", "second", "pattern", "accessory", "accent")
    grid = torch.cartesian_prod(*(torch.arange(k) for k in (n, n, patterns, worn, n)))
    rows = dict(zip(names, grid.T, strict=True))
    real = (rows["colour"] != rows["second"]) & ((rows["accessory"] > 0) | (rows["accent"] == 0))
    return world.select(rows, real)


def differences(look: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    """(n,) attributes in which others differ from one look; an accent counts only where both wear something."""
    count = torch.zeros_like(others["colour"])
    for name in ("colour", "second", "pattern", "accessory"):
        count += (others[name] != look[name]).long()
    both = (others["accessory"] > 0) & (look["accessory"] > 0)
    return count + (both & (others["accent"] != look["accent"])).long()


def hard_candidates(look: dict[str, Tensor], generator: torch.Generator, count: int = HARD) -> tuple[dict[str, Tensor], int]:
    """`count` looks, the true one last: all that differ in one attribute, filled up by chance with those that differ in two.

    Also how many differ in one. The true look stands last, so that the judge's ties count against it."""
    from likeness.models.demo import world

    looks = all_looks()
    far = differences(look, looks)
    near, next_ = (far == 1).nonzero()[:, 0], (far == 2).nonzero()[:, 0]
    near = near[torch.randperm(len(near), generator=generator)][:count - 1]
    fill = next_[torch.randperm(len(next_), generator=generator)][:count - 1 - len(near)]
    own = (far == 0).nonzero()[:, 0]
    return world.select(looks, torch.cat([near, fill, own])), len(near)
