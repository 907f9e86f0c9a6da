"""A folder of training pictures: metadata.jsonl with one sample a line, checked before it is used.

{"reference": "r/1.jpg", "mask": "m/1.png", "target": "t/1.jpg", "caption": "a cat, snow", "category": "cat"}
Paths are relative to the folder. Without a mask the reference's alpha channel serves, else the whole picture.
"""
from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import background_color, resize, to_chw, to_rgb
from ..common.masks import bounding_box, cut_out
from .base import Batch

logger = logging.getLogger("likeness")
FIELDS = ("reference", "target", "caption", "category")
KEPT = 256  # rows that stay decoded in memory, about 1 MB each at 512


class Row(NamedTuple):
    """One line of metadata.jsonl; line counts from 1, mask None = alpha channel or the whole picture."""
    line: int
    reference: Path
    mask: Path | None
    target: Path
    caption: str
    category: str
    subject: str


def validate(folder: str | Path, pictures: bool = True) -> list[str]:
    """One text per bad row of <folder>/metadata.jsonl: line number and all its faults; empty = all good.

    pictures False leaves the picture files unopened (their existence is checked).
    """
    folder = Path(folder)
    return _faults(folder, list(_lines(folder)), pictures)


class FolderData:
    """A Source of (cut-out reference, target, caption, word); each epoch takes all rows in a new order."""

    def __init__(self, folder: str | Path, size: int = 512, reference_size: int = 256,
                 background: str = "white", margin: float = 0.1, augment: bool = True, skip_bad: bool = False,
                 pictures: bool = True, workers: int = 4):
        """size: side of the square targets. Bad rows raise LikenessError, unless skip_bad leaves them out.

        augment turns, shifts, scales and mirrors references, so that their pose says less of the target's.
        pictures False skips opening every picture in advance.
        """
        self.folder, self.size, self.reference_size = Path(folder), size, reference_size
        self.background, self.margin, self.augment, self.workers = background, margin, augment, workers
        lines = list(_lines(self.folder))
        bad = _faults(self.folder, lines, pictures)
        if bad and not skip_bad:
            raise LikenessError(f"{len(bad)} of {len(lines)} rows of {self.folder / 'metadata.jsonl'} cannot "
                                f"be used ({'; '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}); mend them, "
                                "or skip bad rows.")
        for text in bad:
            logger.warning("Training leaves out %s", text)
        refused = {int(text.split(":", 1)[0].removeprefix("line ")) for text in bad}
        self.rows = [_row(self.folder, line, _parse(text)) for line, text in lines if line not in refused]
        if not self.rows:
            raise LikenessError(f"The training folder {self.folder} holds no usable row; add samples to "
                                "metadata.jsonl.")
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.seed, self.cursor, self.order = 0, 0, torch.empty(0, dtype=torch.long)

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """The next n rows; an epoch's order and the augmentation come from the generator."""
        chosen = [self._next(generator) for _ in range(n)]
        new = [index for index in dict.fromkeys(chosen) if index not in self.kept]
        with ThreadPoolExecutor(self.workers) as pool:
            loaded = dict(zip(new, pool.map(lambda index: self._load(self.rows[index]), new), strict=True))
        for index, pair in loaded.items():
            if len(self.kept) < KEPT:
                self.kept[index] = pair
        pairs = [self.kept[index] if index in self.kept else loaded[index] for index in chosen]
        reference, target = (torch.stack(part).float() / 255 for part in zip(*pairs, strict=True))
        if self.augment:
            reference = augment_reference(reference, generator, self.background)
        rows = [self.rows[index] for index in chosen]
        return Batch(reference, target, None, [row.caption for row in rows], [row.category for row in rows])

    def state_dict(self) -> dict[str, int]:
        """Position in the epoch, for a checkpoint."""
        return {"seed": self.seed, "cursor": self.cursor, "rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position; raises LikenessError when the folder has another number of rows."""
        if state["rows"] != len(self.rows):
            raise LikenessError(f"The run was made with {state['rows']} training rows, the folder now has "
                                f"{len(self.rows)}; bring them back or train in a new folder.")
        self.seed, self.cursor = state["seed"], state["cursor"]
        if self.cursor:
            self._shuffle()

    def _next(self, generator: torch.Generator) -> int:
        if self.cursor == 0:
            # The order hangs on one drawn number, so that a checkpoint need not hold the whole order.
            self.seed = int(torch.randint(2 ** 62, (1,), generator=generator))
            self._shuffle()
        index = int(self.order[self.cursor])
        self.cursor = (self.cursor + 1) % len(self.rows)
        return index

    def _shuffle(self) -> None:
        self.order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed))

    def _load(self, row: Row) -> tuple[Tensor, Tensor]:
        """Reference (3, r, r) and target (3, s, s) as bytes."""
        try:
            image, mask, target = _read(row.reference), _read_mask(row.mask) if row.mask else None, _read(row.target)
        except (OSError, ValueError) as error:
            raise LikenessError(f"Line {row.line} of metadata.jsonl: a picture cannot be read ({error}); "
                                "mend it or take the line out.") from error
        cut = cut_out(image, mask, self.background, self.margin, self.reference_size)
        if not cut.found[0]:
            raise LikenessError(f"Line {row.line} of metadata.jsonl: the mask is empty; paint the subject "
                                "white.")
        return _bytes(cut.image), _bytes(_square(to_rgb(target), self.size))


def augment_reference(pixels: Tensor, generator: torch.Generator, background: str = "white") -> Tensor:
    """Mirror, scale (0.85 to 1.1), shift (8 %) and turn (10 degrees) each of (n, 3, s, s)."""
    n = pixels.shape[0]
    draw = torch.rand(n, 5, generator=generator)
    mirror = torch.where(draw[:, 0] < 0.5, -1.0, 1.0)
    size = 0.85 + 0.25 * draw[:, 1]
    shift = 0.16 * (draw[:, 2:4] * 2 - 1)
    turn = math.radians(10) * (draw[:, 4] * 2 - 1)
    cos, sin = turn.cos() / size, turn.sin() / size
    # grid_sample asks for the way back: from the new picture's place to the old one's.
    matrix = torch.stack([cos * mirror, sin * mirror, shift[:, 0], -sin, cos, shift[:, 1]], -1).view(n, 2, 3)
    grid = F.affine_grid(matrix.to(pixels), list(pixels.shape), align_corners=False)
    color = pixels.new_tensor(background_color(background)).view(1, 3, 1, 1)
    return (F.grid_sample(pixels - color, grid, align_corners=False) + color).clamp(0, 1)


def _lines(folder: Path) -> Iterator[tuple[int, str]]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise LikenessError(f"The training folder {folder} holds no metadata.jsonl; write one line a sample "
                            f"with {', '.join(FIELDS)} and, if there is one, mask.")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, text


def _parse(text: str) -> dict[str, Any]:
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("is not an object in braces")
    return row


def _row(folder: Path, line: int, row: dict[str, Any]) -> Row:
    mask = folder / row["mask"] if row.get("mask") else None
    return Row(line, folder / row["reference"], mask, folder / row["target"], row["caption"].strip(),
               row["category"].strip(), str(row.get("subject") or ""))


def _faults(folder: Path, lines: list[tuple[int, str]], pictures: bool) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda item: _row_faults(folder, item[1], pictures), lines)
        return [f"line {line}: "
                f"{', '.join(faults)}" for (line, _), faults in zip(lines, found, strict=True) if faults]


def _row_faults(folder: Path, text: str, pictures: bool) -> list[str]:
    try:
        row = _parse(text)
    except ValueError as error:
        return [f"not JSON ({error})"]
    faults = [f"'{name}' is "
              "missing" for name in FIELDS if not (isinstance(row.get(name), str) and row[name].strip())]
    if row.get("mask") is not None and not isinstance(row["mask"], str):
        faults.append("'mask' is not a path")
    if faults:
        return faults
    if not re.search(rf"(?<!\w){re.escape(row['category'].strip())}(?!\w)", row["caption"], re.IGNORECASE):
        faults.append(f"the category '{row['category']}' does not stand in the caption '{row['caption']}'")
    sizes: dict[str, Tensor] = {}
    for name in ("reference", "mask", "target"):
        if not row.get(name):
            continue
        path = folder / row[name]
        if not path.resolve().is_relative_to(folder.resolve()):
            faults.append(f"{name} {row[name]} lies outside the folder")
        elif not path.is_file():
            faults.append(f"{name} {row[name]} does not exist")
        elif pictures:
            try:
                sizes[name] = _read_mask(path) if name == "mask" else _read(path)
            except (OSError, ValueError) as error:
                faults.append(f"{name} {row[name]} cannot be read ({error})")
    return faults + _mask_faults(sizes)


def _mask_faults(images: dict[str, Tensor]) -> list[str]:
    reference, mask = images.get("reference"), images.get("mask")
    if reference is None:
        return []
    if mask is None:
        if reference.shape[-1] == 4 and bounding_box(reference[0, ..., 3]) is None:
            return ["the reference is wholly transparent"]
        return []
    height, width = reference.shape[1:3]
    if mask.shape[1:] != (height, width):
        return [f"the mask is {mask.shape[2]} x {mask.shape[1]}, but the reference is {width} x {height}"]
    return ["the mask is empty"] if bounding_box(mask[0]) is None else []


def _open(path: Path) -> Any:
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, SyntaxError) as error:  # a syntax error: PIL's word for a broken PNG or EXIF part
        raise ValueError(str(error)) from error


def _read(path: Path) -> Tensor:
    """Picture file -> (1, h, w, 3 or 4) in 0..1."""
    image = _open(path)
    alpha = "A" in image.getbands() or "transparency" in image.info
    if image.mode.startswith(("I", "F")):
        return _grey(image)[..., None].expand(-1, -1, -1, 3)
    return torch.from_numpy(np.array(image.convert("RGBA" if alpha else "RGB"))).float()[None] / 255


def _read_mask(path: Path) -> Tensor:
    """Mask file -> (1, h, w) in 0..1; of a picture with colours its brightness."""
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        return _grey(image)
    return torch.from_numpy(np.array(image.convert("L"))).float()[None] / 255


def _grey(image: Any) -> Tensor:
    """16 bit and float pictures, which PIL would clip to bytes."""
    values = torch.from_numpy(np.array(image).astype(np.float32))[None]
    if image.mode.startswith("I"):
        values = values / (65535 if values.max() > 255 else 255)
    return values.clamp(0, 1)


def _square(image: Tensor, size: int) -> Tensor:
    """(1, h, w, 3) -> (1, size, size, 3): shorter side to size, then the middle."""
    height, width = image.shape[1:3]
    scale = size / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top:top + size, left:left + size]


def _bytes(image: Tensor) -> Tensor:
    return (to_chw(image)[0] * 255).round().to(torch.uint8)
