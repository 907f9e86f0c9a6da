"""CustomNet's image tower as a CLIP_VISION of the host, and the reference's embedding as the authors compute it."""
from __future__ import annotations

import math
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management as management
import comfy.ops
import torch
from torch import Tensor, nn

from ..customnet import pixels
from ..vision.load import load_vit
from ..vision.preprocess import NORMALISATION
from .memory import patcher_class

HEAD = 64  # channels of one attention head in every CLIP


class Vision(comfy.clip_vision.ClipVisionModel):
    """The host's object round a tower whose sizes were read from a file; the host's own builds from a file of settings."""

    def __init__(self, module: nn.Module, config: dict[str, Any], dtype: torch.dtype, disable_dynamic: bool = False):
        self.config, self.model_type = config, config["model_type"]
        self.image_size, self.image_mean, self.image_std = config["image_size"], config["image_mean"], config["image_std"]
        self.return_all_hidden_states = False
        self.load_device = management.text_encoder_device()
        self.dtype, self.model = dtype, module.eval().requires_grad_(False)
        self.patcher = patcher_class(disable_dynamic)(self.model, load_device=self.load_device,
                                                      offload_device=management.text_encoder_offload_device())


def clip_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """The host's settings of a tower under transformers' names."""
    layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("vision_model.encoder.layers."))
    patches = state["vision_model.embeddings.patch_embedding.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    side = math.isqrt(state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1)
    return {"model_type": "clip_vision_model", "num_hidden_layers": layers, "hidden_size": width,
            "num_attention_heads": max(1, width // HEAD), "num_channels": 3, "patch_size": patch, "image_size": side * patch,
            "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0], "hidden_act": "quick_gelu",
            "projection_dim": state["visual_projection.weight"].shape[0], "image_mean": list(pixels.MEAN),
            "image_std": list(pixels.STD)}


def clip_tower(state: dict[str, Tensor], disable_dynamic: bool = False) -> Vision:
    """From OpenAI's or transformers' tensor names; the state is emptied on the way."""
    state = comfy.clip_vision.convert_to_transformers(state, "")
    config = clip_config(state)
    dtype = management.text_encoder_dtype(management.text_encoder_device())
    offload = management.text_encoder_offload_device()
    module = comfy.clip_model.CLIPVisionModelProjection(config, dtype, offload, comfy.ops.manual_cast)
    own = module.state_dict()
    # in place of a copy into fresh tensors, which would need the tower's memory twice
    state = {name: state.pop(name).to(own[name].dtype).contiguous() for name in list(state) if name in own}
    module.load_state_dict(state, strict=True, assign=True)
    return Vision(module, config, dtype, disable_dynamic)


class _Miniature(nn.Module):
    """Our ViT in the host's words: the mean of its patch tokens stands for the projected embedding."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor, intermediate_output: Any = None) -> tuple[Any, ...]:
        result = self.vit(pixel_values)
        return result.patches, result.patches, result.patches.mean(1), None


def miniature_tower(state: dict[str, Tensor], metadata: dict[str, str], disable_dynamic: bool = False) -> Vision:
    """The miniature's MAE."""
    vit, config = load_vit(state, metadata, operations=comfy.ops.manual_cast)
    mean, std = NORMALISATION[config.family]
    settings = {"model_type": "clip_vision_model", "image_size": config.grid * config.patch, "patch_size": config.patch,
                "image_mean": list(mean), "image_std": list(std)}
    return Vision(_Miniature(vit), settings, torch.float32, disable_dynamic)


def embed_reference(clip_vision: Any, reference: Tensor) -> Tensor:
    """Reference (n, 3, h, w) in -1..1 -> (n, e) on the CPU, with the authors' own preparation in place of the host's."""
    management.load_models_gpu([clip_vision.patcher])
    shrinks = reference.shape[-1] > 2 * clip_vision.image_size  # the authors' has no antialias and needs none at 256 to 224
    if shrinks:
        reference = torch.nn.functional.interpolate(reference, (clip_vision.image_size,) * 2, mode="area")
    values = pixels.pixel_values(reference, clip_vision.image_size, clip_vision.image_mean, clip_vision.image_std)
    out = clip_vision.model(pixel_values=values.to(clip_vision.load_device), intermediate_output=-2)[2]
    return out.float().cpu()
