"""Inversions as safetensors: tensors in full precision, everything else as text."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from .records import ESTIMATES, INVERSION_VERSION, METHODS, Inversion

FORMAT = "likeness.inversion"
PRECISIONS = ("fp32", "fp16 residuals")
_TENSORS = ("anchors", "residuals", "levels", "to_latent", "nulls")
_WHOLE = ("steps", "start", "refine", "evaluations", "calls")
_TEXT = ("method", "estimate", "prediction", "latent_format", "model_hash", "conditioning_hash")


def save_inversion(inversion: Inversion, path: str | os.PathLike[str], precision: str = "fp32") -> None:
    """Write it whole or not at all. fp16 residuals halve their share and cost 20 to 50 dB; anchors are never
    rounded. Raises LikenessError where a residual has no fp16 number."""
    tensors = {name: getattr(inversion, name) for name in _TENSORS if getattr(inversion, name) is not None}
    if precision != PRECISIONS[0]:
        tensors["residuals"] = tensors["residuals"].half()
        if not bool(tensors["residuals"].isfinite().all()):
            raise LikenessError("The residuals are too large for fp16; save them as fp32.")
    metadata = {"format": FORMAT, "format_version": str(inversion.version), "cfg": repr(inversion.cfg),
                "closed": str(inversion.closed)}
    metadata |= {name: str(getattr(inversion, name)) for name in (*_WHOLE, *_TEXT)}
    if inversion.drift is not None:
        metadata["drift"] = repr(inversion.drift)
    files.save(path, tensors, metadata)


def load_inversion(path: str | os.PathLike[str]) -> Inversion:
    """A saved inversion. Raises LikenessError for another kind of file, a newer format, and damage."""
    name = Path(path).name
    said = files.read_saved(path, "inversion", INVERSION_VERSION)
    tensors, _ = files.load(path)
    try:
        held: dict[str, Any] = {key: tensors[key].float() for key in _TENSORS if key != "nulls"}
        held |= {key: int(said[key]) for key in _WHOLE} | {key: said[key] for key in _TEXT}
        inversion = Inversion(
            **held, cfg=float(said["cfg"]), closed=said["closed"] == "True",
            drift=float(said["drift"]) if "drift" in said else None,
            nulls=tensors["nulls"].float() if "nulls" in tensors else None, version=int(said["format_version"]))
        _check(inversion)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise LikenessError(f"The inversion {name} is damaged, its parts do not fit together ({error}); record it again."
                            ) from error
    return inversion


def _check(inversion: Inversion) -> None:
    """Raises ValueError where shapes, numbers or names contradict one another."""
    length = len(inversion.levels) - 1
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "anchors": (inversion.anchors, (length + 1, *inversion.shape)),
        "residuals": (inversion.residuals, (length, *inversion.shape)),
        "to_latent": (inversion.to_latent, (2, inversion.shape[1])),
    }
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} instead of {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} with numbers that are not finite")
    levels = inversion.levels
    # asked the other way round, a level that is no number would pass
    if length < 0 or float(levels[0]) != 0.0 or not bool((levels[1:] > levels[:-1]).all() & levels.isfinite().all()):
        raise ValueError("levels that do not rise from 0")
    if inversion.steps - inversion.start != length:
        raise ValueError(f"{length} levels for {inversion.steps} steps from step {inversion.start} on")
    if inversion.method not in METHODS or inversion.estimate not in ESTIMATES:
        raise ValueError(f"the method {inversion.method}, {inversion.estimate}")
    nulls = inversion.nulls
    if nulls is not None and (nulls.ndim != 4 or nulls.shape[:2] != (length, inversion.shape[0]) or not nulls.isfinite().all()):
        raise ValueError(f"nulls of the shape {tuple(nulls.shape)}, or with numbers that are not finite")
