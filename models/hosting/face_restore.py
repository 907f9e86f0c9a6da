"""Core's UPSCALE_MODEL on the crop of a face, under the host's memory manager."""
from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..face.networks import Network
from ..face.swap import Restore
from .face import MEMORY, prepare
from .memory import patcher_of

SIDE = 512  # pixels that face restorers are made for
ACTIVATIONS = 384 * 4  # bytes for a value of an upscaled picture, as the host reckons
# Architectures that core calls without a change of range, though they were trained on -1..1 at exactly SIDE pixels, with what
# they are told: GFPGAN would draw noise from the global generator, CodeFormer passes over words that it does not know.
SIGNED = ("GFPGAN", "CodeFormer")
WORDS = {"randomize_noise": False}
_patchers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of upscale models, while those live


def restorer(upscale_model: Any, network: Network) -> Restore:
    """Core's UPSCALE_MODEL as a function on a crop (3, s, s) in 0..1; a model that keeps the size is a face restorer, gets 512
    pixels at least and gives as many. network: the swapper, which works between its calls and has to stay where it is."""
    hosts = getattr(upscale_model, "patcher", None)
    patcher = hosts or _patchers.get(upscale_model)
    if patcher is None:  # older hosts hand the bare model over
        patcher = _patchers[upscale_model] = patcher_of(upscale_model.model)
    signed = getattr(getattr(upscale_model, "architecture", None), "id", "") in SIGNED

    def restore(square: Tensor) -> Tensor:
        scale = max(int(upscale_model.scale), 1)
        wished = max(square.shape[-1], SIDE) if scale == 1 else square.shape[-1]
        side = SIDE if signed else wished
        prepare([network], max(MEMORY, int(side * side * 3 * scale * ACTIVATIONS)), (patcher,))
        if hosts is None:  # core's own node takes it off the card behind the patcher's back
            upscale_model.model.to(patcher.load_device)
        picture = _resized(square.float(), side).clamp(0, 1)[None].to(patcher.load_device)
        if signed:
            with torch.inference_mode():  # as the call of core's object has it
                done = upscale_model.model(picture * 2 - 1, **WORDS)[0]
            done = _resized((done[0] + 1) / 2, wished)
        else:
            done = upscale_model(picture)[0]
        return done[:3].float().clamp(0, 1).to(square.device)

    return restore


def _resized(square: Tensor, side: int) -> Tensor:
    """Crop (c, s, s) -> (c, side, side)."""
    old = square.shape[-1]
    return square if old == side else F.interpolate(square[None], (side, side), mode="bicubic", align_corners=False,
                                                    antialias=side < old)[0]
