"""The shipped workflows of CustomNet: a turntable, and an object in a background."""
from __future__ import annotations

from .canvas import Board, Group, Link, Node, Sub
from .workflow_notes import NOTES
from .workflow_parts import BLUE, ENLARGE, GREEN, GREY, PURPLE, SIDE, YELLOW, core_cut_out, cut_out_picture, save

TURN = "Turn and Place an Object (CustomNet)"
MINIATURE = "miniature (ships with the pack)"
SAMPLER = {"steps": 20, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def begin(board: Board, picture: str) -> tuple[Node, Link, Link]:
    """Note, model and the object: the loader, IMAGE and MASK."""
    board.group("Read me", (0, 0), YELLOW).note(NOTES[board.name], width=460, height=900)
    model = board.group("1  Model", (1, 0), BLUE).add("Likeness_LoadCustomNet", {"file": MINIATURE})
    group = board.group("2  Object", (1, 1), GREEN)
    image, mask = cut_out_picture(group, picture, "Picture of the object", "White on the object")
    core_cut_out(board, image, (1, 2))
    return model, image, mask


def background(group: Group, clip: Link, text: str) -> tuple[Node, Node]:
    """Both prompts."""
    return (group.add("CLIPTextEncode", {"clip": clip, "text": text}, title="Background"),
            group.add("CLIPTextEncode", {"clip": clip, "text": ""}, title="Negative prompt"))


def on_white(group: Group, image: Link, mask: Link, column: int = 0) -> Node:
    return group.add("Likeness_PrepareReference", {"image": image, "mask": mask, "preset": "CustomNet"}, room=230, column=column)


def box(group: Group, x: float, y: float, side: float) -> Node:
    """A square for the whole reference. The miniature has learned boxes that lie on its latent's 8 x 8 cells."""
    return group.add("Likeness_Placement", {"x": x, "y": y, "box_width": side, "box_height": side, "box_of": "whole reference",
                                            "frame_width": SIDE, "frame_height": SIDE}, room=230)


def turn(info: dict) -> Sub:
    """The method as one block: an object and a sentence in, prompts and latent for any sampler out."""
    sub = Sub(TURN, info, "Turns an object and places it: a picture of it, camera, place and a sentence for the background in "
              "(with the inpaint file also a picture of it); both prompts and the empty latent out, for any sampler with "
              "CustomNet's model, and what puts the background's own pixels back.")
    clip, vision, vae, image, mask, behind = (sub.input(*pair) for pair in (
        ("clip", "CLIP"), ("clip_vision", "CLIP_VISION"), ("vae", "VAE"), ("image", "IMAGE"), ("mask", "MASK", False),
        ("background_picture", "IMAGE", False)))
    reference = on_white(sub.group("The object on white", (0, 0), GREEN), image, mask)
    words, no = background(sub.group("The background in words", (0, 1), PURPLE), clip, "a photo of a tower in the snow")
    place = sub.group("Camera and place", (1, 0), GREEN)
    view, where = place.add("Likeness_Viewpoint", {"azimuth": -35.0, "elevation": 5.0}), box(place, 0.375, 0.25, 0.625)
    into = sub.group("Into both prompts", (2, 0), BLUE).add("Likeness_ViewConditioner", {
        "positive": words["CONDITIONING"], "negative": no["CONDITIONING"], "clip_vision": vision, "vae": vae,
        "reference": reference["image"], "width": SIDE, "height": SIDE, "view": view["view"], "placement": where["placement"],
        "background": behind})
    for name, node, widget in (
            ("background", words, "text"), ("negative_text", no, "text"), ("azimuth", view, "azimuth"),
            ("elevation", view, "elevation"), ("x", where, "x"), ("y", where, "y"), ("box_width", where, "box_width"),
            ("box_height", where, "box_height"), ("object_strength", into, "object_strength")):
        sub.promote(name, node, widget)
    sub.promote("width", into, "width", (where, "frame_width"))
    sub.promote("height", into, "height", (where, "frame_height"))
    sub.preview(reference)
    for name in ("positive", "negative", "latent", "background", "mask"):
        sub.output(name, into[name])
    return sub


def paint(board: Board, column: int, number: int, model: Node, into: Node, latent: Link, seed: int) -> Link:
    """IMAGE of the sampled pictures."""
    group = board.group(f"{number}  Sample", (column, 0), PURPLE)
    run = group.add("KSampler", {"model": model["model"], "positive": into["positive"], "negative": into["negative"],
                                 "latent_image": latent, "seed": seed, **SAMPLER}, room=120)
    return group.add("VAEDecode", {"samples": run["LATENT"], "vae": model["vae"]})["IMAGE"]


def turntable(board: Board) -> None:
    model, image, mask = begin(board, "likeness_house")
    reference = on_white(board.groups[2], image, mask, column=1)["image"]
    group = board.group("3  Background in words", (2, 0), PURPLE)
    words, no = background(group, model["clip"], "a photo of a house on the beach")
    place = board.group("4  Camera and place", (2, 1), GREEN)
    view = place.add("Likeness_Turntable", {"start": -60.0, "end": 60.0, "count": 8, "equal_noise": True})["view"]
    where = box(place, 0.125, 0.125, 0.75)["placement"]
    into = board.group("5  Into both prompts", (3, 0), GREEN).add("Likeness_ViewConditioner", {
        "positive": words["CONDITIONING"], "negative": no["CONDITIONING"], "clip_vision": model["clip_vision"],
        "vae": model["vae"], "reference": reference, "width": SIDE, "height": SIDE, "view": view, "placement": where})
    pictures = paint(board, 4, 6, model, into, into["latent"], 7)
    result = board.group("7  Result", (5, 0), BLUE)
    save(result, pictures, "turntable")
    big = result.add("ImageScaleBy", {"image": pictures, "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                     title="Enlarge for the animation", column=1)["IMAGE"]
    result.add("SaveAnimatedWEBP", {"images": big, "filename_prefix": "likeness/turntable", "fps": 6.0, "lossless": True,
                                    "quality": 90, "method": "default"}, room=300, column=1)


def place_it(board: Board) -> None:
    model, image, mask = begin(board, "likeness_tower")
    group = board.group("3  Turn it, place it", (2, 0), GREEN)
    into = group.add(turn(board.info), {"clip": model["clip"], "clip_vision": model["clip_vision"], "vae": model["vae"],
                                        "image": image, "mask": mask}, width=400, room=140)
    several = group.add("RepeatLatentBatch", {"samples": into["latent"], "amount": 4}, title="Four pictures", column=1)
    pictures = paint(board, 3, 4, model, into, several["LATENT"], 3)
    save(board.group("5  Result", (4, 0), BLUE), pictures, "place in a background")
    own_background(board, into, pictures, (3, 1))


def own_background(board: Board, into: Node, pictures: Link, cell: tuple[int, int]) -> None:
    """The muted group: a photo as background, whose own pixels come back outside of the box."""
    group = board.group("Your own background, inpaint file only (muted: select, Ctrl+M)", cell, GREY)
    group.add("LoadImage", {"image": "likeness_tower.png"}, muted=True, room=230, title="Your background: to background_picture")
    four = group.add("RepeatImageBatch", {"image": into["background"], "amount": 4}, muted=True, column=1)
    back = group.add("ImageCompositeMasked", {"destination": four["IMAGE"], "source": pictures, "mask": into["mask"]},
                     muted=True, column=1)
    group.add("PreviewImage", {"images": back["IMAGE"]}, muted=True, room=220, column=2)
