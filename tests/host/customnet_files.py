"""Tiny CustomNet files of the true layout: the authors' tensor names, all four parts, random numbers."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import tiny
from host import support
from host.support import comfy
from likeness.models.common import files
from likeness.models.customnet.placement import Placement
from likeness.models.customnet.view import View
from likeness.models.hosting import customnet, view
from likeness.models.hosting.customnet_model import KEY
from likeness.models.hosting.customnet_unet import DualUNet, restored

WIDTH = 64
UNET = {"image_size": 32, "model_channels": 32, "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
        "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1, "context_dim": WIDTH, "legacy": False}
SIZE = 64  # pixels of the pictures in these tests
BOXES = Placement(((0.125, 0.25, 0.5, 0.5),))


def vision_state(generator: torch.Generator, width: int = WIDTH, layers: int = 2, patch: int = 56) -> dict[str, Tensor]:
    """OpenAI's names of an image tower for 224 pixels."""
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / max(1, shape[-1]) ** 0.5
    out = {"class_embedding": draw(width), "conv1.weight": draw(width, 3, patch, patch) / patch,
           "positional_embedding": draw((224 // patch) ** 2 + 1, width), "proj": draw(width, width)}
    norms = ["ln_pre", "ln_post"]
    for k in range(layers):
        block = f"transformer.resblocks.{k}."
        norms += [block + "ln_1", block + "ln_2"]
        for name, shape in (("attn.in_proj_", (3 * width, width)), ("attn.out_proj.", (width, width)),
                            ("mlp.c_fc.", (4 * width, width)), ("mlp.c_proj.", (width, 4 * width))):
            out |= {f"{block}{name}weight": draw(*shape), f"{block}{name}bias": 0.1 * draw(shape[0])}
    for name in norms:
        out |= {f"{name}.weight": 1 + 0.1 * draw(width), f"{name}.bias": 0.1 * draw(width)}
    return out


@cache
def state(variant: str = "normal", levels: str = "two") -> dict[str, Tensor]:
    """The whole file; what is cached here is shared by all tests. levels: "sd15" has SD1.5's own blocks."""
    from harness.tiny_models import families

    sizes = UNET if levels == "two" else UNET | families.SD15_UNET
    generator = torch.Generator().manual_seed(31)
    network = DualUNet(in_channels=8 if variant == "normal" else 12, dtype=torch.float32, **sizes)
    text = tiny.clip_text("sd1_clip_config.json", families.CLIP_L, generator)
    text.pop("text_projection.weight")
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    parts = {"model.diffusion_model.": restored(tiny.random_weights(network, generator)),
             "first_stage_model.": tiny.first_stage(4, generator), "cond_stage_model.model.visual.": vision_state(generator),
             "text_encoder.transformer.": text,
             "cond_stage_model.model.": {"token_embedding.weight": torch.zeros(9, WIDTH), "logit_scale": torch.tensor(4.6)},
             "cc_projection.": {"weight": torch.randn(WIDTH, WIDTH + 4, generator=generator) / 8, "bias": torch.zeros(WIDTH)},
             "": {"betas": torch.linspace(0, 1, 1000)}}
    out = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in out.items()}


@cache
def path(variant: str = "normal", ending: str = ".safetensors", levels: str = "two") -> Path:
    """The file on disk."""
    place = support.folder() / f"a_{variant}_file_of_{levels}{ending}"
    if ending == ".safetensors":
        files.save(place, state(variant, levels))
    else:
        torch.save(state(variant, levels), place)
    return place


@cache
def loaded(variant: str = "normal", levels: str = "two") -> customnet.Loaded:
    with torch.inference_mode():
        return customnet.load(path(variant, levels=levels))


def reference(seed: int = 0) -> Tensor:
    """(1, 256, 256, 3): a coloured disc on white."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    inside = ((x - 128) ** 2 + (y - 120) ** 2 < 90 ** 2)[..., None]
    colour = torch.rand(256, 256, 3, generator=torch.Generator().manual_seed(seed))
    return torch.where(inside, colour, torch.ones(3))[None]


def encode(text: str, variant: str = "normal") -> list[list[Any]]:
    clip = loaded(variant).clip
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def conditioned(variant: str = "normal", text: str = "on the beach", negative: str = "", azimuth: tuple[float, ...] = (30.0,),
                placement: Placement = BOXES, width: int = SIZE, height: int = SIZE, **more: Any) -> view.Conditioned:
    model = loaded(variant)
    cameras = View(azimuth, (10.0,) * len(azimuth), (0.0,) * len(azimuth))
    if variant == "inpaint":
        more.setdefault("background", torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(5)))
    return view.condition(encode(text, variant), encode(negative, variant), model.vision, model.vae,
                          more.pop("reference", reference()), more.pop("view", cameras), placement, width, height, **more)


def run(done: view.Conditioned, model: Any = None, variant: str = "normal", **more: Any) -> Tensor:
    """Two steps of core's own sampling."""
    more = {"steps": 2, "cfg": 3.0, "latent": done.latent["samples"], **more}
    return support.sample(model or loaded(variant).model, done.positive, done.negative, **more)


__all__ = ["KEY", "comfy", "support"]
