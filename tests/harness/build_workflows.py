"""Writes workflows/*.json, subgraphs/*.json and, with words, the pictures beside them.

    python tests/harness build_workflows                  the JSON files
    python tests/harness build_workflows inputs           also the reference pictures (workflows/inputs)
    python tests/harness build_workflows thumbnails       also runs them all and makes the .jpg files
    python tests/harness build_workflows golden           also freezes them (tests/golden/workflows.json)

Widget values live here and nowhere else: change them, run this, look at the pictures, commit all of it.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import workflow_pictures, workflow_portrait
from .canvas import Board, write
from .client import Client
from .paths import ROOT, WORKFLOWS, HarnessError
from .server import Server
from .workflow_guidance import one_to_many, predicted, rounds, subject_where_its_word_is, two_words, visible_mask
from .workflow_inversion import bring_back, change_subject, drawing, exact, fuse_identities, fusion, keep_the_scene
from .workflow_parts import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SAM3,
    SIDE,
    core_cut_out,
    cut_out_picture,
    extract,
    finish,
    inject,
    keep_a_subject,
    one_scene,
    save,
    start,
)
from .workflow_swap import swap_a_face
from .workflow_views import place_it, turn, turntable
from .workflows import load

SUBGRAPHS, GOLDEN = ROOT / "subgraphs", ROOT / "tests" / "golden" / "workflows.json"
MORE = ("inputs", "thumbnails", "golden")


# -- the workflows -----------------------------------------------------------------------------------
def new_scene(board: Board) -> None:
    world, subject = start(board)
    image, mask = cut_out_picture(subject, "likeness_cat")
    core_cut_out(board, image, (1, 2))
    group = board.group("3  Subject into prompt and model", (2, 0), GREEN)
    block = group.add(keep_a_subject(board.info), {
        "model": world["model"], "clip": world["clip"], "adapter": world["adapter"], "encoders": world["encoders"],
        "image": image, "mask": mask}, width=400, room=140)
    finish(board, 3, 4, world, block, 7, "new scene")


def two_subjects(board: Board) -> None:
    world, group = start(board)
    first, first_mask = cut_out_picture(group, "likeness_cat_2", "First subject")
    second, second_mask = cut_out_picture(group, "likeness_bunny", "Second subject", "White on the second", row=1)
    ids = board.group("3  Look at both", (2, 0), GREEN)
    cat, bunny = (extract(ids, world, *args) for args in ((first, first_mask, "First subject"),
                                                          (second, second_mask, "Second subject")))
    core_cut_out(board, first, (1, 2))
    masks = board.group("4  Where each may act", (2, 1), GREY)
    zero = masks.add("SolidMask", {"value": 0.0, "width": SIDE, "height": SIDE}, title="Whole picture, black")
    half = masks.add("SolidMask", {"value": 1.0, "width": SIDE // 2, "height": SIDE}, title="Left half, white")
    left = masks.add("MaskComposite", {"destination": zero["MASK"], "source": half["MASK"], "x": 0, "y": 0,
                                       "operation": "add"}, title="Mask of the first: left", column=1)
    right = masks.add("InvertMask", {"mask": left["MASK"]}, title="Mask of the second: right", column=1)
    words = board.group("5  One sentence for each half", (3, 0), PURPLE)
    one = words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": "a photo of a cat on the beach, left",
                                              "word": "cat"}, title="Left: first subject")
    two = words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": "a photo of a bunny on the beach, right",
                                              "word": "bunny"}, title="Right: second subject")
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = board.group("6  Into model and prompts, one after the other", (4, 0), GREEN)
    a = inject(into, world["model"], one["conditioning"], empty["CONDITIONING"], cat, one["word"], "First subject",
               mask=left["MASK"])
    b = inject(into, a["model"], two["conditioning"], a["negative"], bunny, two["word"], "Second subject", row=1,
               mask=right["MASK"])
    here = into.add("ConditioningSetMask", {"conditioning": a["positive"], "mask": left["MASK"]}, title="Left sentence: left",
                    column=1)
    there = into.add("ConditioningSetMask", {"conditioning": b["positive"], "mask": right["MASK"]}, column=1, row=1,
                     title="Right sentence: right")
    both = into.add("ConditioningCombine", {"conditioning_1": here["CONDITIONING"], "conditioning_2": there["CONDITIONING"]},
                    title="Both", column=2)
    finish(board, 5, 7, world, b, 11, "two subjects", b["text"], positive=both["CONDITIONING"])


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
        "clip": world["clip"], "text": "a photo of a red and white striped cat with a scarf in the forest", "word": "scarf"})
    empty = ids.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = inject(ids, world["model"], prompt["conditioning"], empty["CONDITIONING"], scarf, prompt["word"], column=1)
    finish(board, 3, 4, world, into, 3, "try on", into["text"])


def mix(board: Board) -> None:
    world, group = start(board)
    image, mask = cut_out_picture(group, "likeness_cat_3")
    core_cut_out(board, image, (1, 2))
    ids = board.group("3  The look of the cat, the word duck", (2, 0), GREEN)
    cat = extract(ids, world, image, mask)
    prompt = ids.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": "a photo of a duck on the beach", "word": "duck"})
    empty = ids.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = inject(ids, world["model"], prompt["conditioning"], empty["CONDITIONING"], cat, prompt["word"], column=1)
    finish(board, 3, 4, world, into, 5, "mix", into["text"])


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
    strip = board.group("5  The strip", (4, 0), GREY)
    joined = pictures[0]
    for number, picture in enumerate(pictures[1:], 2):
        joined = strip.add("ImageStitch", {"image1": joined, "image2": picture, "direction": "right", "match_image_size": True,
                                           "spacing_width": 2, "spacing_color": "white"},
                           title=f"Scene {number} to the right")["IMAGE"]
    save(board.group("6  Result", (5, 0), BLUE), joined, "story", room=240)


RECIPES: dict[str, Callable[[Board], None]] = {
    "1 Subject in a new scene": new_scene, "2 Two subjects": two_subjects, "3 Try on a garment": try_on,
    "4 Mix picture and word": mix, "5 Story strip": story,
    "6 Exact inversion": exact, "7 Change the subject, keep the scene": change_subject, "8 Identity fusion": fusion,
    "9 Identity on a drawing": drawing, "10 Turntable": turntable, "11 Place in a background": place_it,
    "12 Swap a face, keep the scene": swap_a_face,
    "13 A mask you can see": visible_mask, "14 Two words, two subjects": two_words,
    "15 Many words of one picture (One2Many)": one_to_many, "16 Predict the mask, edit it, use it": predicted,
    "17 Round after round": rounds,
}
OWN_FILES = workflow_portrait.RECIPES  # these need files that the artist has


def build(info: dict) -> dict[str, dict]:
    """Workflow JSON by title."""
    out = {}
    for name, recipe in {**RECIPES, **OWN_FILES}.items():
        board = Board(name, info)
        recipe(board)
        out[name] = board.data()
    return out


def blueprints(info: dict) -> dict[str, dict]:
    """Sub-graph files by name."""
    makers = (keep_a_subject, bring_back, keep_the_scene, fuse_identities, turn, subject_where_its_word_is)
    return {sub.name: sub.blueprint() for sub in (make(info) for make in makers)}


def signature(workflow: dict) -> dict[str, dict]:
    """What a shipped file relies on, by node id: the node, the order of its widgets, its sockets and outputs in use."""
    inner = workflow["definitions"]["subgraphs"]
    names = {sub["id"] for sub in inner}
    out = {}
    for node in [*workflow["nodes"], *(node for sub in inner for node in sub["nodes"])]:
        used = max((k for k, output in enumerate(node["outputs"], 1) if output["links"]), default=0)
        out[str(node["id"])] = {
            "type": "sub-graph" if node["type"] in names else node["type"], "title": node.get("title", ""),
            "widgets": [item["name"] for item in node["inputs"] if "widget" in item],
            "sockets": [item["name"] for item in node["inputs"] if item["link"] is not None],
            "outputs": [output["name"] for output in node["outputs"][:used]],
        }
    return out


def write_all(client: Client, folder: Path = WORKFLOWS, subgraphs: Path = SUBGRAPHS) -> list[Path]:
    """All JSON files, from what the server says about its nodes."""
    info = client.object_info()
    out = [write(folder / f"{name}.json", data) for name, data in build(info).items()]
    return out + [write(subgraphs / f"{name}.json", data) for name, data in blueprints(info).items()]


def write_golden() -> Path:
    """Freeze what the files hold now."""
    files = [*WORKFLOWS.glob("*.json"), *SUBGRAPHS.glob("*.json")]
    return write(GOLDEN, {path.stem: signature(load(path)) for path in sorted(files)})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="build_workflows")
    parser.add_argument("more", nargs="*", help=f"what to make beside the JSON files: {', '.join(MORE)}")
    more = parser.parse_args(argv).more
    if set(more) - set(MORE):
        raise HarnessError(f"build_workflows knows {', '.join(MORE)}.")
    made = workflow_pictures.write_inputs(WORKFLOWS / "inputs") if "inputs" in more else []
    with Server() as server:
        made += write_all(server)
        if "thumbnails" in more:
            made += workflow_pictures.write_thumbnails(server)
    if "golden" in more:
        made.append(write_golden())
    print("\n".join(path.name for path in made))
    return 0
