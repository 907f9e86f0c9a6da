"""Embedding, landmarks, gender and age of faces that were found."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .faces import Face
from .geometry import align, box_matrix, crop, invert, move
from .networks import Network, run_all


def _pixels(network: Network, crops: list[Tensor]) -> Tensor:
    contract = network.contract
    return (torch.stack(crops).to(network.device) * 255 - contract.mean) / contract.std


def recognise(network: Network, picture: Tensor, faces: Sequence[Face]) -> list[Face]:
    """Faces with their raw embeddings (512,) from aligned crops of picture (h, w, 3) in 0..1."""
    if not faces:
        return []
    size = network.contract.size
    crops = [crop(picture, align(face.keypoints, size), size) for face in faces]
    rows = run_all(network, _pixels(network, crops)).float().cpu()
    return [face._replace(embedding=row.clone()) for face, row in zip(faces, rows, strict=True)]


def _round_box(network: Network, picture: Tensor, faces: Sequence[Face]) -> tuple[Tensor, list[Tensor]]:
    """What a network says of upright crops round the boxes (n, d), and the crops' matrices."""
    size = network.contract.size
    matrices = [box_matrix(face.box, size) for face in faces]
    crops = [crop(picture, matrix, size) for matrix in matrices]
    return run_all(network, _pixels(network, crops)).float().cpu(), matrices


def find_landmarks(network: Network, picture: Tensor, faces: Sequence[Face]) -> list[Face]:
    """Faces with 106 landmarks (106, 2) in pixels of the picture."""
    if not faces:
        return []
    rows, matrices = _round_box(network, picture, faces)
    half = network.contract.size // 2
    points = [move(invert(matrix), (row.reshape(-1, 2) + 1) * half) for row, matrix in zip(rows, matrices, strict=True)]
    return [face._replace(landmarks=landmarks) for face, landmarks in zip(faces, points, strict=True)]


def guess_attributes(network: Network, picture: Tensor, faces: Sequence[Face]) -> list[Face]:
    """Faces with gender and age in years, as the network guesses them."""
    if not faces:
        return []
    rows, _ = _round_box(network, picture, faces)
    return [face._replace(gender=("female", "male")[int(row[:2].argmax())], age=float(torch.round(row[2] * 100)))
            for face, row in zip(faces, rows, strict=True)]


def unit(embedding: Tensor) -> Tensor:
    """Embedding (..., d) of length 1."""
    return embedding / embedding.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def likeness(a: Face, b: Face) -> float:
    """Cosine of two embeddings of one space; 0 where one is missing."""
    if a.embedding is None or b.embedding is None:
        return 0.0
    return float(unit(a.embedding) @ unit(b.embedding))
