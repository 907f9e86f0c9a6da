"""Reference pictures and thumbnails of the shipped workflows.

The references are drawn by the miniature world's own renderer and show looks that no training has seen. A thumbnail is
made of the pictures that its workflow really made, beside the reference.
"""
from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from . import workflows
from .client import Client
from .pack import load_pack
from .paths import ROOT, WORKFLOWS, HarnessError

PIXELS = 256
# file name: kind, colour, second colour, pattern, accessory, its colour, scene, faces left
CREATURES = {
    "likeness_cat": ("cat", "orange", "white", "round belly", "hat", "green", "in a room", False),
    "likeness_cat_2": ("cat", "white", "orange", "striped", "scarf", "red", "in the forest", False),
    "likeness_bunny": ("bunny", "blue", "orange", "round belly", "scarf", "blue", "in the snow", True),
    "likeness_scarf": ("dog", "white", "purple", "round belly", "scarf", "blue", "in a room", False),
    "likeness_cat_3": ("cat", "white", "red", "striped", "scarf", "blue", "in the forest", False),
    "likeness_bear": ("bear", "red", "white", "round belly", "scarf", "blue", "in the snow", False),
}
# pictures to work in, opaque: kind, colours, pattern, accessory, its colour, scene, place; a drawing is posterised with outlines
SCENES = {
    "likeness_scene": ("bear", "yellow", "white", "half", "none", "red", "on the beach", 0),
    "likeness_drawing": ("bear", "white", "pink", "half", "none", "red", "in the forest", 1),
}
# toy buildings as CustomNet's miniature knows them, cut out: kind, colours of front, side and roof
BUILDINGS = {
    "likeness_house": ("house", "yellow", "green", "red"),
    "likeness_tower": ("tower", "pink", "white", "orange"),
}
DRAWING = "likeness_drawing"
GARMENT = "likeness_scarf"  # opaque, with a mask of the garment in a file of its own
TILE, GAP = 256, 8
# CustomEnhancer's four stages: the strip of this workflow stands for those that nothing here can run
STAGES = "12 Swap a face, keep the scene"
STEPS = ("scene", "swap", "inversion", "result")


def identity(name: str) -> dict[str, Any]:
    """The creature's row in the miniature world; HarnessError when training may have seen its look."""
    row = _row((CREATURES.get(name) or SCENES[name])[:6])
    from likeness.models.demo import world

    if name in CREATURES and not bool(world.held_out(row)):
        raise HarnessError(f"{name} is not a held-out look.")
    return row


def _row(look: tuple) -> dict[str, Any]:
    load_pack()
    import torch

    from likeness.models.demo import world

    kind, colour, second, pattern, accessory, accent = look
    index = (world.KINDS.index(kind), world.COLOUR_NAMES.index(colour), world.COLOUR_NAMES.index(second),
             world.PATTERNS.index(pattern), world.ACCESSORIES.index(accessory), world.COLOUR_NAMES.index(accent))
    return dict(zip(world.IDENTITY_KEYS, (torch.tensor([i]) for i in index), strict=True))


def draw(name: str) -> Any:
    """The creature in its own scene: picture (1, 3, p, p), mask and accessory (1, p, p)."""
    row = identity(name)
    import torch

    from likeness.models.demo import creatures, world

    scene, mirror, place = (*CREATURES[name][6:], 1) if name in CREATURES else (SCENES[name][6], False, SCENES[name][7])
    pose = {"place": torch.tensor([place]), "dx": torch.zeros(1), "dy": torch.zeros(1), "turn": torch.zeros(1),
            "size": torch.tensor([1]), "mirror": torch.tensor([int(mirror)])}
    return creatures.draw_pictures(row, pose, torch.tensor([world.SCENES.index(scene)]), torch.full((1, 8), 0.5), PIXELS)


def write_inputs(folder: Path) -> list[Path]:
    """PNG files for Load Image: the subject opaque, the rest transparent."""
    import torch
    from PIL import Image

    def image(channels: Any) -> Image.Image:
        return Image.fromarray((channels.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())

    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for name in [*CREATURES, *SCENES]:
        drawn = draw(name)
        if name in SCENES:
            files = {name: image(as_drawing(drawn.picture[0]) if name == DRAWING else drawn.picture[0])}
        elif name == GARMENT:
            files = {name: image(drawn.picture[0]), f"{name}_mask": image(drawn.accessory.expand(3, -1, -1))}
        else:
            files = {name: image(torch.cat([drawn.picture[0], drawn.mask]))}
        for stem, picture in files.items():
            out.append(folder / f"{stem}.png")
            picture.save(out[-1], optimize=True)
    for name in BUILDINGS:
        out.append(folder / f"{name}.png")
        image(building(name)).save(out[-1], optimize=True)
    return out


def building(name: str) -> Any:
    """(4, p, p): the toy building from the camera of every reference, the rest transparent. HarnessError for one that
    training has seen."""
    load_pack()
    import torch

    from likeness.models.demo import views, world

    kind, *colours = BUILDINGS[name]
    row = {"kind": torch.tensor([views.KINDS.index(kind)])} | {
        part: torch.tensor([world.COLOUR_NAMES.index(colour)]) for part, colour in zip(("front", "side", "roof"), colours,
                                                                                    strict=True)}
    if not bool(views.held_out(row)):
        raise HarnessError(f"{name} is not a held-out building.")
    on_white, on_black = views.references(row, PIXELS)[0], views.references(row, PIXELS, 0.0)[0]
    return torch.cat([on_white, 1 - (on_white - on_black).mean(0, keepdim=True)])


def as_drawing(picture: Any) -> Any:
    """(3, h, w) as if drawn by hand: few shades, warm paper, dark lines where colours meet."""
    import torch
    import torch.nn.functional as F

    paper = torch.tensor([0.98, 0.95, 0.86]).view(3, 1, 1)
    flat = (picture * 4).round() / 4
    grey = flat.mean(0)[None, None]
    edge = (F.max_pool2d(grey, 5, 1, 2) - F.max_pool2d(-grey, 5, 1, 2).neg())[0].clamp(0, 0.2) * 5
    return (0.35 * paper + 0.65 * flat) * (1 - 0.8 * edge)


# -- thumbnails --------------------------------------------------------------------------------------
def tiles(pictures: list[bytes]) -> list[Any]:
    """The first three pictures, or the first three parts of a strip; of many pictures the ends and the middle."""
    from PIL import Image

    found = []
    for data in pictures:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        side, count = picture.height, round(picture.width / picture.height)
        if count < 3:
            found.append(picture)
            continue
        step = (picture.width - side) / (2 if count != 4 else 3)  # of a story the first three, of a way both ends
        found += [picture.crop((round(k * step), 0, round(k * step) + side, side)) for k in range(3)]
    if len(found) < 3:
        raise HarnessError(f"A thumbnail is made of three pictures, not of {len(found)}.")
    if len(found) > 4:  # a turn: its ends and its middle
        found = [found[0], found[len(found) // 2], found[-1]]
    return [picture.resize((TILE, TILE), Image.Resampling.BICUBIC) for picture in found[:3]]


def reference_tile(names: list[str], folder: Path) -> Any:
    """The reference pictures side by side on white; of a garment's picture all but the garment is pale."""
    from PIL import Image

    card = Image.new("RGBA", (TILE, TILE), "white")
    side = TILE // len(names)
    for column, name in enumerate(names):
        picture = Image.open(folder / name).convert("RGBA")
        mask = folder / f"{Path(name).stem}_mask.png"
        if mask.is_file():
            pale = Image.blend(picture, Image.new("RGBA", picture.size, "white"), 0.65)
            picture = Image.composite(picture, pale, Image.open(mask).convert("L")).resize((TILE, TILE))
        else:
            picture = picture.crop(picture.getchannel("A").getbbox())
            scale = min((side - 12) / picture.width, (TILE - 40) / picture.height)
            size = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        card.alpha_composite(picture, (column * side + (side - picture.width) // 2, (TILE - picture.height) // 2))
    return card.convert("RGB")


def thumbnail(pictures: list[bytes], names: list[str], folder: Path) -> Any:
    """The first references, two at most, at the top left, three results round them."""
    from PIL import Image

    side = 2 * TILE + 3 * GAP
    sheet = Image.new("RGB", (side, side), (226, 220, 208))
    for k, tile in enumerate([reference_tile(names[:2], folder), *tiles(pictures)]):
        sheet.paste(tile, (GAP + (k % 2) * (TILE + GAP), GAP + (k // 2) * (TILE + GAP)))
    return sheet


def part_of(strip: bytes, number: int) -> bytes:
    """One of the four pictures of a strip, as PNG."""
    from PIL import Image

    picture = Image.open(io.BytesIO(strip)).convert("RGB")
    left = round(number * (picture.width - picture.height) / (len(STEPS) - 1))
    out = io.BytesIO()
    picture.crop((left, 0, left + picture.height, picture.height)).save(out, "PNG")
    return out.getvalue()


def stand_in(title: str, strip: bytes) -> Any:
    """For a workflow that needs an artist's own files: the same stages in the miniature, and a caption that says so."""
    from PIL import Image, ImageDraw, ImageFont

    side = 2 * TILE + 3 * GAP
    sheet = Image.new("RGB", (side, side), (226, 220, 208))
    draw = ImageDraw.Draw(sheet)
    for k, step in enumerate(STEPS):
        picture = Image.open(io.BytesIO(part_of(strip, k)))
        x, y = GAP + (k % 2) * (TILE + GAP), GAP + (k // 2) * (TILE + GAP)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        low = y + TILE - 26 if k > 1 else y
        draw.rectangle((x, low, x + 104, low + 26), fill=(40, 36, 32))
        draw.text((x + 8, low + 13), f"{k + 1}  {step}", fill="white", font=ImageFont.load_default(15), anchor="lm")
    middle = side // 2
    draw.rectangle((0, middle - 34, side, middle + 34), fill=(40, 36, 32))
    for line, size, shift in ((title.split(" ", 1)[1], 22, -12),
                              ("needs models of your own; pictures: the same stages in the miniature", 14, 16)):
        draw.text((middle, middle + shift), line, fill="white", font=ImageFont.load_default(size), anchor="mm")
    return sheet


def write_thumbnails(client: Client, folder: Path = WORKFLOWS) -> list[Path]:
    """Runs each workflow on the server and writes the .jpg beside it."""
    inputs = folder / "inputs"
    workflows.copy_inputs(client.input, inputs)  # type: ignore[attr-defined]
    out, stages = [], b""
    for path in workflows.shipped(folder):
        workflow = workflows.load(path)
        if workflows.own_files(workflow):
            stand_in(path.stem, stages).save(path.with_suffix(".jpg"), quality=90, optimize=True, comment=mark(path))
            continue
        prompt = workflows.to_prompt(workflow, client.object_info())
        result = client.run(prompt, workflow=workflow)
        if not result.ok:
            raise HarnessError(f"{path.name}: {result.error}")
        saved = [node for node, entry in prompt.items() if entry["class_type"] == "SaveImage"]
        pictures = [data for node in saved for data in result.images[node]]
        if path.stem == STAGES:
            (stages,) = pictures
            pictures = [part_of(stages, number) for number in (0, 1, 3)]
        names = [name for name in workflows.input_pictures(prompt) if not name.endswith("_mask.png")]
        out.append(path.with_suffix(".jpg"))
        thumbnail(pictures, names, inputs).save(out[-1], quality=90, optimize=True, comment=mark(path))
    write_gallery(out)
    return out


def mark(workflow: Path) -> bytes:
    """Hash of a workflow file that stands in its thumbnail, so that an old picture beside a new file is noticed."""
    return hashlib.sha256(json.dumps(workflows.load(workflow), sort_keys=True).encode()).hexdigest().encode()


def write_gallery(thumbnails: list[Path]) -> Path:
    """All thumbnails in rows of three, for the README."""
    from PIL import Image

    pictures = [Image.open(path) for path in thumbnails]
    side = pictures[0].width
    sheet = Image.new("RGB", (3 * side, -(-len(pictures) // 3) * side), (226, 220, 208))
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % 3 * side, k // 3 * side))
    path = ROOT / "js" / "docs" / "images" / "workflows.jpg"
    sheet.resize((sheet.width // 2, sheet.height // 2)).save(path, quality=88, optimize=True)
    return path
