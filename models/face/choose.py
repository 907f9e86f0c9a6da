"""Which faces: order, numbers, likeness to a reference; and several faces blended into one."""
from __future__ import annotations

import math

import torch

from ..common.errors import LikenessError
from .analyse import likeness, unit
from .contract import MINIATURE
from .faces import Face, Faces, area

ORDERS = ("large to small", "small to large", "left to right", "right to left", "top to bottom", "bottom to top",
          "best to worst", "most similar first")
GENDERS = ("any", "female", "male")
MODES = ("unit length", "raw")


def _centre(face: Face, axis: int) -> float:
    return float(face.box[axis] + face.box[axis + 2]) / 2


_KEYS = {"large to small": lambda face: -area(face), "small to large": area,
         "left to right": lambda face: _centre(face, 0), "right to left": lambda face: -_centre(face, 0),
         "top to bottom": lambda face: _centre(face, 1), "bottom to top": lambda face: -_centre(face, 1),
         "best to worst": lambda face: -face.score}


def check_space(have: str, wanted: str, what: str) -> None:
    """Raises LikenessError when two kinds of embeddings would be mixed."""
    packs = {"w600k_r50": "buffalo_l", "glintr100": "antelopev2"}
    if have != wanted:
        pack = f"the pack {packs[wanted]}" if wanted in packs else f"the recogniser {wanted}"
        advice = f"analyse the faces with {pack}" if wanted != MINIATURE else (
            "the miniature knows only the heads of its own creatures; for people choose the pack buffalo_l in Load Face Models "
            "and inswapper_128.onnx in Load Face Swapper")
        raise LikenessError(f"{what} needs embeddings of {wanted}, but these faces have those of {have or 'no recogniser'}, and "
                            f"the two do not compare: {advice}.")


def parse_numbers(text: str) -> tuple[int, ...] | None:
    """"all" or nothing -> None; "0, 2, 0" -> (0, 2), each once. Raises LikenessError for anything else."""
    words = text.replace(";", ",").split(",")
    if text.strip().lower() in ("", "all"):
        return None
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in words if word.strip()))
    except ValueError as error:
        raise LikenessError(f"The list of faces is {text!r}: write all, or numbers from 0 such as 0,2.") from error
    if not numbers or min(numbers) < 0:
        raise LikenessError(f"The list of faces is {text!r}: write all, or numbers from 0 such as 0,2.")
    return numbers


def select(faces: Faces, order: str, numbers: tuple[int, ...] | None = None, reference: Faces | None = None,
           threshold: float = 0.0, gender: str = "any", min_size: int = 0) -> tuple[Faces, str]:
    """Chosen faces of each picture in that order, and a table of all faces.

    With a reference only faces at least `threshold` similar to one of its faces stay. Numbers count the faces that are left,
    in their order, in each picture. Raises LikenessError for a reference of another space and for a missing one."""
    known = tuple(reference.each()) if reference is not None else ()
    if reference is not None:
        if not known:
            raise LikenessError("The reference holds no face: connect faces of a picture that shows one, or leave it open.")
        check_space(faces.space, reference.space, "The comparison with the reference")
    if order == "most similar first" and not known:
        raise LikenessError("The order most similar first needs a reference face: connect reference, or choose another order.")
    frames, lines = [], []
    for place, frame in enumerate(faces.frames):
        rated = [(face, max((likeness(face, other) for other in known), default=0.0)) for face in frame]
        left = [(face, rate) for face, rate in rated
                if (not known or rate >= threshold) and gender in ("any", face.gender)
                and min(float(face.box[2] - face.box[0]), float(face.box[3] - face.box[1])) >= min_size]
        left.sort(key=(lambda pair: -pair[1]) if order == "most similar first" else lambda pair: _KEYS[order](pair[0]))
        kept = [left[number][0] for number in (numbers if numbers is not None else range(len(left))) if number < len(left)]
        frames.append(tuple(kept))
        ids = [id(face) for face in kept]
        lines += [_line(place, number, face, rate if known else None) + (", chosen" if id(face) in ids else "")
                  for number, (face, rate) in enumerate(rated)]
    chosen = faces._replace(frames=tuple(frames))
    count = sum(map(len, frames))
    return chosen, "\n".join([f"{count} of {sum(map(len, faces.frames))} faces chosen", *lines])


def table(faces: Faces) -> str:
    """Every face with its number, size, place and score."""
    lines = [_line(place, number, face) for place, frame in enumerate(faces.frames) for number, face in enumerate(frame)]
    return "\n".join([f"{len(lines)} face{'s' * (len(lines) != 1)} in {len(faces.frames)} picture"
                      f"{'s' * (len(faces.frames) != 1)}", *lines])


def _line(place: int, number: int, face: Face, rate: float | None = None) -> str:
    """number: of the face in the FACES that came in; behind Analyze Faces, what that draws."""
    x0, y0, x1, y1 = (round(side) for side in face.box.tolist())
    words = [f"picture {place + 1}, face {number}: {x1 - x0} x {y1 - y0} at {x0}, {y0}, score {face.score:.2f}"]
    if rate is not None:
        words.append(f"similarity {rate:.3f}")
    if face.gender:
        words.append(f"{face.gender}, about {face.age:.0f}" if face.age is not None else face.gender)
    return ", ".join(words)


def parse_weights(text: str, count: int) -> list[float]:
    """"" -> equal weights; else as many numbers as faces, none negative, not all zero. Raises LikenessError."""
    if not text.strip():
        return [1.0] * count
    try:
        weights = [float(word) for word in text.replace(";", ",").split(",") if word.strip()]
    except ValueError as error:
        raise LikenessError(f"The weights are {text!r}: write numbers with commas, such as 1, 0.5.") from error
    if len(weights) != count or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise LikenessError(f"The weights are {text!r} for {count} faces: write one number from 0 for each, not all zero.")
    return weights


def blend(groups: list[Faces], weights: str = "", mode: str = MODES[0]) -> tuple[Faces, str]:
    """One face, the weighted mean of all, and a report. Its length is the weighted mean of theirs.

    "unit length" brings every embedding to length 1 before, "raw" does not. Raises LikenessError for two spaces, for no face
    and for wrong weights."""
    space = groups[0].space
    for group in groups[1:]:
        check_space(group.space, space, "The blend")
    faces = [face for group in groups for face in group.each()]
    if not faces or any(face.embedding is None for face in faces):
        raise LikenessError("There is no recognised face to blend: connect faces of Analyze Faces or Load Faces.")
    shares = torch.tensor(parse_weights(weights, len(faces)))
    shares = shares / shares.sum()
    rows = torch.stack([face.embedding for face in faces if face.embedding is not None]).float()
    length = (shares * rows.norm(dim=1)).sum()
    mean = (shares[:, None] * (unit(rows) if mode == MODES[0] else rows)).sum(0)
    chief = faces[int(shares.argmax())]
    face = chief._replace(embedding=unit(mean) * length if mode == MODES[0] else mean)
    sizes = [size for group in groups for size, frame in zip(group.sizes, group.frames, strict=True) for _ in frame]
    lines = [f"blend of {len(faces)} faces in the space {space}"]
    lines += [f"face {number}: {100 * float(share):.0f} %, similarity to the blend {likeness(face, other):.3f}"
              for number, (share, other) in enumerate(zip(shares, faces, strict=True))]
    return Faces(((face,),), (sizes[int(shares.argmax())],), space), "\n".join(lines)
