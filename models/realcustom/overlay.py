"""Pictures of masks: laid over a picture in colour, and many of them in one sheet."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = ((1.0, 0.25, 0.1), (0.1, 0.6, 1.0), (0.3, 0.9, 0.2), (0.9, 0.3, 0.9), (1.0, 0.8, 0.1), (0.2, 0.9, 0.9))
STRENGTH = 0.65
FONT, LINE = 14, 18  # of a label, pixels


def overlay(picture: Tensor, mask: Tensor, colour: int = 0) -> Tensor:
    """Pictures (b, h, w, 3) in 0..1 darkened outside of masks (b, h', w') in 0..1 and tinted inside, cells left visible."""
    share = F.interpolate(mask[:, None], picture.shape[1:3], mode="nearest-exact")[:, 0, ..., None]
    tint = picture.new_tensor(COLOURS[colour % len(COLOURS)])
    return torch.lerp(picture * (1 - STRENGTH / 2), torch.lerp(picture, tint, STRENGTH), share).clamp(0, 1)


def labelled(tiles: Tensor, labels: Sequence[Sequence[str]], colour: int = 0) -> Tensor:
    """Tiles (n, h, w, 3), each under the lines of its label, on black in the colour of its mask -> (n, h + lines, w, 3)."""
    from PIL import Image, ImageDraw

    tint = tuple(round(255 * value) for value in COLOURS[colour % len(COLOURS)])
    out = []
    for tile, lines in zip(tiles, labels, strict=True):
        strip = Image.new("RGB", (tile.shape[1], LINE * len(lines)))
        draw = ImageDraw.Draw(strip)
        for row, text in enumerate(lines):
            text = whole = " ".join(text.split())
            while draw.textlength(text, font_size=FONT) > strip.width - 6 and text != "...":
                whole = whole[:-1]
                text = whole + "..."
            draw.text((3, LINE * row), text, fill=tint, font_size=FONT)
        out.append(torch.cat([torch.from_numpy(np.asarray(strip).copy()).to(tile) / 255, tile]))
    return torch.stack(out)


def sheet(tiles: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Tiles (n, h, w, 3) -> one picture (1, H, W, 3), row by row, white where none is left."""
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    out = tiles.new_ones(1, rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for index in range(count):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        out[0, y:y + height, x:x + width] = tiles[index]
    return out
