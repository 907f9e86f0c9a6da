"""Another subject in a given picture, through the shipped nodes on the real server: how much of the scene stays, who it shows.

Source pictures are held-out creatures A in scenes whose details (sun, trees, hills, stars) no prompt tells and no training of
the base varied. The identity is another held-out creature B of the same kind, so that the prompt is true of both and only the
look has to move. Three ways at equal evaluations: BiMD, img2img with the same injector, and DDIM inversion with plain sampling.
"""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS, CFG = 20, 3.0
POINTS = tuple(range(STEPS + 1))
SHAPES = {16: (4, 1, 4), 32: (8, 1, 4), 64: (16, 1, 4), 128: (16, 2, 4), 256: (16, 4, 4)}  # identities, prompts, sources
NAMES = {"bimd": "BiMD", "img2img": "img2img", "ddim": "DDIM inversion"}
SHOWN = (0, 1, 2, 3)  # identities in the picture of the page


class Job:
    """One identity, one sentence, some source pictures: file names and what the right answers are."""

    def __init__(self, ids: dict[str, Tensor], k: int, j: int, sources: int):
        from likeness.models.demo import creatures, world

        self.k, self.j = k, j
        self.kind, self.scene, self.place = int(ids["kind"][k]), (k + j) % len(world.SCENES), (k + 2 * j) % len(world.PLACES)
        self.other = torch.tensor([(k + 1 + (3 * i + 5 * j) % 15) % 16 for i in range(sources)])
        generator = torch.Generator().manual_seed(100 * k + j)
        pose = world.draw_poses(sources, generator)
        pose["place"] = torch.full((sources,), self.place)
        parameters = world.draw_scene_parameters(sources, generator, world.Variation(scene=1.0))
        scene = torch.full((sources,), self.scene)
        there = {**world.select(ids, self.other), "kind": torch.full((sources,), self.kind)}
        goal = world.select(ids, torch.full((sources,), k))
        drawn, moved = (creatures.draw_pictures(who, pose, scene, parameters) for who in (there, goal))
        self.pictures = drawn.picture
        subject = torch.maximum(drawn.mask, moved.mask)[:, None]
        self.outside = (torch.nn.functional.max_pool2d(subject, 3, 1, 1) < 1e-3).float()  # a pixel of air round the union
        self.text = f"a photo of a {world.KINDS[self.kind]} {world.SCENES[self.scene]}, {world.PLACES[self.place]}"
        self.word = world.KINDS[self.kind]
        self.files = [f"source_{k:02d}_{j}_{i}.png" for i in range(sources)]

    def save(self, folder: Path) -> None:
        from PIL import Image

        for name, picture in zip(self.files, self.pictures, strict=True):
            Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / name)


def plan(method: str, point: int) -> tuple[int, int]:
    """(steps that act, evaluations a picture) of a method at the cost of BiMD with `point` steps without identity.

    BiMD of L = 20 - point steps: 2 L + 1 to record, 2 L to sample. img2img: 2 a step, so 2 L steps of 40. DDIM: 1 + 2 a step,
    so about 4/3 L steps of 27. The noise that all three begin with is the same within one of their steps.
    """
    length = STEPS - point
    if length == 0:
        return 0, 0
    if method == "bimd":
        return length, 4 * length + 1
    if method == "img2img":
        return 2 * length, 4 * length
    steps = round((4 * length + 1) / 3)
    return steps, 3 * steps


def graph(job: Job, method: str, points: list[int]) -> dict[str, Any]:
    """API prompt that makes the pictures of all points of a method; output "save_M" holds those of point M."""
    out: dict[str, Any] = {
        "world": {"class_type": "Likeness_LoadDemo", "inputs": {"method": "CustAny"}},
        "reference": {"class_type": "LoadImage", "inputs": {"image": f"identity_{job.k:02d}.png"}},
        "id": {"class_type": "Likeness_ExtractID", "inputs": {
            "adapter": ["world", 3], "encoders": ["world", 4], "image": ["reference", 0], "mask": ["reference", 1],
            "combine": "concat", "margin": 0.1, "on_missing": "error"}},
        "prompt": {"class_type": "Likeness_EncodePrompt", "inputs": {
            "clip": ["world", 1], "text": job.text, "word": job.word, "occurrence": 0, "on_missing": "error"}},
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["world", 1], "text": ""}},
        "inject": {"class_type": "Likeness_DualLevelInjector", "inputs": {
            "model": ["world", 0], "positive": ["prompt", 0], "negative": ["empty", 0], "subject": ["id", 0],
            "word": ["prompt", 1], "preset": "custom", "global_strength": 1.0, "local_strength": 1.0, "start_percent": 0.0,
            "end_percent": 1.0}},
        "guider": {"class_type": "Likeness_EnhancerGuider", "inputs": {
            "model": ["inject", 0], "positive": ["inject", 1], "free": ["prompt", 0], "negative": ["inject", 2], "cfg": CFG}},
        "noise": {"class_type": "DisableNoise", "inputs": {}},
    }
    batch: list[Any] = []
    for i, name in enumerate(job.files):
        out[f"source_{i}"] = {"class_type": "LoadImage", "inputs": {"image": name}}
        if batch:
            out[f"batch_{i}"] = {"class_type": "ImageBatch", "inputs": {"image1": batch, "image2": [f"source_{i}", 0]}}
        batch = [f"batch_{i}", 0] if batch else ["source_0", 0]
    out["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": batch, "vae": ["world", 2]}}

    def scheduler(name: str, steps: int) -> None:
        out[name] = {"class_type": "BasicScheduler", "inputs": {"model": ["world", 0], "scheduler": "normal", "steps": steps,
                                                                "denoise": 1.0}}

    def replay(point: int, inversion: str, start: int, backward: float) -> None:
        out[f"bimd_{point}"] = {"class_type": "Likeness_BiMDSampler", "inputs": {
            "inversion": [inversion, 0], "manipulation_start": start, "forward_strength": 1.0, "backward_strength": backward,
            "tether": 0.0, "mask_mode": "anchor", "accept_mismatch": False}}
        out[f"sample_{point}"] = {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["noise", 0], "guider": ["guider", 0], "sampler": [f"bimd_{point}", 0], "sigmas": [inversion, 1],
            "latent_image": ["encode", 0]}}

    if method == "bimd":  # one recording serves all points: cut off it is the same, and the count is as if it were
        scheduler("sigmas", STEPS)
        out["record"] = {"class_type": "Likeness_ResInversion", "inputs": {
            "guider": ["guider", 0], "sigmas": ["sigmas", 0], "latent_image": ["encode", 0], "estimate": "source", "refine": 0,
            "manipulation_start": min(points), "closed_loop": False, "chunk": 0}}
        for point in points:
            replay(point, "record", point, 1.0)
    elif method == "ddim":
        whole = plan("ddim", 0)[0]
        scheduler("sigmas", whole)
        for point in points:
            start = whole - plan("ddim", point)[0]
            out[f"record_{point}"] = {"class_type": "Likeness_BaselineInversion", "inputs": {
                "guider": ["guider", 0], "sigmas": ["sigmas", 0], "latent_image": ["encode", 0], "method": "ddim",
                "inner_steps": 10, "early_stop": True, "manipulation_start": start}}
            replay(point, f"record_{point}", start, 0.0)
    else:
        for point in points:
            steps = plan("img2img", point)[0]
            out[f"sample_{point}"] = {"class_type": "KSampler", "inputs": {
                "model": ["inject", 0], "positive": ["inject", 1], "negative": ["inject", 2], "latent_image": ["encode", 0],
                "seed": 1000 * job.k + job.j, "steps": steps, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal",
                "denoise": steps / (2 * STEPS)}}
    for point in points:
        out[f"decode_{point}"] = {"class_type": "VAEDecode", "inputs": {"samples": [f"sample_{point}", 0], "vae": ["world", 2]}}
        out[f"save_{point}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"decode_{point}", 0]}}
    return out


class Studio:
    """Server, judge and identities; what was measured is kept in a file, so that a run that was stopped goes on."""

    def __init__(self, server: Any, folder: Path):
        from bench.custany import candidates, load_judge, save_references

        from likeness.models.common import files
        from likeness.models.hosting.demo import WEIGHTS

        self.judge, _ = load_judge(WEIGHTS)
        self.ids, self.server, self.folder = candidates(), server, folder
        save_references(server.input, self.ids)
        digest = hashlib.sha256("".join(files.sha256(WEIGHTS / f"{name}.safetensors") for name in
                                        ("base", "custany", "judge")).encode()).hexdigest()[:8]
        self.kept = folder / f"inversion_rows_{digest}.json"  # other weights are measured anew
        self.rows: dict[str, dict[str, list[float]]] = json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def run(self, method: str, points: list[int], pictures: int) -> None:
        """Fills `rows`: per picture, whether the judge sees B, or still A, and the distance outside of the subject."""
        from bench.custany import read

        from likeness.models.demo.judge import likelihoods

        identities, prompts, sources = SHAPES[pictures]
        points = [point for point in points if f"{method} {point} {pictures}" not in self.rows]
        found: dict[int, dict[str, list[float]]] = {point: {"moved": [], "stayed": [], "scene": []} for point in points}
        for k in range(identities if points else 0):
            for j in range(prompts):
                job = Job(self.ids, k, j, sources)
                job.save(self.server.input)
                result = self.server.run(graph(job, method, points), timeout=3000)
                if not result.ok:
                    raise RuntimeError(f"{method}, identity {k}: {result.error} {result.node_errors}")
                for point in points:
                    made = read(result.images[f"save_{point}"])
                    with torch.no_grad():
                        seen = likelihoods(self.judge, made, self.ids).argmax(1)
                    far = ((made - job.pictures).abs().mean(1, keepdim=True) * job.outside).sum((1, 2, 3))
                    row = found[point]
                    row["moved"] += (seen == k).float().tolist()
                    row["stayed"] += (seen == job.other).float().tolist()
                    row["scene"] += (far / job.outside.sum((1, 2, 3))).tolist()
                    if k in SHOWN and j == 0:
                        self._keep(method, point, k, made[0])
        for point in points:
            self.rows[f"{method} {point} {pictures}"] = found[point]
        part = self.kept.with_name(self.kept.name + ".part")
        part.write_text(json.dumps(self.rows))
        os.replace(part, self.kept)

    def _keep(self, method: str, point: int, k: int, picture: Tensor) -> None:
        from PIL import Image

        place = self.folder / "inversion_pictures"
        place.mkdir(exist_ok=True)
        Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(place / f"{method}_{point}_{k}.png")

    def numbers(self, method: str, point: int, pictures: int) -> dict[str, float]:
        """Means with 95 % intervals."""
        from bench.custany import interval

        out: dict[str, float] = {}
        for name, values in self.rows[f"{method} {point} {pictures}"].items():
            low, high = interval(values)
            out |= {name: sum(values) / len(values), f"{name}_lo": low, f"{name}_hi": high}
        return out


def nearest(studio: Studio, method: str, wanted: float, pictures: int) -> int:
    """The point of a method's curve whose retrieval is nearest to `wanted`; of equals the one that keeps more of the scene."""
    def far(point: int) -> tuple[float, float]:
        row = studio.numbers(method, point, pictures)
        return abs(row["moved"] - wanted), row["scene"]
    return min((point for point in POINTS if f"{method} {point} {pictures}" in studio.rows), key=far)


def verdict(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Whether BiMD keeps more of the scene at an identity that is not less: only where intervals do not overlap."""
    equal = ours["moved_hi"] >= theirs["moved_lo"] and theirs["moved_hi"] >= ours["moved_lo"]
    if (equal or ours["moved_lo"] > theirs["moved_hi"]) and ours["scene_hi"] < theirs["scene_lo"]:
        return "shown"
    if (equal or theirs["moved_lo"] > ours["moved_hi"]) and theirs["scene_hi"] < ours["scene_lo"]:
        return "the other way round"
    return "not shown"


def sheet(studio: Studio, columns: list[tuple[str, int]], target: Path) -> None:
    """Source, identity, then the columns; a row an identity."""
    import numpy
    from PIL import Image

    rows = []
    for k in SHOWN:
        job = Job(studio.ids, k, 0, 1)
        with Image.open(studio.server.input / f"identity_{k:02d}.png") as image:
            reference = image.convert("RGB").resize((64, 64), Image.Resampling.BOX)
        pictures = [Image.fromarray((job.pictures[0].permute(1, 2, 0) * 255).round().byte().numpy()), reference]
        for method, point in columns:
            with Image.open(studio.folder / "inversion_pictures" / f"{method}_{point}_{k}.png") as image:
                pictures.append(image.convert("RGB"))
        rows.append(numpy.concatenate([numpy.pad(p, ((1, 1), (1, 1), (0, 0)), constant_values=255) for p in pictures], 1))
    grid = Image.fromarray(numpy.concatenate(rows, 0))
    grid.resize((grid.width * 2, grid.height * 2), 0).save(target)


def evidence(curve: int, pictures: int, headline: int, points: list[int], folder: Path) -> dict[str, Any]:
    """The curve of all methods, then rows of more pictures at the headline's point and the others' nearest identity."""
    from harness.server import Server

    folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {"chance": 1 / 16, "pictures_curve": curve, "pictures_row": pictures, "headline": headline}
    with Server(cpu=True) as server:
        studio = Studio(server, folder)
        for method in NAMES:
            mine = [point for point in points if point < STEPS or method == "bimd"]
            studio.run(method, mine, curve)
            for point in mine:
                out |= {f"{method}_{point}_{name}": value for name, value in studio.numbers(method, point, curve).items()}
                out[f"{method}_{point}_evals"] = plan(method, point)[1]
        for point in (point for point in points if point < STEPS):  # each point of ours against theirs of the nearest identity
            ours = studio.numbers("bimd", point, curve)
            for method in ("img2img", "ddim") if ours["moved_lo"] > 2 / 16 else ():
                other = nearest(studio, method, ours["moved"], curve)
                out[f"curve_{point}_{method}_point"] = other
                out[f"curve_{point}_better_than_{method}"] = verdict(ours, studio.numbers(method, other, curve))
        wanted = studio.numbers("bimd", headline, curve)["moved"]
        chosen = {method: headline if method == "bimd" else nearest(studio, method, wanted, curve) for method in NAMES}
        for method, point in chosen.items():
            studio.run(method, [point], pictures)
            out |= {f"row_{method}_{name}": value for name, value in studio.numbers(method, point, pictures).items()}
            out |= {f"row_{method}_point": point, f"row_{method}_evals": plan(method, point)[1]}
        ours = studio.numbers("bimd", headline, pictures)
        for method in ("img2img", "ddim"):  # at the nearest identity, and at the same point, where the evaluations are equal too
            out[f"better_than_{method}"] = verdict(ours, studio.numbers(method, chosen[method], pictures))
            if chosen[method] != headline:
                studio.run(method, [headline], pictures)
                same = studio.numbers(method, headline, pictures)
                out |= {f"same_{method}_{name}": value for name, value in same.items()}
                out[f"better_than_{method}_same_point"] = verdict(ours, same)
        columns = [("bimd", point) for point in points if point % 4 == 0]
        sheet(studio, [*columns, ("img2img", chosen["img2img"]), ("ddim", chosen["ddim"])], folder / "inversion.png")
    return out
