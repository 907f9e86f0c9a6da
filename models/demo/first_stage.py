"""The miniature's first stage: a closed-form patch PCA with a small network that cleans what it decodes.

8 x 8 pixels become one cell of 48 whitened numbers; the decoder is the transposed PCA plus a residual refiner
that was trained on noisy latents, so that it also mends small errors of the diffusion model.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, CHANNELS = 8, 48


class _Residual(nn.Module):
    def __init__(self, channels: int, operations):
        super().__init__()
        self.norm = operations.GroupNorm(8, channels)
        self.first = operations.Conv2d(channels, channels, 3, padding=1)
        self.last = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.silu(self.first(F.silu(self.norm(x)))))


class FirstStage(nn.Module):
    """encode (n, 3, h, w) in -1..1 -> (n, 48, h/8, w/8); decode back. Sizes are multiples of 8."""
    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, width: int = 32, operations=nn):
        super().__init__()
        deep = 2 * width
        self.register_buffer("mean", torch.zeros(3 * PATCH * PATCH))
        self.register_buffer("basis", torch.zeros(3 * PATCH * PATCH, CHANNELS))
        self.register_buffer("scale", torch.ones(CHANNELS))
        self.pixels_in = operations.Conv2d(12, width, 3, padding=1)
        self.fine_in = _Residual(width, operations)
        self.down = operations.Conv2d(width, deep, 4, 2, 1)
        self.latent_in = operations.Conv2d(CHANNELS, 4 * deep, 1)
        self.coarse = nn.Sequential(_Residual(deep, operations), _Residual(deep, operations))
        self.up = operations.Conv2d(deep, 4 * width, 3, padding=1)
        self.fine_out = nn.Sequential(_Residual(width, operations), _Residual(width, operations))
        self.pixels_out = operations.Conv2d(width, 12, 3, padding=1)

    def init_weights(self) -> None:
        """The refiner starts as the identity: every residual branch and the output begin at zero."""
        for module in self.modules():
            if isinstance(module, _Residual):
                nn.init.zeros_(module.last.weight)
                nn.init.zeros_(module.last.bias)
        nn.init.zeros_(self.pixels_out.weight)
        nn.init.zeros_(self.pixels_out.bias)

    @torch.no_grad()
    def fit(self, pictures: Tensor) -> None:
        """Closed-form PCA of the patches of pictures (n, 3, h, w) in -1..1, whitened."""
        patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
        self.mean.copy_(patches.mean(0))
        centred = patches - self.mean
        basis = torch.linalg.svd(centred.T @ centred)[0][:, :CHANNELS]
        self.basis.copy_(basis)
        self.scale.copy_((centred @ basis).std(0))

    def encode(self, pictures: Tensor) -> Tensor:
        n, _, height, width = pictures.shape
        mean, basis, scale = (t.to(pictures) for t in (self.mean, self.basis, self.scale))
        patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2) - mean
        return (patches @ basis / scale).transpose(1, 2).reshape(n, CHANNELS, height // PATCH, width // PATCH)

    def linear(self, latents: Tensor) -> Tensor:
        """The PCA's own picture, before refinement."""
        mean, basis, scale = (t.to(latents) for t in (self.mean, self.basis, self.scale))
        patches = (latents.flatten(2).transpose(1, 2) * scale) @ basis.T + mean
        size = (latents.shape[-2] * PATCH, latents.shape[-1] * PATCH)
        return F.fold(patches.transpose(1, 2), size, PATCH, stride=PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        picture = self.linear(latents)
        fine = self.fine_in(self.pixels_in(F.pixel_unshuffle(picture, 2)))
        coarse = self.coarse(self.down(fine) + F.pixel_shuffle(self.latent_in(latents), 2))
        fine = self.fine_out(fine + F.pixel_shuffle(self.up(coarse), 2))
        return picture + F.pixel_shuffle(self.pixels_out(F.silu(fine)), 2)
