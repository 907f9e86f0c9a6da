"""Where a subject may act in each row of a call: the artist's mask, the word's live mask, cut to the row's own area."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.masks import in_rows
from ..realcustom.masks import resized
from .stamps import MADE, RowStamps

GUIDANCE_KEY = "likeness_guidance"


def row_masks(mask: Tensor | None, guidance: str | None, stamps: RowStamps, rows: list[int], batch: int, x: Tensor,
              extra_options: dict[str, Any]) -> Tensor | None:
    """(rows, tokens, 1) share of the subject at each place of x (b, tokens, c); None: everywhere.

    mask (b, h, w) over the whole picture; guidance: name of the live masks (b, 1, h, w) in this call's options. Layers of
    one size in one call of the network share the result: what a layer reads has thousands of times fewer places than a MASK.
    """
    if mask is None and guidance is None:
        return None
    size = layer_size(x, stamps, extra_options)
    made = extra_options.get(MADE, {})  # a layer that is asked alone has none
    asked = id(mask), guidance, tuple(rows), batch, size, x.dtype, x.device
    if asked not in made:
        made[asked] = _shares(mask, guidance, stamps, rows, batch, x, size, extra_options)
    shares: Tensor = made[asked]
    return shares


def _shares(mask: Tensor | None, guidance: str | None, stamps: RowStamps, rows: list[int], batch: int, x: Tensor,
            size: tuple[int, int], extra_options: dict[str, Any]) -> Tensor:
    masks: list[tuple[Tensor, list[int], Any]] = []  # with the one of each row and the way it is brought there
    if guidance is not None:
        live = extra_options.get(GUIDANCE_KEY, {}).get(guidance)
        if live is None:
            raise LikenessError("The injector waits for the mask of its GUIDANCE, and the sampler made none: it asks the model "
                                "in a way of its own, or none of its prompts holds the word; use another sampler or guider, or "
                                "a MASK in place of the guidance.")
        masks.append((live.reshape(-1, *live.shape[-2:]), [row % batch for row in rows], live_area_of))
    if mask is not None:
        masks.append((mask, latents_of(rows, batch, extra_options), area_of))
    out = []
    for place, row in enumerate(rows):
        shares = [bring(one[own[place] % one.shape[0]].to(x.device, torch.float32), stamps.areas[row], stamps.latent, size)
                  for one, own, bring in masks]
        out.append(torch.stack(shares).prod(0).reshape(-1, 1))
    return torch.stack(out).to(x.dtype)


def checked_mask(mask: Tensor) -> Tensor:
    """Any MASK -> (b, h, w) in 0..1. Raises LikenessError for one that is empty."""
    mask = in_rows(mask)
    if float(mask.max()) <= 0.0:
        raise LikenessError("The mask is empty, so the subject would act nowhere; paint where it should be, or disconnect the "
                            "mask.")
    return mask


def check_batch(mask: Tensor | None, references: int, batch: int, extra_options: dict[str, Any], owner: str = "injector") -> None:
    """Raises LikenessError where a mask or a reference would find no latent; fewer go round.

    references: how many have a latent of their own. owner: the node that the mask is connected to."""
    if "context_window" in extra_options:  # a window of a video holds a part of the batch
        batch = getattr(extra_options["context_window"], "total_frames", 0)
        if not frames_of(extra_options) or not batch:
            return
    for count, what in ((0 if mask is None else mask.shape[0], "masks"), (references, "references, one per latent,")):
        if count > batch:
            raise LikenessError(f"The {owner} has {count} {what} and the batch holds {batch} latent"
                                f"{'s' if batch > 1 else ''}; make the batch {count} large, or give at most {batch}.")


def frames_of(extra_options: dict[str, Any]) -> tuple[int, ...] | None:
    """Which latents of the batch a call sees, in their order, where it sees a window of them; None where it sees all.

    Empty for a window that does not tell, or that cuts another axis than the batch. Frames that the host keeps in a place of
    every window (retained ones) count as those whose place they take: the window does not tell them."""
    window = extra_options.get("context_window")
    if window is None:
        return None
    if getattr(window, "dim", 0) != 0:
        return ()
    anchor = getattr(window, "causal_anchor_index", None)  # the latent before the window, which the host puts in front of it
    return (*((anchor,) if anchor is not None and anchor >= 0 else ()), *getattr(window, "index_list", ()))


def latents_of(rows: list[int], batch: int, extra_options: dict[str, Any]) -> list[int]:
    """Which latent of the whole batch each of these rows of a call with `batch` latents belongs to."""
    frames = frames_of(extra_options)
    places = frames if frames and len(frames) == batch else range(batch)
    return [places[row % batch] for row in rows]


def layer_size(x: Tensor, stamps: RowStamps, extra_options: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of the tokens of x (b, t, c)."""
    shape = extra_options.get("activations_shape")
    return (shape[-2], shape[-1]) if shape is not None else grid_of(x.shape[1], stamps.latent)


def grid_of(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a token grid that is a latent (height, width) made coarser by a whole factor."""
    factor = max(1, round((latent[0] * latent[1] / tokens) ** 0.5))
    return -(-latent[0] // factor), -(-latent[1] // factor)


def area_of(mask: Tensor, area: tuple[int, int, int, int] | None, latent: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Brings a mask (h, w) over the whole picture to the tokens (size) of a row, which may see only an area of it; by area."""
    if area is not None:
        # first to the latent's cells, so that the area is cut where the host cut the latent
        mask = F.interpolate(mask[None, None], latent, mode="area")[0, 0]
        height, width, y, x = area
        mask = mask[y:y + height, x:x + width]
    return F.interpolate(mask[None, None], size, mode="area")[0, 0]


def live_area_of(mask: Tensor, area: tuple[int, int, int, int] | None, latent: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """As area_of, for a live mask: a row that sees the whole picture gets the release's bilinear resizing.

    By one halving for each level of the network, so that in SD1.5, whose coarser levels the release does not have, no cell
    is skipped; what is left when a whole factor is left is the mean of cells, the same as bilinear halves."""
    while area is None and any(have % want for have, want in zip(mask.shape, size, strict=True)):
        nearer = [max(want, -(-have // 2)) for have, want in zip(mask.shape, size, strict=True)]
        mask = resized(mask[None, None], (nearer[0], nearer[1]))[0, 0]
    return area_of(mask, area, latent, size)
