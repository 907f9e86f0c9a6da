"""The miniature's face pack, measured: who a swapped head is taken for, and what BiMD leaves of the swap's edge."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORKFLOW = "12 Swap a face, keep the scene"
JUDGE_PAIRS, JUDGE_STEPS, JUDGE_SEED = 1024, 400, 7
GALLERY = 14  # faces that no training saw; each gives the gallery its first picture, which is not judged
SEEN_AT = 192  # pixels at which the workflow's detector looks
REACH, BESIDE = 1.5, 4.0  # pixels: half of the way across which a step is read; from the mask's edge to the lines beside it


def swapped(drawn: Any, pack: Path, paste: Any) -> tuple[Tensor, float]:
    """Pictures (n, 3, 64, 64) of drawn heads after the swap, and the share of which both pictures gave exactly one face."""
    from likeness.models.hosting import demo_faces, face
    from likeness.models.hosting.face_batch import Job, analyse, swap

    models, swapper = face.load_models(pack)[0], face.load_swapper(pack / demo_faces.SWAPPER)[0]
    there, given = (analyse(models, pictures.movedim(1, -1), (SEEN_AT,)) for pictures in (drawn.head, drawn.source))
    done, clean = drawn.head.clone(), 0
    for number, (found, sources) in enumerate(zip(there.frames, given.frames, strict=True)):
        clean += len(found) == len(sources) == 1
        if found and sources:
            one = swap(swapper, drawn.head[number:number + 1].movedim(1, -1), given._replace(frames=(sources[:1],)),
                       Job(paste), target=there._replace(frames=(found,), sizes=there.sizes[:1]))
            done[number] = one.image[0].movedim(-1, 0)
    return done, clean / done.shape[0]


def heads(count: int, packs: list[Path], log: Any) -> dict[str, Any]:
    """Rendered creatures whose faces no training saw, found and swapped as the nodes do it, judged by a recogniser trained apart.

    packs: folders of the face pack, one for each training seed; the rows are of the first, with the workflow's settings, its
    `default_` rows with those of a new node. `_packs` lists the share and interval of each, `_all` is that of all together.

    swap_retrieval: share whose nearest source picture, of one for each face, shows the right face. similarity: mean cosine of
    the swapped head and its source, before and after; truth: of the rendered creature with that face. stranger_retrieval: the
    swapped head scored against the face of another picture, which should be chance."""
    from bench.custany import interval

    from likeness.models.demo import face_training as lessons
    from likeness.models.face.swap import Paste
    from likeness.models.hosting import demo_faces

    packs = packs or [demo_faces.FOLDER]
    pairs = lessons.draw_pairs(JUDGE_PAIRS, 77, demo_faces.crops, off=0.0)  # it looks at true points
    judge = lessons.train_recogniser(pairs, JUDGE_STEPS, log, JUDGE_SEED)
    drawn = lessons.draw_swaps(count + GALLERY, torch.Generator().manual_seed(78), training=False)
    with torch.inference_mode():  # as the host runs nodes
        every = [swapped(drawn, pack, Paste(1, "box")) for pack in packs]
        default, _ = swapped(drawn, packs[0], Paste(2))

    def seen(pictures: Tensor, points: Tensor) -> Tensor:
        return lessons.embed(judge, (demo_faces.crops(pictures, points, 128) * 255).round().to(torch.uint8))

    source, look = seen(drawn.source, drawn.source_points), drawn.other
    gallery = torch.stack([(look == value).nonzero()[0, 0] for value in look.unique()])
    free = torch.ones(look.shape[0], dtype=torch.bool)
    free[gallery] = False  # the pictures of the gallery do not find themselves
    out: dict[str, Any] = {"swap_faces": gallery.numel(), "swap_chance": 1 / gallery.numel(), "swap_pictures": int(free.sum()),
                           "swap_one_face_found": every[0][1]}

    def named_as(rows: Tensor) -> Tensor:
        return look[gallery][(rows @ source[gallery].T).argmax(1)]

    made = [seen(done, drawn.points) for done, _ in every]
    shares = [(named_as(rows) == look).float()[free].tolist() for rows in made]
    out["swap_retrieval_packs"] = [[round(number, 4) for number in (sum(right) / len(right), *interval(right))]
                                   for right in shares]
    together = [sum(hits) / len(hits) for hits in zip(*shares, strict=True)]  # the packs are judged on the same pictures
    out["swap_retrieval_all"] = sum(together) / len(together)
    out["swap_retrieval_all_lo"], out["swap_retrieval_all_hi"] = interval(together)
    for name, rows in (("before", seen(drawn.head, drawn.points)), ("swap", made[0]), ("default", seen(default, drawn.points)),
                       ("truth", seen(drawn.swapped, drawn.points)), ("source", source)):
        named = named_as(rows)
        # a stranger's face for the right one: what the judge gives when nothing was learned
        for what, wanted in ((name, look), *([("stranger", look.roll(1))] if name == "swap" else ())):
            right = (named == wanted).float()[free].tolist()
            out[f"{what}_retrieval"] = sum(right) / len(right)
            out[f"{what}_retrieval_lo"], out[f"{what}_retrieval_hi"] = interval(right)
        if name != "source":
            alike = (rows * source).sum(1)[free].tolist()
            out[f"similarity_{name}"] = sum(alike) / len(alike)
            out[f"similarity_{name}_lo"], out[f"similarity_{name}_hi"] = interval(alike)
    return out


def excess(pictures: Tensor, masks: Tensor) -> Tensor:
    """(n,) colour step across the edge of masks (n, h, w), beyond what is usual beside it: of pictures (n, 3, h, w), REACH pixels
    to both sides of the line where the mask is one half, less the same steps BESIDE pixels further in and further out.

    In the middle half of the mask's lower side, where the swap cuts the body: beside the head the mask meets the ground,
    whose step to the creature is no seam. A picture's own outlines and patterns lie on all three lines alike."""
    slope = torch.stack(torch.gradient(masks, dim=(2, 1)), -1)
    normal = F.normalize(slope, dim=-1)  # towards the inside
    inside = masks > 0.5
    lonely = F.max_pool2d((~inside).float()[:, None], 3, 1, 1)[:, 0] > 0
    edge = inside & lonely & (normal[..., 1] < -0.7)
    size = masks.new_tensor([masks.shape[2], masks.shape[1]])
    y, x = torch.meshgrid(*(torch.arange(n, dtype=masks.dtype) for n in masks.shape[1:]), indexing="ij")
    place = torch.stack([x, y], -1)
    weight = inside.sum(1).float()
    centre, width = (weight * x[0]).sum(1) / weight.sum(1).clamp(min=1), (weight > 0).sum(1)
    edge &= ((x - centre[:, None, None]).abs() <= width[:, None, None] / 4)

    def at(step: float) -> Tensor:
        grid = (place + step * normal + 0.5) / size * 2 - 1
        return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def step(middle: float) -> Tensor:
        across = (at(middle + REACH) - at(middle - REACH)).norm(dim=1) * edge
        return across.sum((1, 2)) / edge.sum((1, 2)).clamp(min=1)

    return step(0.0) - (step(BESIDE) + step(-BESIDE)) / 2


def job_for(prompt: dict, k: int, seed: int, word: str, place: str, batch: int) -> tuple[dict, dict[str, str]]:
    """The shipped workflow with another identity, scene and seed, and the nodes that show scene, mask, swap and result."""
    job = copy.deepcopy(prompt)

    def titled(title: str) -> dict:
        return next(node["inputs"] for node in job.values() if node.get("_meta", {}).get("title") == title)

    text = f"a photo of a {word} {place}"
    titled("Reference picture")["image"] = f"identity_{k:02d}.png"
    titled("The scene in words")["text"] = titled("What the picture shows")["text"] = text
    titled("What it shall show").update(text=text, word=word)
    for node in job.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] = seed
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = batch
        if node["class_type"] == "Likeness_AnalyzeFaces":
            node["inputs"]["on_missing"] = "pass through"
        if node["class_type"] == "Likeness_ExtractID":
            node["inputs"]["mask"] = [node["inputs"]["image"][0], 1]  # the candidates' files hold the mask the other way round
        if node["class_type"] == "Likeness_SwapFaces":
            node["inputs"]["on_missing"] = "pass through"
            swap = node["inputs"]
    swapped = next(key for key, node in job.items() if node["class_type"] == "Likeness_SwapFaces")
    shown = {"scene": swap["image"], "swapped": [swapped, 0], "result": titled("Beside it the result")["image2"]}
    ends = ("SaveImage", "PreviewImage", "Likeness_InversionReport")
    job = {key: node for key, node in job.items() if node["class_type"] not in ends}
    job["mask"] = {"class_type": "MaskToImage", "inputs": {"mask": [swapped, 1]}}
    names = {}
    for name, link in {**shown, "mask": ["mask", 0]}.items():
        names[name] = f"show_{name}"
        job[names[name]] = {"class_type": "PreviewImage", "inputs": {"images": link}}
    return job, names


def seam(identities: int, batch: int, log: Any) -> dict[str, float]:
    """The shipped workflow on the real server, with held-out creatures in sets of sixteen.

    Before: the `excess` step at the edge of the swap, in what the swap changed of the scene. After: the same in what BiMD changed
    of it; their ratio is 1 where the seam stands as before, 0 where it is gone. Also who the whole picture is taken for."""
    from bench.custany import IDENTITIES, candidates, interval, load_judge, ratio, read, save_references

    from harness import workflows
    from harness.paths import WORKFLOWS
    from harness.server import Server
    from likeness.models.demo import world
    from likeness.models.demo.judge import likelihoods
    from likeness.models.hosting.demo import WEIGHTS
    judge = load_judge(WEIGHTS)[0]
    before, after = [], []
    right: dict[str, list[float]] = {"scene": [], "swapped": [], "result": []}
    with Server(cpu=True) as server:
        workflow = workflows.load(WORKFLOWS / f"{WORKFLOW}.json")
        prompt = workflows.to_prompt(workflow, server.object_info())
        for number in range(identities):
            group, k = divmod(number, IDENTITIES)
            if k == 0:
                ids = candidates(2024 + group)
                save_references(server.input, ids)
            word, place = world.KINDS[int(ids["kind"][k])], f"{world.SCENES[number % 5]}, {world.PLACES[number % 3]}"
            job, names = job_for(prompt, k, 100 + number, word, place, batch)
            result = server.run(job, timeout=3000)
            if not result.ok:
                raise RuntimeError(f"identity {number}: {result.error} {result.node_errors}")
            made = {name: read(result.images[key]) for name, key in names.items()}
            masks = made.pop("mask")[:, 0]
            found = masks.amax((1, 2)) > 0.5
            for kept, name in ((before, "swapped"), (after, "result")) if bool(found.any()) else ():
                kept.append(excess((made[name] - made["scene"])[found], masks[found]))
            for name, pictures in made.items():
                with torch.no_grad():
                    right[name] += (likelihoods(judge, pictures, ids).argmax(1) == k).float().tolist()
            log(f"identity {number}: {int(found.sum())} of {batch} heads swapped")
    old, new = torch.cat(before), torch.cat(after)
    # the interval is that of identities: the pictures of one are no independent draws
    left, low, high = ratio(*([float(one.sum()) for one in kept] for kept in (after, before)))
    out: dict[str, float] = {
        "seam_pictures": old.numel(), "seam_found": old.numel() / (identities * batch), "picture_chance": 1 / 16,
        "seam_after_over_before": left, "seam_after_over_before_lo": low, "seam_after_over_before_hi": high,
        "seam_before": float(old.mean()), "seam_after": float(new.mean())}
    for name, hits in right.items():
        out[f"picture_{name}_retrieval"] = sum(hits) / len(hits)
        out[f"picture_{name}_retrieval_lo"], out[f"picture_{name}_retrieval_hi"] = interval(hits)
    return out
