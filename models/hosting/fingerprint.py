"""Short hashes that tell one model, or one prompt, from another across sessions."""
from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

TENSORS, VALUES = 24, 64  # how many weights are looked at, and how many numbers of each


def model_hash(patcher: Any) -> str:
    """Of a MODEL: names and shapes of all weights, some values of some of them, and the weight patches with their strengths.

    Attention patches do not count: the free branch does not see them. 16 hexadecimal digits.
    """
    # the network alone: the noise schedule beside it is that of whichever clone is loaded at the moment
    state = {name: tensor for name, tensor in patcher.model.state_dict().items() if name.startswith("diffusion_model.")}
    names = sorted(state)
    digest = hashlib.sha256(repr([(name, tuple(state[name].shape)) for name in names]).encode())
    for name in names[::max(1, len(names) // TENSORS)]:
        # the loaded weight may have a LoRA in it; the host keeps the plain one aside
        kept = patcher.backup.get(name)
        _add(digest, kept.weight if kept is not None else state[name])
    for name in sorted(patcher.patches):
        for strength, patch, strength_model, *_ in patcher.patches[name]:
            digest.update(repr((name, strength, strength_model)).encode())
            for tensor in _tensors(patch)[:2]:
                _add(digest, tensor)
    return digest.hexdigest()[:16]


def conditioning_hash(*prompts: list[dict[str, Any]] | None) -> str:
    """Of converted conditionings: text vectors, pooled vectors, areas and times. 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for prompt in prompts:
        for entry in prompt or ():
            for key in ("cross_attn", "pooled_output"):
                if isinstance(entry.get(key), Tensor):
                    digest.update(entry[key].detach().float().cpu().contiguous().numpy().tobytes())
            plain = {key: entry[key] for key in ("area", "strength", "start_percent", "end_percent") if key in entry}
            digest.update(repr(sorted(plain.items())).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def guided(guider: Any) -> bool:
    """Whether a guider looks at its negative: with cfg, or where another node's guidance needs it also without."""
    return not math.isclose(guider.cfg, 1.0) or bool(guider.model_options.get("disable_cfg1_optimization", False))


def free_hash(guider: Any) -> str:
    """`conditioning_hash` of what a guider's free flow reads: the free prompt, or the only one, and the negative if it counts."""
    conds = guider.original_conds
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
