"""CustAny in training: the two denoising passes and their switches, for any base behind the Protocol."""
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import files
from ..common.errors import LikenessError
from ..custany import losses
from ..custany.adapter import CustAny
from ..custany.config import CustAnyConfig, to_metadata
from ..custany.decouple import Decouple
from ..custany.layers import replace_word, word_mean
from .base import Base, Batch, Features, Middle
from .config import DROPS, TrainConfig
from .data import FolderData
from .emphasis import loss_weight, timesteps

logger = logging.getLogger("likeness")
LOSSES = ("normal", "decouple", "contrast")
COLLAPSE, RECOVERED = -0.9, -0.8


class Front:
    """A point where the graph is cut: the passes add gradients to leaves, `close` sends their sum on.

    Both passes share the word and every layer's keys and values. With leaves in between each pass can be
    differentiated and freed before the next one begins, so that only one graph of the base lives at a time,
    and the sum of gradients is what backward() of the summed loss would give.
    """

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def close(self) -> None:
        """Backward through what made the tensors; parts that no pass read are left out."""
        used = [(tensor, leaf.grad) for tensor, leaf in zip(self.tensors, self.leaves, strict=True)
                if leaf.grad is not None]
        if used:
            torch.autograd.backward([tensor for tensor, _ in used], [grad for _, grad in used])


class CustAnyTask:
    """Builds the adapter (and the decoupling branch) and computes one step's losses and gradients."""
    columns = ("total", *LOSSES, "cosine")

    def __init__(self, base: Base, config: CustAnyConfig, train: TrainConfig,
                 encoder_hashes: Sequence[str] = ()):
        """Raises LikenessError when the config does not fit the base; encoder_hashes go into the file."""
        config.check()
        if config.width != base.width:
            raise LikenessError(f"The adapter is made for text rows of width {config.width}, but the base "
                                f"model has {base.width}; take its preset.")
        missing = sorted(set(config.layers) - set(base.layers))
        if missing:
            raise LikenessError(f"The base model has no block {missing[0][0]} with {missing[0][1]} channels "
                                "for the adapter; choose the preset of this base.")
        self.base, self.config, self.train = base, config, train
        self.encoder_hashes = tuple(encoder_hashes) or ("",) * len(config.encoders)
        if len(self.encoder_hashes) != len(config.encoders):
            raise LikenessError(f"The adapter reads {len(config.encoders)} encoders, but "
                                f"{len(self.encoder_hashes)} encoder hashes came; give one for each.")
        generator = torch.Generator().manual_seed(train.seed)
        self.adapter = CustAny(config, device=base.device)
        self.adapter.init_weights(generator)
        self.decouple: Decouple | None = None
        if train.decouple != "off":
            self.decouple = Decouple(base.embed_width, config.width, train.decouple, device=base.device)
            self.decouple.init_weights(generator)
        self.keys = tuple(key for key, _ in config.layers)
        self.warned = False

    def modules(self) -> dict[str, nn.Module]:
        """The adapter, and the decoupling branch unless it is off."""
        return {"adapter": self.adapter} | ({"decouple": self.decouple} if self.decouple else {})

    def switches(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Per sample (n,) of 0 and 1 on the CPU: text kept, word injected, local attention on.

        Five independent uniform draws a sample: no text, no reference, neither, no global, no local level.
        Without a reference both levels are off; without text there is no word to inject.
        """
        draw = torch.rand(n, 5, generator=generator)
        limits = draw.new_tensor([getattr(self.train, name) for name in DROPS])
        text, reference, both, no_global, no_local = (draw < limits).unbind(1)
        keep_text, keep_reference = ~(text | both), ~(reference | both)
        word_on, local_on = keep_text & keep_reference & ~no_global, keep_reference & ~no_local
        return keep_text.float(), word_on.float(), local_on.float()

    def step(self, batch: Batch, generator: torch.Generator) -> dict[str, float]:
        """Both passes with the same noise, timestep and target; gradients are added to the trained modules.

        Two backward passes (normal, then decoupling with contrast) keep one graph of the base in memory.
        """
        base, weights = self.base, self.train.loss_weights
        n = len(batch.captions)
        keep_text, word_on, local_on = self.switches(n, generator)
        with torch.no_grad():
            captions, words = _without_text(batch, keep_text)
            rows, first, count = base.encode_text(captions, words)
            features = self._features(batch)
            latents = batch.latents
            if latents is None:
                latents = base.encode_image(_pixels(batch.target, "target").to(base.device))
            latents = latents.to(base.device)
            t = timesteps(base, n, self.train.noisiest_of, generator)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            x_t, target, weight = base.noised(latents, t, noise)
            weight = loss_weight(weight, batch.mask, latents, self.train.subject_weight)
            first, count = first.to(rows.device), count.to(rows.device)
            word = word_mean(rows, first, count)
            word_on = word_on.to(word) * (first >= 0)
            local_on = local_on.to(word).view(n, 1, 1)
            # Where nothing is injected the prompt stays whole, even if the word's rest would be dropped.
            place = first.masked_fill(word_on == 0, -1)

        tokens, local = self.adapter.encode(features)
        front = Front([self.adapter.word_delta(tokens, word) * word_on[:, None],
                       *(part for key in self.keys for part in self.adapter.keys_values(key, local))])
        delta, *pairs = front.leaves
        kv = dict(zip(self.keys, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
        middle = self._middle(kv, local_on)

        fused = replace_word(rows, place, count, delta, self.config.category_mode)
        normal = losses.denoise(base.denoise(x_t, t, fused, middle), target, weight)
        (weights[0] * normal).backward()
        parts = {"normal": normal.detach()}
        if self.decouple is not None:
            masked = self.decouple(self._embeds(batch))
            # Made anew: the first pass has freed its graph.
            fused = replace_word(rows, place, count, delta, self.config.category_mode)
            second = base.denoise(x_t, t, fused + masked[:, None].to(fused.dtype), middle)
            decouple = losses.denoise(second, target, weight)
            fused_word = word + delta
            contrast = losses.contrast(fused_word, masked, self.train.contrast_mode, word_on)
            (weights[1] * decouple + weights[2] * contrast).backward()
            with torch.no_grad():
                cosine = losses.mean(losses.cosine(fused_word, masked), word_on)
            parts |= {"decouple": decouple.detach(), "contrast": contrast.detach(), "cosine": cosine}
        front.close()
        return self._report(parts)

    def _middle(self, kv: dict[str, tuple[Tensor, Tensor]], local_on: Tensor) -> Middle:
        def middle(key: str, x: Tensor) -> Tensor:
            if key not in kv:
                return x
            # The adapter stays in float 32 when the base runs in half precision.
            out = self.adapter.local(key, x.float(), *kv[key])
            return x + (local_on * out).to(x.dtype)
        return middle

    def _features(self, batch: Batch) -> Features:
        features = batch.features
        if features is None:
            features = self.base.features(_pixels(batch.reference, "reference").to(self.base.device))
        device = self.base.device
        return [(cls.to(device).float(), patches.to(device).float()) for cls, patches in features]

    @torch.no_grad()
    def _embeds(self, batch: Batch) -> Tensor:
        embeds = batch.embeds
        if embeds is None:
            embeds = self.base.embed_image(_pixels(batch.target, "target").to(self.base.device))
        return embeds.to(self.base.device).float()

    def _report(self, parts: dict[str, Tensor]) -> dict[str, float]:
        # One read of the device for all numbers.
        numbers = torch.stack([value.float() for value in parts.values()]).tolist()
        values = dict(zip(parts, numbers, strict=True))
        values = {name: values.get(name, 0.0) for name in self.columns[1:]}
        total = losses.total(values["normal"], values["decouple"], values["contrast"], self.train.loss_weights)
        if values["cosine"] < COLLAPSE and not self.warned:
            logger.warning("The subject's word and the decoupled embedding have become opposites (cosine "
                           "%.3f): the contrast loss outweighs the likeness. Lower weight_contrast or use "
                           "contrast_mode 'clamp'.", values["cosine"])
        self.warned = values["cosine"] < (RECOVERED if self.warned else COLLAPSE)
        return {"total": total} | values

    def export(self, path: Path, ema_state: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
        """Write the adapter to `path`, and beside it the decoupling branch, which only training needs."""
        dtype = torch.float16 if self.train.export_dtype == "fp16" else torch.float32
        families = [{"family": family, "width": width, "sha256": digest} for (family, width), digest in
                    zip(self.config.encoders, self.encoder_hashes, strict=True)]
        common = {"format_version": "1", "base": self.config.base, "encoders": json.dumps(families),
                  "background": self.config.background}
        for name, state in ema_state.items():
            tensors = {key: value.to("cpu", dtype) for key, value in state.items()}
            if name == "adapter":
                own = {"method": "custany", **to_metadata(self.config)}
                files.save(path, tensors, metadata | common | own)
            else:
                own = {"method": f"custany.{name}"}
                files.save(path.with_name(f"{name}.safetensors"), tensors, metadata | common | own)


def folder_source(folder: str | Path, config: CustAnyConfig, train: TrainConfig, size: int = 512,
                  skip_bad: bool = False) -> FolderData:
    """A folder of pictures, cut out just as the adapter's file will say; size: side of the square targets."""
    return FolderData(folder, size, max(config.resolutions, default=256), config.background, config.margin,
                      augment=train.reference_augment, skip_bad=skip_bad)


def _without_text(batch: Batch, keep_text: Tensor) -> tuple[list[str], list[str]]:
    keep = keep_text.bool().tolist()
    if all(keep):
        return batch.captions, batch.words
    return ([caption if kept else "" for caption, kept in zip(batch.captions, keep, strict=True)],
            [word if kept else "" for word, kept in zip(batch.words, keep, strict=True)])


def _pixels(pixels: Tensor | None, what: str) -> Tensor:
    if pixels is None:
        raise LikenessError(f"The training data gives neither {what} pictures nor what is computed from "
                            "them.")
    return pixels
