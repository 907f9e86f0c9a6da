"""What PhotoMaker and InstantID take out of FACES: one raw embedding a picture, of the right recogniser."""
from __future__ import annotations

from torch import Tensor

from ..common.errors import LikenessError
from ..face.faces import Face, Faces, area

WIDTH = 512


def embeddings(faces: Faces, space: str, pack: str, method: str) -> list[Tensor | None]:
    """For each picture the embedding (512,) of its largest face, None where it has no face.

    space: the recogniser that `method` was trained on; pack: the files that have it. Raises LikenessError for faces of
    another recogniser, and for faces that no recogniser has seen."""
    if faces.space != space:
        raise LikenessError(f"{method} reads face embeddings of {space} (the pack {pack}), these faces come from "
                            f"{faces.space or 'no recogniser'}; choose {pack} in Load Face Models.")
    return [_embedding(max(frame, key=area), method) if frame else None for frame in faces.frames]


def _embedding(face: Face, method: str) -> Tensor:
    if face.embedding is None or face.embedding.shape != (WIDTH,):
        got = "none" if face.embedding is None else f"one of the shape {tuple(face.embedding.shape)}"
        raise LikenessError(f"{method} needs a face embedding of {WIDTH} numbers, a face here has {got}; connect Analyze Faces "
                            "with a pack that has a recogniser.")
    return face.embedding.float()
