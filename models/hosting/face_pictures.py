"""Pictures of the faces of whole batches, written row by row into one tensor, with progress and cancel."""
from __future__ import annotations

import comfy.model_management as management
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import to_rgb
from ..face.drawing import annotate, draw_keypoints, keypoint_size
from ..face.faces import Faces
from .memory import counted


def _empty(count: int, height: int, width: int) -> Tensor:
    return torch.empty(count, height, width, 3, device=management.intermediate_device())


def marked(image: Tensor, faces: Faces) -> Tensor:
    """Pictures (b, h, w, c) with box, number and points of their faces -> (b, h, w, 3)."""
    step, out = counted(len(faces.frames)), _empty(len(faces.frames), *faces.sizes[0])
    for row, picture, frame in zip(out, image, faces.frames, strict=True):
        row.copy_(annotate(to_rgb(picture[None])[0], frame))
        step(1)
    return out


def keypoints(faces: Faces, style: str, width: int, height: int) -> Tensor:
    """One drawing for each picture (b, height, width, 3). Raises LikenessError where the drawings would differ in size."""
    sizes = {keypoint_size(width, height, wide, tall) for tall, wide in faces.sizes}
    if len(sizes) > 1:
        raise LikenessError("These faces come from pictures of several sizes, and the drawings have to be alike: give width and "
                            "height.")
    wide, tall = sizes.pop()
    step, out = counted(len(faces.frames)), _empty(len(faces.frames), tall, wide)
    for row, frame, (own_height, own_width) in zip(out, faces.frames, faces.sizes, strict=True):
        row.copy_(draw_keypoints(frame, tall, wide, style, (wide / own_width, tall / own_height)))
        step(1)
    return out
