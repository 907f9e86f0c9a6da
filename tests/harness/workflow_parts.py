"""What several shipped workflows share: groups that look the same everywhere, and the sub-graphs."""
from __future__ import annotations

from .canvas import Board, Group, Link, Node, Sub
from .workflow_notes import NOTES

BLUEPRINT = "Keep a Subject (CustAny)"
SIDE, PICTURES, ENLARGE = 64, 4, 4.0
SAMPLER = {"steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
BLUE, GREEN, PURPLE, YELLOW, GREY = "#3f789e", "#8A8", "#a1309b", "#b58b2a", "#444"
BIREFNET = {"name": "birefnet.safetensors", "directory": "background_removal",
            "url": "https://huggingface.co/Comfy-Org/BiRefNet/resolve/main/background_removal/birefnet.safetensors"}
SAM3 = {"name": "sam3.1_multiplex_fp16.safetensors", "directory": "checkpoints",
        "url": "https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors"}


def start(board: Board, method: str = "CustAny") -> tuple[Node, Group]:
    """Note and model; also the group of the subject, still empty."""
    board.group("Read me", (0, 0), YELLOW).note(NOTES[board.name], width=460, height=900)
    world = board.group("1  Model", (1, 0), BLUE).add("Likeness_LoadDemo", {"method": method})
    return world, board.group("2  Subject", (1, 1), GREEN)


def empty_latent(board: Board) -> Link:
    """Beside the model: size and number of the pictures."""
    values = {"width": SIDE, "height": SIDE, "batch_size": PICTURES}
    return board.groups[1].add("EmptyLatentImage", values, title="Size and number", column=1)["LATENT"]


def cut_out_picture(group: Group, name: str, title: str = "Reference picture", mask_title: str = "White on the subject",
                    row: int = 0) -> tuple[Link, Link]:
    """A picture whose background is transparent: IMAGE, and a MASK that is white on the subject."""
    picture = group.add("LoadImage", {"image": f"{name}.png"}, title=title, room=230, row=row)
    flip = group.add("InvertMask", {"mask": picture["MASK"]}, title=mask_title, column=1, row=row)
    return picture["IMAGE"], flip["MASK"]


def core_cut_out(board: Board, picture: Link, cell: tuple[int, int]) -> None:
    """The muted group: a MASK from the host's own background removal."""
    group = board.group("Cut out with core nodes (muted: select, Ctrl+M)", cell, GREY)
    loader = group.add("LoadBackgroundRemovalModel", {"bg_removal_name": BIREFNET["name"]}, muted=True, models=(BIREFNET,))
    remove = group.add("RemoveBackground", {"bg_removal_model": loader["bg_model"], "image": picture}, muted=True)
    group.add("MaskPreview", {"mask": remove["mask"]}, muted=True, room=220, column=1, title="The mask: connect it")


def finish(board: Board, column: int, number: int, world: Node, into: Node, seed: int, prefix: str,
           report: Link | None = None, positive: Link | None = None) -> None:
    """Sampling and result, the last two groups. `into` has the outputs of an injector."""
    group = board.group(f"{number}  Sample", (column, 0), PURPLE)
    run = group.add("KSampler", {
        "model": into["model"], "positive": positive or into["positive"], "negative": into["negative"],
        "latent_image": empty_latent(board), "seed": seed, **SAMPLER}, room=120)
    group = board.group(f"{number + 1}  Result", (column + 1, 0), BLUE)
    pictures = group.add("VAEDecode", {"samples": run["LATENT"], "vae": world["vae"]}, width=420)
    save(group, pictures["IMAGE"], prefix)
    if report is not None:
        group.add("PreviewAny", {"source": report}, title="What the injector did", room=160)


def save(group: Group, pictures: Link, prefix: str, room: int = 420) -> None:
    """Enlarged for the eye, then saved."""
    big = group.add("ImageScaleBy", {"image": pictures, "upscale_method": "nearest-exact", "scale_by": ENLARGE},
                    title="Enlarge the tiny pictures", width=420)
    group.add("SaveImage", {"images": big["IMAGE"], "filename_prefix": f"likeness/{prefix}"}, room=room)


def inject(group: Group, model: Link, positive: Link, negative: Link, subject: Link, word: Link, title: str = "",
           column: int = 0, row: int = 0, mask: Link | None = None, guidance: Link | None = None) -> Node:
    values = {"model": model, "positive": positive, "negative": negative, "subject": subject, "word": word,
              **({"mask": mask} if mask else {}), **({"guidance": guidance} if guidance else {})}
    return group.add("Likeness_DualLevelInjector", values, title=title, column=column, row=row)


def extract(group: Group, world: Node, image: Link, mask: Link, title: str = "", column: int = 0) -> Link:
    values = {"adapter": world["adapter"], "encoders": world["encoders"], "image": image, "mask": mask}
    return group.add("Likeness_ExtractID", values, title=title, column=column, room=230)["subject"]


# -- sub-graphs --------------------------------------------------------------------------------------
def picture_and_words(sub: Sub, text: str, word: str) -> tuple[Link, Node, Node, Node]:
    """How a subject's block begins: (model, ID Extractor, Subject Prompt, negative prompt)."""
    model, clip = sub.input("model", "MODEL"), sub.input("clip", "CLIP")
    adapter, encoders = sub.input("adapter", "LIKENESS_ADAPTER"), sub.input("encoders", "LIKENESS_ENCODERS")
    image, mask = sub.input("image", "IMAGE"), sub.input("mask", "MASK", required=False)
    seen = sub.group("The subject", (0, 0), GREEN).add(
        "Likeness_ExtractID", {"adapter": adapter, "encoders": encoders, "image": image, "mask": mask}, room=230)
    words = sub.group("The words", (0, 1), PURPLE)
    prompt = words.add("Likeness_EncodePrompt", {"clip": clip, "text": text, "word": word})
    empty = words.add("CLIPTextEncode", {"clip": clip, "text": ""}, title="Negative prompt")
    return model, seen, prompt, empty


def keep_a_subject(info: dict, text: str = "a photo of a cat in the snow", word: str = "cat") -> Sub:
    """The method as one block: a picture and a prompt in, a model and prompts for any sampler out."""
    sub = Sub(BLUEPRINT, info, "Keeps the subject of a reference picture in new pictures: looks at the picture, "
              "finds the subject's word in the prompt and brings the subject into both prompt and model (CustAny).")
    model, seen, prompt, empty = picture_and_words(sub, text, word)
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
    prompt = words.add("Likeness_EncodePrompt", {"clip": clip, "text": "", "word": "bear"})
    empty = words.add("CLIPTextEncode", {"clip": clip, "text": ""}, title="Negative prompt")
    latent = words.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1})
    into = inject(sub.group("Into prompt and model", (1, 0), BLUE), model, prompt["conditioning"], empty["CONDITIONING"],
                  subject, prompt["word"])
    group = sub.group("Sample", (2, 0), PURPLE)
    run = group.add("KSampler", {
        "model": into["model"], "positive": into["positive"], "negative": into["negative"],
        "latent_image": latent["LATENT"], "seed": 1, **SAMPLER}, room=120)
    picture = group.add("VAEDecode", {"samples": run["LATENT"], "vae": vae})
    sub.promote("text", prompt, "text")
    sub.promote("word", prompt, "word")
    sub.promote("seed", run, "seed")
    sub.output("image", picture["IMAGE"])
    return sub
