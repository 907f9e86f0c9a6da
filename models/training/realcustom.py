"""RealCustom++ in training: one denoising pass with image attention beside the text's, for any base behind the Protocol."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import files
from ..common.attention import sdpa
from ..common.errors import LikenessError
from ..custany.losses import denoise
from ..realcustom.adapter import RealCustom, release_names
from ..realcustom.config import RealCustomConfig, to_metadata
from ..realcustom.projector import Projector
from .base import Base, Batch, Cross
from .config import TrainConfig
from .emphasis import loss_weight, timesteps

MASKED = 0.5   # share of samples that learn under a mask, as the word's mask will limit them later
AREA = 0.22    # share of the picture that such a mask takes, as the live one does in the workflows
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # reference pictures (n, 3, s, s) -> features deep, local


class RealCustomTask:
    """Builds the adapter and computes one step's loss and gradients."""
    columns = ("total",)

    def __init__(self, base: Base, config: RealCustomConfig, train: TrainConfig, encode: Encode, side: int,
                 encoder_hashes: Sequence[str], blocks: int = 2):
        """encode: for batches without features. side: of the reference pictures. blocks: residual blocks a level of the
        base, for the names in the file. Raises LikenessError for another base."""
        missing = sorted(set(config.layers) - set(base.layers))
        if missing or config.width != base.width:
            raise LikenessError(f"The adapter is made for text rows of width {config.width} and the block "
                                f"{(missing or config.layers)[0][0]}, which this base model does not have; take its preset.")
        self.base, self.config, self.train, self.encode, self.blocks = base, config, train, encode, blocks
        self.encoder_hashes = tuple(encoder_hashes)
        projector = Projector(config.vision, config.width, 4 * config.vision, device=base.device)
        self.adapter = RealCustom(config, projector, device=base.device)
        self.adapter.init_weights(torch.Generator().manual_seed(train.seed))
        with torch.no_grad():  # what a dropped reference shows, and all negative rows later
            self.black = tuple(part.to(base.device).float() for part in encode(torch.zeros(1, 3, side, side)))

    def modules(self) -> dict[str, nn.Module]:
        """The adapter."""
        return {"adapter": self.adapter}

    def step(self, batch: Batch, generator: torch.Generator) -> dict[str, float]:
        """One pass; without text or reference as often as the settings say (three independent draws a sample)."""
        base, n = self.base, len(batch.captions)
        draw = torch.rand(n, 3, generator=generator)
        no_text, no_picture, neither = (draw < draw.new_tensor([self.train.drop_text, self.train.drop_reference,
                                                                self.train.drop_both])).unbind(1)
        silent, black = (no_text | neither).tolist(), no_picture | neither
        with torch.no_grad():
            captions = ["" if quiet else caption for caption, quiet in zip(batch.captions, silent, strict=True)]
            rows, _, _ = base.encode_text(captions, [""] * n)
            features = self._features(batch, black)
            latents = batch.latents
            if latents is None:
                latents = base.encode_image(_there(batch.target, "target").to(base.device))
            latents = latents.to(base.device)
            t = timesteps(base, n, self.train.noisiest_of, generator)
            x_t, target, weight = base.noised(latents, t, torch.randn(latents.shape, generator=generator).to(latents))
            mask = self._mask(batch, generator)
        tokens = self.adapter.encode(features)
        weight = loss_weight(weight, batch.mask, latents, self.train.subject_weight)
        loss = denoise(base.denoise(x_t, t, rows, cross=self._cross(tokens, mask)), target, weight)
        loss.backward()
        return {"total": float(loss.detach())}

    def _features(self, batch: Batch, black: Tensor) -> list[Tensor]:
        if batch.features is not None:
            ((deep, local),) = batch.features
        else:
            deep, local = self.encode(_there(batch.reference, "reference"))
        place = black.to(self.base.device).view(-1, 1, 1)
        return [torch.where(place, nothing, part.to(self.base.device).float())
                for part, nothing in zip((deep, local), self.black, strict=True)]

    def _mask(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """(n, 1, h, w) of 0 and 1, or None: for some samples only the places where most of the subject is."""
        limited = torch.rand(len(batch.captions), generator=generator) < MASKED
        if batch.mask is None:
            return None
        share = batch.mask.float()
        # a word smaller than that takes its neighbours
        share = (share + 1e-3 * F.avg_pool2d(share[:, None], 5, 1, 2)[:, 0]).flatten(1)
        best = share.topk(max(1, round(AREA * share.shape[1])), 1).indices
        places = torch.zeros_like(share).scatter_(1, best, 1.0).view_as(batch.mask)[:, None]
        return torch.where(limited.view(-1, 1, 1, 1), places, 1.0).to(self.base.device)

    def _cross(self, tokens: Tensor, mask: Tensor | None) -> Cross:
        known = dict(self.config.layers)

        def cross(key: str, q: Tensor, out: Tensor, heads: int) -> Tensor:
            if key not in known:
                return out
            # The adapter stays in float 32 when the base runs in half precision.
            added = sdpa(q.float(), *self.adapter.keys_values(key, tokens), heads)
            if mask is not None:
                side = round(q.shape[1] ** 0.5)
                added = added * F.adaptive_avg_pool2d(mask, side).flatten(2).mT
            return out + added.to(out.dtype)
        return cross

    def export(self, path: Path, ema_state: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
        """Writes the adapter under the release's own names."""
        dtype = torch.float16 if self.train.export_dtype == "fp16" else torch.float32
        families = [{"family": family, "width": width, "sha256": digest} for (family, width), digest in
                    zip(self.config.encoders, self.encoder_hashes, strict=True)]
        own = {"format_version": "1", "method": "realcustom", "base": self.config.base, "encoders": json.dumps(families),
               **to_metadata(self.config)}
        state = release_names(ema_state["adapter"], self.blocks)
        files.save(path, {name: value.to("cpu", dtype) for name, value in state.items()}, metadata | own)


def _there(pixels: Tensor | None, what: str) -> Tensor:
    if pixels is None:
        raise LikenessError(f"The training data gives neither {what} pictures nor what is computed from them.")
    return pixels
