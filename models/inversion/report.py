"""What an inversion says about itself: numbers, a plot of its residuals, levels for a strip."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .records import Inversion

WIDTH, HEIGHT, MARGIN = 640, 360, 48
INK, GRID, BAR, PAPER = (40, 40, 48), (214, 214, 220), (62, 116, 190), (250, 250, 250)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of a against b in dB, peak = range of b; infinite where both are equal."""
    error = (a.double() - b.double()).square().mean()
    span = float(b.max() - b.min()) or 1.0
    return math.inf if float(error) == 0.0 else 10 * math.log10(span ** 2 / float(error))


def residual_sizes(inversion: Inversion) -> Tensor:
    """(L,) root mean square of each r_i over the length of its step: what the network is corrected by, in units of noise."""
    steps = (inversion.levels[1:] - inversion.levels[:-1]).abs()
    return inversion.residuals.float().flatten(1).square().mean(1).sqrt() / steps


def describe(inversion: Inversion, replayed: Tensor | None = None) -> str:
    """Lines for the artist. replayed (b, c, ...): x_0 of a replay that evaluated every step."""
    length = len(inversion.levels) - 1
    lines = [f"{inversion.method}: {length} of {inversion.steps} steps recorded, from step {inversion.start} on, "
             f"{inversion.shape[0]} x {inversion.describe()}",
             f"estimate {inversion.estimate}, refine {inversion.refine}, {'closed' if inversion.closed else 'open'} loop, cfg "
             f"{inversion.cfg:g}, model predicts {inversion.prediction}",
             f"network: {inversion.evaluations} evaluations a picture in {inversion.calls} calls"]
    if length and inversion.method == "resinversion":
        sizes = residual_sizes(inversion)
        lines.append(f"residuals: {float(sizes.mean()):.3g} of the noise on average, largest {float(sizes.max()):.3g} at step "
                     f"{inversion.steps - int(sizes.argmax())}")
    if inversion.drift is not None:
        lines.append(f"closed loop: replayed as recorded it ends at most {inversion.drift:.2g} from the picture")
    if replayed is not None:
        error = float((replayed - inversion.anchors[0].to(replayed)).abs().max())
        quality = psnr(replayed, inversion.anchors[0].to(replayed))
        lines.append("reconstruction with every step evaluated: "
                     + ("exact" if math.isinf(quality) else f"{quality:.1f} dB") + f", largest error {error:.2g}")
    lines.append(f"size: {size_mib(inversion):.1f} MiB")
    return "\n".join(lines)


def size_mib(inversion: Inversion) -> float:
    """Memory of anchors, residuals and null texts in MiB."""
    held = [inversion.anchors, inversion.residuals, *([] if inversion.nulls is None else [inversion.nulls])]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2 ** 20


def strip_levels(inversion: Inversion, count: int) -> list[int]:
    """`count` levels from the noise down to the picture, evenly over the steps."""
    length = len(inversion.levels) - 1
    count = max(1, min(count, length + 1))
    return [round(length * (1 - k / max(1, count - 1))) for k in range(count)] if count > 1 else [0]


def plot(inversion: Inversion) -> Tensor:
    """(1, h, w, 3) bars of `residual_sizes`, first step of a sampler on the left."""
    import numpy
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    sizes = residual_sizes(inversion).flip(0).tolist() if len(inversion.levels) > 1 else []
    top = max([*sizes, 1e-9])
    inner_w, inner_h = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    for part in range(5):
        y = HEIGHT - MARGIN - part / 4 * inner_h
        pen.line((MARGIN, y, WIDTH - MARGIN, y), fill=GRID)
        pen.text((4, y - 6), f"{top * part / 4:.2g}", fill=INK)
    for index, size in enumerate(sizes):
        x0, x1 = (MARGIN + inner_w * edge / len(sizes) for edge in (index + 0.1, index + 0.9))
        pen.rectangle((x0, HEIGHT - MARGIN - size / top * inner_h, max(x0, x1), HEIGHT - MARGIN), fill=BAR)
    said = "residual of each step, in units of the noise" if inversion.method == "resinversion" else \
        f"{inversion.method} keeps no residuals: what it misses is not in this plot"
    pen.text((MARGIN, 12), said, fill=INK)
    pen.text((MARGIN, HEIGHT - MARGIN + 8), f"step {inversion.start + 1}", fill=INK)
    last = f"step {inversion.steps}"
    pen.text((WIDTH - MARGIN - pen.textlength(last), HEIGHT - MARGIN + 8), last, fill=INK)
    return torch.from_numpy(numpy.asarray(image).copy()).float()[None] / 255
