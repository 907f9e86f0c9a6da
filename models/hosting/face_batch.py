"""Faces of whole batches and videos: one picture at a time, with progress, cancel and flat memory."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.utils
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import as_image, split_alpha
from ..common.masks import as_mask
from ..face.analyse import find_landmarks, guess_attributes, recognise
from ..face.choose import check_space
from ..face.contract import MINIATURE
from ..face.detect import LADDER, THRESHOLD, detect, inside
from ..face.faces import Face, Faces, area
from ..face.foreign import boxes_of, faces_of
from ..face.masks import HULL
from ..face.smooth import seats, smooth
from ..face.swap import Paste, identity, swap_face
from .face import FaceModels, FaceSwapper, prepare
from .face_restore import restorer
from .memory import stop_if_asked

ASSIGN = ("in turn", "one each")
LOOK_AGAIN = "lower the threshold, choose another detection_size (a larger one for small faces)"
CREATURES = ("this pack finds only the heads of the miniature's creatures; for people put buffalo_l into "
             "models/insightface/models and choose it in Load Face Models")


class Parts(NamedTuple):
    """Which networks look at the pictures; without the detector somebody else says where the faces are."""
    recogniser: bool = True
    landmarks: bool = True
    attributes: bool = True
    detector: bool = True


class Swapped(NamedTuple):
    """image (b, h, w, c) as it came in, mask (b, h, w), report, and whether any face was swapped."""
    image: Tensor
    mask: Tensor
    report: str
    found: bool


def _as_batch(image: Tensor) -> Tensor:
    """A picture batch (b, h, w, c) with values untouched where it is one already."""
    return image if image.ndim == 4 and image.is_floating_point() and image.numel() else as_image(image)


def _content(frame: Tensor) -> bytes:
    """What tells pictures apart; a still that is repeated in a video is looked at once."""
    return hashlib.blake2b(frame.contiguous().view(torch.uint8).cpu().numpy().data, digest_size=16).digest()


class Look:
    """Finds the faces of one picture after the other; remembers pictures by their content for the length of a run."""

    def __init__(self, models: FaceModels, sizes: tuple[int, ...] = LADDER, threshold: float = THRESHOLD,
                 parts: Parts | None = None):
        self.models, self.sizes, self.threshold, self.parts = models, sizes, threshold, parts or Parts()
        self.known: dict[bytes, tuple[Face, ...]] = {}
        prepare([network for network, wish in ((models.detector, self.parts.detector),
                                               (models.recogniser, self.parts.recogniser),
                                               (models.landmarks, self.parts.landmarks),
                                               (models.attributes, self.parts.attributes)) if wish])

    def at(self, frame: Tensor) -> tuple[Face, ...]:
        """Faces of picture (h, w, c)."""
        key = _content(frame)
        if key not in self.known:
            picture = split_alpha(frame[None])[0][0]
            self.known[key] = self.complete(picture, detect(self.models.detector, picture, self.sizes, self.threshold))
        return self.known[key]

    def within(self, frame: Tensor, boxes: list[tuple[float, float, float, float]]) -> tuple[Face, ...]:
        """Faces that lie in boxes of another detector."""
        picture = split_alpha(frame[None])[0][0]
        return self.complete(picture, inside(self.models.detector, picture, boxes, self.sizes, self.threshold))

    def complete(self, picture: Tensor, faces: list[Face]) -> tuple[Face, ...]:
        """Faces with whatever else the pack and `parts` give, from large to small: the first face is the same one to all nodes,
        whatever the detector was most sure of."""
        if self.parts.recogniser:
            faces = recognise(self.models.recogniser, picture, faces)
        if self.parts.landmarks and self.models.landmarks is not None:
            faces = find_landmarks(self.models.landmarks, picture, faces)
        if self.parts.attributes and self.models.attributes is not None:
            faces = guess_attributes(self.models.attributes, picture, faces)
        return tuple(sorted(faces, key=area, reverse=True))


def analyse(models: FaceModels, image: Tensor, sizes: tuple[int, ...] = LADDER, threshold: float = THRESHOLD,
            boxes: Any = None, landmarks: Any = None, parts: Parts | None = None) -> Faces:
    """Faces of all pictures (b, h, w, c). boxes: core's BOUNDING_BOX, says where to look. landmarks: core's FACE_LANDMARKS,
    in place of the detector."""
    if boxes is not None and landmarks is not None:
        raise LikenessError("Boxes and landmarks are both connected, and each says by itself where the faces are: disconnect one "
                            "of them.")
    image = _as_batch(image)
    count, (height, width) = image.shape[0], image.shape[1:3]
    where = boxes_of(boxes, count) if boxes is not None else None
    given = faces_of(landmarks, count, (height, width)) if landmarks is not None else None
    look = Look(models, sizes, threshold, (parts or Parts())._replace(detector=given is None))
    bar = comfy.utils.ProgressBar(count)
    frames = []
    for number, frame in enumerate(image):
        stop_if_asked()
        if given is not None:
            frames.append(look.complete(split_alpha(frame[None])[0][0], given[number]))
        elif where is not None:
            frames.append(look.within(frame, where[number]))
        else:
            frames.append(look.at(frame))
        bar.update(1)
    return Faces(tuple(frames), ((height, width),) * count, models.space)


def check_faces(faces: Faces, on_missing: str, what: str = "face", advice: str = LOOK_AGAIN) -> bool:
    """Whether any picture holds one. Raises LikenessError that names the pictures without, unless they may pass.

    advice: what to do, in words of the inputs that the node has."""
    empty = [str(number) for number, frame in enumerate(faces.frames, 1) if not frame]
    if empty and on_missing == "error":
        if advice == LOOK_AGAIN and faces.space == MINIATURE:
            advice = CREATURES
        shown = ", ".join(empty[:8]) + (" ..." if len(empty) > 8 else "")
        raise LikenessError(f"No {what} was found in picture {shown} of {len(faces.frames)}: {advice}, or set on_missing to "
                            "pass through.")
    return any(faces.frames)


class Job(NamedTuple):
    """One swap of a batch. weight: of the source's identity. reach: pictures to each side for smoothing."""
    paste: Paste = Paste()
    weight: float = 1.0
    assign: str = ASSIGN[0]
    reach: int = 0
    sizes: tuple[int, ...] = LADDER
    threshold: float = THRESHOLD
    on_missing: str = "error"


def swap(swapper: FaceSwapper, image: Tensor, source: Faces, job: Job, models: FaceModels | None = None,
         target: Faces | None = None, mask: Tensor | None = None, upscale_model: Any = None) -> Swapped:
    """Faces of image (b, h, w, c) replaced by those of `source`; everything outside of the mask stays bit for bit.

    Raises LikenessError for a source of another space, for faces of another batch and for what may not be missing."""
    image = _as_batch(image)
    count, height, width = image.shape[:3]
    check_space(source.space, swapper.space, f"The swapper {swapper.name}")
    sources = [face for face in source.each() if face.embedding is not None]
    nothing = Swapped(image, torch.zeros(count, height, width), "no source face: nothing was swapped", False)
    if not sources:
        if job.on_missing == "error":
            raise LikenessError("The source holds no recognised face: connect faces of a picture that shows one, or set "
                                "on_missing to pass through.")
        return nothing
    several = len(sources) > 1 or job.assign == ASSIGN[1]
    targets = _targets(image, models, target, job, swapper, count > 1 and several)
    advice = LOOK_AGAIN if target is None else "choose other faces as target, or connect face_models in its place to swap all"
    if not check_faces(targets, job.on_missing, "face to swap", advice):
        return nothing._replace(report="no face to swap in any picture: everything passes unchanged")
    frames = smooth(list(targets.frames), job.reach)
    limit_of = _limits(mask, count, height, width)
    restore = restorer(upscale_model, swapper.network) if upscale_model is not None and job.paste.visibility > 0 else None
    # grey becomes colour, with or without an alpha channel behind it
    out = torch.cat([image[..., :1].expand(-1, -1, -1, 3), image[..., 1:]], -1) if image.shape[-1] < 3 else image.clone()
    covered = torch.zeros(count, height, width)
    latents: dict[int, Tensor] = {}
    prepare([swapper.network])
    bar = comfy.utils.ProgressBar(count)
    done = [0] * count
    for number, (frame, places) in enumerate(zip(frames, seats(frames), strict=True)):
        stop_if_asked()
        limit = limit_of(number)
        for seat, face in zip(places, frame, strict=True):
            if job.assign == ASSIGN[1] and seat >= len(sources):
                continue
            chosen = seat % len(sources)
            if job.weight != 1:
                latent = identity(_embedding(sources[chosen]), swapper.emap, _embedding(face), job.weight)
            else:
                latent = latents.setdefault(chosen, identity(_embedding(sources[chosen]), swapper.emap))
            done[number] += swap_face(swapper.network, out[number, ..., :3], covered[number], face, latent, job.paste, limit,
                                      restore)
        bar.update(1)
    total = sum(done)
    if not total:
        if job.on_missing == "error":
            raise LikenessError("Nothing was swapped, because no face lies where the mask lets the picture change: paint the "
                                "mask over a face, disconnect it, or set on_missing to pass through.")
        return nothing._replace(report="no face lies inside of the mask: everything passes unchanged")
    report = [f"{total} face{'s' * (total != 1)} swapped in {sum(map(bool, done))} of {count} pictures",
              f"{swapper.name}, {swapper.network.backend}, {swapper.network.contract.size * job.paste.boost} pixels a face, "
              f"mask {job.paste.mask}"]
    if job.paste.mask == HULL and any(face.landmarks is None for frame in frames for face in frame):
        report.append("without the 106 landmarks of a pack the hull is an oval round the five points")
    return Swapped(out, covered, "\n".join(report), True)


def _embedding(face: Face) -> Tensor:
    assert face.embedding is not None
    return face.embedding


def _targets(image: Tensor, models: FaceModels | None, target: Faces | None, job: Job, swapper: FaceSwapper,
             tell_apart: bool) -> Faces:
    """The faces to replace: those given, else all; with embeddings of the swapper's space where a weight needs them.

    tell_apart: whether it matters who is who from picture to picture."""
    if target is None:
        if models is None:
            raise LikenessError("Nothing says which faces to swap: connect face_models to swap all, or target of Analyze Faces.")
        if job.weight != 1:
            check_space(models.space, swapper.space, "The identity weight")
        return analyse(models, image, job.sizes, job.threshold,
                       parts=Parts(job.weight != 1 or job.reach > 0 or tell_apart, job.paste.mask == HULL, False))
    size = tuple(image.shape[1:3])
    if len(target.frames) != image.shape[0] or any(tuple(other) != size for other in target.sizes):
        raise LikenessError(f"The target faces are of {len(target.frames)} pictures of {_size(target.sizes)}, but image has "
                            f"{image.shape[0]} of {size[1]} x {size[0]}: connect Analyze Faces of the very same batch.")
    if job.weight != 1:
        check_space(target.space, swapper.space, "The identity weight")
        if any(face.embedding is None for face in target.each()):
            raise LikenessError("An identity weight other than 1 needs recognised target faces: connect those of Analyze Faces.")
    return target


def _size(sizes: tuple[tuple[int, int], ...]) -> str:
    return " and ".join(sorted({f"{width} x {height}" for height, width in sizes}))


def _limits(mask: Tensor | None, count: int, height: int, width: int) -> Callable[[int], Tensor | None]:
    """Mask (h, w) of picture i; a mask for all is not repeated in memory."""
    if mask is None:
        return lambda number: None
    rows = mask if mask.ndim > 2 else mask[None]
    if rows.shape[0] == 1:
        only = as_mask(rows, 1, height, width)[0]
        return lambda number: only
    if rows.shape[0] != count:
        as_mask(rows, count, height, width)  # has the sentence
    return lambda number: as_mask(rows[number:number + 1], 1, height, width)[0]
