"""The shipped workflows that begin with a picture and invert it, and their block."""
from __future__ import annotations

from .canvas import Board, Group, Link, Node, Sub
from .workflow_parts import (
    BLUE,
    ENLARGE,
    GREEN,
    GREY,
    PURPLE,
    SAMPLER,
    SIDE,
    core_cut_out,
    cut_out_picture,
    extract,
    inject,
    save,
    start,
)

KEEP = "Keep the Scene (CustomEnhancer)"
SCHEDULE = {"scheduler": "normal", "steps": 20, "denoise": 1.0}
CFG = 3.0


def small(group: Group, name: str, title: str, row: int = 0) -> Link:
    """An opaque picture at the miniature's size."""
    picture = group.add("LoadImage", {"image": f"{name}.png"}, title=title, room=230, row=row)
    return group.add("ImageScale", {"image": picture["IMAGE"], "upscale_method": "area", "width": SIDE, "height": SIDE,
                                    "crop": "center"}, title=f"Size: {title.lower()}", row=row)["IMAGE"]


def scene_by_text(group: Group, world: Node, text: str, seed: int) -> Link:
    """The scene picture as in the paper: the base model makes it from words alone."""
    words = group.add("CLIPTextEncode", {"clip": world["clip"], "text": text}, title="The scene in words")
    empty = group.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt of the scene")
    latent = group.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1})
    run = group.add("KSampler", {
        "model": world["model"], "positive": words["CONDITIONING"], "negative": empty["CONDITIONING"],
        "latent_image": latent["LATENT"], "seed": seed, **SAMPLER}, room=120, column=1)
    picture = group.add("VAEDecode", {"samples": run["LATENT"], "vae": world["vae"]}, title="Decode the scene", column=1)["IMAGE"]
    group.add("PreviewImage", {"images": picture}, title="The scene", room=200, column=1)
    return picture


def record(group: Group, guider: Link, model: Link, latent: Link) -> Node:
    steps = group.add("BasicScheduler", {"model": model, **SCHEDULE})
    return group.add("Likeness_ResInversion", {"guider": guider, "sigmas": steps["SIGMAS"], "latent_image": latent})


def replay(group: Group, guider: Link, inversion: Node, latent: Link, vae: Link) -> Link:
    """The picture out of a recording."""
    sampler = group.add("Likeness_BiMDSampler", {"inversion": inversion["inversion"]})
    noise = group.add("DisableNoise", {})
    run = group.add("SamplerCustomAdvanced", {
        "noise": noise["NOISE"], "guider": guider, "sampler": sampler["sampler"], "sigmas": inversion["sigmas"],
        "latent_image": latent}, column=1)
    return group.add("VAEDecode", {"samples": run["output"], "vae": vae}, column=1)["IMAGE"]


def keep_the_scene(info: dict) -> Sub:
    """A picture and three prompts in, the same scene with another subject out."""
    sub = Sub(KEEP, info, "Inverts a picture and lets a subject work inside it: records the picture's way to noise "
              "(ResInversion) and walks it down again with the identity (BiMD). One dial says how much of the scene stays.")
    model, positive, free, negative, vae, image = (sub.input(*pair) for pair in (
        ("model", "MODEL"), ("positive", "CONDITIONING"), ("free", "CONDITIONING"), ("negative", "CONDITIONING"),
        ("vae", "VAE"), ("image", "IMAGE")))
    mask = sub.input("mask", "MASK", required=False)
    first = sub.group("Record", (0, 0), GREEN)
    latent = first.add("VAEEncode", {"pixels": image, "vae": vae})["LATENT"]
    guider = first.add("Likeness_EnhancerGuider", {"model": model, "positive": positive, "free": free, "negative": negative,
                                                   "cfg": CFG})
    steps = first.add("BasicScheduler", {"model": model, **SCHEDULE})
    recorded = first.add("Likeness_ResInversion", {"guider": guider["guider"], "sigmas": steps["SIGMAS"],
                                                   "latent_image": latent}, column=1)
    second = sub.group("Replay with the identity", (1, 0), PURPLE)
    sampler = second.add("Likeness_BiMDSampler", {"inversion": recorded["inversion"], "mask": mask})
    noise = second.add("DisableNoise", {})
    run = second.add("SamplerCustomAdvanced", {
        "noise": noise["NOISE"], "guider": guider["guider"], "sampler": sampler["sampler"], "sigmas": recorded["sigmas"],
        "latent_image": latent}, column=1)
    picture = second.add("VAEDecode", {"samples": run["output"], "vae": vae}, column=1)
    for name in ("manipulation_start", "forward_strength", "backward_strength"):
        sub.promote(name, sampler, name)
    sub.promote("cfg", guider, "cfg")
    sub.promote("steps", steps, "steps")
    sub.output("image", picture["IMAGE"])
    sub.output("inversion", recorded["inversion"])
    return sub


def stitch(group: Group, pictures: list[Link]) -> Link:
    joined = pictures[0]
    for number, picture in enumerate(pictures[1:], 2):
        joined = group.add("ImageStitch", {"image1": joined, "image2": picture, "direction": "right", "match_image_size": True,
                                           "spacing_width": 2, "spacing_color": "white"},
                           title=f"Picture {number} to the right")["IMAGE"]
    return joined


def prompts(group: Group, world: Node, subject: Link, now: str, then: str, word: str) -> tuple[Node, Link]:
    """(injector, free conditioning)."""
    free = group.add("CLIPTextEncode", {"clip": world["clip"], "text": now}, title="What the picture shows")
    prompt = group.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": then, "word": word},
                       title="What it shall show")
    empty = group.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    into = inject(group, world["model"], prompt["conditioning"], empty["CONDITIONING"], subject, prompt["word"], column=1)
    return into, free["CONDITIONING"]


def exact(board: Board) -> None:
    world, group = start(board)
    group.title = "2  Picture"
    picture = small(group, "likeness_scene", "Picture")
    words = board.group("3  Record", (2, 0), GREEN)
    now = words.add("CLIPTextEncode", {"clip": world["clip"], "text": "a photo of a bear on the beach, left"},
                    title="What the picture shows")
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    guider = words.add("CFGGuider", {"model": world["model"], "positive": now["CONDITIONING"],
                                     "negative": empty["CONDITIONING"], "cfg": CFG})
    latent = words.add("VAEEncode", {"pixels": picture, "vae": world["vae"]}, column=1)
    recorded = record(words, guider["GUIDER"], world["model"], latent["LATENT"])
    back = board.group("4  Bring it back", (3, 0), PURPLE)
    result = replay(back, guider["GUIDER"], recorded, latent["LATENT"], world["vae"])
    report = board.group("5  What the recording is worth", (3, 1), GREY)
    judged = report.add("Likeness_InversionReport", {"inversion": recorded["inversion"], "vae": world["vae"],
                                                     "guider": guider["GUIDER"]}, room=230)
    report.add("PreviewAny", {"source": judged["text"]}, title="What it says", room=160, column=1)
    out = board.group("6  Result", (4, 0), BLUE)
    save(out, result, "exact inversion", room=240)
    strip = board.group("7  From noise to the picture", (4, 1), BLUE)
    big = strip.add("ImageScaleBy", {"image": judged["strip"], "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                    title="Enlarge the tiny strip", width=420)
    strip.add("SaveImage", {"images": big["IMAGE"], "filename_prefix": "likeness/exact inversion steps"}, room=160,
              title="Save the strip")


def settings_of_the_dial(board: Board, world: Node, into: Node, free: Link, picture: Link, values: tuple[int, ...],
                         prefix: str) -> None:
    """One block a setting of the dial, and their pictures side by side."""
    dial = board.group("5  The dial", (2, 1), PURPLE)
    starts = [dial.add("PrimitiveInt", {"value": value}, title=f"Dial {number}")["INT"] for number, value in enumerate(values, 1)]
    blocks, block = board.group("6  One picture a setting", (3, 0), GREEN), keep_the_scene(board.info)
    pictures = [blocks.add(block, {
        "model": into["model"], "positive": into["positive"], "free": free, "negative": into["negative"], "vae": world["vae"],
        "image": picture, "manipulation_start": at}, title=f"Dial {number}", width=340)["image"]
        for number, at in enumerate(starts, 1)]
    joined = stitch(board.group("7  Side by side", (4, 0), GREY), pictures)
    save(board.group("8  Result", (5, 0), BLUE), joined, prefix, room=240)


def change_subject(board: Board) -> None:
    world, group = start(board)
    image, mask = cut_out_picture(group, "likeness_bunny")
    subject = extract(group, world, image, mask, column=1)
    core_cut_out(board, image, (1, 3))
    scene = scene_by_text(board.group("3  Scene", (1, 2), GREEN), world,
                          "a photo of a red and white striped bunny in the forest, left", 5)
    into, free = prompts(board.group("4  Three prompts", (2, 0), PURPLE), world, subject,
                         *["a photo of a bunny in the forest, left"] * 2, "bunny")
    settings_of_the_dial(board, world, into, free, scene, (0, 9, 11), "change the subject")


def fusion(board: Board) -> None:
    world, group = start(board)
    image, mask = cut_out_picture(group, "likeness_bear", "First identity")
    first = extract(group, world, image, mask, "First identity", column=2)
    other, other_mask = cut_out_picture(group, "likeness_bunny", "Second identity", "White on the second", row=1)
    second = extract(group, world, other, other_mask, "Second identity", column=2)
    core_cut_out(board, image, (1, 3))
    scene = scene_by_text(board.group("3  Picture", (1, 2), GREEN), world, "a photo of a yellow bear on the beach, left", 2)
    words = board.group("4  Both identities in one model", (2, 0), PURPLE)
    prompt = words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": "a photo of a bear on the beach, left",
                                                 "word": "bear"})
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    a = inject(words, world["model"], prompt["conditioning"], empty["CONDITIONING"], first, prompt["word"], "First identity")
    b = inject(words, a["model"], prompt["conditioning"], a["negative"], second, prompt["word"], "Second identity", column=1)
    mix = board.group("5  From the first to the second", (3, 0), GREEN)
    guider = mix.add("Likeness_EnhancerGuider", {"model": b["model"], "positive": a["positive"], "free": prompt["conditioning"],
                                                 "negative": b["negative"], "cfg": CFG})
    both = mix.add("Likeness_IdentityFusion", {"guider": guider["guider"], "positive": b["positive"], "weight": 1.0, "keep": 0.0,
                                               "path": True})
    latent = mix.add("VAEEncode", {"pixels": scene, "vae": world["vae"]}, column=1)
    many = mix.add("RepeatLatentBatch", {"samples": latent["LATENT"], "amount": 5}, column=1, title="Pictures on the way")
    recorded = record(mix, both["guider"], world["model"], latent["LATENT"])
    pictures = replay(board.group("6  Replay", (4, 0), PURPLE), both["guider"], recorded, many["LATENT"], world["vae"])
    report = board.group("7  The recording", (4, 1), GREY)
    judged = report.add("Likeness_InversionReport", {"inversion": recorded["inversion"], "vae": world["vae"]}, room=230)
    strip = report.add("ImageScaleBy", {"image": judged["strip"], "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                       title="Enlarge the tiny strip", column=1)
    report.add("PreviewImage", {"images": strip["IMAGE"]}, title="From noise to the picture", room=160, column=1)
    out = board.group("8  Result", (5, 0), BLUE)
    grid = out.add("ImageGrid", {"images": pictures, "columns": 5, "cell_width": SIDE, "cell_height": SIDE, "padding": 0})
    save(out, grid["images"], "identity fusion", room=240)


def drawing(board: Board) -> None:
    world, group = start(board)
    image, mask = cut_out_picture(group, "likeness_bunny")
    subject = extract(group, world, image, mask, column=1)
    core_cut_out(board, image, (1, 3))
    picture = small(board.group("3  Drawing", (1, 2), GREEN), "likeness_drawing", "Drawing")
    into, free = prompts(board.group("4  Three prompts", (2, 0), PURPLE), world, subject,
                         *["a photo of a bear in the forest, center"] * 2, "bear")
    settings_of_the_dial(board, world, into, free, picture, (0, 4, 8), "identity on a drawing")
