"""A small classifier that reads a picture's attributes. It was trained apart and is used only to measure."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pool import Pool
from .world import ACCESSORIES, COLOURS, KINDS, PATTERNS, PLACES, SCENES, Rows

HEADS = {"kind": len(KINDS), "colour": len(COLOURS), "second": len(COLOURS), "pattern": len(PATTERNS),
         "accessory": len(ACCESSORIES), "accent": len(COLOURS), "scene": len(SCENES), "place": len(PLACES), "mirror": 2}
LOOK = ("colour", "second", "pattern", "accessory", "accent")  # what identity means once the word names the kind


def _layer(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU())


class Judge(nn.Module):
    """Pictures (n, 3, 64, 64) in 0..1 -> {attribute: logits (n, classes)}."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.PixelUnshuffle(2), _layer(12, 32, 1), _layer(32, 64, 2), _layer(64, 64, 1), _layer(64, 96, 2), _layer(96, 48, 1),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(48 * 64, 160), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(160, classes) for name, classes in HEADS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        x = self.features(pictures * 2 - 1)
        return {name: head(x) for name, head in self.heads.items()}


def truth(pool: Pool, index: Tensor) -> Rows:
    """The right answers for rows of a pool."""
    out = {name: pool.identity[name][index] for name in ("kind", *LOOK)}
    return {**out, "scene": pool.scene[index], "place": pool.pose["place"][index], "mirror": pool.pose["mirror"][index]}


def _softened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A little blur and noise, so that slightly soft pictures are judged fairly."""
    n = pictures.shape[0]
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share, noise = torch.rand(2, n, 1, 1, 1, generator=generator)
    return pictures + share * (blurred - pictures) + 0.05 * noise * torch.randn(pictures.shape, generator=generator)


def judge_loss(answers: dict[str, Tensor], right: Rows) -> Tensor:
    """Sum of cross entropies; the accent counts only where an accessory is worn."""
    worn = right["accessory"] > 0
    total = sum(F.cross_entropy(answers[name], right[name]) for name in HEADS if name != "accent")
    return total + F.cross_entropy(answers["accent"][worn], right["accent"][worn])


def train_judge(pool: Pool, steps: int, log: Callable[[str], None], batch: int = 64) -> Judge:
    """Pictures with one creature only: with two there would be two right answers."""
    torch.manual_seed(0)
    model = Judge()
    rows = (pool.other["kind"] < 0).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        index = rows[torch.randint(0, rows.numel(), (batch,), generator=generator)]
        loss = judge_loss(model(_softened(pool.picture[index].float() / 255, generator)), truth(pool, index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            log(f"judge {step + 1}: loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(judge: Judge, pictures: Tensor, right: Rows) -> dict[str, float]:
    """Share of right answers for each attribute in `right`."""
    answers = judge(pictures.clamp(0, 1))
    out = {}
    for name, value in right.items():
        if name in HEADS:
            same = answers[name].argmax(1) == value
            if name == "accent" and "accessory" in right:
                same = same[right["accessory"] > 0]
            out[name] = float(same.float().mean())
    return out


@torch.no_grad()
def likelihoods(judge: Judge, pictures: Tensor, candidates: Rows) -> Tensor:
    """(n, k) log probability that each picture shows the look of each candidate (rows of identities, without kind)."""
    answers = {name: value.log_softmax(1).clamp(min=math.log(1e-3)) for name, value in judge(pictures.clamp(0, 1)).items()}
    total = sum(answers[name][:, candidates[name]] for name in LOOK if name != "accent")
    worn = (candidates["accessory"] > 0).float()
    return total + answers["accent"][:, candidates["accent"]] * worn
