"""Small siblings of the host's SD1.5, SDXL and SD3 classes, and the shapes of their parts."""
from __future__ import annotations

from typing import Any

import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip

# SDXL and SD3 take the last hidden layer but one, which the host refuses with fewer than three layers.
CLIP_L = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "projection_dim": 64,
}
CLIP_G = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3,
    "projection_dim": 96,
}
# The block layouts are the real ones, so that block numbers in patches are the true ones; widths are 1/10.
SD15_UNET: dict[str, Any] = {
    "model_channels": 32, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "context_dim": 64,
    "num_heads": 8, "num_head_channels": -1, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "use_linear_in_transformer": False, "adm_in_channels": None,
}
SDXL_UNET: dict[str, Any] = {
    "model_channels": 32, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "context_dim": CLIP_L["hidden_size"] + CLIP_G["hidden_size"], "num_heads": -1, "num_head_channels": 64,
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10, "use_linear_in_transformer": True,
    # pooled CLIP-G and six sizes of 256 numbers each
    "adm_in_channels": CLIP_G["projection_dim"] + 6 * 256, "num_classes": "sequential",
}
SD3_DEPTH = 2  # the host reads width = 64 * depth


def small(model_options: dict) -> dict:
    """The host merges these over the shapes of its bundled CLIP configs."""
    return {**model_options, "clip_l_model_config": CLIP_L, "clip_g_model_config": CLIP_G}


class TinySD15Clip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=small(model_options or {}))


class TinySDXLClip(comfy.sdxl_clip.SDXLClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=small(model_options or {}))


class TinySD3Clip(comfy.text_encoders.sd3_clip.SD3ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(
            clip_l=True, clip_g=True, t5=False, device=device, dtype=dtype,
            model_options=small(model_options or {}),
        )


class TinySD15(comfy.supported_models.SD15):
    unet_config = {
        "context_dim": SD15_UNET["context_dim"], "model_channels": SD15_UNET["model_channels"],
        "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
    }

    def clip_target(self, state_dict: Any = None) -> Any:
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinySD15Clip)


class TinySDXL(comfy.supported_models.SDXL):
    unet_config = {
        "model_channels": SDXL_UNET["model_channels"], "use_linear_in_transformer": True,
        "context_dim": SDXL_UNET["context_dim"], "adm_in_channels": SDXL_UNET["adm_in_channels"],
        "use_temporal_attention": False,
    }

    def clip_target(self, state_dict: Any = None) -> Any:
        return comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, TinySDXLClip)


class TinySD3(comfy.supported_models.SD3):
    unet_config = {"in_channels": 16, "pos_embed_scaling_factor": None, "depth": SD3_DEPTH}

    def clip_target(self, state_dict: Any = None) -> Any:
        tokenizer = comfy.text_encoders.sd3_clip.SD3Tokenizer
        return comfy.supported_models_base.ClipTarget(tokenizer, TinySD3Clip)


def register() -> None:
    """Append the classes once. The host takes the first that fits, and its SD3 class looks at nothing but
    the channels, so ours goes before it."""
    models = comfy.supported_models.models
    if not any(m.__name__ == TinySD15.__name__ for m in models):
        models.extend([TinySD15, TinySDXL])
        models.insert(0, TinySD3)
