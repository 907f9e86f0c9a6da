"""Build a vision encoder from the tensors of a file in any of the known key styles."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LikenessError
from .keys import fuse, identify, rename
from .vit import ViT, VitConfig

# What artists mix up with a vision encoder: (parts of tensor names, its name); the first hit wins.
_LOOKS_LIKE = (
    (("rope_embeddings", "rope_embed", "freqs_cis"), "an encoder with rotary positions, such as DINOv3"),
    (("lora_up", "lora_down", "lora_A", "lora_B", "lora_unet"), "a LoRA"),
    (("ip_adapter", "image_proj."), "an IP-Adapter"),
    (("encoder_mlps.",), "a Likeness subject adapter"),
    (("control_model.", "controlnet_cond_embedding", "input_hint_block"), "a ControlNet"),
    (("model.diffusion_model.", "input_blocks.", "down_blocks.", "double_blocks.", "transformer_blocks.",
      "joint_blocks."), "a diffusion model"),
    (("first_stage_model.", "decoder.up_blocks.", "decoder.conv_in", "quant_conv"), "a VAE"),
    (("visual.layer1.", "layer1.0.conv1", "stages.", "features.0"), "a convolutional network"),
    (("text_model.", "token_embedding", "shared.weight", "embed_tokens"), "a text encoder"),
    (("blocks.0.", "encoder.layer", "resblocks.0"), "a transformer of another kind"),
)


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a state dict; a checkpoint that holds them a level down, under `model`, is opened first."""
    for name in ("state_dict", "model", "module", "teacher"):
        inner = state_dict.get(name)
        if isinstance(inner, Mapping):
            return unwrap(inner)
    return {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}


def looks_like(names: Iterable[str]) -> str | None:
    """A guess in words at what a file holds that is no vision encoder, or None."""
    names = list(names)
    for parts, what in _LOOKS_LIKE:
        if any(part in name for name in names for part in parts):
            return what
    return None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_vit(state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None, operations: Any = nn,
             dtype: torch.dtype | None = None, device: torch.device | str | None = None,
             depth: int | None = None) -> tuple[ViT, VitConfig]:
    """Frozen encoder and its config; dtype None = float32, device None = where the tensors are.

    depth: how many blocks are wanted; the later ones are not loaded.
    Raises LikenessError if they are no vision encoder, or if some are missing, left over or of wrong shapes.
    """
    tensors = unwrap(state_dict)
    config, renamed = identify(tensors, metadata), rename(tensors)
    if config is None or renamed is None:
        guess = looks_like(tensors)
        guess = f"it looks like {guess}" if guess else "its tensors are of no kind that is known here"
        raise LikenessError(f"This file is not a vision encoder of the kinds DINOv2, MAE, SigLIP or CLIP, "
                            f"{guess}: choose an encoder file.")
    known, unknown, _ = renamed
    if depth is not None and depth < config.depth:
        config = config._replace(depth=depth)
        later = tuple(f"blocks.{index}." for index in range(depth, len(known)))
        known = {name: value for name, value in known.items() if not name.startswith(later)}
    found = fuse(known)
    # Compared against a plain torch build: the host's layers may hold no weights before loading.
    expected = ViT(config, nn, device="meta").state_dict()
    what = f"This {config.family} vision encoder ({config.depth} blocks, width {config.width})"
    missing = expected.keys() - found.keys()
    if missing:
        raise LikenessError(f"{what} lacks {_some(missing)}: the file is incomplete, download it again.")
    unknown += list(found.keys() - expected.keys())
    if unknown:
        raise LikenessError(f"{what} has tensors that it should not have, {_some(unknown)}: choose a file of "
                            f"a plain DINOv2, MAE, SigLIP or CLIP encoder.")
    wrong = [f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
             for name, tensor in expected.items() if found[name].shape != tensor.shape]
    if wrong:
        raise LikenessError(f"{what} has tensors of wrong shapes, {_some(wrong)}: choose another file.")
    dtype = torch.float32 if dtype is None else dtype
    # Built on the meta device and assigned: no time for an initialisation, never two copies of the model.
    # Copied, so that later changes of the weights cannot reach the caller's tensors nor a mapped file.
    model = ViT(config, operations, dtype=dtype, device="meta")
    weights = {name: tensor.detach().to(device=device, dtype=dtype, copy=True)
               for name, tensor in found.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval(), config
