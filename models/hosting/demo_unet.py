"""The miniature's diffusion network: the host's own UNet class at a size that a CPU can train."""
from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

UNET_CONFIG = {
    "image_size": 8, "in_channels": 48, "out_channels": 48, "model_channels": 96, "num_res_blocks": [1, 1],
    "channel_mult": [1, 1], "num_head_channels": 32, "use_spatial_transformer": True, "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 128,
    "use_linear_in_transformer": True, "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
}


class TrainableOps(comfy.ops.disable_weight_init):
    """The host's operations skip torch's own initialisation; a network that is trained from nothing needs it."""

    class Linear(nn.Linear):
        pass

    class Conv2d(nn.Conv2d):
        pass

    class GroupNorm(nn.GroupNorm):
        pass

    class LayerNorm(nn.LayerNorm):
        pass

    @classmethod
    def conv_nd(cls, dims: int, *args, **kwargs):
        return cls.Conv2d(*args, **kwargs)


def build_trainable_unet() -> UNetModel:
    """A freshly initialised float32 network with torch's own layers."""
    return UNetModel(**UNET_CONFIG, dtype=torch.float32, operations=TrainableOps)
