"""The base as it ships: large weights in 8 bits with a scale a row, so that all files of the miniature stay below 16 MB."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..common import files

SCALE = ".row_scale"
LARGE = 4096  # values; what is smaller stays as it is, it would save nothing


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, the large weights of UNet and text encoder as int8 (rows, ...) and float32 (rows,) beside them.

    The first stage stays: its error would stand in every picture.
    """
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim < 2 or value.numel() < LARGE or name.startswith("first_stage."):
            packed[name] = value
            continue
        rows = value.float().flatten(1)
        scale = rows.abs().amax(1) / 127
        packed[name] = (rows / scale.clamp_min(1e-12)[:, None]).round().to(torch.int8).view(value.shape)
        packed[name + SCALE] = scale
    return packed


def unpack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given, in float16 and with at most half a step (1/254 of the row's largest value) of error where it packed;
    tensors that are not packed come back as they are."""
    plain = {}
    for name, value in state.items():
        if name.endswith(SCALE):
            continue
        scale = state.get(name + SCALE)
        plain[name] = value if scale is None else (value.flatten(1) * scale[:, None]).view(value.shape).half()
    return plain


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a base file, packed or not. Raises LikenessError when the file is missing or damaged."""
    return unpack(files.load(path)[0])
