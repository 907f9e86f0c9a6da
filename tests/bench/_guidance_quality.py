"""What a trained adapter of the miniature does under the live mask, and without it.

Identities and scenes are held out of the training of base, encoders, adapter and judge. Two subjects are told apart by the
renderer's own pictures: the nearest of 16 renders in each half.
"""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _ablation_table import spread  # tests/bench is on the path of every bench
from _guidance_world import CFG, NEGATIVE, NOISES, REFRESH, SCOPE, STEPS, World, injected, sampled
from custany import IDENTITIES, candidates
from torch import Tensor

from likeness.models.common import files
from likeness.models.demo import creatures, world
from likeness.models.demo.cache import cache_key
from likeness.models.demo.judge import likelihoods
from likeness.models.hosting import adapters, demo
from likeness.models.hosting.guidance_runs import RUNS

PICTURES, SIDE, SHOWN = 256, 64, 8
RULES = 1  # of what is measured and how, the guidance's settings too: what was kept under others is measured anew
HALVES = tuple(torch.arange(SIDE).div(SIDE // 2, rounding_mode="floor").eq(half).float().expand(1, SIDE, SIDE) for half in (0, 1))
PARTS = ("outside_near", "outside_far")  # what changes beyond the mask with it and without it
Hits = dict[str, list[float]]


def quality(paths: list[Path], folder: Path) -> dict[str, Any]:
    """Rows of every adapter file, one a training seed, the shipped one without any, and a sheet of the first's pictures."""
    paths = paths or [demo.WEIGHTS / demo.METHODS["RealCustom++"][0]]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        return {"quality": f"not measured: {', '.join(missing)} missing; python dev.py train demo realcustom makes it"}
    with torch.inference_mode():
        world_, plain = World(), {}
        found = [kept(world_, path, plain, folder) for path in paths]
        right = alike_on_renders()
    shutil.copyfile(found[0][1], folder / "guidance.png")
    out: dict[str, Any] = {"adapters": len(paths), "judge_on_renders": world_.judged, "two_subjects_on_renders": right,
                           "chance": round(1 / 16, 4), "two_subjects_chance": round(1 / 256, 4)}
    out |= numbers([hits for hits, _ in found])
    return out | {"similarity_and_control": together(out)}


def kept(world_: World, path: Path, plain: dict[int, Tensor], folder: Path) -> tuple[Hits, Path]:
    """What was measured of one adapter and its sheet of pictures, from `folder` or made now: a bench that was stopped goes on."""
    parts = (demo.WEIGHTS / f"{name}.safetensors" for name in ("base", "dino", "mae", "judge"))
    key = cache_key([files.sha256(file) for file in (path, *parts)], RULES, PICTURES, NOISES, NEGATIVE,
                    STEPS, CFG, SCOPE, REFRESH)
    file, sheet = folder / f"quality_{key}.json", folder / f"quality_{key}.png"
    if not (file.exists() and sheet.exists()):
        rows = Rows(world_, adapters.load_adapter(path), plain, PICTURES // (IDENTITIES * NOISES))
        rows.all()
        save_sheet(rows.shown, sheet)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(rows.hits), encoding="utf-8")
        os.replace(part, file)
    return json.loads(file.read_text(encoding="utf-8")), sheet


def numbers(found: list[Hits]) -> dict[str, Any]:
    """Mean, interval, count and each training seed's mean of every row; an entry of `found` is one seed's. Training seeds are
    drawn anew for the interval, identities within each and their pictures."""
    out: dict[str, Any] = {}

    def say(name: str, value: float, ends: tuple[float, float], each: list[float]) -> None:
        out.update({name: round(value, 4), f"{name}_lo": round(ends[0], 4), f"{name}_hi": round(ends[1], 4),
                    f"{name}_n": sum(len(hits[PARTS[0]] if name == "outside_change" else hits[name]) for hits in found)})
        if len(each) > 1:
            out[f"{name}_seeds"] = [round(mean, 4) for mean in each]
    for name in found[0]:
        if name not in PARTS:
            values = torch.tensor([hits[name] for hits in found])
            say(name, float(values.mean()), spread(values, IDENTITIES), values.mean(1).tolist())
    near, far = (torch.tensor([hits[part] for hits in found], dtype=torch.float64) for part in PARTS)
    say("outside_change", float(near.sum() / far.sum()), spread(near, IDENTITIES, far), (near.sum(1) / far.sum(1)).tolist())
    return out


def together(numbers: dict[str, Any]) -> str:
    """Whether the live mask raises both, how much the picture shows of the subject and how much it does of the prompt."""
    up = all(numbers[f"{name}_lo"] > numbers[f"{name}_no_mask_hi"] for name in ("retrieval", "scene"))
    return "both up" if up else "not shown"


def references(ids: Any) -> Tensor:
    """(16, 128, 128, 3) on white, as ID Extractor cuts them out."""
    pose = world.draw_poses(ids["kind"].shape[0], torch.Generator().manual_seed(7), world.Variation(mirror=True))
    return creatures.draw_references(ids, pose, pixels=128).picture.movedim(1, -1)


class Rows:
    """All pictures of one adapter. plain: {seed: pictures of the text alone}, the same for all adapters."""

    def __init__(self, world_: World, adapter: Any, plain: dict[int, Tensor], prompts: int):
        self.world, self.ids, self.plain, self.prompts = world_, candidates(), plain, prompts
        self.count = self.ids["kind"].shape[0]
        self.references = references(self.ids)
        self.who = [adapters.extract(adapter, world_.encoders, self.references[k:k + 1], "concat", str(k))
                    for k in range(self.count)]
        self.hits: Hits = {}
        self.shown: list[list[Tensor]] = []

    def note(self, name: str, hits: Tensor) -> None:
        self.hits.setdefault(name, []).extend(hits.float().tolist())

    def all(self) -> None:
        """Notes the hits of every picture: with the mask, without, with a shuffled reference; what changes outside; two."""
        for k in range(self.count):
            for j in range(self.prompts):
                self.shown.append([self.references[k].movedim(-1, 0), *self.one(k, j), *self.two(k, j)])

    def kind(self, k: int) -> str:
        return world.KINDS[int(self.ids["kind"][k])]

    def one(self, k: int, j: int) -> list[Tensor]:
        """One subject; text alone, under the mask, that mask, without it: (3, h, w) of the first picture each."""
        scene, seed = (k + j) % len(world.SCENES), 1000 * k + j
        text = f"a photo of a {self.kind(k)} {world.SCENES[scene]}, {world.PLACES[(k + 2 * j) % len(world.PLACES)]}"
        plain = self.text_alone(text, seed)
        made, masks = {}, torch.ones(1)
        for name, one, live in (("", k, True), ("_no_mask", k, False), ("_shuffled", (k + 5) % self.count, True)):
            done = injected(self.world, self.who[one], text, self.kind(k), live=live)
            latent = sampled(done.model, done.positive, done.negative, seed)
            made[name] = shown = self.world.decode(latent)
            self.note(f"retrieval{name}", likelihoods(self.world.judge, shown, self.ids).argmax(1) == k)
            if name != "_shuffled":
                self.note(f"scene{name}", self.world.judge(shown)["scene"].argmax(1) == scene)
            if not name:
                masks = last_mask(latent)
        beyond = F.interpolate((masks == 0).float(), (SIDE, SIDE), mode="nearest")
        for name, of in zip(PARTS, ("", "_no_mask"), strict=True):
            self.note(name, ((made[of] - plain).abs() * beyond).flatten(1).sum(1))
        self.note("mask_area_live", (masks > 0).float().flatten(1).mean(1))
        return [plain[0], made[""][0], masks[0].expand(3, -1, -1), made["_no_mask"][0]]

    def text_alone(self, text: str, seed: int) -> Tensor:
        """(b, 3, 64, 64)."""
        if seed not in self.plain:
            positive, negative = (self.world.clip.encode_from_tokens_scheduled(self.world.clip.tokenize(one))
                                  for one in (text, NEGATIVE))
            self.plain[seed] = self.world.decode(sampled(self.world.model, positive, negative, seed))
        return self.plain[seed]

    def two(self, k: int, j: int) -> list[Tensor]:
        """Both subjects right in their own half: a sentence for each half, and one sentence for both words."""
        other, scene = partner(self.ids, k), (k + j) % len(world.SCENES)
        kinds, out = (self.kind(k), self.kind(other)), []
        for name, texts, areas in (
                ("two_subjects", [f"a photo of a {kind} {world.SCENES[scene]}, {place}"
                                  for kind, place in zip(kinds, ("left", "right"), strict=True)], HALVES),
                ("two_subjects_one_sentence", [f"a photo of a {kinds[0]} and a {kinds[1]} {world.SCENES[scene]}"] * 2,
                 (None, None))):
            first = injected(self.world, self.who[k], texts[0], kinds[0], area=areas[0])
            both = injected(self.world, self.who[other], texts[1], kinds[1], into=first, area=areas[1])
            positive = both.positive if areas[0] is None else [*first.positive, *both.positive]
            shown = self.world.decode(sampled(both.model, positive, both.negative, 7000 + 10 * k + j))
            found = nearest_pair(shown, self.ids, (k, other), scene)
            self.note(name, (found[:, 0] == k) & (found[:, 1] == other))
            out.append(shown[0])
        return [self.references[other].movedim(-1, 0), *out]


def last_mask(latent: Tensor) -> Tensor:
    """(b, 1, h, w) of the one word of the run that made this latent."""
    ((run,),) = (RUNS.find(latent).values(),)
    return run.masks[-1][1]


def save_sheet(rows: list[list[Tensor]], path: Path) -> None:
    """Reference, text alone, under the mask, the mask, no mask, second reference, both by two sentences, both by one."""
    from PIL import Image

    step = max(1, len(rows) // SHOWN)
    sheet = torch.cat([torch.cat([F.interpolate(tile[None].float(), (2 * SIDE, 2 * SIDE))[0] for tile in row], 2)
                       for row in rows[::step][:SHOWN]], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet.clamp(0, 1) * 255).byte().movedim(0, -1).numpy()).save(path)


def partner(ids: Any, k: int) -> int:
    """Another identity of another kind: the word has to tell them apart."""
    count = ids["kind"].shape[0]
    return next((k + n) % count for n in range(3, count) if ids["kind"][(k + n) % count] != ids["kind"][k])


def render_side(ids: Any, kind: int, scene: int, place: int) -> Tensor:
    """All 16 looks as this kind, standing left (place 0) or right (2)."""
    n = ids["kind"].shape[0]
    rows = {**ids, "kind": torch.full((n,), kind)}
    pose = world.draw_poses(n, torch.Generator().manual_seed(0))
    pose["place"] = torch.full((n,), place)
    return creatures.draw_pictures(rows, pose, torch.full((n,), scene), torch.full((n, 8), 0.5)).picture


def nearest_pair(shown: Tensor, ids: Any, pair: tuple[int, int], scene: int) -> Tensor:
    """(b, 2): which of 16 looks is nearest in the left and in the right half of pictures (b, 3, 64, 64)."""
    out = []
    for n, place, half in ((pair[0], 0, slice(0, 32)), (pair[1], 2, slice(32, 64))):
        renders = render_side(ids, int(ids["kind"][n]), scene, place)[..., half]
        out.append((shown[:, None, ..., half] - renders[None]).square().flatten(2).mean(2).argmin(1))
    return torch.stack(out, 1)


def alike_on_renders() -> float:
    """How often the nearest-render rule is right on true pictures of two."""
    ids, right = candidates(), []
    for k in range(ids["kind"].shape[0]):
        other, scene = partner(ids, k), k % len(world.SCENES)
        left = render_side(ids, int(ids["kind"][k]), scene, 0)[k:k + 1]
        pose = world.draw_poses(1, torch.Generator().manual_seed(1))
        pose["place"] = torch.full((1,), 2)
        picture = creatures.draw_creature(left, world.select(ids, torch.tensor([other])), pose, creatures.standing(pose)).picture
        found = nearest_pair(picture, ids, (k, other), scene)
        right.append(float(found[0, 0] == k and found[0, 1] == other))
    return round(sum(right) / len(right), 4)
