"""A UNet that came inside an adapter file, in place of the checkpoint's own."""
from __future__ import annotations

from itertools import takewhile
from typing import Any

import comfy.utils
from torch import Tensor

from ..common.errors import LikenessError


def apply_base(model: Any, weights: tuple[tuple[str, Tensor], ...]) -> str:
    """Lays (diffusers name, tensor) under a cloned MODEL's patches: LoRAs before and after stay on top; a line for the report.

    Raises LikenessError when the UNet is another one."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    wanted = {f"diffusion_model.{names[name]}": ("set", (tensor,)) for name, tensor in weights if name in names}
    there = {key for key, (_, (tensor,)) in wanted.items()
             if any(_is_set(patch[1], tensor) for patch in model.patches.get(key, ()))}
    added = model.add_patches({key: patch for key, patch in wanted.items() if key not in there})
    for key in added:
        # The host works the list off in turn and a set forgets all before it, so it goes behind other sets only.
        *before, own = model.patches[key]
        first = sum(1 for _ in takewhile(lambda patch: _is_set(patch[1]), before))
        model.patches[key] = [*before[:first], own, *before[first:]]
    done = len(there) + len(added)
    if done < len(weights):
        raise LikenessError(f"Only {done} of the {len(weights)} base weights in the adapter file belong to this model; load "
                            "an SDXL checkpoint, or set base_weights to ignore.")
    return f"base weights of the adapter file: {done} tensors in place of the checkpoint's"


def _is_set(patch: Any, tensor: Tensor | None = None) -> bool:
    """Whether a patch puts a tensor, or this very one, in place of the weight; other kinds may be objects of the host."""
    return isinstance(patch, tuple) and patch[0] == "set" and (tensor is None or patch[1][0] is tensor)
