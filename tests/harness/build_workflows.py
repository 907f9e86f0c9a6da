"""Writes workflows/*.json, subgraphs/*.json and, with words, the pictures beside them.

    python tests/harness build_workflows                  the JSON files
    python tests/harness build_workflows inputs           also the reference pictures (workflows/inputs)
    python tests/harness build_workflows thumbnails       also runs them all and makes the .jpg files

Widget values live here and nowhere else: change them, run this, look at the pictures, commit all of it.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import workflow_pictures
from .canvas import Board, Group, Link, Node, Sub, write
from .client import Client
from .paths import ROOT, WORKFLOWS, HarnessError
from .server import Server
from .workflow_notes import NOTES

SUBGRAPHS = ROOT / "subgraphs"
BLUEPRINT = "Keep a Subject (CustAny)"
STEPS, CFG, SIDE, PICTURES, ENLARGE = 20, 3.0, 64, 4, 4.0
BLUE, GREEN, PURPLE, YELLOW, GREY = "#3f789e", "#8A8", "#a1309b", "#b58b2a", "#444"
BIREFNET = {"name": "birefnet.safetensors", "directory": "background_removal",
            "url": "https://huggingface.co/Comfy-Org/BiRefNet/resolve/main/background_removal/birefnet.safetensors"}
SAM3 = {"name": "sam3.1_multiplex_fp16.safetensors", "directory": "checkpoints",
        "url": "https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors"}


# -- parts that several workflows share --------------------------------------------------------------
def start(board: Board) -> tuple[Node, Group]:
    """Note and model; also the group of the subject, still empty."""
    board.group("Read me", (0, 0), YELLOW).note(NOTES[board.name], width=460, height=900)
    world = board.group("1  Model", (1, 0), BLUE).add("Likeness_LoadDemo", {"method": "CustAny"})
    return world, board.group("2  Subject", (1, 1), GREEN)


def empty_latent(board: Board) -> Link:
    """Beside the model: size and number of the pictures."""
    values = {"width": SIDE, "height": SIDE, "batch_size": PICTURES}
    return board.groups[1].add("EmptyLatentImage", values, title="Size and number", column=1)["LATENT"]


def cut_out_picture(group: Group, name: str, title: str = "Reference picture", row: int = 0) -> tuple[Link, Link]:
    """A picture whose background is transparent: IMAGE, and a MASK that is white on the subject."""
    picture = group.add("LoadImage", {"image": f"{name}.png"}, title=title, room=230, row=row)
    flip = group.add("InvertMask", {"mask": picture["MASK"]}, title="White on the subject", column=1, row=row)
    return picture["IMAGE"], flip["MASK"]


def core_cut_out(board: Board, picture: Link, cell: tuple[int, int]) -> None:
    """The muted group: a MASK from the host's own background removal."""
    group = board.group("Cut out with core nodes (muted: select, Ctrl+M)", cell, GREY)
    loader = group.add("LoadBackgroundRemovalModel", {"bg_removal_name": BIREFNET["name"]}, muted=True, models=(BIREFNET,))
    remove = group.add("RemoveBackground", {"bg_removal_model": loader["bg_model"], "image": picture}, muted=True)
    group.add("MaskPreview", {"mask": remove["mask"]}, muted=True, room=220, column=1, title="The mask: connect it")


def sample(board: Board, cell: tuple[int, int], model: Link, positive: Link, negative: Link, vae: Link, seed: int) -> Link:
    """KSampler and VAE Decode; the pictures."""
    group = board.group("4  Sample", cell, PURPLE)
    run = group.add("KSampler", {
        "model": model, "positive": positive, "negative": negative, "latent_image": empty_latent(board), "seed": seed,
        "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}, room=220)
    return group.add("VAEDecode", {"samples": run["LATENT"], "vae": vae})["IMAGE"]


def result(board: Board, cell: tuple[int, int], pictures: Link, prefix: str, report: Link | None = None) -> None:
    """Enlarged for the eye, saved; and what the injector says about itself."""
    group = board.group("5  Result", cell, BLUE)
    big = group.add("ImageScaleBy", {"image": pictures, "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                    title="Enlarge the tiny pictures", width=420)
    group.add("SaveImage", {"images": big["IMAGE"], "filename_prefix": f"likeness/{prefix}"}, room=420)
    if report is not None:
        group.add("PreviewAny", {"source": report}, title="What the injector did", room=160)


def inject(group: Group, model: Link, positive: Link, negative: Link, subject: Link, word: Link, title: str = "",
           column: int = 0, mask: Link | None = None) -> Node:
    values = {"model": model, "positive": positive, "negative": negative, "subject": subject, "word": word}
    if mask is not None:
        values["mask"] = mask
    return group.add("Likeness_DualLevelInjector", values, title=title, column=column)


def extract(group: Group, world: Node, image: Link, mask: Link, title: str = "", column: int = 0) -> Link:
    values = {"adapter": world["adapter"], "encoders": world["encoders"], "image": image, "mask": mask}
    return group.add("Likeness_ExtractID", values, title=title, column=column, room=230)["subject"]


# -- sub-graphs --------------------------------------------------------------------------------------
def keep_a_subject(info: dict, text: str = "a photo of a cat in the snow", word: str = "cat") -> Sub:
    """The method as one block: a picture and a prompt in, a model and prompts for any sampler out."""
    sub = Sub(BLUEPRINT, info, "Keeps the subject of a reference picture in new pictures: looks at the picture, "
              "finds the subject's word in the prompt and brings the subject into both prompt and model (CustAny).")
    model, clip = sub.input("model", "MODEL"), sub.input("clip", "CLIP")
    adapter, encoders = sub.input("adapter", "LIKENESS_ADAPTER"), sub.input("encoders", "LIKENESS_ENCODERS")
    image, mask = sub.input("image", "IMAGE"), sub.input("mask", "MASK", required=False)
    seen = sub.group("The subject", (0, 0), GREEN).add(
        "Likeness_ExtractID", {"adapter": adapter, "encoders": encoders, "image": image, "mask": mask}, room=230)
    words = sub.group("The words", (0, 1), PURPLE)
    prompt = words.add("Likeness_EncodePrompt", {"clip": clip, "text": text, "word": word})
    empty = words.add("CLIPTextEncode", {"clip": clip, "text": ""}, title="Negative prompt")
    into = inject(sub.group("Into prompt and model", (1, 0), BLUE), model, prompt["conditioning"], empty["CONDITIONING"],
                  seen["subject"], prompt["word"])
    sub.promote("text", prompt, "text")
    sub.promote("word", prompt, "word")
    sub.promote("negative_text", empty, "text")
    sub.promote("global_strength", into, "global_strength")
    sub.promote("local_strength", into, "local_strength")
    sub.preview(seen)
    for name in ("model", "positive", "negative"):
        sub.output(name, into[name])
    return sub


def one_scene(info: dict) -> Sub:
    """One picture of the story: everything behind the subject itself."""
    sub = Sub("One scene of the story", info, "Prompt, injection and sampling of one picture with a given subject.")
    model, clip, vae = (sub.input(*pair) for pair in (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")))
    subject = sub.input("subject", "LIKENESS_SUBJECT")
    words = sub.group("The words", (0, 0), PURPLE)
    prompt = words.add("Likeness_EncodePrompt", {"clip": clip, "text": "a photo of a bear in the snow", "word": "bear"})
    empty = words.add("CLIPTextEncode", {"clip": clip, "text": ""}, title="Negative prompt")
    latent = words.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1})
    into = inject(sub.group("Into prompt and model", (1, 0), BLUE), model, prompt["conditioning"], empty["CONDITIONING"],
                  subject, prompt["word"])
    group = sub.group("Sample", (2, 0), PURPLE)
    run = group.add("KSampler", {
        "model": into["model"], "positive": into["positive"], "negative": into["negative"],
        "latent_image": latent["LATENT"], "seed": 1, "steps": STEPS, "cfg": CFG, "sampler_name": "euler",
        "scheduler": "normal", "denoise": 1.0}, room=220)
    picture = group.add("VAEDecode", {"samples": run["LATENT"], "vae": vae})
    sub.promote("text", prompt, "text")
    sub.promote("word", prompt, "word")
    sub.promote("seed", run, "seed")
    sub.output("image", picture["IMAGE"])
    return sub


# -- the workflows -----------------------------------------------------------------------------------
def new_scene(board: Board) -> None:
    world, subject = start(board)
    image, mask = cut_out_picture(subject, "likeness_cat")
    core_cut_out(board, image, (1, 2))
    group = board.group("3  Subject into prompt and model", (2, 0), GREEN)
    block = group.add(keep_a_subject(board.info), {
        "model": world["model"], "clip": world["clip"], "adapter": world["adapter"], "encoders": world["encoders"],
        "image": image, "mask": mask}, width=400, room=260)
    pictures = sample(board, (3, 0), block["model"], block["positive"], block["negative"], world["vae"], 7)
    result(board, (4, 0), pictures, "new scene")


def two_subjects(board: Board) -> None:
    world, group = start(board)
    first, first_mask = cut_out_picture(group, "likeness_cat_2", "First subject")
    second, second_mask = cut_out_picture(group, "likeness_bunny", "Second subject", row=1)
    ids = board.group("3  Look at both", (2, 0), GREEN)
    cat, bunny = (extract(ids, world, *args) for args in ((first, first_mask, "First subject"),
                                                          (second, second_mask, "Second subject")))
    core_cut_out(board, first, (1, 2))
    masks = board.group("Where each may act", (2, 1), GREY)
    zero = masks.add("SolidMask", {"value": 0.0, "width": SIDE, "height": SIDE}, title="Whole picture, black")
    half = masks.add("SolidMask", {"value": 1.0, "width": SIDE // 2, "height": SIDE}, title="Left half, white")
    left = masks.add("MaskComposite", {"destination": zero["MASK"], "source": half["MASK"], "x": 0, "y": 0,
                                       "operation": "add"}, title="Mask of the first: left", column=1)
    right = masks.add("InvertMask", {"mask": left["MASK"]}, title="Mask of the second: right", column=1)
    words = board.group("Words", (3, 0), PURPLE)
    text = words.add("PrimitiveStringMultiline", {"value": "a photo of a cat and a bunny on the beach"}, title="The prompt",
                     room=40)["STRING"]
    one = words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": text, "word": "cat"}, title="Word of the first")
    two = words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": text, "word": "bunny",
                                              "conditioning": one["conditioning"]}, title="Word of the second")
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = board.group("Into prompt and model, one after the other", (4, 0), GREEN)
    a = inject(into, world["model"], one["conditioning"], empty["CONDITIONING"], cat, one["word"], "First subject",
               mask=left["MASK"])
    b = inject(into, a["model"], a["positive"], a["negative"], bunny, two["word"], "Second subject", mask=right["MASK"])
    pictures = sample(board, (5, 0), b["model"], b["positive"], b["negative"], world["vae"], 11)
    result(board, (6, 0), pictures, "two subjects", b["text"])


def try_on(board: Board) -> None:
    world, group = start(board)
    picture = group.add("LoadImage", {"image": "likeness_scarf.png"}, title="Somebody who wears it", room=230)
    mask = group.add("LoadImageMask", {"image": "likeness_scarf_mask.png", "channel": "red"}, title="Mask: only the scarf",
                     room=230)["MASK"]
    core = board.group("Cut out with core nodes (muted: select, Ctrl+M)", (1, 2), GREY)
    sam = core.add("CheckpointLoaderSimple", {"ckpt_name": SAM3["name"]}, muted=True, models=(SAM3,), title="SAM3")
    what = core.add("CLIPTextEncode", {"clip": sam["CLIP"], "text": "scarf"}, muted=True, title="What to cut out")
    found = core.add("SAM3_Detect", {"model": sam["MODEL"], "image": picture["IMAGE"], "conditioning": what["CONDITIONING"]},
                     muted=True, column=1)
    core.add("MaskPreview", {"mask": found["masks"]}, muted=True, room=220, column=1, title="The mask: connect it")
    ids = board.group("3  Look at the scarf, put it into the prompt", (2, 0), GREEN)
    scarf = extract(ids, world, picture["IMAGE"], mask)
    prompt = ids.add("Likeness_EncodePrompt", {
        "clip": world["clip"], "text": "a photo of a blue and white striped cat with a scarf in the snow", "word": "scarf"})
    empty = ids.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = inject(ids, world["model"], prompt["conditioning"], empty["CONDITIONING"], scarf, prompt["word"], column=1)
    pictures = sample(board, (3, 0), into["model"], into["positive"], into["negative"], world["vae"], 3)
    result(board, (4, 0), pictures, "try on", into["text"])


def mix(board: Board) -> None:
    world, group = start(board)
    image, mask = cut_out_picture(group, "likeness_cat_3")
    core_cut_out(board, image, (1, 2))
    ids = board.group("3  The look of the cat, the word duck", (2, 0), GREEN)
    cat = extract(ids, world, image, mask)
    prompt = ids.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": "a photo of a duck on the beach", "word": "duck"})
    empty = ids.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = inject(ids, world["model"], prompt["conditioning"], empty["CONDITIONING"], cat, prompt["word"], column=1)
    pictures = sample(board, (3, 0), into["model"], into["positive"], into["negative"], world["vae"], 5)
    result(board, (4, 0), pictures, "mix", into["text"])


STORY = ("a photo of a bear in a room", "a photo of a bear in the forest", "a photo of a bear on the beach",
         "a photo of a bear at night")


def story(board: Board) -> None:
    world, group = start(board)
    image, mask = cut_out_picture(group, "likeness_bear")
    bear = extract(group, world, image, mask, column=1)
    core_cut_out(board, image, (1, 2))
    words = board.group("3  The story", (2, 0), PURPLE)
    word = words.add("PrimitiveString", {"value": "bear"}, title="Word of the subject")["STRING"]
    seed = words.add("PrimitiveInt", {"value": 4}, title="Seed of all pictures")["INT"]
    texts = [words.add("PrimitiveStringMultiline", {"value": text}, title=f"Scene {number}", room=30)["STRING"]
             for number, text in enumerate(STORY, 1)]
    scenes, scene = board.group("4  One picture a scene", (3, 0), GREEN), one_scene(board.info)
    pictures = [scenes.add(scene, {
        "model": world["model"], "clip": world["clip"], "vae": world["vae"], "subject": bear, "text": text, "word": word,
        "seed": seed}, title=f"Scene {number}", width=320)["image"] for number, text in enumerate(texts, 1)]
    strip = board.group("5  The strip", (4, 0), BLUE)
    joined = pictures[0]
    for number, picture in enumerate(pictures[1:], 2):
        joined = strip.add("ImageStitch", {"image1": joined, "image2": picture, "direction": "right", "match_image_size": True,
                                           "spacing_width": 2, "spacing_color": "white"},
                           title=f"Scene {number} to the right")["IMAGE"]
    result(board, (5, 0), joined, "story")


RECIPES: dict[str, Callable[[Board], None]] = {
    "1 Subject in a new scene": new_scene, "2 Two subjects": two_subjects, "3 Try on a garment": try_on,
    "4 Mix picture and word": mix, "5 Story strip": story,
}


def build(info: dict) -> dict[str, dict]:
    """Workflow JSON by title."""
    out = {}
    for name, recipe in RECIPES.items():
        board = Board(name, info)
        recipe(board)
        out[name] = board.data()
    return out


def blueprints(info: dict) -> dict[str, dict]:
    """Sub-graph files by name."""
    sub = keep_a_subject(info)
    return {sub.name: sub.blueprint()}


def write_all(client: Client, folder: Path = WORKFLOWS, subgraphs: Path = SUBGRAPHS) -> list[Path]:
    """All JSON files, from what the server says about its nodes."""
    info = client.object_info()
    out = [write(folder / f"{name}.json", data) for name, data in build(info).items()]
    return out + [write(subgraphs / f"{name}.json", data) for name, data in blueprints(info).items()]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="build_workflows")
    parser.add_argument("more", nargs="*", choices=("inputs", "thumbnails", []), help="what to make beside the JSON files")
    args = parser.parse_args(argv)
    if "inputs" in args.more:
        print(*(path.name for path in workflow_pictures.write_inputs(WORKFLOWS / "inputs")), sep="\n")
    with Server() as server:
        print(*(path.name for path in write_all(server)), sep="\n")
        if "thumbnails" in args.more:
            for path in workflow_pictures.write_thumbnails(server):
                print(path.name)
    if not list(WORKFLOWS.glob("*.json")):
        raise HarnessError("Nothing was written.")
    return 0
