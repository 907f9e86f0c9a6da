"""The miniature's vision encoders: one that knows identity through contrast (DINO-like), one that rebuilds (MAE), and
for comparison one that learned from captions (CLIP-like).

All are small ViTs in the key style of transformers, so that the native loader reads them like any encoder file.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vision.vit import ViT, VitConfig
from .captions import END, look, row_ids
from .pool import Pool
from .text import WIDTH as TEXT_WIDTH
from .text import TextModel
from .world import KINDS, Rows

WIDTH, DEPTH, HEADS, PATCH, SIDE = 96, 4, 3, 8, 64
TOKENS = (SIDE // PATCH) ** 2
BATCH = 64
CHANCE = 2 * math.log(BATCH)


EPS = {"dinov2": 1e-6, "mae": 1e-12, "clip": 1e-5}
Log = Callable[[str], None]
Normalise = Callable[[Tensor], Tensor]


def vit_config(family: str) -> VitConfig:
    """One small network for all: dinov2 has layer scale, clip a norm before its blocks, no patch bias and the quick GELU."""
    clip = family == "clip"
    return VitConfig(family=family, style="transformers", width=WIDTH, depth=DEPTH, heads=HEADS, mlp=4 * WIDTH, patch=PATCH,
                     grid=SIDE // PATCH, pre_norm=clip, patch_bias=not clip, layer_scale=family == "dinov2",
                     activation="quick_gelu" if clip else "gelu", eps=EPS[family])


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


def _train(parameters: list[nn.Parameter], steps: int, loss_of: Callable[[], Tensor], log: Log, what: str) -> None:
    """Minimises loss_of(), which draws its own batch; every hundred steps a line with the mean."""
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05, fused=True)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 100 == 99:
            log(f"{what.format(total / 100)}, step {step + 1}")
            total = 0.0


def _drawn(pool: Pool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of a batch and their references (BATCH, 3, 64, 64) in 0..1."""
    index = torch.randint(0, pool.reference.shape[0], (BATCH,), generator=generator)
    return index, pool.reference[index].float() / 255


def info_nce(a: Tensor, b: Tensor, temperature: Tensor | float = 0.1) -> Tensor:
    """Both ways between rows (n, d) of unit length that belong together; chance is 2 ln n."""
    similarity, own = a @ b.T / temperature, torch.arange(a.shape[0])
    return F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)


def train_dino(pool: Pool, normalise: Normalise, steps: int, log: Log) -> ViT:
    """Two views of one creature are close, two creatures are apart (InfoNCE on the class token)."""
    model = _initialised("dinov2", 0)
    head = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
    generator = torch.Generator().manual_seed(8)

    def loss() -> Tensor:
        pictures = _drawn(pool, generator)[1]
        return info_nce(*(F.normalize(head(model(normalise(_jitter(pictures, generator))).cls), dim=-1) for _ in range(2)))
    _train([*model.parameters(), *head.parameters()], steps, loss, log, f"dino InfoNCE {{:.3f}} (chance {CHANCE:.2f})")
    return model.eval().requires_grad_(False)


def descriptions(identity: Rows) -> list[str]:
    """The whole look and the kind of each creature in words; nothing of pose, place or scene."""
    out = []
    for k, kind in enumerate(identity["kind"].tolist()):
        before, after = look(identity, k)
        out.append(f"a {before} {KINDS[kind]}{after}")
    return out


def train_clip(pool: Pool, normalise: Normalise, steps: int, log: Log) -> ViT:
    """A creature and the words that describe it are close, other words are apart; the text side is thrown away."""
    model = _initialised("clip", 2)
    text, scale = TextModel(), nn.Parameter(torch.tensor(math.log(1 / 0.1)))
    heads = nn.ModuleList([nn.Linear(WIDTH, 64, bias=False), nn.Linear(TEXT_WIDTH, 64, bias=False)])
    rows = row_ids(descriptions(pool.identity))
    generator = torch.Generator().manual_seed(10)

    def loss() -> Tensor:
        index, pictures = _drawn(pool, generator)
        seen = heads[0](model(normalise(_jitter(pictures, generator))).cls)
        said = text(rows[index])[torch.arange(BATCH), (rows[index] == END).int().argmax(1)]  # as CLIP: the first end token
        return info_nce(F.normalize(seen, dim=-1), F.normalize(heads[1](said), dim=-1), torch.exp(-scale))
    parameters = [*model.parameters(), *text.parameters(), *heads.parameters(), scale]
    _train(parameters, steps, loss, log, f"clip InfoNCE {{:.3f}} (chance {CHANCE:.2f})")
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


def train_mae(pool: Pool, normalise: Normalise, steps: int, log: Log) -> ViT:
    """44 of 64 patches are hidden and must be painted from the rest."""
    model = _initialised("mae", 1)
    decoder = _Decoder()
    generator = torch.Generator().manual_seed(9)

    def loss() -> Tensor:
        pictures = _jitter(_drawn(pool, generator)[1], generator)
        keep = torch.rand(BATCH, TOKENS, generator=generator).argsort(1)[:, :20]
        cls, seen = _seen_only(model, normalise(pictures), keep)
        painted = decoder(cls, seen, keep)
        target = F.unfold(pictures * 2 - 1, PATCH, stride=PATCH).transpose(1, 2)
        weight = torch.ones(BATCH, TOKENS).scatter(1, keep, 0.1)
        return ((painted - target).square().mean(-1) * weight).sum() / weight.sum()
    _train([*model.parameters(), *decoder.parameters()], steps, loss, log, "mae hidden patches {:.4f}")
    return model.eval().requires_grad_(False)


_BLOCK_NAMES = {
    "dinov2": {"norm1": "norm1", "norm2": "norm2", "q": "attention.attention.query", "k": "attention.attention.key",
               "v": "attention.attention.value", "o": "attention.output.dense", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
               "ls1": "layer_scale1.lambda1", "ls2": "layer_scale2.lambda1"},
    "mae": {"norm1": "layernorm_before", "norm2": "layernorm_after", "q": "attention.attention.query",
            "k": "attention.attention.key", "v": "attention.attention.value", "o": "attention.output.dense",
            "fc1": "intermediate.dense", "fc2": "output.dense"},
    "clip": {"norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
             "v": "self_attn.v_proj", "o": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
}
_TOP_NAMES = {"cls": "embeddings.cls_token", "position": "embeddings.position_embeddings",
              "patch": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_CLIP_NAMES = {"cls": "embeddings.class_embedding", "position": "embeddings.position_embedding.weight",
               "patch": "embeddings.patch_embedding", "pre_norm": "pre_layrnorm", "norm": "post_layernorm"}


def transformers_names(model: ViT) -> dict[str, Tensor]:
    """The encoder's tensors under the names and in the shapes that transformers writes to disk."""
    family, out = model.config.family, {}
    clip = family == "clip"
    prefix, layers, top = ("vision_model.", "layers", _CLIP_NAMES) if clip else ("", "layer", _TOP_NAMES)
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            key = ".".join(["encoder", layers, parts[1], _BLOCK_NAMES[family][parts[2]], *parts[3:]])
        else:
            key = ".".join([top[parts[0]], *parts[1:]])
        if clip and name in ("cls", "position"):  # CLIP keeps a vector and a table without the leading one
            tensor = tensor.flatten() if name == "cls" else tensor[0]
        out[prefix + key] = tensor
    return out
