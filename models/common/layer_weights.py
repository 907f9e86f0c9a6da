"""Factors of an adapter's layers: by resolution level, along the network, and by name."""
from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .errors import LikenessError
from .records import LayerWeights

LEVELS = ("coarse", "middle", "fine")
# base: (blocks of the UNet a resolution level, number of levels)
_LAYOUT = {"sd15": (3, 4), "sdxl": (3, 3), "miniature": (2, 2)}


def _parts(key: str) -> tuple[str, int, int]:
    part, block, index = key.split(".")
    return part, int(block), int(index)


def _depth(key: str, base: str) -> int:
    """0 for the lowest resolution of the network, one more for each doubling."""
    part, block, _ = _parts(key)
    per_level, count = _LAYOUT.get(base, (3, 4))
    if part == "middle":
        return 0
    return block // per_level if part == "output" else count - 1 - block // per_level


def _order(key: str) -> tuple[int, int, int]:
    """The way through the network: down, middle, up."""
    part, block, index = _parts(key)
    return {"input": 0, "middle": 1, "output": 2}.get(part, 3), block, index


def level_names(keys: Sequence[str], base: str) -> dict[str, str]:
    """Layer key "output.3.0" -> "coarse", "middle" or "fine", by the resolutions that these layers have."""
    depths = {key: _depth(key, base) for key in keys}
    low, high = min(depths.values()), max(depths.values())
    place = {low: LEVELS[0], high: LEVELS[2]} if high > low else {low: LEVELS[0]}
    return {key: place.get(depth, LEVELS[1]) for key, depth in depths.items()}


def parse_overrides(text: str, keys: Sequence[str]) -> dict[str, float]:
    """"output.3.0: 0.5, output.9: 0" -> {key: factor}; "output.9" means all layers of that block.

    Raises LikenessError that names the part which cannot be read and the layers that there are."""
    out: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        name, separator, number = (part.strip() for part in entry.partition(":"))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not separator or not math.isfinite(factor):
            raise LikenessError(f"The override \"{entry}\" cannot be read; write a layer, a colon and a "
                                f"number, such as {keys[0]}: 0.5.")
        chosen = [key for key in keys if key == name or key.startswith(name + ".")]
        if not chosen:
            raise LikenessError(f"The override names the layer {name}, this adapter has the layers "
                                f"{', '.join(keys)}; correct the list.")
        out.update(dict.fromkeys(chosen, factor))
    return out


def layer_weights(keys: Sequence[str], base: str, levels: dict[str, float],
                  fade: tuple[float, float] = (1.0, 1.0), overrides: str = "") -> LayerWeights:
    """(key, factor) of every layer, in the order in which the network runs through them.

    levels: factor of each of LEVELS. fade: further factors of the first and the last layer, in even steps
    between them. overrides replace what came out for a layer."""
    ordered = sorted(keys, key=_order)
    names = level_names(ordered, base)
    fixed = parse_overrides(overrides, ordered)
    last = max(1, len(ordered) - 1)
    return tuple((key, fixed.get(key, levels[names[key]] * (fade[0] + (fade[1] - fade[0]) * index / last)))
                 for index, key in enumerate(ordered))


def weights_report(weights: LayerWeights, base: str) -> str:
    """One line a level: its layers and their factors."""
    names = level_names([key for key, _ in weights], base)
    lines = []
    for level in LEVELS:
        own = ", ".join(f"{key}: {factor:.3g}" for key, factor in weights if names[key] == level)
        lines.append(f"{level}: {own or 'this adapter has no such layers'}")
    return "\n".join(lines)
