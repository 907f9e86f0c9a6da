"""The masks of one finished run, as MASK and as pictures."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import resize, to_rgb
from ..common.records import Guidance
from ..realcustom.overlay import overlay, sheet
from .guidance_runs import RUNS, WordRun
from .memory import to_intermediate

TILE, COLUMNS = 192, 6


class Preview(NamedTuple):
    """masks (n, h, w), word by word, step by step, picture by picture; strip (1, H, W, 3) in the same order; report."""
    masks: Tensor
    strip: Tensor
    report: str


def preview(guidance: Guidance, samples: Tensor, image: Tensor | None = None, every_word: bool = False) -> Preview:
    """Of the run that made a latent's samples (b, c, h, w). Raises LikenessError when that run is not kept any more."""
    run = RUNS.find(samples)
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
        for _, mask in word.masks:
            planes = F.interpolate(mask.float(), size, mode="bilinear", align_corners=False)[:, 0]
            masks.append(planes)
            tiles.append(overlay(_tiles(image, mask.shape[0], size), mask[:, 0].float(), colour))
        lines.append(_line(word))
    masks_, strip = torch.cat(masks), sheet(torch.cat(tiles), COLUMNS)
    return Preview(to_intermediate(masks_), to_intermediate(strip), "\n".join(lines))


def _tiles(image: Tensor | None, count: int, size: tuple[int, int]) -> Tensor:
    """What the masks are laid over: the pictures themselves, or plain grey."""
    height, width = (round(TILE * side / max(size)) for side in size)
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
