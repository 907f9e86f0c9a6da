"""Synthetic packs on disk and loaded, for the face tests. What is cached here is shared: nothing may be changed."""
from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness import face_pack

from .support import folder

# isort: split
from likeness.models.face.faces import Face, Faces
from likeness.models.hosting import face as hosting
from likeness.models.hosting import face_batch

BACKENDS = ("torch", "onnxruntime")
TWO = ((200, 160, 24), (450, 300, 48))


@cache
def root() -> Path:
    """models/buffalo_l, models/antelopev2 (nested) and inswapper_128.onnx."""
    place = folder() / "insightface"
    face_pack.pack(place)
    face_pack.pack(place, "antelopev2", nested=True)
    face_pack.swapper(place / face_pack.SWAPPER)
    face_pack.swapper(place / "inswapper_128_fp16.onnx", half=True)
    return place


@cache
def models(backend: str = "onnxruntime", name: str = "buffalo_l") -> hosting.FaceModels:
    with torch.inference_mode():
        return hosting.load_models(root() / "models" / name, backend)[0]


@cache
def swapper(backend: str = "onnxruntime", file: str = face_pack.SWAPPER) -> hosting.FaceSwapper:
    with torch.inference_mode():
        return hosting.load_swapper(root() / file, backend)[0]


def picture(*args, **kwargs) -> Tensor:
    """A scene as IMAGE (1, h, w, 3)."""
    return torch.from_numpy(face_pack.scene(*args, **kwargs)).float()[None] / 255


def as_bgr(image: Tensor) -> np.ndarray:
    return (image[0, ..., :3] * 255).round().byte().numpy()[..., ::-1].copy()


def analysed(image: Tensor, backend: str = "onnxruntime", name: str = "buffalo_l", **more) -> Faces:
    return face_batch.analyse(models(backend, name), image, **more)


def only(faces: Faces, number: int = 0) -> Faces:
    """One face of the first picture, as a source."""
    return Faces(((faces.frames[0][number],),), faces.sizes[:1], faces.space)


def nearest(face: Face, others: list) -> object:
    """The insightface face at the place of ours."""
    return min(others, key=lambda other: float(np.abs(other.bbox - face.box.numpy()).sum()))
