"""What travels as LIKENESS_FACES: the faces of a batch of pictures, as plain tensors."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

FACES_VERSION = 1


class Face(NamedTuple):
    """One face, in pixels of its own picture, everything on the CPU in float32.

    box (4,): x0, y0, x1, y1. keypoints (5, 2): eye at the picture's left, eye at its right, nose, mouth left, mouth right.
    score: the detector's, 0..1. embedding (d,): as the recogniser gives it, not normalised; None before recognition.
    landmarks (106, 2), gender ("female" or "male"), age: only where the pack has those networks.
    """
    box: Tensor
    keypoints: Tensor
    score: float
    embedding: Tensor | None = None
    landmarks: Tensor | None = None
    gender: str = ""
    age: float | None = None

    def __repr__(self) -> str:
        """Nothing that tells who it is: the host prints the inputs of a node that fails into messages and history."""
        corners = " ".join(f"{side:.0f}" for side in self.box.flatten().tolist())
        known = "no embedding" if self.embedding is None else f"embedding of {self.embedding.numel()} numbers"
        return f"Face(box {corners}, score {self.score:.2f}, {known})"


def area(face: Face) -> float:
    """Square pixels of its box."""
    x0, y0, x1, y1 = face.box.tolist()
    return float((x1 - x0) * (y1 - y0))


class Faces(NamedTuple):
    """frames: one tuple of faces a picture, empty where none was found; analysis gives them from large to small.
    sizes: (height, width) of each picture.

    space: the recogniser whose embeddings these are ("w600k_r50", "glintr100", ...); embeddings of two spaces never mix.
    """
    frames: tuple[tuple[Face, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    space: str
    version: int = FACES_VERSION

    def each(self) -> Iterator[Face]:
        """All faces, picture after picture."""
        return (face for frame in self.frames for face in frame)
