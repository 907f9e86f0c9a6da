"""Pictures of a trained miniature CustomNet for the bench."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from likeness.models.common import files
from likeness.models.customnet.layers import ObjectToken
from likeness.models.demo import views
from likeness.models.demo.schedule import sample
from likeness.models.demo.views import Scene
from likeness.models.hosting.customnet_demo import MiniatureViews

STEPS, CFG, BLOCK = 20, 2.0, 64


class Painter:
    """One trained file; paints scenes as the host's sampler does with Euler's steps."""

    def __init__(self, path: Path, weights: Path):
        self.base = MiniatureViews(weights)
        self.token = ObjectToken(self.base.embed_width, self.base.width)
        self.token.load_state_dict(self.base.begin(path))
        self.base.unet.eval().requires_grad_(False)
        self.ablation = files.load(path)[1].get("ablation", "none")

    @torch.no_grad()
    def paint(self, scene: Scene, seed: int, references: dict[str, Tensor] | None = None) -> Tensor:
        """(n, 3, 64, 64) in 0..1; references: buildings to show in place of the scene's own."""
        shown = scene if references is None else scene._replace(identity=references)
        lessons = self.base.lessons(shown)
        generator = torch.Generator().manual_seed(seed)
        out = []
        captions = views.captions(scene.identity, scene.scene)
        for start in range(0, len(captions), BLOCK):
            part = slice(start, start + BLOCK)
            rows = self.base.encode_text(captions[part])
            null = self.base.encode_text([""] * rows.shape[0])
            tokens = self.token(lessons.embed[part], lessons.camera[part])
            location = lessons.location[part].float() * (self.ablation != "no location")
            noise = torch.randn(location.shape, generator=generator)
            out.append(self.base.stage.decode(sample(self._denoise(rows, null, tokens, location), noise, STEPS)))
        return (torch.cat(out) / 2 + 0.5).clamp(0, 1)

    def _denoise(self, rows: Tensor, null: Tensor, tokens: Tensor, location: Tensor) -> Any:
        both = torch.cat([rows, null]), torch.cat([tokens, torch.zeros_like(tokens)])
        if self.ablation == "shared attention":
            both = torch.cat(both, 1), None

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            inputs = torch.cat([torch.cat([x, location], 1), torch.cat([x, torch.zeros_like(location)], 1)])
            with_, without = self.base.predict(inputs, torch.cat([t, t]), *both).chunk(2)
            return without + CFG * (with_ - without)
        return denoise

    @torch.no_grad()
    def through_first_stage(self, pictures: Tensor) -> Tensor:
        """True renders as the first stage can show them: what the rules reach at best."""
        return (self.base.stage.decode(self.base.encode_image(pictures * 2 - 1)) / 2 + 0.5).clamp(0, 1)
