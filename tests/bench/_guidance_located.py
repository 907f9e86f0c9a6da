"""Where the mask lies: on noised renders, against the renderer's own masks."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
import torch.nn.functional as F
from _guidance_world import STEPS, World
from custany import interval  # tests/bench is on the path of every bench
from torch import Tensor

from likeness.models.demo import creatures, world
from likeness.models.demo.captions import look
from likeness.models.hosting.guidance import KEEPS, make_guidance
from likeness.models.hosting.predict_mask import Walk, mask_after
from likeness.models.hosting.prompt import encode_prompt
from likeness.models.hosting.word_maps import ALL, FINE

RENDERS = 256
COVERED, TOUCHED = 0.25, 0.02


def true_cells(mask: Tensor, share: float) -> Tensor:
    """(n, 64, 64) -> (n, 8, 8) of 0 and 1: cells of which the creature covers more than this share."""
    return (F.adaptive_avg_pool2d(mask[:, None], 8)[:, 0] > share).float()


def located() -> dict[str, Any]:
    """Renders of held-out identities, noised as at steps 2, 5 and 10 of 20, against the renderer's own masks.

    mask_iou: against the cells that the creature covers by a quarter, as many as the mask keeps. inside: share of the
    mask's weight on cells that it touches; inside_chance: of the mean mask over all pictures. _all: with all layers."""
    with torch.inference_mode():
        world_, generator = World(), torch.Generator().manual_seed(31)
        rows, scene = world.draw_split(RENDERS, generator, training=False)
        pose = world.draw_poses(RENDERS, generator)
        drawn = creatures.draw_pictures(rows, pose, scene, world.draw_scene_parameters(RENDERS, generator))
        truth, touched = true_cells(drawn.mask, COVERED), true_cells(drawn.mask, TOUCHED)
        latents = world_.vae.encode(drawn.picture.movedim(1, -1))
        sigmas = comfy.samplers.calculate_sigmas(world_.model.get_model_object("model_sampling"), "normal", STEPS)
        out: dict[str, Any] = {"renders": RENDERS}
        for end, layers, steps in (("", FINE, (1, 4, 9)), ("_all", ALL, (4,))):
            every: dict[str, list[float]] = {"mask_iou": [], "mask_area": [], "inside": []}
            for step in steps:
                masks = torch.cat([one_mask(world_, rows, pose, scene, k, latents[k:k + 1], sigmas[step:step + 1], generator,
                                            float(truth[k].mean()), layers) for k in range(RENDERS)])
                binary = (masks > 0).float()
                iou = (binary * truth).flatten(1).sum(1) / (binary + truth).clamp(max=1).flatten(1).sum(1)
                inside = (masks * touched).flatten(1).sum(1) / masks.flatten(1).sum(1)
                for name, values in (("mask_iou", iou), ("mask_area", binary.flatten(1).mean(1)), ("inside", inside)):
                    every[name] += values.tolist()
                    out[f"{name}{end}_step{step + 1}"] = round(float(values.mean()), 4)
            for name, values in every.items():
                low, high = interval(values)
                out |= {f"{name}{end}": round(sum(values) / len(values), 4), f"{name}{end}_lo": round(low, 4),
                        f"{name}{end}_hi": round(high, 4)}
        mean = truth.mean(0)
        out["inside_chance"] = round(float((mean * touched).flatten(1).sum(1).mean() / mean.sum()), 4)
    return out


def one_mask(world_: World, rows: Any, pose: Any, scene: Tensor, k: int, latent: Tensor, sigma: Tensor,
             generator: torch.Generator, scope: float, layers: str) -> Tensor:
    """(1, 8, 8) soft mask of the kind's word in this noised render, with its own caption."""
    kind = world.KINDS[int(rows["kind"][k])]
    before, after = look(rows, k)
    text = f"a photo of a {before} {kind}{after} {world.SCENES[int(scene[k])]}, {world.PLACES[int(pose['place'][k])]}"
    positive, word, _ = encode_prompt(world_.clip, text, kind)
    guidance = make_guidance(word, scope, "max_norm", KEEPS[0], False, 1, layers=layers)
    noise = torch.randn(latent.shape, generator=generator)
    return mask_after(world_.model, positive, guidance, Walk(latent, noise, torch.cat([sigma, 0 * sigma]), 1))[0]
