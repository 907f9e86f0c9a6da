"""Short hashes that tell one model, or one prompt, from another across sessions."""
from __future__ import annotations

import hashlib
import math
from operator import itemgetter
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from .guider import mixes
from .stamps import numbers

TENSORS, VALUES = 24, 64  # how many weights are looked at, and how many numbers of each
SKIPPED = ("uuid",)  # drawn anew for every sampling
# What a ControlNet (ours for faces too), a group of hooks, a hook and its keyframes say about themselves.
PARTS = ("cond_hint_original", "strength", "timestep_percent_range", "previous_controlnet", "inner", "tokens", "hooks",
         "_strength_model", "strength_model", "hook_keyframe", "keyframes", "start_percent")


def model_hash(patcher: Any) -> str:
    """Of a MODEL: names and shapes of all weights, some values of some of them, and the weight patches with their strengths.

    Attention patches do not count: the free branch does not see them. 16 hexadecimal digits.
    """
    # the network alone: the noise schedule beside it is that of whichever clone is loaded at the moment
    state = {name: tensor for name, tensor in patcher.model.state_dict().items() if name.startswith("diffusion_model.")}
    names = sorted(state)
    digest = hashlib.sha256(repr([(name, tuple(state[name].shape)) for name in names]).encode())
    for name in _spread(names):
        # the loaded weight may have a LoRA in it; the host keeps the plain one aside
        kept = patcher.backup.get(name)
        _add(digest, kept.weight if kept is not None else state[name])
    for name in sorted(patcher.patches):
        for strength, patch, strength_model, *_ in patcher.patches[name]:
            digest.update(repr((name, strength, strength_model)).encode())
            for tensor in _tensors(patch)[:2]:
                _add(digest, tensor)
    return digest.hexdigest()[:16]


def conditioning_hash(*prompts: list[dict[str, Any]] | None, settings: dict[str, Any] | None = None) -> str:
    """Of converted conditionings: all that reaches the network or says where, when and how strongly. 16 hexadecimal digits.

    Text, pooled and concatenated tensors, areas, masks, times, stamps of subjects, ControlNets with hint, strength and range,
    hooks with their weights. settings: the guider's own numbers.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        for entry in prompt or ():
            _describe(digest, {**entry, "stamps": numbers(entry)})
        digest.update(b"|")
    _describe(digest, settings or {})
    return digest.hexdigest()[:16]


def _describe(digest: Any, value: Any) -> None:
    """Adds a value of any kind; what is None or only tells one object from another counts as absent."""
    if isinstance(value, Tensor):
        digest.update(repr(tuple(value.shape)).encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in sorted(((str(key), item) for key, item in value.items() if item is not None), key=itemgetter(0)):
            # our own marks beside the tensors say nothing that the tensors do not say
            if key not in SKIPPED and not key.startswith("likeness_"):
                digest.update(key.encode())
                _describe(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(b"[")
        for item in value:
            _describe(digest, item)
    elif isinstance(value, comfy.conds.CONDRegular):
        _describe(digest, value.cond)
    elif isinstance(value, (str, int, float, bool)):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
        _describe(digest, {name: getattr(value, name, None) for name in PARTS})
        network, weights = getattr(value, "control_model", None), getattr(value, "weights", None)
        found = list(network.state_dict().values()) if network is not None else []
        for tensor in _spread(found + _tensors(list(weights.values()) if isinstance(weights, dict) else [])):
            _add(digest, tensor)


def _spread(items: list[Any]) -> list[Any]:
    """At most about TENSORS of them, evenly."""
    return items[::max(1, len(items) // TENSORS)]


def guided(guider: Any) -> bool:
    """Whether a guider looks at its negative: with cfg, or where another node's guidance needs it also without."""
    return not math.isclose(guider.cfg, 1.0) or bool(guider.model_options.get("disable_cfg1_optimization", False))


def free_hash(guider: Any) -> str:
    """`conditioning_hash` of what a guider's free flow reads: the free prompt, or the only one, and the negative if it counts.

    Of a guider that mixes in its own way (core's DualCFGGuider): all its prompts and all its numbers.
    """
    conds = guider.original_conds
    if mixes(guider):
        settings = {name: value for name, value in vars(guider).items() if isinstance(value, (int, float, str))}
        return conditioning_hash(*(conds[name] for name in sorted(conds)), settings=settings)
    return conditioning_hash(conds.get("free", conds.get("positive")), conds.get("negative") if guided(guider) else None)


def _tensors(patch: Any) -> list[Tensor]:
    """Tensors of a weight patch: a tensor, a tuple of them, or an adapter object that keeps them in `weights`."""
    if isinstance(patch, Tensor):
        return [patch]
    if isinstance(patch, (tuple, list)):
        return [tensor for item in patch for tensor in _tensors(item)]
    return _tensors(getattr(patch, "weights", ()))


def _add(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, max(0, flat.numel() - 1), min(VALUES, flat.numel()), device=flat.device).long()
    digest.update(flat[index].float().cpu().numpy().tobytes())
