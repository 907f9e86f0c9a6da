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
BACK = "Bring a Picture Back (ResInversion)"
FUSE = "From One Identity to Another (CustomEnhancer)"
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


def walk(sub: Sub, where: tuple[int, int], guider: Link, model: Link, latent: Link, vae: Link,
         mask: Link | None = None, many: Link | None = None) -> tuple[Node, Node, Node, Link]:
    """Records a latent and replays it (or a batch of it): (steps, recording, BiMD Sampler, picture)."""
    first = sub.group("Record", where, GREEN)
    steps = first.add("BasicScheduler", {"model": model, **SCHEDULE})
    recorded = first.add("Likeness_ResInversion", {"guider": guider, "sigmas": steps["SIGMAS"], "latent_image": latent})
    second = sub.group("Replay", (where[0] + 1, where[1]), PURPLE)
    sampler = second.add("Likeness_BiMDSampler", {"inversion": recorded["inversion"], **({"mask": mask} if mask else {})})
    noise = second.add("DisableNoise", {})
    run = second.add("SamplerCustomAdvanced", {
        "noise": noise["NOISE"], "guider": guider, "sampler": sampler["sampler"], "sigmas": recorded["sigmas"],
        "latent_image": many or latent}, column=1)
    picture = second.add("VAEDecode", {"samples": run["output"], "vae": vae}, column=1)
    return steps, recorded, sampler, picture["IMAGE"]


def bring_back(info: dict) -> Sub:
    """A picture and its prompt in, the same picture and its recording out."""
    sub = Sub(BACK, info, "Inverts a picture and brings it back: records the picture's way to noise (ResInversion) and walks it "
              "down again. Nothing is changed; the recording can be judged, saved and edited.")
    model, positive, negative, vae, image = (sub.input(*pair) for pair in (
        ("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("vae", "VAE"), ("image", "IMAGE")))
    ready = sub.group("Guide", (0, 0), GREY)
    guider = ready.add("CFGGuider", {"model": model, "positive": positive, "negative": negative, "cfg": CFG})
    latent = ready.add("VAEEncode", {"pixels": image, "vae": vae})["LATENT"]
    steps, recorded, sampler, picture = walk(sub, (1, 0), guider["GUIDER"], model, latent, vae)
    for name, node in (("manipulation_start", sampler), ("cfg", guider), ("steps", steps), ("closed_loop", recorded)):
        sub.promote(name, node, name)
    sub.output("image", picture)
    sub.output("inversion", recorded["inversion"])
    sub.output("guider", guider["GUIDER"])
    return sub


def fuse_identities(info: dict) -> Sub:
    """A picture and two identities in, the way from one to the other in the same scene out."""
    sub = Sub(FUSE, info, "The way from one identity to another inside a picture: inverts the picture and replays it once for "
              "each mixture, the first picture with the first identity alone, the last one with the second alone.")
    names = (("model", "MODEL"), ("first", "CONDITIONING"), ("second", "CONDITIONING"), ("free", "CONDITIONING"),
             ("negative", "CONDITIONING"), ("vae", "VAE"), ("image", "IMAGE"))
    model, first, second, free, negative, vae, image = (sub.input(*pair) for pair in names)
    mix = sub.group("Two identities", (0, 0), GREY)
    guider = mix.add("Likeness_EnhancerGuider", {"model": model, "positive": first, "free": free, "negative": negative,
                                                 "cfg": CFG})
    both = mix.add("Likeness_IdentityFusion", {"guider": guider["guider"], "positive": second, "weight": 1.0, "keep": 0.0,
                                               "path": True})
    latent = mix.add("VAEEncode", {"pixels": image, "vae": vae}, column=1)["LATENT"]
    many = mix.add("RepeatLatentBatch", {"samples": latent, "amount": 5}, column=1, title="Pictures on the way")
    steps, recorded, sampler, pictures = walk(sub, (1, 0), both["guider"], model, latent, vae, many=many["LATENT"])
    for name, node, widget in (("pictures", many, "amount"), ("manipulation_start", sampler, "manipulation_start"),
                               ("forward_strength", sampler, "forward_strength"), ("cfg", guider, "cfg"),
                               ("steps", steps, "steps")):
        sub.promote(name, node, widget)
    sub.output("images", pictures)
    sub.output("inversion", recorded["inversion"])
    return sub


def keep_the_scene(info: dict) -> Sub:
    """A picture and three prompts in, the same scene with another subject out."""
    sub = Sub(KEEP, info, "Inverts a picture and lets a subject work inside it: records the picture's way to noise "
              "(ResInversion) and walks it down again with the identity (BiMD). One dial says how much of the scene stays.")
    model, positive, free, negative, vae, image = (sub.input(*pair) for pair in (
        ("model", "MODEL"), ("positive", "CONDITIONING"), ("free", "CONDITIONING"), ("negative", "CONDITIONING"),
        ("vae", "VAE"), ("image", "IMAGE")))
    mask = sub.input("mask", "MASK", required=False)
    ready = sub.group("Guide", (0, 0), GREY)
    latent = ready.add("VAEEncode", {"pixels": image, "vae": vae})["LATENT"]
    guider = ready.add("Likeness_EnhancerGuider", {"model": model, "positive": positive, "free": free, "negative": negative,
                                                   "cfg": CFG})
    steps, recorded, sampler, picture = walk(sub, (1, 0), guider["guider"], model, latent, vae, mask)
    for name in ("manipulation_start", "forward_strength", "backward_strength"):
        sub.promote(name, sampler, name)
    sub.promote("cfg", guider, "cfg")
    sub.promote("steps", steps, "steps")
    sub.output("image", picture)
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
    words = board.group("3  What it shows", (2, 0), PURPLE)
    now = words.add("CLIPTextEncode", {"clip": world["clip"], "text": "a photo of a bear on the beach, left"},
                    title="What the picture shows")
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")
    there = board.group("4  Record it, bring it back", (3, 0), GREEN)
    back = there.add(bring_back(board.info), {"model": world["model"], "positive": now["CONDITIONING"],
                                              "negative": empty["CONDITIONING"], "vae": world["vae"], "image": picture},
                     width=340)
    report = board.group("5  What the recording is worth", (3, 1), GREY)
    judged = report.add("Likeness_InversionReport", {"inversion": back["inversion"], "vae": world["vae"],
                                                     "guider": back["guider"]}, room=230)
    report.add("PreviewAny", {"source": judged["text"]}, title="What it says", room=160, column=1)
    out = board.group("6  Result", (4, 0), BLUE)
    save(out, back["image"], "exact inversion", room=240)
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
    way = board.group("5  From the first to the second", (3, 0), GREEN)
    mixed = way.add(fuse_identities(board.info), {
        "model": b["model"], "first": a["positive"], "second": b["positive"], "free": prompt["conditioning"],
        "negative": b["negative"], "vae": world["vae"], "image": scene}, width=360)
    report = board.group("6  The recording", (4, 1), GREY)
    judged = report.add("Likeness_InversionReport", {"inversion": mixed["inversion"], "vae": world["vae"]}, room=230)
    strip = report.add("ImageScaleBy", {"image": judged["strip"], "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                       title="Enlarge the tiny strip", column=1)
    report.add("PreviewImage", {"images": strip["IMAGE"]}, title="From noise to the picture", room=160, column=1)
    out = board.group("7  Result", (5, 0), BLUE)
    grid = out.add("ImageGrid", {"images": mixed["images"], "columns": 5, "cell_width": SIDE, "cell_height": SIDE, "padding": 0})
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
