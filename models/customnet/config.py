"""Telling a CustomNet file from its tensors: which variant it is, and which parts it holds."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..common.errors import LikenessError
from .layers import CAMERA

UNET, VAE, VISION, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.visual.", "text_encoder."
PROJECTION = "cc_projection."
PARTS = {UNET: "network", VAE: "VAE", VISION: "image tower", TEXT: "text encoder"}
VARIANTS = {2: "normal", 3: "inpaint"}  # how many latents stand side by side in the network's input
_INPUT, _OUTPUT, _TEXT_KEY = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight", "attn2.to_k_text.weight"
Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """variant "normal" or "inpaint"; width of the text rows and the object token; embed: of the image tower's output."""
    variant: str
    width: int
    embed: int


def wanted(name: str) -> bool:
    """Whether a tensor is used: not the schedule's tables, nor what is left of CLIP's text half beside the image tower."""
    return name.startswith((*PARTS, PROJECTION)) and not name.endswith("position_ids")


def identify(shapes: Shapes, name: str, parts: Iterable[str] = tuple(PARTS)) -> Layout:
    """Shapes of all tensors of a file -> its layout. `parts`: prefixes that must be there.

    Raises LikenessError that says what the file is instead, or which part is missing."""
    text = next((key for key in shapes if key.endswith(_TEXT_KEY)), None)
    projection = shapes.get(f"{PROJECTION}weight")
    if text is None or projection is None:
        raise LikenessError(f"The file {name} is no CustomNet, it looks like {_guess(shapes, projection is not None)}; choose "
                            "customnet_v1 or customnet_inpaint_v1" + (", and load this one with core's Load Checkpoint."
                                                                      if f"{UNET}out.2.weight" in shapes else "."))
    missing = [what for part, what in PARTS.items() if part in parts and not any(key.startswith(part) for key in shapes)]
    if missing or _INPUT not in shapes or _OUTPUT not in shapes:
        raise LikenessError(f"The file {name} is a CustomNet without its {(missing or ['network'])[0]}; download the whole file.")
    count, left = divmod(shapes[_INPUT][1], shapes[_OUTPUT][0])
    if left or count not in VARIANTS:
        raise LikenessError(f"The CustomNet in {name} takes {shapes[_INPUT][1]} channels, known are 8 (normal) and 12 (inpaint); "
                            "update the pack.")
    width = shapes[text][1]
    if projection[0] != width or projection[1] <= CAMERA:
        raise LikenessError(f"The CustomNet in {name} makes object tokens of {projection[0]} numbers for layers that read "
                            f"{width}; download it again.")
    return Layout(VARIANTS[count], width, projection[1] - CAMERA)


def _guess(shapes: Shapes, projection: bool) -> str:
    if projection:
        return "Zero-1-to-3 or Stable Zero123, which has no text"
    if any(key.startswith("conditioner.embedders.1.") for key in shapes):
        return "a stock SDXL checkpoint"
    attention = next((shape for key, shape in shapes.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight")), None)
    if attention is not None:
        return {768: "a stock SD1.5 checkpoint", 1024: "a stock SD2 checkpoint"}.get(
            attention[1], f"a checkpoint with text width {attention[1]}")
    if any(key.startswith(("lora_unet", "lora_te")) or ".lora_" in key for key in shapes):
        return "a LoRA"
    if any("control_model" in key or key.startswith("controlnet") for key in shapes):
        return "a ControlNet"
    return "another kind of model"
