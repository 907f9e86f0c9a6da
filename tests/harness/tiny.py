"""Tiny random checkpoints of the SD1.5, SDXL and SD3 kinds, made at test time and kept under .dev/tiny.

The same numbers on every machine (own generators). Works in this process (`register`, after host.enter)
and on a server (`PACK` among its packs, `folder()` as its checkpoints).
"""
from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .paths import DEV, ROOT, HarnessError, host_dir, host_version

PACK = Path(__file__).parent / "tiny_models"
CHECKPOINTS = ("tiny_sd15.safetensors", "tiny_sdxl.safetensors", "tiny_sd3.safetensors")
LORA, CONTROLNET = "tiny_sd15_lora.safetensors", "tiny_sd15_control.safetensors"
FILES = (*CHECKPOINTS, LORA, CONTROLNET)


def folder() -> Path:
    """Where the files of this version of the recipe and of the host lie (they may not exist yet)."""
    recipe = Path(__file__).read_bytes() + (PACK / "families.py").read_bytes() + host_version().encode()
    return DEV / "tiny" / hashlib.sha256(recipe).hexdigest()[:12]


def ensure() -> dict[str, Path]:
    """Make the missing files in a process of their own (some seconds, once); file name -> path."""
    place = folder()
    if not all((place / name).is_file() for name in FILES):
        words = [sys.executable, str(ROOT / "tests" / "harness"), "tiny"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        if done.returncode != 0:
            raise HarnessError("The tiny checkpoints could not be made:\n" + done.stderr[-3000:])
    return {name: place / name for name in FILES}


def register() -> None:
    """Let the host inside this process recognise the files."""
    from . import tiny_models  # registers itself when imported, as it does on a server

    tiny_models.families.register()


# -- making them ---------------------------------------------------------------------------------------
State = dict[str, Any]  # tensor name -> tensor


def random_weights(module: Any, generator: Any) -> State:
    """Seeded weights in half precision: 1/sqrt(fan in) for matrices, norms near one, biases near zero."""
    import torch

    norms = set()
    for name, part in module.named_modules():
        if isinstance(part, (torch.nn.LayerNorm, torch.nn.GroupNorm)) or "RMSNorm" in type(part).__name__:
            norms.add(f"{name}.weight")
    state = {}
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            value = noise / tensor[0].numel() ** 0.5
        else:
            value = 0.05 * noise + (1.0 if name in norms else 0.0)
        state[name] = value.half()
    return state


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def clip_text(config_file: str, sizes: dict, generator: Any) -> State:
    import comfy.clip_model
    import comfy.ops
    import torch

    config = json.loads((host_dir() / "comfy" / config_file).read_text(encoding="utf-8"))
    config.update(sizes)
    model = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    return random_weights(model, generator)


def open_clip_names(state: State) -> State:
    """transformers names -> those of the OpenCLIP tower in an SDXL file (q, k, v in one matrix)."""
    import torch

    plain = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    out: State = {plain[k]: v for k, v in state.items() if k in plain}
    out["text_projection"] = state["text_projection.weight"].t().contiguous()
    start = "text_model.encoder.layers."
    for name in (k for k in state if k.startswith(start)):
        number, rest = name[len(start):].split(".", 1)
        part, kind = rest.rsplit(".", 1)
        block = f"transformer.resblocks.{number}."
        if part in inner:
            out[f"{block}{inner[part]}.{kind}"] = state[name]
        elif part == "self_attn.q_proj":
            three = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
    return out


def first_stage(channels: int, generator: Any) -> State:
    """A TAESD: found by its names, small, encodes and decodes (the KL kind has a fixed large encoder)."""
    import comfy.taesd.taesd

    return random_weights(comfy.taesd.taesd.TAESD(latent_channels=channels), generator)


def unet(shape: dict, generator: Any) -> State:
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model = UNetModel(
        image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **shape,
    )
    return random_weights(model, generator)


def sd15(generator: Any) -> State:
    from .tiny_models import families as f

    text = clip_text("sd1_clip_config.json", f.CLIP_L, generator)
    text.pop("text_projection.weight")  # SD1.5 files have none
    return {
        **prefixed("model.diffusion_model.", unet(f.SD15_UNET, generator)),
        **prefixed("cond_stage_model.transformer.", text),
        **prefixed("first_stage_model.", first_stage(4, generator)),
    }


def sdxl(generator: Any) -> State:
    from .tiny_models import families as f

    text_l = clip_text("sd1_clip_config.json", f.CLIP_L, generator)
    text_l.pop("text_projection.weight")
    text_g = open_clip_names(clip_text("clip_config_bigg.json", f.CLIP_G, generator))
    return {
        **prefixed("model.diffusion_model.", unet(f.SDXL_UNET, generator)),
        **prefixed("conditioner.embedders.0.transformer.", text_l),
        **prefixed("conditioner.embedders.1.model.", text_g),
        **prefixed("first_stage_model.", first_stage(4, generator)),
    }


def sd3(generator: Any) -> State:
    """The flow-matching kind. Text rows are padded to 4096 by the host, whatever the encoders' width."""
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    from .tiny_models import families as f

    embedder = {"in_features": 4096, "out_features": 64 * f.SD3_DEPTH}
    model = MMDiT(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=f.SD3_DEPTH,
        adm_in_channels=f.CLIP_L["projection_dim"] + f.CLIP_G["projection_dim"],
        context_embedder_config={"target": "torch.nn.Linear", "params": embedder},
        num_patches=64 * 64, pos_embed_max_size=64, pos_embed_scaling_factor=None, qk_norm="rms",
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )
    text_l = clip_text("sd1_clip_config.json", f.CLIP_L, generator)
    text_g = clip_text("clip_config_bigg.json", f.CLIP_G, generator)
    return {
        **prefixed("model.diffusion_model.", random_weights(model, generator)),
        **prefixed("text_encoders.clip_l.transformer.", text_l),
        **prefixed("text_encoders.clip_g.transformer.", text_g),
        **prefixed("first_stage_model.", first_stage(16, generator)),
    }


def lora(generator: Any) -> State:
    """Rank 4 on the queries, keys and values of every attention of tiny_sd15, names as kohya writes them."""
    import torch

    from .tiny_models import families as f

    out: State = {}
    for name, weight in unet(f.SD15_UNET, generator).items():
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            key = "lora_unet_" + name[: -len(".weight")].replace(".", "_")
            up, down = (weight.shape[0], 4), (4, weight.shape[1])
            out[f"{key}.lora_up.weight"] = (0.5 * torch.randn(up, generator=generator)).half()
            out[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator).half() / down[1] ** 0.5
            out[f"{key}.alpha"] = torch.tensor(4.0)
    return out


def controlnet(generator: Any) -> State:
    import comfy.cldm.cldm
    import comfy.ops
    import torch

    from .tiny_models import families as f

    shape = {k: v for k, v in f.SD15_UNET.items() if k != "transformer_depth_output"}
    model = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, use_spatial_transformer=True, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **shape,
    )
    return prefixed("control_model.", random_weights(model, generator))


def main(argv: list[str]) -> int:
    """Make every file (called by `ensure` in a process of its own)."""
    from . import host

    host.enter(cpu=True)
    import safetensors.torch
    import torch

    recipes: dict[str, Callable[[Any], State]] = dict(
        zip(FILES, (sd15, sdxl, sd3, lora, controlnet), strict=True)
    )
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    for seed, (name, recipe) in enumerate(recipes.items(), 1):
        state = recipe(torch.Generator().manual_seed(seed))
        # Two test runs may do this at once: each writes its own part, the last rename wins.
        part = place / f"{name}.{os.getpid()}.part"
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, part)
        os.replace(part, place / name)
        print(f"{name}: {len(state)} tensors, {(place / name).stat().st_size / 1e6:.1f} MB")
    return 0
