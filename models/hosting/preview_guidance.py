"""The masks of one finished run, as MASK and as pictures."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import resize, to_rgb
from ..common.records import Guidance
from ..realcustom.overlay import labelled, overlay, sheet
from .guidance_runs import RUNS, WordRun
from .memory import to_intermediate

TILE, COLUMNS = 192, 6  # width of a tile, wide enough for its label; tiles in a row


class Preview(NamedTuple):
    """masks (n, h, w), word by word, step by step, picture by picture; strip (1, H, W, 3): the same with labels; report."""
    masks: Tensor
    strip: Tensor
    report: str


def preview(guidance: Guidance, samples: Tensor, image: Tensor | None = None, every_word: bool = False,
            last_step: bool = False) -> Preview:
    """Of the run that made a latent's samples (b, c, h, w). last_step: of each word its last mask alone, one for every picture.

    Raises LikenessError when that run is not kept any more."""
    run = RUNS.find(samples, guidance.name)
    if run is None:
        raise LikenessError("No masks are kept for this LATENT: its run is not one of the last 8, or it is not a sampler's own "
                            "output, or no injector with a GUIDANCE acted in it (all strengths 0); connect the sampler's LATENT, "
                            "raise a strength, and queue the sampler again (change its seed).")
    if guidance.name not in run and not every_word:
        words = ", ".join(f"\"{one.text}\"" for one in run.values())
        raise LikenessError(f"This LATENT was sampled with masks of {words}, and not with this GUIDANCE of "
                            f"\"{guidance.word.text}\"; connect the GUIDANCE that its injector has, and see that the injector's "
                            "strengths are not all 0.")
    chosen = list(run.values()) if every_word else [run[guidance.name]]
    size = (samples.shape[-2], samples.shape[-1])
    masks, tiles, lines = [], [], []
    for colour, word in enumerate(chosen):
        for step, mask in word.masks[-1:] if last_step else word.masks:
            if last_step:  # the artist's own may be fewer than the pictures, then they go round
                mask = mask[[k % mask.shape[0] for k in range(samples.shape[0])]]
            masks.append(F.interpolate(mask.float(), size, mode="bilinear", align_corners=False)[:, 0])
            pictures = (["all pictures"] if mask.shape[0] == 1 < samples.shape[0]
                        else [f"picture {k}" for k in range(1, mask.shape[0] + 1)])
            labels = [(word.text, f"step {step + 1}, {picture}") for picture in pictures]
            laid = overlay(_tiles(image, mask.shape[0], size), mask[:, 0].float(), colour)
            tiles.append(labelled(laid, labels, colour))
        lines.append(_line(word))
    masks_, strip = torch.cat(masks), sheet(torch.cat(tiles), COLUMNS)
    return Preview(to_intermediate(masks_), to_intermediate(strip), "\n".join(lines))


def _tiles(image: Tensor | None, count: int, size: tuple[int, int]) -> Tensor:
    """What the masks are laid over: the pictures themselves, or plain grey."""
    height, width = max(1, round(TILE * size[0] / size[1])), TILE
    if image is None:
        return torch.full((count, height, width, 3), 0.75)
    small = resize(to_rgb(image).cpu(), height, width)
    return small[[k % small.shape[0] for k in range(count)]]


def _line(word: WordRun) -> str:
    steps = ", ".join(str(step + 1) for step, _ in word.masks)
    step, mask = word.masks[-1]
    last, many = mask > 0, "s" if len(word.masks) > 1 else ""
    share, empty = float(last.float().mean()), int((~last.flatten(1).any(1)).sum())
    later = " and serves all later steps" if step + 1 < word.steps else ""
    nowhere = (f"; in {empty} of them it is empty, so the subject does not act there: with multiply, your mask and the word's "
               "place do not meet" if empty else "")
    return (f"\"{word.text}\": {mask.shape[0]} picture(s), mask{many} of step {steps}; the last one covers {100 * share:.0f} %"
            f"{later}{nowhere}")
