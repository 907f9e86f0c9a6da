"""Pictures of the miniature CustomNet by the way of the nodes: View Conditioner, the host's MODEL, its sampler and its VAE."""
from __future__ import annotations

import time
from pathlib import Path

import comfy.sample
import torch
from torch import Tensor

from likeness.models.customnet.placement import Box, Placement
from likeness.models.customnet.view import View
from likeness.models.customnet.view import turntable as views_of
from likeness.models.demo import views
from likeness.models.demo.views import Scene
from likeness.models.hosting import customnet
from likeness.models.hosting.view import condition

CALL = 8  # pictures of one run of the sampler
SIZE, STEPS, CFG, REFERENCE = 64, 20, 2.0, 256


class Nodes:
    """One trained file as Load CustomNet gives it."""

    def __init__(self, path: Path, weights: Path):
        with torch.inference_mode():
            self.loaded = customnet.load_miniature(None, weights, path)

    @torch.inference_mode()
    def paint(self, scene: Scene, seed: int) -> Tensor:
        """(n, 3, 64, 64) in 0..1 of one building before one scene, by n cameras and places: one run of the sampler."""
        camera = (tuple(scene.camera[name].tolist()) for name in ("azimuth", "elevation", "distance"))
        boxes: list[Box] = [(x0 / SIZE, y0 / SIZE, (x1 - x0) / SIZE, (y1 - y0) / SIZE) for x0, y0, x1, y1 in scene.box.tolist()]
        told = set(views.captions(scene.identity, scene.scene))
        if len(told) != 1:
            raise ValueError(f"One run has one sentence, these are {len(told)}.")
        latents = self.latents(views.select(scene.identity, torch.tensor([0])), told.pop(), View(*camera), boxes, seed)
        return self.loaded.vae.decode(latents).movedim(-1, 1)

    def latents(self, building: dict[str, Tensor], sentence: str, view: View, boxes: list[Box], seed: int) -> Tensor:
        """What a KSampler with the workflows' settings gives."""
        loaded = self.loaded
        prompts = [loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize(text)) for text in (sentence, "")]
        picture = views.references(building, REFERENCE).movedim(1, -1)
        done = condition(*prompts, loaded.vision, loaded.vae, picture, view, Placement(tuple(boxes)), SIZE, SIZE)
        latent = done.latent["samples"]
        noise = comfy.sample.prepare_noise(latent, seed, done.latent.get("batch_index"))
        return comfy.sample.sample(loaded.model, noise, STEPS, CFG, "euler", "normal", done.positive, done.negative, latent,
                                   seed=seed, disable_pbar=True)


def turntable(nodes: Nodes) -> float:
    """Seconds of eight views in one batch over eight single runs; encoding included."""
    building = views.select(views.identities(), torch.tensor([7]))

    @torch.inference_mode()
    def seconds(count: int) -> float:
        begin = time.perf_counter()
        nodes.latents(building, "a house on the beach", views_of(-60.0, 60.0, count, 0.0, 0.0, True), [(0.1, 0.1, 0.8, 0.8)], 1)
        return time.perf_counter() - begin

    seconds(1)
    return min(seconds(8) for _ in range(3)) / (8 * min(seconds(1) for _ in range(3)))
