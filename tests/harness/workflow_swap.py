"""The shipped workflow that swaps a face and lets the model repair the swap: CustomEnhancer's whole way, in the miniature."""
from __future__ import annotations

from .canvas import Board, Group, Link
from .workflow_inversion import keep_the_scene, prompts, scene_by_text
from .workflow_parts import BLUE, ENLARGE, GREEN, GREY, PURPLE, core_cut_out, extract, start

PACK = "miniature (ships with the pack)"
SWAPPER = f"{PACK}/head_swapper.onnx"
SEEN_AT = "192"  # pixels at which the miniature's small pictures show their heads best


def faces(group: Group, models: Link, image: Link, title: str, column: int = 0) -> Link:
    return group.add("Likeness_AnalyzeFaces", {"face_models": models, "image": image, "detection_size": SEEN_AT}, title=title,
                     room=200, column=column)["faces"]


def swap_a_face(board: Board) -> None:
    world, group = start(board)
    models = board.groups[1].add("Likeness_LoadFaceModels", {"pack": PACK})["face_models"]
    swapper = board.groups[1].add("Likeness_LoadFaceSwapper", {"file": SWAPPER})["swapper"]
    picture = group.add("LoadImage", {"image": "likeness_cat.png"}, title="Reference picture", room=230)
    mask = group.add("InvertMask", {"mask": picture["MASK"]}, title="White on the subject", column=1)["MASK"]
    subject = extract(group, world, picture["IMAGE"], mask, column=1)
    source = faces(group, models, picture["IMAGE"], "The face to put in", 2)
    core_cut_out(board, picture["IMAGE"], (1, 3))
    scene = scene_by_text(board.group("3  Scene", (1, 2), GREEN), world, "a photo of a purple bear in the forest, right", 8)
    there = board.group("4  Swap", (2, 0), GREEN)
    swapped = there.add("Likeness_SwapFaces", {
        "swapper": swapper, "image": scene, "source": source, "target": faces(there, models, scene, "The face to replace"),
        "boost": 1, "mask_kind": "box"}, column=1)
    there.add("PreviewImage", {"images": swapped["image"]}, title="After the swap", room=200, column=1)
    into, free = prompts(board.group("5  Three prompts", (2, 1), PURPLE), world, subject,
                         *["a photo of a bear in the forest, right"] * 2, "bear")
    dial = board.group("6  The dial", (2, 2), PURPLE).add("PrimitiveInt", {"value": 8}, title="Dial")["INT"]
    block = board.group("7  Record and replay", (3, 0), GREEN).add(keep_the_scene(board.info), {
        "model": into["model"], "positive": into["positive"], "free": free, "negative": into["negative"], "vae": world["vae"],
        "image": swapped["image"], "manipulation_start": dial}, width=340)
    report = board.group("8  The recording", (3, 1), GREY)
    judged = report.add("Likeness_InversionReport", {"inversion": block["inversion"], "vae": world["vae"], "pictures": 3},
                        room=230)
    size = report.add("GetImageSize", {"image": swapped["image"]})
    half = report.add("ImageCrop", {"image": judged["strip"], "width": size["width"], "height": size["height"],
                                    "x": size["width"], "y": 0}, title="Half way to noise")["IMAGE"]
    show(board, 4, (scene, swapped["image"], half, block["image"]))


def show(board: Board, column: int, pictures: tuple[Link, Link, Link, Link]) -> None:
    """Scene, swap, inversion and result side by side."""
    joined = pictures[0]
    side = board.group("9  Side by side", (column, 0), GREY)
    for picture, what in zip(pictures[1:], ("the swap", "the inversion", "the result"), strict=True):
        joined = side.add("ImageStitch", {"image1": joined, "image2": picture, "direction": "right", "match_image_size": True,
                                          "spacing_width": 2, "spacing_color": "white"}, title=f"Beside it {what}")["IMAGE"]
    out = board.group("10  Result", (column + 1, 0), BLUE)
    big = out.add("ImageScaleBy", {"image": joined, "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                  title="Enlarge the tiny pictures", width=420)
    out.add("SaveImage", {"images": big["IMAGE"], "filename_prefix": "likeness/swap a face"}, room=240)
