"""Which attention blocks a MODEL has, and whether an adapter fits them."""
from __future__ import annotations

from typing import Any

from ..common.errors import LikenessError

FAMILIES = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 128: "the miniature"}


def attention_blocks(model: Any) -> dict[str, int]:
    """Key "output.3.0" -> channels, for every transformer block of a MODEL's UNet, in the order of the network; empty for
    other networks. The host numbers the middle block 0."""
    unet = model.get_model_object("diffusion_model")
    blocks = [(f"{part}.{number}", block) for part in ("input", "output")
              for number, block in enumerate(getattr(unet, f"{part}_blocks", ()))]
    down = sum(name.startswith("input") for name, _ in blocks)
    out: dict[str, int] = {}
    for name, block in (*blocks[:down], ("middle.0", getattr(unet, "middle_block", ())), *blocks[down:]):
        for layer in block:
            for index, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                out[f"{name}.{index}"] = int(transformer.norm1.normalized_shape[0])
    return out


def text_width(model: Any) -> int:
    """Channels of the text rows that the UNet reads; 0 when it has no text attention."""
    unet = model.get_model_object("diffusion_model")
    for part in ("input_blocks", "output_blocks"):
        for block in getattr(unet, part, ()):
            for layer in block:
                for transformer in getattr(layer, "transformer_blocks", ()):
                    if getattr(transformer, "attn2", None) is not None:
                        return int(transformer.attn2.to_k.in_features)  # a quantised weight may have another shape
    return 0


def check_fits(model: Any, base: str, width: int, layers: dict[str, int]) -> None:
    """Raises LikenessError when the adapter was made for another kind of model."""
    have = attention_blocks(model)
    name = {"sd15": "SD1.5", "sdxl": "SDXL", "miniature": "the miniature"}.get(base, base)
    if not have:
        kind = type(model.model).__name__
        raise LikenessError(f"This adapter needs a UNet with text attention blocks as {name} has it, and {kind} is another "
                            f"kind of network; load a {name} checkpoint.")
    got = text_width(model)
    wrong = next((key for key, channels in layers.items() if have.get(key) != channels), None)
    if got != width or wrong is not None:
        family = FAMILIES.get(got, f"a model with text width {got}")
        raise LikenessError(f"This adapter was trained for {name} (text width {width}), the model is {family}"
                            + (f" and has no matching block {wrong}" if wrong and got == width else "")
                            + f"; load a {name} checkpoint or an adapter for {family}.")
