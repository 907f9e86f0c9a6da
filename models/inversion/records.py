"""What an inversion holds and how a replay acts: immutable, plain tensors and numbers."""
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

INVERSION_VERSION = 1
ESTIMATES = ("source", "target", "midpoint")
METHODS = ("resinversion", "ddim", "null-text")
MASK_MODES = ("anchor", "difference")


class Inversion(NamedTuple):
    """A recorded trajectory of a picture, in model space, L = steps - start steps long.

    anchors (L + 1, b, c, ...): x*_0 (the picture) to x*_L. residuals (L, b, c, ...): row i - 1 is r_i of the step i -> i - 1.
    levels (L + 1,): rising sigmas, the first is 0. nulls (L, b, tokens, width): the negative text of each step for null-text.
    steps: N of the whole schedule; start: manipulation start, the steps above it were never recorded.
    to_latent (2, c): factor and shift a channel that bring model space back to a LATENT.
    cfg, model_hash, conditioning_hash: what the residuals are true for. evaluations: latents through the network for one
    picture; calls: how often the network ran. drift: largest error of the closed loop, None for an open one.
    """
    method: str
    anchors: Tensor
    residuals: Tensor
    levels: Tensor
    steps: int
    start: int
    cfg: float
    estimate: str
    refine: int
    closed: bool
    prediction: str
    latent_format: str
    model_hash: str
    conditioning_hash: str
    evaluations: int
    calls: int
    to_latent: Tensor
    drift: float | None = None
    nulls: Tensor | None = None
    version: int = INVERSION_VERSION

    @property
    def sigmas(self) -> Tensor:
        """(L + 1,) falling to 0, as a sampler takes them."""
        return self.levels.flip(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, c, ...) of the latent."""
        return tuple(self.anchors.shape[1:])

    def as_latent(self, level: int) -> Tensor:
        """The anchor of a level as samples of a LATENT (b, c, ...)."""
        factor, shift = (row.view(1, -1, *[1] * (len(self.shape) - 2)) for row in self.to_latent)
        return self.anchors[level] * factor + shift

    def describe(self) -> str:
        """"4 x 64 x 64" without the batch."""
        return " x ".join(map(str, self.shape[1:]))


class Flows(NamedTuple):
    """How the forward flow (the identity) and the backward flow (the picture) act in a replay.

    start: steps without forward flow. forward: its strength. curve: strength over the steps, x from 0 to 1. backward: share of
    the residual. tether: share of the distance to the anchor that every step takes back (0 = none, as in the paper).
    mask (b or 1, 1, ...) in latent cells, 1 where the picture may change; mode: how it acts, see MASK_MODES.
    """
    start: int = 0
    forward: float = 1.0
    backward: float = 1.0
    tether: float = 0.0
    mask: Tensor | None = None
    mode: str = "anchor"
    curve: Any = None

    def forward_at(self, step: int, steps: int) -> float:
        """Forward strength of a step (from 0) of the whole schedule."""
        if step < self.start:
            return 0.0
        if self.curve is None:
            return self.forward
        return self.forward * float(self.curve.interp(step / max(1, steps - 1)))
