"""The miniature CustomNet in training: the dual-attention network at a size for a CPU, round the miniature's frozen parts."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import files
from ..customnet.config import PROJECTION, UNET
from ..customnet.location import location_canvases
from ..customnet.view import View
from ..demo import packed, views
from ..demo.base import channel_weights
from ..demo.captions import row_ids
from ..demo.first_stage import CHANNELS, FirstStage
from ..demo.schedule import STEPS, noised
from ..demo.text import WIDTH, TextModel
from ..demo.world import Rows
from ..vision.load import load_vit
from ..vision.preprocess import normalise
from .customnet_unet import DualUNet, load_unet, restored
from .demo_unet import TrainableOps

UNET_CONFIG = {
    "image_size": 8, "in_channels": 2 * CHANNELS, "out_channels": CHANNELS, "model_channels": 64, "num_res_blocks": [1],
    "channel_mult": [1], "num_head_channels": 32, "use_spatial_transformer": True, "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "transformer_depth_middle": 1, "context_dim": WIDTH,
    "use_linear_in_transformer": True, "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
}
PARTS = ("base.safetensors", "mae.safetensors")  # text and first stage; the image tower


class Lessons(NamedTuple):
    """n pictures as the training wants them; latents in half precision. embed and camera in float32."""
    latents: Tensor
    location: Tensor
    embed: Tensor
    camera: Tensor
    identity: Rows
    scene: Tensor


class MiniatureViews:
    """A ViewBase (models/training/customnet.py) in plain float32 layers."""

    def __init__(self, weights: Path, seed: int = 0):
        state = packed.load(weights / PARTS[0])
        self.text, self.stage = TextModel(), FirstStage()
        for module, name in ((self.text, "text"), (self.stage, "first_stage")):
            module.load_state_dict({key[len(name) + 1:]: value.float() for key, value in state.items()
                                    if key.startswith(name + ".")})
            module.eval().requires_grad_(False)
        self.vision, self.vision_config = load_vit(*files.load(weights / PARTS[1]))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)  # torch's own initialisation has no generator
            self.unet = DualUNet(**UNET_CONFIG, dtype=torch.float32, operations=TrainableOps)
        self.width, self.embed_width = WIDTH, self.vision_config.width
        self.device = torch.device("cpu")
        self.hashes = tuple(files.sha256(weights / name) for name in PARTS)
        self._weight = channel_weights(self.stage)
        self._rows: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        for text in captions:  # this world has few sentences; one by one, so that their company leaves no trace
            if text not in self._rows:
                self._rows[text] = self.text(row_ids([text]))[0]
        return torch.stack([self._rows[text] for text in captions])

    @torch.no_grad()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """(n, 3, h, w) in -1..1 -> latents."""
        return self.stage.encode(pictures)

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        """(n, 3, 64, 64) in 0..1 -> (n, 96)."""
        return self.vision(normalise(pixels, self.vision_config)).patches.mean(1)

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        slices = (torch.arange(n) + torch.rand(n, generator=generator)) * (STEPS / n)
        return slices.long().clamp(max=STEPS - 1)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *noised(latents, t, noise), self._weight

    def predict(self, x: Tensor, t: Tensor, rows: Tensor, tokens: Tensor | None) -> Tensor:
        return self.unet(x, t.float(), context=rows, object_context=tokens)

    def names(self, state: dict[str, Tensor]) -> dict[str, Any]:
        return restored(state)

    def begin(self, path: Path) -> dict[str, Tensor]:
        """Takes the network's weights of a trained file; returns those of the object token's layer."""
        state, _ = files.load(path)
        load_unet(self.unet, {name.removeprefix(UNET): value.float() for name, value in state.items() if name.startswith(UNET)})
        return {name: value.float() for name, value in state.items() if name.startswith(PROJECTION)}

    def lessons(self, scene: views.Scene) -> Lessons:
        """Renders a scene and computes all that the frozen parts say of it."""
        parts = []
        every = views.identities()
        known = views.references(every)  # far fewer than pictures
        embeds = torch.cat([self.embed_image(block) for block in known.split(256)])
        for block in views.blocks(scene):
            number = views.number_of(block.identity)
            canvas = location_canvases(known[number] * 2 - 1, list(block.box))
            both = [self.encode_image(pixels).half() for pixels in (views.render(block)[0] * 2 - 1, canvas)]
            parts.append((*both, embeds[number], camera_rows(block.camera)))
        latents, location, embed, camera = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Lessons(latents, location, embed, camera, scene.identity, scene.scene)


def camera_rows(camera: Rows) -> Tensor:
    """(n, 4) of the renderer's camera rows."""
    azimuth, elevation, distance = (tuple(camera[name].tolist()) for name in ("azimuth", "elevation", "distance"))
    return View(azimuth, elevation, distance).vector()
