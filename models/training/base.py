"""What the engine asks of a base model, a data source and a method. A test implements each in ten lines."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Middle = Callable[[str, Tensor], Tensor]
Cross = Callable[[str, Tensor, Tensor, int], Tensor]
Features = list[tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """n samples. What is None is computed through the base; what is given spares that time.

    reference: (n, 3, h, w) in 0..1, cut out. target: (n, 3, h, w) in 0..1. latents: of the target.
    words: each sample's category word as it stands in its caption. features: of the reference, per encoder
    (class token (n, d_e), patch tokens (n, t, d_e)), or one pair (deep, local) for RealCustom++. embeds: of the target,
    (n, e) or (n, t, e). mask: (n, h, w) where the subject is in the target.
    """
    reference: Tensor | None
    target: Tensor | None
    latents: Tensor | None
    captions: list[str]
    words: list[str]
    features: Features | None = None
    embeds: Tensor | None = None
    mask: Tensor | None = None


class Base(Protocol):
    """A frozen text-to-image model. Nothing here may need gradients but `denoise`, which passes them on."""
    width: int
    layers: tuple[tuple[str, int], ...]
    embed_width: int
    device: torch.device

    def encode_text(self, captions: list[str], words: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n, t, width), first (n,) long = row of the word's first token, count (n,) long = its tokens.

        No weights, one window. A word that is empty or not in its caption has first -1 and count 0.
        """

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) in 0..1 -> latents."""

    def embed_image(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) in 0..1 -> (n, embed_width) embedding of the target for the decoupling branch."""

    def features(self, pixels: Tensor) -> Features:
        """(n, 3, h, w) in 0..1, cut out -> per encoder (class token (n, d_e), patch tokens (n, t, d_e))."""

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """n training timesteps, drawn from a CPU generator."""

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, what is to be predicted, and a loss weight: (c,) per channel, broadcastable, or None."""

    def denoise(self, x_t: Tensor, t: Tensor, rows: Tensor, middle: Middle | None = None, cross: Cross | None = None) -> Tensor:
        """Prediction. Each transformer block calls middle(key, x (n, t, c)) -> x after self-attention, and
        cross(key, queries (n, t, c), text attention (n, t, c), heads) -> what goes on to its output projection.

        rows belong to the last `encode_text`, so that a base may keep what else that text gave (SDXL).
        """


class Source(Protocol):
    """Where batches come from. All chance comes from the generator, else a resumed run would differ.

    A source with a position is `Positioned` too.
    """

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n samples."""


@runtime_checkable
class Positioned(Protocol):
    """A source whose place in its data belongs to the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The place as JSON data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""


@runtime_checkable
class Rated(Protocol):
    """A task whose parameters do not all learn at one rate."""

    def rate(self, name: str) -> float:
        """Factor on the learning rate of the parameter "<module>.<parameter>"."""


class Task(Protocol):
    """A method in training: all that the loop knows of it."""
    columns: tuple[str, ...]

    def modules(self) -> dict[str, nn.Module]:
        """Name -> trained module; names are prefixes in the checkpoint files."""

    def step(self, batch: Any, generator: torch.Generator) -> dict[str, float]:
        """Losses by `columns`, with "total" among them, after backward() was called."""

    def export(self, path: Path, ema_state: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
        """Write the file for use from the averaged weights of each module."""
