"""Faces from the sockets of core's own detectors: BOUNDING_BOX and FACE_LANDMARKS."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import LikenessError
from .faces import Face

# Of the 478 points of the MediaPipe mesh: both corners of each eye, the tip of the nose, the corners of the mouth.
EYES, NOSE, MOUTH = ((33, 133), (362, 263)), 1, (61, 291)
MESHES = (478, 468)  # with and without the irises, which come last
CONNECT = "connect Detect Face Landmarks (MediaPipe) of ComfyUI"

Box = tuple[float, float, float, float]


def boxes_of(value: Any, pictures: int) -> list[list[Box]]:
    """Boxes (x0, y0, x1, y1) of each picture from a BOUNDING_BOX: one box, a list for all pictures, or a list a picture."""
    rows = [value] if isinstance(value, Mapping) else value
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise LikenessError(f"A BOUNDING_BOX was expected, but a {type(value).__name__} came: connect a detector of core.")
    if not any(isinstance(row, (list, tuple)) for row in rows):
        return [[_box(box) for box in rows]] * pictures
    if len(rows) not in (1, pictures):
        raise LikenessError(f"There are {pictures} pictures but boxes for {len(rows)}: run the detector on the same batch.")
    lists = [[_box(box) for box in row] for row in rows]
    return lists if len(lists) == pictures else lists * pictures


def _box(box: Any) -> Box:
    try:
        x, y, width, height = (float(box[name]) for name in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError) as error:
        raise LikenessError("A box with x, y, width and height in pixels was expected: connect the bboxes of a detector of "
                            "core.") from error
    return x, y, x + width, y + height


def faces_of(value: Any, pictures: int, size: tuple[int, int]) -> list[list[Face]]:
    """Faces of each picture from core's FACE_LANDMARKS; box, points and score are the mesh's own. size: (height, width)."""
    frames = value.get("frames") if isinstance(value, Mapping) else None
    if frames is None:
        raise LikenessError(f"FACE_LANDMARKS were expected, but a {type(value).__name__} came: connect Detect Face Landmarks.")
    if len(frames) not in (1, pictures):
        raise LikenessError(f"There are {pictures} pictures but landmarks for {len(frames)}: run the detector on the same batch.")
    own = tuple(value.get("image_size", size))
    if own != size:
        raise LikenessError(f"The landmarks are of pictures of {own[1]} x {own[0]}, but image has {size[1]} x {size[0]}: connect "
                            "the very same pictures to both.")
    rows = [[_face(item) for item in frame] for frame in frames]
    return rows if len(rows) == pictures else rows * pictures


def _face(item: Mapping[str, Any]) -> Face:
    try:
        mesh: Tensor = torch.as_tensor(item["landmarks_xy"]).float()
        box = torch.as_tensor([float(side) for side in item["bbox_xyxy"]])
    except (KeyError, TypeError, ValueError) as error:
        raise LikenessError(f"A face with landmarks_xy and bbox_xyxy was expected: {CONNECT}.") from error
    if mesh.ndim != 2 or mesh.shape[1] != 2 or len(mesh) not in MESHES:
        shape = " x ".join(map(str, mesh.shape)) or "a single number"
        raise LikenessError(f"The landmarks of a face are {shape}, but the {MESHES[0]} x 2 of the MediaPipe mesh were expected: "
                            f"{CONNECT}.")
    points = [mesh[list(eye)].mean(0) for eye in EYES] + [mesh[NOSE], *(mesh[place] for place in MOUTH)]
    return Face(box, torch.stack(points), float(item.get("score", 1.0)))
