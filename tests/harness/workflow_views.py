"""The shipped workflows of CustomNet: a turntable, and an object in a background."""
from __future__ import annotations

from .canvas import Board, Group, Link, Node
from .workflow_notes import NOTES
from .workflow_parts import BLUE, ENLARGE, GREEN, PURPLE, SIDE, YELLOW, core_cut_out, cut_out_picture, save

MINIATURE = "miniature (ships with the pack)"
SAMPLER = {"steps": 20, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def begin(board: Board, picture: str, text: str) -> tuple[Node, Link, Link, Link, Group]:
    """Note, model, reference and prompts: the loader, the reference, both prompts, and the group of camera and place."""
    board.group("Read me", (0, 0), YELLOW).note(NOTES[board.name], width=460, height=900)
    model = board.group("1  Model", (1, 0), BLUE).add("Likeness_LoadCustomNet", {"file": MINIATURE})
    group = board.group("2  Object on white", (1, 1), GREEN)
    image, mask = cut_out_picture(group, picture, "Picture of the object", "White on the object")
    reference = group.add("Likeness_PrepareReference", {"image": image, "mask": mask, "preset": "CustomNet"})["image"]
    core_cut_out(board, image, (1, 2))
    words = board.group("3  Background in words", (2, 0), PURPLE)
    prompts = [words.add("CLIPTextEncode", {"clip": model["clip"], "text": line}, title=title)["CONDITIONING"]
               for line, title in ((text, "Background"), ("", "Negative prompt"))]
    return model, reference, *prompts, board.group("4  Camera and place", (2, 1), GREEN)


def condition(group: Group, model: Node, reference: Link, positive: Link, negative: Link, view: Link, placement: Link) -> Node:
    return group.add("Likeness_ViewConditioner", {
        "positive": positive, "negative": negative, "clip_vision": model["clip_vision"], "vae": model["vae"],
        "reference": reference, "width": SIDE, "height": SIDE, "view": view, "placement": placement})


def paint(board: Board, model: Node, into: Node, latent: Link, seed: int) -> Link:
    """IMAGE of the sampled pictures."""
    group = board.group("6  Sample", (4, 0), PURPLE)
    run = group.add("KSampler", {"model": model["model"], "positive": into["positive"], "negative": into["negative"],
                                 "latent_image": latent, "seed": seed, **SAMPLER}, room=120)
    return group.add("VAEDecode", {"samples": run["LATENT"], "vae": model["vae"]})["IMAGE"]


def turntable(board: Board) -> None:
    model, reference, positive, negative, place = begin(board, "likeness_house", "a photo of a house on the beach")
    view = place.add("Likeness_Turntable", {"start": -60.0, "end": 60.0, "count": 8, "equal_noise": True})["view"]
    box = place.add("Likeness_Placement", {"x": 0.2, "y": 0.2, "box_width": 0.6, "box_height": 0.6, "frame_width": SIDE,
                                           "frame_height": SIDE}, room=230)["placement"]
    into = condition(board.group("5  Into the prompts", (3, 0), GREEN), model, reference, positive, negative, view, box)
    pictures = paint(board, model, into, into["latent"], 7)
    result = board.group("7  Result", (5, 0), BLUE)
    save(result, pictures, "turntable")
    big = result.add("ImageScaleBy", {"image": pictures, "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                     title="Enlarge for the animation", column=1)["IMAGE"]
    result.add("SaveAnimatedWEBP", {"images": big, "filename_prefix": "likeness/turntable", "fps": 6.0, "lossless": True,
                                    "quality": 90, "method": "default"}, room=300, column=1)


def place_it(board: Board) -> None:
    model, reference, positive, negative, place = begin(board, "likeness_tower", "a photo of a tower in the snow")
    view = place.add("Likeness_Viewpoint", {"azimuth": -35.0, "elevation": 5.0})["view"]
    box = place.add("Likeness_Placement", {"x": 0.45, "y": 0.3, "box_width": 0.5, "box_height": 0.6, "frame_width": SIDE,
                                           "frame_height": SIDE}, room=230)
    into = condition(board.group("5  Into the prompts", (3, 0), GREEN), model, reference, positive, negative, view,
                     box["placement"])
    several = board.groups[-1].add("RepeatLatentBatch", {"samples": into["latent"], "amount": 4}, title="Four pictures")
    pictures = paint(board, model, into, several["LATENT"], 3)
    save(board.group("7  Result", (5, 0), BLUE), pictures, "place in a background")
