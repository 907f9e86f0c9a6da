"""The host's slots for a replaced text attention: one object a layer, so ours are laid round what stands there."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import comfy.ldm.modules.attention
from torch import Tensor

Slot = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def text_attention(before: Slot | None, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """What the slot held, or the host's own attention: q (b, t, c), k and v (b, l, c) -> (b, t, c)."""
    if before is not None:
        return before(q, k, v, extra_options)
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, extra_options["n_heads"], attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options)


def laid_round(options: dict[str, Any], keys: Iterable[str], make: Callable[[str, Slot | None], Slot]) -> dict[str, Any]:
    """A copy of transformer_options with make(key, what stood there) in the slots of the layers "output.3.0"."""
    slots = dict(options.get("patches_replace", {}).get("attn2", {}))
    for key in keys:
        part, number, depth = key.split(".")
        place = (part, int(number), int(depth))
        # the host looks for the layer first, then for the whole block
        slots[place] = make(key, slots.get(place, slots.get(place[:2])))
    return {**options, "patches_replace": {**options.get("patches_replace", {}), "attn2": slots}}
