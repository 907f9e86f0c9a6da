"""A UNet that came inside an adapter file, in place of the checkpoint's own."""
from __future__ import annotations

from typing import Any

import comfy.utils
from torch import Tensor

from ..common.errors import LikenessError


def apply_base(model: Any, weights: tuple[tuple[str, Tensor], ...]) -> str:
    """Lays (diffusers name, tensor) over a cloned MODEL's weights, LoRAs stay on top; a line for the report.

    Raises LikenessError when the UNet is another one."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    patches = {f"diffusion_model.{names[name]}": ("set", (tensor,)) for name, tensor in weights if name in names}
    done = model.add_patches(patches)
    if len(done) < len(weights):
        raise LikenessError(f"Only {len(done)} of the {len(weights)} base weights in the adapter file belong to this model; load "
                            "an SDXL checkpoint, or set base_weights to ignore.")
    return f"base weights of the adapter file: {len(done)} tensors in place of the checkpoint's"
