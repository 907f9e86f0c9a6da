"""A base model, a data source and configs small enough to train in a second; for tests only."""
from __future__ import annotations

import torch
from torch import Tensor

from likeness.models.common.attention import sdpa
from likeness.models.custany.config import CustAnyConfig
from likeness.models.training.base import Batch
from likeness.models.training.config import TrainConfig

WIDTH, CHANNELS, EMBED = 16, 8, 6
LAYERS = (("output.0.0", CHANNELS), ("output.1.0", CHANNELS))
CONFIG = CustAnyConfig(WIDTH, (("dinov2", 6), ("mae", 5)), LAYERS, head_dim=4, base="miniature",
                       resolutions=(8, 8))
WORDS = ["", "a", "cat", "dog", "on", "grass", "snow", "big"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(**changes) -> TrainConfig:
    quick = {"steps": 8, "batch": 4, "lr": 1e-2, "warmup": 2, "save_every": 4, "ema": 0.9, "csv_every": 3}
    return TrainConfig(**(quick | changes))


class ToyBase:
    """Frozen: two blocks that call `middle`, read the text and call `cross`; it predicts the clean latents (n, 4, 4, 4)."""
    width, layers, embed_width, device = WIDTH, LAYERS, EMBED, torch.device("cpu")

    def __init__(self):
        self.table, self.read = draw(1, len(WORDS), WIDTH), draw(4, WIDTH, CHANNELS) / 4
        self.enter, self.leave = draw(2, 4, CHANNELS) / 2, draw(3, CHANNELS, 4) / 3
        self.calls: list[str] = []

    def encode_text(self, captions, words):
        ids = [[WORDS.index(word) if word in WORDS else 0 for word in caption.split()]
               for caption in captions]
        rows = self.table[torch.tensor([(row + [0] * 6)[:6] for row in ids])]
        first = torch.tensor([caption.split().index(word) if word in caption.split() else -1
                              for caption, word in zip(captions, words, strict=True)])
        return rows, first, (first >= 0).long()

    def encode_image(self, pixels):
        return pixels.repeat(1, 2, 1, 1)[:, :4, :4, :4]

    def embed_image(self, pixels):
        return pixels.flatten(1)[:, :EMBED]

    def features(self, pixels):
        tokens = pixels.flatten(2).transpose(1, 2)[:, :16].repeat(1, 1, 2)
        return [(tokens[:, 0, :6], tokens[..., :6]), (tokens[:, 1, :5], tokens[..., :5])]

    def timesteps(self, n, generator):
        return torch.rand(n, generator=generator) * 0.5 + 0.5

    def noised(self, latents, t, noise):
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * latents + t * noise, latents, None

    def denoise(self, x_t, t, rows, middle=None, cross=None):
        h = x_t.flatten(2).transpose(1, 2) @ self.enter
        for key, _ in LAYERS:
            self.calls.append(key)
            h = middle(key, h) if middle else h
            read = sdpa(h, rows @ self.read, rows @ self.read, 2)
            h = torch.tanh(h + (cross(key, h, read, 2) if cross else read))
        return (h @ self.leave).transpose(1, 2).reshape(x_t.shape)


class ToySource:
    """Sixteen subjects; a subject's features tell its latents."""

    def __init__(self):
        self.who = draw(5, 16, 6)
        self.latents = (self.who @ draw(6, 6, 64) / 3).tanh().view(16, 4, 4, 4)
        self.poison_at = -1
        self.count = 0

    def batch(self, n, generator):
        k = torch.randint(16, (n,), generator=generator)
        who = self.who[k]
        cls, patches = who, who[:, None].expand(-1, 4, -1) + draw(7, 4, 6)
        latents = self.latents[k]
        if self.count == self.poison_at:
            latents = latents * float("nan")
        self.count += 1
        return Batch(None, None, latents, ["a cat on grass"] * n, ["cat"] * n,
                     [(cls, patches), (cls[:, :5], patches[..., :5])], latents.flatten(1)[:, :EMBED])
