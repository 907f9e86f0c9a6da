"""CustomNet from the authors' file, as it is: MODEL, CLIP, VAE and CLIP_VISION that every stock node understands."""
from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_detection
import comfy.model_management as management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..customnet import config as layout_of
from ..customnet.config import PROJECTION, TEXT, UNET, VAE, VISION, Layout
from . import demo
from .customnet_demo import PARTS, UNET_CONFIG
from .customnet_model import CustomNetConfig, MiniatureConfig, projection_state
from .customnet_unet import build_unet, load_unet
from .customnet_vision import clip_tower, miniature_tower
from .encoders import read_weights
from .memory import patcher_class, stop_if_asked

__all__ = ["SMALL", "Loaded", "build_unet", "load", "load_miniature", "save_half"]
log = logging.getLogger("likeness")
State = dict[str, Tensor]
HALF_SUFFIX = "_fp16.safetensors"
MINIATURE = "customnet.safetensors"
SMALL = "the miniature is small already: no copy was saved"


class Loaded(NamedTuple):
    """variant "normal" or "inpaint"; text: what was found, for the artist."""
    model: Any
    clip: Any
    vae: Any
    vision: Any
    variant: str
    text: str


def read(path: Path, *parts: str) -> tuple[State, Layout]:
    """The tensors that are used, and the layout; parts: only names that begin so. A safetensors file that is no CustomNet is
    refused from its header."""
    path = Path(path)

    def wanted(name: str) -> bool:
        return layout_of.wanted(name) and name.startswith(parts or "")
    if files.is_safetensors(path):
        header = files.read_header(path)
        layout = layout_of.identify({name: info.shape for name, info in header.tensors.items()}, path.name)
        return read_weights(path, wanted)[0], layout
    state = read_weights(path)[0]
    layout = layout_of.identify({name: tuple(value.shape) for name, value in state.items()}, path.name)
    return {name: state[name] for name in list(state) if wanted(name)}, layout


def _is_miniature(path: Path) -> bool:
    """Whether the pack's own trainer made the file: the network alone, for the miniature world."""
    return files.is_safetensors(path) and files.read_header(path).metadata.get("base") == "miniature"


def load(path: str | Path, embedding_directory: Any = None) -> Loaded:
    """All four parts of a file; one that was trained in the miniature world takes the miniature's other parts. Raises
    LikenessError for what is no whole CustomNet, and says what it is."""
    path = Path(path)
    if _is_miniature(path):
        return load_miniature(embedding_directory, path=path)
    state, layout = read(path)
    # Each part takes its tensors out of the state as it is built, so that nothing is in memory twice.
    model = _model(state, layout)
    vae = comfy.sd.VAE(sd=_taken(state, VAE))
    clip = _clip(_taken(state, TEXT), embedding_directory)
    vision = clip_tower(_taken(state, VISION))
    for part, patcher in (("unet", model), ("vae", vae.patcher), ("text", clip.patcher), ("vision", vision.patcher)):
        patcher.cached_patcher_init = (reload_part, (part, path))
    channels = 4 * (2 if layout.variant == "normal" else 3)
    return Loaded(model, clip, vae, vision, layout.variant,
                  f"{path.name}: CustomNet, {layout.variant} variant ({channels} channels), text width {layout.width}")


def reload_part(part: str, path: Path, disable_dynamic: bool = False) -> Any:
    """The host's factory for a patcher with weights of its own, for another device."""
    prefix = {"unet": (UNET, PROJECTION), "vision": (VISION,), "text": (TEXT,), "vae": (VAE,)}[part]
    state, layout = read(path, *prefix)
    if part == "unet":
        return _model(state, layout, disable_dynamic)
    if part == "vision":
        return clip_tower(_taken(state, VISION), disable_dynamic).patcher
    if part == "text":
        return _clip(_taken(state, TEXT), None, disable_dynamic).patcher
    return comfy.sd.VAE(sd=_taken(state, VAE)).patcher


def _taken(state: State, prefix: str) -> State:
    return {name[len(prefix):]: state.pop(name) for name in list(state) if name.startswith(prefix)}


def _model(state: State, layout: Layout, disable_dynamic: bool = False) -> Any:
    unet_config = comfy.model_detection.detect_unet_config(state, UNET)
    unet_config.pop("num_head_channels", None)
    return _patcher(CustomNetConfig(unet_config), state, layout, disable_dynamic)


def _patcher(config: CustomNetConfig, state: State, layout: Layout, disable_dynamic: bool) -> Any:
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    count = sum(value.numel() for name, value in state.items() if name.startswith(UNET))
    dtype = management.unet_dtype(model_params=count, supported_dtypes=[torch.float16, torch.bfloat16, torch.float32])
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device))
    model = config.build(layout, offload_device)
    projection = projection_state({name: state.pop(name) for name in list(state) if name.startswith(PROJECTION)})
    load_unet(model.diffusion_model, _cast(_taken(state, UNET), dtype), assign=True)
    model.object_token.load_state_dict(projection)
    management.archive_model_dtypes(model.diffusion_model)
    return patcher_class(disable_dynamic)(model.eval().requires_grad_(False), load_device=load_device,
                                          offload_device=offload_device)


def _cast(state: State, dtype: torch.dtype) -> State:
    for name in list(state):  # one by one: the old tensor goes before the next one comes
        state[name] = state.pop(name).to(dtype)
    return state


def text_sizes(state: State) -> dict[str, int]:
    """What the host has to know of a CLIP text encoder, from its tensors' shapes."""
    start = "transformer.text_model."
    width = state[f"{start}embeddings.token_embedding.weight"].shape[1]
    layers = [int(name.split(".")[4]) for name in state if name.startswith(f"{start}encoder.layers.")]
    return {"hidden_size": width, "num_hidden_layers": 1 + max(layers),
            "intermediate_size": state[f"{start}encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_attention_heads": max(1, width // 64)}


def _clip(state: State, embedding_directory: Any, disable_dynamic: bool = False) -> Any:
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, parameters=sum(t.numel() for t in state.values()),
                         model_options={"clip_l_model_config": text_sizes(state)},
                         **({"disable_dynamic": True} if disable_dynamic else {}))
    # the release has none, and SD1.5 never reads it; the host would leave it without numbers
    table = state["transformer.text_model.embeddings.token_embedding.weight"]
    state["transformer.text_projection.weight"] = torch.eye(table.shape[1], dtype=table.dtype)
    missing, _ = clip.load_sd({f"clip_l.{name}": state.pop(name) for name in list(state)}, full_model=True)
    lost = [name for name in missing if not name.endswith("logit_scale")]
    if lost:
        raise LikenessError(f"The file is no whole CustomNet: {len(lost)} tensors of its text encoder are missing ({lost[0]}); "
                            "download it again.")
    return clip


def load_miniature(embedding_directory: Any = None, weights: Path = demo.WEIGHTS, path: Path | None = None) -> Loaded:
    """The miniature's network (`path`, else the shipped one) with its text encoder, first stage and image tower."""
    path = path or weights / MINIATURE
    if not path.exists():
        raise LikenessError(f"The miniature's weights {path.name} are missing from this copy of the pack; install it again, or "
                            "make them with: python dev.py train customnet --ship.")
    _, clip, vae = demo.load_base(embedding_directory, weights / PARTS[0])
    model = _miniature_model(path, weights / PARTS[0])
    model.cached_patcher_init = (_miniature_model, (path, weights / PARTS[0]))
    vision = miniature_tower(*files.load(weights / PARTS[1]))
    vision.patcher.cached_patcher_init = (_miniature_vision, (weights / PARTS[1],))
    return Loaded(model, clip, vae, vision, "normal", "the miniature CustomNet: toy buildings at 64 x 64 pixels")


def _miniature_model(path: Path, base: Path, disable_dynamic: bool = False) -> Any:
    state, _ = files.load(path)
    layout = layout_of.identify({key: tuple(value.shape) for key, value in state.items()}, path.name, (UNET,))
    config = MiniatureConfig(dict(UNET_CONFIG))
    config.latent_format = demo.latent_format(base)
    return _patcher(config, state, layout, disable_dynamic)


def _miniature_vision(path: Path, disable_dynamic: bool = False) -> Any:
    return miniature_tower(*files.load(path), disable_dynamic).patcher


def save_half(path: Path) -> str:
    """A copy in half precision beside the file, as safetensors under the authors' names; returns a line for the artist.

    The object token's layer keeps its digits. Shows its progress and can be cancelled; nothing is written over, and a folder that
    takes no file costs no more than the line."""
    if _is_miniature(path):
        return SMALL
    target = path.with_name(path.stem + HALF_SUFFIX)
    if path.name.endswith(HALF_SUFFIX) or files.is_safetensors(path) and _is_half(path):
        return f"{path.name} is of half precision already: no copy was saved"
    if target.exists():
        return f"{target.name} is there already and was left as it is"
    unwritten = "no copy of half precision was saved: {} cannot be written ({})"
    try:  # asked before gigabytes are read and converted for nothing
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        return unwritten.format(target.name, error.strerror)
    state, layout = read(path)
    bar = comfy.utils.ProgressBar(len(state))
    for name in list(state):
        stop_if_asked()
        value = state.pop(name)
        state[name] = value.half() if value.is_floating_point() and not name.startswith(PROJECTION) else value
        bar.update(1)
    metadata = {"format_version": "1", "method": "customnet", "variant": layout.variant, "source": path.name}
    try:
        files.save(target, state, metadata)
    except OSError as error:
        return unwritten.format(target.name, error.strerror)
    return f"saved as {target.name}, {target.stat().st_size / 1e9:.2f} GB: choose it the next time"


def _is_half(path: Path) -> bool:
    network = [info.dtype for name, info in files.read_header(path).tensors.items() if name.startswith(UNET)]
    return "F32" not in network
