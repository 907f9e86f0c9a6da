"""The miniature's two vision encoders: one that knows identity through contrast (DINO-like), one that rebuilds (MAE).

Both are small ViTs in the key style of transformers, so that the native loader reads them like any encoder file.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vision.vit import ViT, VitConfig

WIDTH, DEPTH, HEADS, PATCH, SIDE = 96, 4, 3, 8, 64
TOKENS = (SIDE // PATCH) ** 2
BATCH = 64


def vit_config(family: str) -> VitConfig:
    """dinov2 has layer scale, mae has not; else the same small network."""
    return VitConfig(family=family, style="transformers", width=WIDTH, depth=DEPTH, heads=HEADS, mlp=4 * WIDTH, patch=PATCH,
                     grid=SIDE // PATCH, layer_scale=family == "dinov2", eps=1e-6 if family == "dinov2" else 1e-12)


def _initialised(family: str, seed: int) -> ViT:
    torch.manual_seed(seed)
    model = ViT(vit_config(family))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "scale" in name:
            nn.init.ones_(parameter)
        elif name.split(".")[-1] not in ("weight", "bias"):
            nn.init.normal_(parameter, std=0.05)
    return model


def _jitter(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Views (n, 3, h, w) of cut-outs on white: brightness, mirror, a little shift and scale; white stays white."""
    n = pictures.shape[0]
    ink = (1 - pictures) * (0.85 + 0.3 * torch.rand(n, 3, 1, 1, generator=generator))
    theta = torch.zeros(n, 2, 3)
    scale = 0.9 + 0.3 * torch.rand(n, generator=generator)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (torch.rand(n, 2, generator=generator) - 0.5) * 0.25
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return (1 - F.grid_sample(ink, grid, align_corners=False)).clamp(0, 1)


def _rate(step: int, steps: int) -> float:
    return 1e-3 * min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def train_dino(references: Tensor, normalise: Callable[[Tensor], Tensor], steps: int, log: Callable[[str], None]) -> ViT:
    """Two views of one creature are close, two creatures are apart (InfoNCE on the class token). references: bytes."""
    model = _initialised("dinov2", 0)
    head = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(8)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        index = torch.randint(0, references.shape[0], (BATCH,), generator=generator)
        pictures = references[index].float() / 255
        a, b = (F.normalize(head(model(normalise(_jitter(pictures, generator))).cls), dim=-1) for _ in range(2))
        similarity, own = a @ b.T / 0.1, torch.arange(BATCH)
        loss = F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 100 == 99:
            log(f"dino {step + 1}: InfoNCE {total / 100:.3f} (chance {2 * math.log(BATCH):.2f})")
            total = 0.0
    return model.eval().requires_grad_(False)


class _Decoder(nn.Module):
    """One attention block that paints the hidden patches from those that were seen."""

    def __init__(self):
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH) * 0.05)
        self.block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.out = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, cls: Tensor, seen: Tensor, place: Tensor) -> Tensor:
        tokens = self.blank.expand(seen.shape[0], TOKENS, -1).scatter(1, place[..., None].expand_as(seen), seen)
        return self.out(self.block(torch.cat([cls[:, None], tokens], 1) + self.position))[:, 1:]


def _seen_only(model: ViT, pixels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Class token (n, d) and the tokens of the patches `keep` (n, k), computed from those patches alone."""
    tokens, _ = model.embed(pixels)
    seen = tokens[:, 1:].gather(1, keep[..., None].expand(-1, -1, WIDTH))
    x = torch.cat([tokens[:, :1], seen], 1)
    for block in model.blocks:
        x = block(x, model.attention)
    x = model.norm(x)
    return x[:, 0], x[:, 1:]


def train_mae(references: Tensor, normalise: Callable[[Tensor], Tensor], steps: int, log: Callable[[str], None]) -> ViT:
    """44 of 64 patches are hidden and must be painted from the rest. references: bytes (n, 3, 64, 64)."""
    model = _initialised("mae", 1)
    decoder = _Decoder()
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(9)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        index = torch.randint(0, references.shape[0], (BATCH,), generator=generator)
        pictures = _jitter(references[index].float() / 255, generator)
        keep = torch.rand(BATCH, TOKENS, generator=generator).argsort(1)[:, :20]
        cls, seen = _seen_only(model, normalise(pictures), keep)
        painted = decoder(cls, seen, keep)
        target = F.unfold(pictures * 2 - 1, PATCH, stride=PATCH).transpose(1, 2)
        weight = torch.ones(BATCH, TOKENS).scatter(1, keep, 0.1)
        loss = ((painted - target).square().mean(-1) * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 100 == 99:
            log(f"mae {step + 1}: hidden patches {total / 100:.4f}")
            total = 0.0
    return model.eval().requires_grad_(False)


_BLOCK_NAMES = {
    "dinov2": {"norm1": "norm1", "norm2": "norm2", "q": "attention.attention.query", "k": "attention.attention.key",
               "v": "attention.attention.value", "o": "attention.output.dense", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
               "ls1": "layer_scale1.lambda1", "ls2": "layer_scale2.lambda1"},
    "mae": {"norm1": "layernorm_before", "norm2": "layernorm_after", "q": "attention.attention.query",
            "k": "attention.attention.key", "v": "attention.attention.value", "o": "attention.output.dense",
            "fc1": "intermediate.dense", "fc2": "output.dense"},
}
_TOP_NAMES = {"cls": "embeddings.cls_token", "position": "embeddings.position_embeddings",
              "patch": "embeddings.patch_embeddings.projection", "norm": "layernorm"}


def transformers_names(model: ViT) -> dict[str, Tensor]:
    """The encoder's tensors under the names that transformers writes to disk."""
    out = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            inner = _BLOCK_NAMES[model.config.family][parts[2]]
            out[".".join(["encoder.layer", parts[1], inner, *parts[3:]])] = tensor
        else:
            out[".".join([_TOP_NAMES[parts[0]], *parts[1:]])] = tensor
    return out
