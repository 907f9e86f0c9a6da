"""The shipped workflows of RealCustom++: the subject acts where the model draws its word; and their block."""
from __future__ import annotations

from .canvas import Board, Group, Link, Node, Sub
from .workflow_inversion import stitch
from .workflow_parts import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SAMPLER,
    SIDE,
    core_cut_out,
    cut_out_picture,
    extract,
    inject,
    picture_and_words,
    save,
    start,
)

METHOD = "RealCustom++"
WHERE = "Subject where its Word is (RealCustom++)"
PICTURES, REFRESH = 3, 10
SHARES, NECK = 64, 40  # the picture's height in equal parts, and how many of them lie above the neck of a creature
WHITE, BLACK = 0xffffff, 0
# what the miniature needs: its fine layers know outlines best, and its masks have 8 x 8 cells
GUIDED = {"scope": 0.22, "refresh_until_step": REFRESH, "values": "binary", "layers": "finest of the way up"}


def subject_where_its_word_is(info: dict, **values: object) -> Sub:
    """The method as one block: a picture and a prompt in, a guided model and prompts for any sampler out.

    values: of the Guidance Mask Generator; without any it has the release's."""
    sub = Sub(WHERE, info, "Keeps the subject of a reference picture, and lets it act only where the model itself is drawing its "
              "word: looks at the picture, finds the word, makes the mask while sampling (RealCustom++). New from the library it "
              "has the release's values, for SDXL: scope 0.25, refresh_until_step 12 of 25 steps, soft, all layers. For the "
              "miniature set 0.22, 10, binary, finest of the way up.")
    model, seen, prompt, empty = picture_and_words(sub, "a photo of a cat on the beach", "cat")
    guide = sub.group("Where", (1, 0), GREY).add("Likeness_GuidanceMask", {"word": prompt["word"], **values})["guidance"]
    into = inject(sub.group("Into the model", (2, 0), BLUE), model, prompt["conditioning"], empty["CONDITIONING"],
                  seen["subject"], prompt["word"], guidance=guide)
    for name, node, widget in (("text", prompt, "text"), ("word", prompt, "word"), ("negative_text", empty, "text"),
                               ("local_strength", into, "local_strength")):
        sub.promote(name, node, widget)
    node = sub.by_id(guide.node)
    for name in ("scope", "refresh_until_step", "values", "layers"):
        sub.promote(name, node, name)
    sub.preview(seen)
    for name in ("model", "positive", "negative"):
        sub.output(name, into[name])
    sub.output("guidance", guide)
    return sub


def guided(group: Group, word: Link, title: str = "", column: int = 0, **values: object) -> Link:
    """GUIDANCE of a word."""
    return group.add("Likeness_GuidanceMask", {"word": word, **GUIDED, **values}, title=title, column=column)["guidance"]


def begin(board: Board, count: int = PICTURES) -> tuple[Node, Group, Link, Link]:
    """(miniature, group of the subject, empty latent, seed): one seed for all samplers, so that they can be compared."""
    world, group = start(board, METHOD)
    model = board.groups[1]
    latent = model.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": count}, title="Size and number",
                       column=1)["LATENT"]
    return world, group, latent, model.add("PrimitiveInt", {"value": 7}, title="Seed of all pictures", column=1)["INT"]


def sample(group: Group, world: Node, model: Link, positive: Link, negative: Link, latent: Link, seed: Link, title: str,
           row: int = 0) -> tuple[Link, Link]:
    """(LATENT, IMAGE)."""
    run = group.add("KSampler", {"model": model, "positive": positive, "negative": negative, "latent_image": latent,
                                 "seed": seed, **SAMPLER}, title=title, room=120, row=row)["LATENT"]
    return run, group.add("VAEDecode", {"samples": run, "vae": world["vae"]}, title=f"Decode: {title.lower()}", row=row)["IMAGE"]


def plain_words(group: Group, world: Node, text: Link, row: int) -> Link:
    return group.add("CLIPTextEncode", {"clip": world["clip"], "text": text}, title="The same words, no subject",
                     row=row)["CONDITIONING"]


def shown(group: Group, guidance: Link, latent: Link, picture: Link, title: str = "", **widgets: str) -> Link:
    """The preview of a run."""
    return group.add("Likeness_PreviewGuidance", {"guidance": guidance, "latent": latent, "image": picture, **widgets},
                     room=420, width=420, title=title)["masks"]


def as_large(group: Group, mask: Link, picture: Link, of: str = "", method: str = "nearest-exact", column: int = 1) -> Link:
    """Masks as pictures of the size of others, whatever that is."""
    plain = group.add("MaskToImage", {"mask": mask}, column=column, title=f"Masks as pictures{of}")
    size = group.add("GetImageSize", {"image": picture}, column=column, title=f"Size of the picture{of}")
    return group.add("ImageScale", {"image": plain["IMAGE"], "upscale_method": method, "width": size["width"],
                                    "height": size["height"], "crop": "disabled"}, column=column,
                     title=f"Mask: as large as the picture{of}")["IMAGE"]


def visible_mask(board: Board) -> None:
    world, group, latent, seed = begin(board)
    image, mask = cut_out_picture(group, "likeness_cat_2")
    core_cut_out(board, image, (1, 2))
    words = board.group("3  The sentence", (2, 0), PURPLE)
    text = words.add("PrimitiveStringMultiline", {"value": "a photo of a cat on the beach, left"}, title="Sentence",
                     room=30)["STRING"]
    what = subject_where_its_word_is(board.info, **GUIDED)
    block = board.group("4  Subject, only where its word is", (3, 0), GREEN).add(what, {
        "model": world["model"], "clip": world["clip"], "adapter": world["adapter"], "encoders": world["encoders"],
        "image": image, "mask": mask, "text": text}, width=400, room=140)
    runs = board.group("5  The same seed, with and without", (4, 0), PURPLE)
    run, with_it = sample(runs, world, block["model"], block["positive"], block["negative"], latent, seed, "With the subject")
    plain = plain_words(runs, world, text, 1)
    without = sample(runs, world, world["model"], plain, block["negative"], latent, seed, "Text alone", 1)[1]
    look = board.group("6  The mask of this very run", (5, 0), GREY)
    shown(look, block["guidance"], run, with_it, "Step by step")
    last = shown(look, block["guidance"], run, with_it, "The last mask of each picture", steps="last")
    where = as_large(look, last, with_it)
    joined = stitch(board.group("7  Text alone, mask, with the subject", (6, 0), GREY), [without, where, with_it])
    save(board.group("8  Result", (7, 0), BLUE), joined, "visible mask")


def halves(group: Group, left: Link, right: Link) -> Link:
    """Each sentence counts in its half: CONDITIONING of both."""
    zero = group.add("SolidMask", {"value": 0.0, "width": SIDE, "height": SIDE}, title="Whole picture, black")
    half = group.add("SolidMask", {"value": 1.0, "width": SIDE // 2, "height": SIDE}, title="Left half, white")
    here = group.add("MaskComposite", {"destination": zero["MASK"], "source": half["MASK"], "x": 0, "y": 0, "operation": "add"},
                     title="Left")
    there = group.add("InvertMask", {"mask": here["MASK"]}, title="Right")
    placed = [group.add("ConditioningSetMask", {"conditioning": words, "mask": mask["MASK"]}, column=1, title=title)
              for words, mask, title in ((left, here, "Left sentence: left"), (right, there, "Right sentence: right"))]
    return group.add("ConditioningCombine", {"conditioning_1": placed[0]["CONDITIONING"],
                                             "conditioning_2": placed[1]["CONDITIONING"]}, column=1, title="Both")["CONDITIONING"]


def both_sentences(board: Board, world: Node, scene: str, kinds: tuple[str, str]) -> tuple[Node, Node, Link, Link, list[Link]]:
    """Groups 4 to 6: (left prompt, right prompt, both sentences, negative, guidance of each word)."""
    words = board.group("4  Two sentences, two words", (3, 0), PURPLE)
    one, two = (words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": f"a photo of a {kind} {scene}, {place}",
                                                    "word": kind}, title=f"{place.capitalize()}: {kind}")
                for kind, place in zip(kinds, ("left", "right"), strict=True))
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")["CONDITIONING"]
    both = halves(board.group("5  A half for each sentence", (4, 0), GREY), one["conditioning"], two["conditioning"])
    where = board.group("6  Where the model draws each word", (4, 1), GREY)
    guides = [guided(where, word["word"], f"Where the {kind} is", column=column)
              for column, (word, kind) in enumerate(zip((one, two), kinds, strict=True))]
    return one, two, both, empty, guides


def two_words(board: Board) -> None:
    world, group, latent, seed = begin(board)
    a, a_mask = cut_out_picture(group, "likeness_cat_2", "First subject")
    b, b_mask = cut_out_picture(group, "likeness_bunny", "Second subject", "White on the second", row=1)
    core_cut_out(board, a, (1, 2))
    ids = board.group("3  Look at both", (2, 0), GREEN)
    cat, bunny = (extract(ids, world, *args) for args in ((a, a_mask, "First subject"), (b, b_mask, "Second subject")))
    one, two, both, empty, (first, second) = both_sentences(board, world, "in the snow", ("cat", "bunny"))
    into = board.group("7  Both into the model, one after the other", (5, 0), GREEN)
    left = inject(into, world["model"], both, empty, cat, one["word"], "First subject", guidance=first)
    last = inject(into, left["model"], left["positive"], left["negative"], bunny, two["word"], "Second subject", guidance=second)
    runs = board.group("8  The same seed, with and without", (6, 0), PURPLE)
    run, with_them = sample(runs, world, last["model"], last["positive"], last["negative"], latent, seed, "With both subjects")
    without = sample(runs, world, world["model"], both, empty, latent, seed, "Text alone", 1)[1]
    look = board.group("9  The masks of this very run", (7, 0), GREY)
    areas = [as_large(look, shown(look, guide, run, with_them, f"Last masks of the {of}", steps="last"), with_them, f", {of}")
             for guide, of in ((first, "first"), (second, "second"))]
    joined = stitch(board.group("10  Both, where the first is, where the second is, text alone", (8, 0), GREY),
                    [with_them, *areas, without])
    out = board.group("11  Result", (9, 0), BLUE)
    save(out, joined, "two words")
    out.add("PreviewAny", {"source": last["text"]}, title="What the second injector did", room=160)


def one_to_many(board: Board) -> None:
    world, group, latent, seed = begin(board)
    image, mask = cut_out_picture(group, "likeness_cat_2")
    core_cut_out(board, image, (1, 2))
    subject = extract(board.group("3  Look at it, once", (2, 0), GREEN), world, image, mask)
    one, two, both, empty, (first, second) = both_sentences(board, world, "in the forest", ("cat", "duck"))
    into = board.group("7  One picture, word by word", (5, 0), GREEN)
    cat = inject(into, world["model"], both, empty, subject, one["word"], "Only the cat", guidance=first)
    duck = inject(into, world["model"], both, empty, subject, two["word"], "Only the duck", guidance=second)
    all_ = inject(into, cat["model"], cat["positive"], cat["negative"], subject, two["word"], "The duck too", guidance=second)
    runs = board.group("8  The same seed, four times", (6, 0), PURPLE)
    pictures = []
    for row, (node, title) in enumerate(((cat, "Cat"), (duck, "Duck"), (all_, "Cat and duck"))):
        run, made = sample(runs, world, node["model"], node["positive"], node["negative"], latent, seed, title, row)
        pictures.append(made)
    pictures.append(sample(runs, world, world["model"], both, empty, latent, seed, "Text alone", 3)[1])
    shown(board.group("9  The masks of the last run", (7, 0), GREY), first, run, made, words="every word of the run")
    joined = stitch(board.group("10  Cat, duck, both, text alone", (8, 0), GREY), pictures)
    save(board.group("11  Result", (9, 0), BLUE), joined, "one to many")


def predicted(board: Board) -> None:
    world, group, latent, seed = begin(board)
    image, mask = cut_out_picture(group, "likeness_cat")
    core_cut_out(board, image, (1, 2))
    subject = extract(group, world, image, mask, column=2)
    words = board.group("3  The sentence", (2, 0), PURPLE)
    prompt = words.add("Likeness_EncodePrompt", {"clip": world["clip"], "text": "a photo of a cat on the beach, center",
                                                 "word": "cat"})
    empty = words.add("CLIPTextEncode", {"clip": world["clip"], "text": ""}, title="Negative prompt")["CONDITIONING"]
    before = board.group("4  Before: where will it be?", (3, 0), GREY)
    sampling = {"steps": SAMPLER["steps"], "scheduler": SAMPLER["scheduler"]}
    seen = before.add("Likeness_PredictMask", {
        "model": world["model"], "positive": prompt["conditioning"], "word": prompt["word"], "seed": seed, "width": SIDE,
        "height": SIDE, **sampling, "stop_step": 8, "scope": GUIDED["scope"], "values": GUIDED["values"],
        "layers": GUIDED["layers"], "latent": latent, "negative": empty, "cfg": SAMPLER["cfg"]}, room=300, width=420)
    edit = board.group("5  Edit it", (3, 1), GREY)
    keep, away = (edit.add("EmptyImage", {"width": SHARES, "height": height, "batch_size": 1, "color": colour}, title=title)
                  for height, colour, title in ((NECK, WHITE, "White: the upper part stays"),
                                                (SHARES - NECK, BLACK, "Black: the lower part goes")))
    bars = edit.add("ImageStitch", {"image1": keep["IMAGE"], "image2": away["IMAGE"], "direction": "down",
                                    "match_image_size": False, "spacing_width": 0, "spacing_color": "white"},
                    title="One below the other")
    size = edit.add("GetImageSize", {"image": seen["image"]}, column=1)
    large = edit.add("ImageScale", {"image": bars["IMAGE"], "upscale_method": "nearest-exact", "width": size["width"],
                                    "height": size["height"], "crop": "disabled"}, column=1, title="As large as the picture")
    limit = edit.add("ImageToMask", {"image": large["IMAGE"], "channel": "red"}, column=1, title="What stays")
    cut = edit.add("MaskComposite", {"destination": seen["mask"], "source": limit["MASK"], "x": 0, "y": 0,
                                     "operation": "multiply"}, column=1, title="Take the body away")
    edit.add("MaskPreview", {"mask": cut["MASK"]}, column=1, title="The edited mask", room=220)
    paint = board.group("Paint it by hand (muted: select, Ctrl+M)", (3, 2), GREY)
    joined = paint.add("JoinImageWithAlpha", {"image": seen["image"], "alpha": seen["mask"]}, muted=True,
                       title="The mask into the picture's alpha")
    paint.add("SaveImage", {"images": joined["IMAGE"], "filename_prefix": "likeness/mask to paint"}, muted=True, room=220,
              title="Save it for the mask editor")
    where = board.group("6  The mask as it was, and edited", (4, 0), GREY)
    as_seen, edited = (guided(where, prompt["word"], title, mask=link, mask_use="replace")
                       for link, title in ((seen["mask"], "As predicted"), (cut["MASK"], "Edited")))
    into = board.group("7  Subject into the model", (5, 0), GREEN)
    both = [inject(into, world["model"], prompt["conditioning"], empty, subject, prompt["word"], title, guidance=link)
            for link, title in ((as_seen, "As predicted"), (edited, "Edited"))]
    runs = board.group("8  The same seed, three times", (6, 0), PURPLE)
    pictures = [sample(runs, world, world["model"], prompt["conditioning"], empty, latent, seed, "Text alone")[1]]
    for row, (node, title) in enumerate(zip(both, ("Whole mask", "Edited mask"), strict=True), 1):
        pictures.append(sample(runs, world, node["model"], node["positive"], node["negative"], latent, seed, title, row)[1])
    joined = stitch(board.group("9  Text alone, whole mask, edited mask", (7, 0), GREY), pictures)
    save(board.group("10  Result", (8, 0), BLUE), joined, "predicted mask")


# A creature of the miniature wears one thing, so the sentences name what the reference wears. Only the last word is wider: the
# miniature's attention to the small words of a phrase strays, and no later round is cut out with that mask.
ROUNDS = [(f"a photo of a bunny with a scarf {scene}, center", word)
          for scene, word in (("in the snow", "bunny"), ("on the beach", "bunny"), ("in a room", "bunny with a scarf"))]


def rounds(board: Board) -> None:
    world, group, latent, seed = begin(board, 1)
    image, mask = cut_out_picture(group, "likeness_bunny")
    core_cut_out(board, image, (1, 2))
    block, made, box = subject_where_its_word_is(board.info, **GUIDED), [], 3
    for number, (sentence, word) in enumerate(ROUNDS, 1):
        column = 2 * number
        words = board.group(f"{box}  Round {number}: the sentence", (column, 0), PURPLE)
        text = words.add("PrimitiveStringMultiline", {"value": sentence}, title=f"Sentence {number}", room=30)["STRING"]
        name = words.add("PrimitiveString", {"value": word}, title=f"Word {number}")["STRING"]
        node = board.group(f"{box + 1}  Round {number}: the subject", (column, 1), GREEN).add(block, {
            "model": world["model"], "clip": world["clip"], "adapter": world["adapter"], "encoders": world["encoders"],
            "image": image, "mask": mask, "text": text, "word": name}, title=f"Round {number}", width=400, room=140)
        run, image = sample(board.group(f"{box + 2}  Round {number}: the picture", (column + 1, 0), PURPLE), world,
                            node["model"], node["positive"], node["negative"], latent, seed, f"Picture {number}")
        made.append(image)
        box += 3
        if number < len(ROUNDS):
            look = board.group(f"{box}  Its own mask cuts it out for round {number + 1}", (column + 1, 1), GREY)
            of = f", round {number}"
            last = shown(look, node["guidance"], run, image, f"Last mask of round {number}", steps="last")
            # a soft mask is faint where the subject acts little, and the cut-out shall be whole
            whole = look.add("ThresholdMask", {"mask": last, "value": 0.0}, column=1, title=f"All that is not black{of}")["MASK"]
            large = as_large(look, whole, image, of, "bilinear")
            grey = look.add("ImageToMask", {"image": large, "channel": "red"}, column=1, title=f"Back to a mask{of}")["MASK"]
            mask = look.add("ThresholdMask", {"mask": grey, "value": 0.5}, column=1, title=f"White on the subject{of}")["MASK"]
            box += 1
    joined = stitch(board.group(f"{box}  Side by side", (2 * len(ROUNDS) + 2, 0), GREY), made)
    save(board.group(f"{box + 1}  Result", (2 * len(ROUNDS) + 3, 0), BLUE), joined, "rounds", room=240)
