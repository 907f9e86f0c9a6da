"""Faces as safetensors, in the layout of ReActor's face models: one face under plain names, several under numbered ones."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from .faces import FACES_VERSION, Face, Faces

KIND = "faces"
REACTOR_SPACE = "w600k_r50"  # its face models come from buffalo_l


def _tensors(face: Face) -> dict[str, Tensor]:
    out = {"bbox": face.box, "kps": face.keypoints, "det_score": torch.tensor(face.score)}
    if face.embedding is not None:
        out["embedding"] = face.embedding
    if face.landmarks is not None:
        out["landmark_2d_106"] = face.landmarks
    if face.gender:
        out["gender"] = torch.tensor(int(face.gender == "male"))
    if face.age is not None:
        out["age"] = torch.tensor(round(face.age))
    return out


def save_faces(path: str | Path, faces: Faces) -> None:
    """Writes all faces, whole or not at all. Raises LikenessError when there is none."""
    every = list(faces.each())
    if not every:
        raise LikenessError("There is no face to save: connect faces of a picture that shows one.")
    tensors: dict[str, Tensor] = {}
    for number, face in enumerate(every):
        prefix = "" if len(every) == 1 else f"{number}."
        tensors |= {prefix + name: tensor for name, tensor in _tensors(face).items()}
    files.save(path, tensors, {"format": f"likeness.{KIND}", "format_version": str(FACES_VERSION), "space": faces.space,
                               "frames": json.dumps([len(frame) for frame in faces.frames]), "sizes": json.dumps(faces.sizes)})


def load_faces(path: str | Path) -> tuple[Faces, str]:
    """Saved faces, ours or one of ReActor's, and a report. Raises LikenessError for other files."""
    name = Path(path).name
    said = files.read_header(path).metadata
    if "format" in said:
        files.read_saved(path, KIND, FACES_VERSION)
    tensors, _ = files.load(path)
    try:
        if "format" in said:
            counts, sizes = json.loads(said["frames"]), [(int(height), int(width)) for height, width in json.loads(said["sizes"])]
            space = said["space"]
        else:
            if "embedding" not in tensors:
                raise KeyError("embedding")
            counts, space = [1], REACTOR_SPACE
            sizes = [(int(tensors["bbox"][3]) + 1, int(tensors["bbox"][2]) + 1) if "bbox" in tensors else (1, 1)]
        total = sum(counts)
        every = [_face({key.removeprefix(f"{number}.") if total > 1 else key: tensor for key, tensor in tensors.items()
                        if total == 1 or key.startswith(f"{number}.")}) for number in range(total)]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise LikenessError(f"The file {name} holds no faces ({type(error).__name__}: {error}); choose a file of Save Faces or a "
                            "face model of ReActor.") from error
    left = iter(every)
    faces = Faces(tuple(tuple(next(left) for _ in range(count)) for count in counts), tuple(sizes), space)
    maker = "saved by Save Faces" if "format" in said else "a face model of ReActor, taken as made with buffalo_l"
    return faces, f"{name}: {len(every)} face{'s' * (len(every) != 1)} in the space {space}, {maker}"


def _face(tensors: dict[str, Tensor]) -> Face:
    embedding = tensors.get("embedding")
    box = tensors.get("bbox", torch.zeros(4)).float().reshape(-1)[:4]
    points = tensors.get("kps", torch.zeros(5, 2)).float().reshape(5, 2)
    if box.numel() != 4 or (embedding is not None and not torch.isfinite(embedding.float()).all()):
        raise ValueError("damaged numbers")
    landmarks = tensors.get("landmark_2d_106")
    gender = ("female", "male")[int(tensors["gender"].reshape(-1)[0])] if "gender" in tensors else ""
    age = float(tensors["age"].reshape(-1)[0]) if "age" in tensors else None
    score = float(tensors["det_score"].reshape(-1)[0]) if "det_score" in tensors else 1.0
    return Face(box, points, score, None if embedding is None else embedding.float().reshape(-1),
                None if landmarks is None else landmarks.float().reshape(-1, 2), gender, age)
