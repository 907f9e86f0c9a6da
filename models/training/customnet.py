"""CustomNet in training: location, camera and dual attention, with the release's way of leaving conditions out."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..common import files
from ..common.errors import LikenessError
from ..customnet.layers import ObjectToken
from .config import TrainConfig

ABLATIONS = ("none", "shared attention", "no location")
NULLS = ("embedding", "token")
# One uniform number a sample: below EMBED the embedding goes, from LOCATION[0] to LOCATION[1] the location goes.
EMBED, LOCATION = 0.10, (0.05, 0.15)
TEXT_RATE = 10.0


class ViewBatch(NamedTuple):
    """n pictures of objects whose reference was seen by another camera.

    latents (n, c, h, w) of the target; location: latents of the canvas; embed (n, e) of the whole reference; camera (n, 4)."""
    latents: Tensor
    location: Tensor
    embed: Tensor
    camera: Tensor
    captions: list[str]


class ViewBase(Protocol):
    """What the task needs round the network that it trains."""
    unet: nn.Module
    width: int
    embed_width: int
    device: torch.device

    def encode_text(self, captions: list[str]) -> Tensor:
        """Rows (n, t, width), frozen."""

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """n training timesteps, drawn from a CPU generator."""

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, what is to be predicted, and a loss weight or None."""

    def predict(self, x: Tensor, t: Tensor, rows: Tensor, tokens: Tensor | None) -> Tensor:
        """The network's output for x with its extra channels."""

    def names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of the network under the names of the release."""


class CustomNetTask:
    """The whole network and the object token are trained; text, first stage and image tower are frozen, as published."""
    columns = ("total",)

    def __init__(self, base: ViewBase, train: TrainConfig, null: str = "embedding", ablation: str = "none",
                 text_rate: float = TEXT_RATE):
        """null: what a row without object gets, a zero embedding (the release) or a zero token (what it samples with).

        text_rate: factor on the learning rate of the text's keys and values, which begin from nothing in the release."""
        if null not in NULLS or ablation not in ABLATIONS:
            raise LikenessError(f"CustomNet trains with null {' or '.join(NULLS)} and ablation {', '.join(ABLATIONS)}; got "
                                f"'{null}' and '{ablation}'.")
        self.base, self.train, self.null, self.ablation = base, train, null, ablation
        self.projection = ObjectToken(base.embed_width, base.width, device=base.device)
        self.projection.init_weights(torch.Generator().manual_seed(train.seed))
        self.text_rate = text_rate
        base.unet.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        """The network and the layer that makes the object token."""
        return {"unet": self.base.unet, "projection": self.projection}

    def rate(self, name: str) -> float:
        """Factor on the learning rate of one parameter."""
        return self.text_rate if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) else 1.0

    def step(self, batch: ViewBatch, generator: torch.Generator) -> dict[str, float]:
        """Mean squared error of the prediction; gradients are added to the trained modules."""
        base, n = self.base, len(batch.captions)
        draw = torch.rand(n, 2, generator=generator)
        with_object = draw[:, 0] >= EMBED
        with_location = (draw[:, 0] < LOCATION[0]) | (draw[:, 0] >= LOCATION[1])
        captions = [text if chance >= self.train.drop_text else ""
                    for text, chance in zip(batch.captions, draw[:, 1].tolist(), strict=True)]
        latents, camera = batch.latents.to(base.device), batch.camera.to(base.device)
        t = base.timesteps(n, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        x_t, target, weight = base.noised(latents, t, noise)
        rows = base.encode_text(captions)
        keep = with_object.to(latents)
        embed = batch.embed.to(base.device)
        if self.null == "embedding":
            tokens = self.projection(embed * keep[:, None], camera)
        else:
            tokens = self.projection(embed, camera) * keep[:, None, None]
        x = self.inputs(x_t, batch, with_location)
        if self.ablation == "shared attention":
            rows, tokens = torch.cat([rows, tokens.to(rows)], 1), None
        error = (base.predict(x, t, rows, tokens) - target).square()
        loss = (error if weight is None else error * weight).mean()
        loss.backward()
        return {"total": float(loss.detach())}

    def inputs(self, x_t: Tensor, batch: ViewBatch, with_location: Tensor) -> Tensor:
        """x_t with the location's channels."""
        location = batch.location.to(x_t) * with_location.to(x_t)[:, None, None, None]
        if self.ablation == "no location":
            location = torch.zeros_like(location)
        return torch.cat([x_t, location], 1)

    def export(self, path: Path, ema_state: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
        """One file with the network and the projection under the names of the release."""
        dtype = torch.float16 if self.train.export_dtype == "fp16" else torch.float32
        state = {f"model.diffusion_model.{name}": value.to("cpu", dtype)
                 for name, value in self.base.names(ema_state["unet"]).items()}
        # 2.4 MB in the release; the camera's small numbers deserve their digits
        state |= {name: value.to("cpu", torch.float32) for name, value in ema_state["projection"].items()}
        files.save(path, state, metadata | {"format_version": "1", "method": "customnet", "null": self.null,
                                            "ablation": self.ablation})
