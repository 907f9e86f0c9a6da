"""View Conditioner: reference, camera and place into the conditionings of a CustomNet."""
from __future__ import annotations

from typing import Any, NamedTuple

import comfy.model_management as management
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import resize, split_alpha, to_chw
from ..customnet.location import hole, location_canvases
from ..customnet.pixels import CANVAS, squashed
from ..customnet.placement import Placement
from ..customnet.view import View
from .customnet_model import KEY, Shown
from .customnet_vision import embed_reference

Conditioning = list[list[Any]]
CELL = 8  # pixels of the picture along one of its latent


class Conditioned(NamedTuple):
    """latent: core's LATENT with as many empty pictures as there are views or places. mask (n, h, w): 1 in the box;
    background (n, h, w, 3): at the pictures' size; one white picture without. Both are for core's Image Composite Masked."""
    positive: Conditioning
    negative: Conditioning
    latent: dict[str, Any]
    background: Tensor
    mask: Tensor
    report: str


class Strengths(NamedTuple):
    """Factors of the object's and of the text's attention."""
    object: float = 1.0
    text: float = 1.0


AS_TRAINED = Strengths()


def condition(positive: Conditioning, negative: Conditioning, clip_vision: Any, vae: Any, reference: Tensor, view: View,
              placement: Placement, width: int, height: int, strengths: Strengths = AS_TRAINED,
              background: Tensor | None = None) -> Conditioned:
    """New conditionings that show the reference as `view` sees it, standing at `placement`; what came in stays as it was.

    background: what the inpaint variant continues. Width and height lose what goes beyond a multiple of 8, as in core's VAE.
    Raises LikenessError."""
    pixels = checked_reference(reference)
    behind = None if background is None else _background(background, height, width)
    width, height = width // CELL * CELL, height // CELL * CELL
    rows = _row_count(view, placement, pixels.shape[0], 1 if behind is None else behind.shape[0])
    boxes = placement.pixels(width, height)
    embed = embed_reference(clip_vision, pixels)
    canvas = location_canvases(_no_finer(pixels, boxes, min(width, height)),
                               _times(boxes, max(len(boxes), pixels.shape[0])), (height, width))
    location = _encode(vae, canvas)
    around = None
    if behind is not None:
        count = max(len(boxes), behind.shape[0])
        holes = zip((to_chw(behind) * 2 - 1).expand(count, -1, -1, -1), _times(boxes, count), strict=True)
        around = _encode(vae, torch.cat([hole(picture[None], box) for picture, box in holes]))
    shown = Shown(embed, view.vector(), location, around, strengths.object, strengths.text)
    bare = Shown(None, None, None, around, 1.0, strengths.text)
    latent: dict[str, Any] = {"samples": torch.zeros(rows, *location.shape[1:], device=management.intermediate_device())}
    if view.one_noise:
        latent["batch_index"] = [0] * rows
    mask = torch.zeros(rows, height, width)
    for row, (x0, y0, x1, y1) in zip(mask, _times(boxes, rows), strict=True):
        row[max(y0, 0):max(y1, 0), max(x0, 0):max(x1, 0)] = 1.0
    whole = torch.ones(1, height, width, 3) if behind is None else behind.expand(rows, -1, -1, -1).clone()
    report = f"{rows} picture(s) of {width} x {height}: " + "; ".join(
        f"azimuth {a:g}, elevation {e:g}, distance {d:g}"
        for a, e, d in zip(view.azimuth, view.elevation, view.distance, strict=True))
    return Conditioned(_stamped(positive, shown), _stamped(negative, bare), latent,
                       whole, mask, report)


def _times(boxes: list[tuple[int, int, int, int]], count: int) -> list[tuple[int, int, int, int]]:
    return boxes if len(boxes) == count else boxes * count


def checked_reference(reference: Tensor) -> Tensor:
    """(n, 3, 256, 256) in -1..1 of a reference on white. Raises LikenessError for one that was not cut out."""
    if reference.ndim == 3 and reference.shape[-1] not in (3, 4):
        raise LikenessError("A picture of the object was expected, a MASK came; connect the image output of Prepare Reference.")
    rgb, alpha = split_alpha(reference)
    if alpha is not None:
        raise LikenessError("The reference still has its alpha channel; let Prepare Reference lay the object on white (preset "
                            "CustomNet).")
    border = torch.cat([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], 1)
    white = (border > 0.98).all(-1).float().mean(1)
    if bool((white < 0.5).any()):
        which = "The reference" if len(white) == 1 else f"Reference {int((white < 0.5).nonzero()[0]) + 1} of {len(white)}"
        raise LikenessError(f"{which} has no white background, so it was not cut out; connect it through Prepare Reference "
                            "with the preset CustomNet and a mask of the object.")
    return to_chw(squashed(rgb)) * 2 - 1


def _no_finer(pixels: Tensor, boxes: list[tuple[int, int, int, int]], side: int) -> Tensor:
    """The reference (n, 3, 256, 256) in -1..1, no finer than a square of `side`, or than its largest box where that is larger:
    shrunk with care, since the authors' bilinear step into the box has no antialias and would skip pixels."""
    width, height = (min(CANVAS, max(side, *(box[axis + 2] - box[axis] for box in boxes))) for axis in (0, 1))
    if width == height == CANVAS:
        return pixels
    return to_chw(resize((pixels + 1).movedim(1, -1) / 2, height, width)) * 2 - 1


def _row_count(view: View, placement: Placement, references: int, backgrounds: int) -> int:
    counts = {"view(s)": len(view.azimuth), "place(s)": len(placement.boxes), "reference(s)": references,
              "background(s)": backgrounds}
    rows = max(counts.values())
    wrong = [f"{count} {what}" for what, count in counts.items() if count not in (1, rows)]
    if wrong:
        most = next(what for what, count in counts.items() if count == rows)
        raise LikenessError(f"There are {rows} {most} and {wrong[0]}; give one for all, or as many of each.")
    return rows


def _background(background: Tensor, height: int, width: int) -> Tensor:
    """(b, h, w, 3) without the rest of a division by 8; a picture that has the size already keeps its very pixels."""
    if background.ndim == 3 and background.shape[-1] not in (3, 4):
        raise LikenessError("A picture of the background was expected, a MASK came; connect an IMAGE.")
    rgb, _ = split_alpha(background)
    shape, wanted = rgb.shape[2] / rgb.shape[1], width / height
    if abs(shape / wanted - 1) > 0.02:
        raise LikenessError(f"The background is {rgb.shape[2]} x {rgb.shape[1]}, the picture shall be {width} x {height}, which "
                            "would squash it; crop it to the same shape with core's Image Crop, or change width and height.")
    return resize(rgb, height, width)[:, :height // CELL * CELL, :width // CELL * CELL]


def _encode(vae: Any, pixels: Tensor) -> Tensor:
    """As the VAE gives it: the mode of the posterior, not scaled."""
    return vae.encode(((pixels + 1) / 2).movedim(1, -1)).cpu()


def _stamped(conditioning: Conditioning, shown: Shown) -> Conditioning:
    return [[entry[0], {**entry[1], KEY: shown}] for entry in conditioning]
