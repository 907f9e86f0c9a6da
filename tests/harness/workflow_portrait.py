"""CustomEnhancer end to end on SDXL, as in the paper: scene -> swap -> inversion without the identity -> BiMD with it.

They need files that an artist gets from elsewhere, so nothing here can run them as they are; a test runs them on tiny files of
the same names.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .canvas import Board, Group, Link, Node
from .workflow_notes import note
from .workflow_parts import BLUE, GREEN, GREY, PURPLE, YELLOW

CHECKPOINT, SWAPPER = "sd_xl_base_1.0.safetensors", "inswapper_128.onnx"
PHOTOMAKER, INSTANTID = "photomaker-v1.bin", "ip-adapter.bin"
IDENTITY_NET, DEPTH_NET = "instantid/diffusion_pytorch_model.safetensors", "controlnet-depth-sdxl-1.0.safetensors"
PERSON, DEPTH = "portrait.png", "depth.png"
FACES, INSTANTID_FACES = "buffalo_l", "antelopev2"
# Where each file goes, and what it is.
FOLDERS = {
    CHECKPOINT: ("models/checkpoints", "SDXL base 1.0, or any SDXL checkpoint"),
    SWAPPER: ("models/insightface", "the swapper of insightface"),
    FACES: ("models/insightface/models", "insightface's face pack, a folder of .onnx files"),
    INSTANTID_FACES: ("models/insightface/models", "the face pack that InstantID learned with, a folder of .onnx files"),
    PHOTOMAKER: ("models/photomaker", "PhotoMaker v1 of TencentARC"),
    INSTANTID: ("models/instantid", "ip-adapter.bin of InstantX/InstantID"),
    IDENTITY_NET: ("models/controlnet", "from the folder ControlNetModel of InstantX/InstantID"),
    DEPTH_NET: ("models/controlnet", "an SDXL ControlNet for depth"),
    PERSON: ("input", "a picture of the person with one large face"),
    DEPTH: ("input", "a depth picture of the scenery, near is white"),
}
SAMPLER = {"steps": 30, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
STEPS, START, CFG = 50, 11, 5.0  # the paper's 50 steps of DDIM; the release's first 11 without the identity
SMALL_FACE = "1280"  # of a person far off, near the scene's own width
NEGATIVE = "blurry, low quality, watermark"


class Scene(NamedTuple):
    """text: the scene with a person in it. prompt: the same for PhotoMaker, with its trigger. size: width and height."""
    text: str
    prompt: str
    size: tuple[int, int] = (1024, 1024)


PORTRAIT = Scene("a photo of a woman reading in a sunny library, looking at the camera",
                 "a photo of a woman img reading in a sunny library, looking at the camera")
WIDE = Scene("a wide photo of a mountain lake at dawn, a woman in a red coat on the shore",
             "a wide photo of a mountain lake at dawn, a woman img in a red coat on the shore", (1344, 768))


def begin(board: Board) -> tuple[Node, Node, Node]:
    """(checkpoint, face models of the swapper, swapper)."""
    board.own_files = {name: FOLDERS[name][0] for name in FILES[board.name]}
    board.group("Read me", (0, 0), YELLOW).note(NOTES[board.name], width=460, height=900)
    group = board.group("1  Models", (1, 0), BLUE)
    return (group.add("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
            group.add("Likeness_LoadFaceModels", {"pack": FACES}, title="Faces for the swap"),
            group.add("Likeness_LoadFaceSwapper", {"file": SWAPPER}))


def person(group: Group, models: Node) -> tuple[Link, Link]:
    """(IMAGE, FACES) of the reference."""
    picture = group.add("LoadImage", {"image": PERSON}, title="The person", room=230)["IMAGE"]
    found = group.add("Likeness_AnalyzeFaces", {"face_models": models["face_models"], "image": picture}, room=200,
                      title="The person's face")
    return picture, found["faces"]


def paint(group: Group, base: Node, scene: Scene, depth: bool = False) -> tuple[Link, Link, Link]:
    """(IMAGE, negative CONDITIONING, positive CONDITIONING) of the plain model; depth: a ControlNet leads the scenery.

    The prompts come back without it: the guider's three prompts have to be led alike, else cfg drives away from the lead."""
    words = group.add("CLIPTextEncode", {"clip": base["CLIP"], "text": scene.text}, title="The scene in words")
    no = group.add("CLIPTextEncode", {"clip": base["CLIP"], "text": NEGATIVE}, title="Negative prompt")
    positive, negative = words["CONDITIONING"], no["CONDITIONING"]
    if depth:
        net = group.add("ControlNetLoader", {"control_net_name": DEPTH_NET})
        picture = group.add("LoadImage", {"image": DEPTH}, title="Depth of the scenery", room=230)
        led = group.add("ControlNetApplyAdvanced", {"positive": positive, "negative": negative, "control_net": net["CONTROL_NET"],
                                                    "image": picture["IMAGE"], "strength": 0.6}, column=1)
        positive, negative = led["positive"], led["negative"]
    latent = group.add("EmptyLatentImage", {"width": scene.size[0], "height": scene.size[1], "batch_size": 1}, column=1)
    run = group.add("KSampler", {"model": base["MODEL"], "positive": positive, "negative": negative, "seed": 7,
                                 "latent_image": latent["LATENT"], **SAMPLER}, room=60, column=1)
    picture = group.add("VAEDecode", {"samples": run["LATENT"], "vae": base["VAE"]}, title="Decode the scene", column=1)["IMAGE"]
    group.add("PreviewImage", {"images": picture}, title="The scene", room=230, column=1)
    return picture, no["CONDITIONING"], words["CONDITIONING"]


def swap(group: Group, swapper: Node, models: Node, scene: Link, faces: Link, seen_at: str = "auto") -> Node:
    """seen_at: side in pixels at which the face in the scene is looked for."""
    done = group.add("Likeness_SwapFaces", {"swapper": swapper["swapper"], "image": scene, "source": faces,
                                            "face_models": models["face_models"], "detection_size": seen_at})
    group.add("PreviewImage", {"images": done["image"]}, title="After the swap", room=230)
    return done


def invert(board: Board, column: int, models: tuple[Link, Link], prompts: tuple[Link, Link, Link], swapped: Link,
           mask: Link | None = None) -> Link:
    """The picture after ResInversion and BiMD. models: MODEL and VAE; prompts: positive, free, negative."""
    record = board.group("6  Record without the identity", (column, 0), PURPLE)
    guider = record.add("Likeness_EnhancerGuider", {"model": models[0], "positive": prompts[0], "free": prompts[1],
                                                    "negative": prompts[2], "cfg": CFG})["guider"]
    latent = record.add("VAEEncode", {"pixels": swapped, "vae": models[1]})["LATENT"]
    steps = record.add("BasicScheduler", {"model": models[0], "scheduler": "normal", "steps": STEPS, "denoise": 1.0})
    kept = record.add("Likeness_ResInversion", {"guider": guider, "sigmas": steps["SIGMAS"], "latent_image": latent,
                                                "manipulation_start": START}, column=1)
    replay = board.group("7  Replay with the identity", (column + 1, 0), PURPLE)
    values = {"inversion": kept["inversion"], "manipulation_start": START}
    sampler = replay.add("Likeness_BiMDSampler", values if mask is None else {**values, "mask": mask})
    noise = replay.add("DisableNoise", {})
    run = replay.add("SamplerCustomAdvanced", {
        "noise": noise["NOISE"], "guider": guider, "sampler": sampler["sampler"], "sigmas": kept["sigmas"],
        "latent_image": latent}, column=1)
    return replay.add("VAEDecode", {"samples": run["output"], "vae": models[1]}, title="Decode the result", column=1)["IMAGE"]


def show(board: Board, column: int, pictures: tuple[Link, Link, Link], prefix: str) -> None:
    """Scene, swap and result side by side, and the result alone."""
    group = board.group("8  Result", (column, 0), BLUE)
    strip = pictures[0]
    for picture, what in zip(pictures[1:], ("the swap", "the result"), strict=True):
        strip = group.add("ImageStitch", {"image1": strip, "image2": picture, "direction": "right", "match_image_size": True,
                                          "spacing_width": 8, "spacing_color": "white"}, title=f"Beside it {what}")["IMAGE"]
    group.add("PreviewImage", {"images": strip}, title="Scene, swap, result", room=230)
    group.add("SaveImage", {"images": pictures[2], "filename_prefix": f"likeness/{prefix}"}, room=420, column=1)


def prefix(board: Board) -> str:
    return board.name.split(" ", 1)[1].lower()


def photomaker(board: Board, scene: Scene = PORTRAIT, wide: bool = False) -> None:
    base, models, swapper = begin(board)
    maker = board.groups[1].add("Likeness_LoadPhotoMaker", {"file": PHOTOMAKER, "model": base["MODEL"]})
    picture, faces = person(board.group("2  Person", (1, 1), GREEN), models)
    painted, negative, _ = paint(board.group("3  Scene", (2, 0), GREEN), base, scene, wide)
    group = board.group("4  Swap", (3, 0), GREEN)
    done = swap(group, swapper, models, painted, faces, SMALL_FACE if wide else "auto")
    mask = None
    if wide:  # outside of the grown mask the scene stays to the bit
        mask = group.add("GrowMask", {"mask": done["mask"], "expand": 64, "tapered_corners": True})["MASK"]
    words = board.group("5  With and without the identity", (3, 1), GREY)
    prompt = words.add("Likeness_PhotoMakerEncode", {"photomaker": maker["photomaker"], "clip": base["CLIP"], "image": picture,
                                                     "text": scene.prompt, "start_percent": 0.0})
    result = invert(board, 4, (maker["model"], base["VAE"]), (prompt["positive"], prompt["free"], negative), done["image"], mask)
    show(board, 6, (painted, done["image"], result), prefix(board))


def wide_scene(board: Board) -> None:
    photomaker(board, WIDE, True)


def instantid(board: Board) -> None:
    base, models, swapper = begin(board)
    group = board.groups[1]
    antelope = group.add("Likeness_LoadFaceModels", {"pack": INSTANTID_FACES}, title="Faces for InstantID", column=1)
    identity = group.add("Likeness_LoadInstantID", {"file": INSTANTID}, column=1)
    net = group.add("ControlNetLoader", {"control_net_name": IDENTITY_NET}, title="InstantID's ControlNet", column=1)
    people = board.group("2  Person", (1, 1), GREEN)
    picture, faces = person(people, models)
    known = people.add("Likeness_AnalyzeFaces", {"face_models": antelope["face_models"], "image": picture}, room=200, column=1,
                       title="The face as InstantID reads it")
    painted, negative, positive = paint(board.group("3  Scene", (2, 0), GREEN), base, PORTRAIT)
    done = swap(board.group("4  Swap", (3, 0), GREEN), swapper, models, painted, faces)
    words = board.group("5  With and without the identity", (3, 1), GREY)
    there = words.add("Likeness_AnalyzeFaces", {"face_models": antelope["face_models"], "image": done["image"]}, room=200,
                      title="Where the face is")
    points = words.add("Likeness_FaceKeypoints", {"faces": there["faces"]})
    into = words.add("Likeness_InstantIDApply", {
        "model": base["MODEL"], "positive": positive, "negative": negative, "instantid": identity["instantid"],
        "faces": known["faces"], "control_net": net["CONTROL_NET"], "image": points["image"]}, column=1)
    result = invert(board, 4, (into["model"], base["VAE"]), (into["positive"], into["free"], into["negative"]), done["image"])
    show(board, 6, (painted, done["image"], result), prefix(board))


DIALS = """## What to change
- **The person**: any picture with one large face. {scene}
{lead}- **manipulation_start**, the same number at both places: more keeps the scene, less lets the person in.
- **forward_strength** of BiMD Sampler: how strongly the identity acts.
- There is no content filter. A node that checks pictures fits before **image** of Face Swap, or behind *Decode the result*.

## Consent and licences
Use it only with the consent of the people shown, and say so where a picture could be taken for real. The models of insightface
are for non-commercial research only, and so is what is made with them."""
LEAD = """- **Pose, Canny or depth**: put core's *Apply ControlNet* between the prompts of the scene and its KSampler, and nowhere
  else.
"""
ABOUT = {
    "20 CustomEnhancer with PhotoMaker (SDXL)": """# Person in a scene, with PhotoMaker
**SDXL paints a scene from words, and the person of your picture appears in it.** **Face Swap** puts the face there, sharp at its
edges. **ResInversion** records the way of that picture to noise with the prompt that names no identity; **BiMD** walks it down
again while PhotoMaker works inside it: the edge goes, hair and light follow, the scene stays.""",
    "21 CustomEnhancer with InstantID (SDXL)": """# Person in a scene, with InstantID
**SDXL paints a scene from words, and the person of your picture appears in it.** As with PhotoMaker, but the identity comes from
InstantID: its tokens in all 70 layers, and its ControlNet at the place where the swap has put the face.""",
    "22 Wide scene, small person (SDXL)": """# Wide scene, small person
**Scenery and person are led apart.** A **depth ControlNet** holds the scenery while the scene is painted, and the **mask of the
swap**, grown a little, says where PhotoMaker may work. Outside of it every pixel of the latent stays as it was.
**Face Swap** looks for the face at **detection_size** 1280, because it is small. If it finds none, take another seed, or words
that bring the person nearer.""",
}
WITH_PHOTOMAKER, WITH_INSTANTID, WIDE_SCENE = ABOUT
FILES = {
    WITH_PHOTOMAKER: (CHECKPOINT, PHOTOMAKER, SWAPPER, FACES, PERSON),
    WITH_INSTANTID: (CHECKPOINT, INSTANTID, IDENTITY_NET, SWAPPER, FACES, INSTANTID_FACES, PERSON),
    WIDE_SCENE: (CHECKPOINT, PHOTOMAKER, DEPTH_NET, SWAPPER, FACES, PERSON, DEPTH),
}


def files(name: str) -> str:
    """The part of a note that says what goes where."""
    rows = [f"- **{file}** into *{FOLDERS[file][0]}*: {FOLDERS[file][1]}" for file in FILES[name]]
    head = ("## Files that you need", "The miniature cannot stand in for them. **Check Files** names missing face files.", "")
    return "\n".join([*head, *rows])


def dials(name: str) -> str:
    """InstantID works with the scene's own prompt, PhotoMaker has one with its trigger."""
    lead = "" if name == WIDE_SCENE else LEAD
    return DIALS.replace("{lead}", lead).replace("{scene}", "**The scene in words**" + (
        "." if name == WITH_INSTANTID else ", and the same scene in the prompt beside it."))


NOTES = {name: note(about, files(name), dials(name)) for name, about in ABOUT.items()}
RECIPES: dict[str, Callable[[Board], None]] = dict(zip(ABOUT, (photomaker, instantid, wide_scene), strict=True))
