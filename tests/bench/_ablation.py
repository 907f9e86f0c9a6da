"""What each part of CustAny is good for: adapters of all variants and training seeds on held-out identities.

Pictures are made in this process by the functions behind the nodes (ID Extractor, Subject Prompt, Dual-Level Injector,
core's sampler), a batch a kind: each latent has its own prompt and its own reference ("one per latent"). Every row of a
training seed has the same identities, prompts, references and noises.
"""
from __future__ import annotations

import hashlib
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from likeness.models.demo.world import Variation

IDENTITIES, STEPS, CFG = 16, 20, 3.0
FIRST = 4024  # recipes were chosen by the identities from 2024 on: two thirds of these looks stood nowhere among them
MEASURES = ("retrieval", "retrieval_hard", "retrieval_near", "scene", "place", "leak")
RULES = 3  # of what is measured and how: a row that was kept under others is measured anew


class Row(NamedTuple):
    """variant: of the trained adapters, None without one; strengths: global, local; shuffled: another's reference; described: the
    sentence tells the whole look, which shows what the base can draw. A level that was trained alone has no other; `_of_both`
    switches one off in an adapter that was trained with both."""
    variant: str | None
    strengths: tuple[float, float] = (1.0, 1.0)
    shuffled: bool = False
    described: bool = False


ROWS = {
    "none": Row(None), "described": Row(None, described=True),
    "global": Row("global", (1.0, 0.0)), "local": Row("local", (0.0, 1.0)), "both": Row("both"),
    "global_of_both": Row("both", (1.0, 0.0)), "local_of_both": Row("both", (0.0, 1.0)),
    "shuffled": Row("both", shuffled=True), "dino": Row("dino"), "mae": Row("mae"), "clip": Row("clip"),
    "coupled": Row("coupled"), "decoupled": Row("decoupled"),
}


class Trials(NamedTuple):
    """One picture a row; identity 0..15, scene, place and facing of the reference (1 = mirrored) are (n,)."""
    ids: dict[str, Tensor]       # the 16 identities
    hard: list[dict[str, Tensor]]  # for each identity its 64 candidates, the true one last
    near: list[int]              # how many of these, the first ones, differ in one attribute
    identity: Tensor
    scene: Tensor
    place: Tensor
    mirror: Tensor
    picture: Tensor              # (16, 2, 3, 256, 256): each identity in a scene, facing right and left
    mask: Tensor                 # (16, 2, 256, 256)
    noise: Tensor                # (n, 48, 8, 8)
    truth: Tensor                # (n, 3, 64, 64): renders of what is asked for, facing as the reference


@cache
def trials(seed: int, each: int, variation: Variation) -> Trials:
    """16 held-out identities of a training seed, `each` pictures of them; references vary as the base's world does, and face
    both ways in turn in any world: they are cut out, and adapters learn from such."""
    from bench._looks import hard_candidates
    from bench.custany import candidates

    from likeness.models.demo import creatures, world
    from likeness.models.demo.first_stage import CHANNELS

    ids = candidates(FIRST + seed)
    g = torch.Generator().manual_seed(500 + seed)
    found = [hard_candidates(world.select(ids, torch.tensor(k)), g) for k in range(IDENTITIES)]
    identity = torch.arange(IDENTITIES).repeat_interleave(each)
    j = torch.arange(each).repeat(IDENTITIES)
    scene, place = (identity + j) % len(world.SCENES), (identity + 2 * j) % len(world.PLACES)
    mirror = (identity + j) % 2
    both = {name: value.repeat_interleave(2) for name, value in ids.items()}
    pose = world.draw_poses(2 * IDENTITIES, g, variation)
    pose["mirror"] = torch.arange(2).repeat(IDENTITIES)
    where = torch.randint(0, len(world.SCENES), (2 * IDENTITIES,), generator=g)
    drawn = creatures.draw_pictures(both, pose, where, world.draw_scene_parameters(2 * IDENTITIES, g, variation), 256)
    n = len(identity)
    right = world.draw_poses(n, g, variation) | {"place": place, "mirror": mirror}
    truth = creatures.draw_pictures(world.select(ids, identity), right, scene, world.draw_scene_parameters(n, g, variation))
    return Trials(ids, [rows for rows, _ in found], [count for _, count in found], identity, scene, place, mirror,
                  drawn.picture.unflatten(0, (IDENTITIES, 2)), drawn.mask.unflatten(0, (IDENTITIES, 2)),
                  torch.randn(n, CHANNELS, 8, 8, generator=g), truth.picture)


@torch.no_grad()
def judged(judge: Any, t: Trials, pictures: Tensor) -> dict[str, list[float]]:
    """Per picture and measure 1 or 0. leak: it faces as its reference does, which nobody asked for."""
    from likeness.models.demo.judge import likelihoods

    answers = judge(pictures.clamp(0, 1))
    hard, near = torch.zeros(2, len(pictures))
    for k, (candidates, count) in enumerate(zip(t.hard, t.near, strict=True)):
        mine = t.identity == k
        likely = likelihoods(judge, pictures[mine], candidates)
        hard[mine] = (likely.argmax(1) == likely.shape[1] - 1).float()
        near[mine] = (likely[:, :count].amax(1) < likely[:, -1]).float()
    hits = {"retrieval": likelihoods(judge, pictures, t.ids).argmax(1) == t.identity, "retrieval_hard": hard,
            "retrieval_near": near}
    hits |= {name: answers[head].argmax(1) == want for name, head, want in
             (("scene", "scene", t.scene), ("place", "place", t.place), ("leak", "mirror", t.mirror))}
    return {name: hits[name].float().tolist() for name in MEASURES}


def fingerprint(t: Trials) -> str:
    """Changes with anything that is asked for: who, where, from which reference, with which noise, against which candidates."""
    digest = hashlib.sha256()
    for rows in (t.ids, *t.hard):
        for name in sorted(rows):
            digest.update(rows[name].numpy().tobytes())
    for value in (t.identity, t.scene, t.place, t.mirror, t.picture, t.mask, t.noise, t.truth):
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Studio:
    """Base, judge and the trained adapters; what was measured is kept in a file, so that a run that was stopped goes on."""

    def __init__(self, weights: Path, adapters: Path, folder: Path, each: int):
        from bench.custany import load_judge

        from likeness.models.common import files
        from likeness.models.demo.world import world_of
        from likeness.models.hosting.demo import load_base

        self.weights, self.adapters, self.folder, self.each = weights, adapters, folder, each
        self.model, self.clip, self.vae = load_base(None, weights / "base.safetensors")
        self.world = world_of(files.read_header(weights / "base.safetensors").metadata)
        self.judge, self.judge_says = load_judge(weights, self.world)
        self.common = [files.sha256(weights / f"{name}.safetensors") for name in ("base", "judge")]
        self.asked: dict[int, str] = {}  # fingerprints of the trials by training seed
        self.kept = folder / "ablation_rows.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def trials(self, seed: int) -> Trials:
        from likeness.models.demo.world import WORLDS

        return trials(seed, self.each, WORLDS[self.world])

    def adapter_file(self, variant: str, seed: int) -> Path:
        from likeness.models.demo.ablation import folder_of

        return folder_of(self.adapters, variant, seed) / "adapter.safetensors"

    def key(self, name: str, seed: int) -> str:
        """Changes with every file and setting that the row depends on."""
        from likeness.models.common import files

        variant = ROWS[name].variant if name in ROWS else None
        own = [files.sha256(self.adapter_file(variant, seed))] if variant else []
        if seed not in self.asked:
            self.asked[seed] = fingerprint(self.trials(seed))
        hung_on = (self.common, own, self.asked[seed], ROWS.get(name), STEPS, CFG, RULES)
        digest = hashlib.sha256(repr(hung_on).encode()).hexdigest()[:12]
        return f"{name} {seed} {digest}"

    def steps(self, name: str, seed: int) -> int:
        """How long the row's adapter was trained."""
        from likeness.models.common import files

        variant = ROWS[name].variant
        return int(files.read_header(self.adapter_file(variant, seed)).metadata["steps"]) if variant else 0

    def has(self, name: str, seed: int) -> bool:
        variant = ROWS[name].variant
        return variant is None or self.adapter_file(variant, seed).is_file()

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """One row of one training seed, from the kept file or made now."""
        key = self.key(name, seed)
        if key not in self.rows:
            t = self.trials(seed)
            if name == "ceiling":
                pictures, seconds, memory = t.truth, 0.0, 0.0
            elif name == "coded":
                pictures, seconds, memory = self.decode(self.vae.encode(t.truth.permute(0, 2, 3, 1))), 0.0, 0.0
            else:
                pictures, seconds, memory = self.render(ROWS[name], seed)
            self.rows[key] = judged(self.judge, t, pictures) | {"memory_mib": memory}
            self._keep(name, seed, pictures)
            part = self.kept.with_name(self.kept.name + ".part")
            part.write_text(json.dumps(self.rows))
            os.replace(part, self.kept)
            print(f"{name}, training seed {seed}: {seconds:.0f} s", flush=True)
        return self.rows[key]

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).permute(0, 3, 1, 2).float().cpu()

    def loaded(self, variant: str, seed: int) -> tuple[Any, Any]:
        """Adapter and the encoders of its training, found by their keys and hashes. Raises HarnessError for an adapter of
        another base or other encoders: it would be measured where it never learned."""
        from harness.paths import HarnessError
        from likeness.models.hosting import adapters, encoders

        adapter = adapters.load_adapter(self.adapter_file(variant, seed))
        wanted, hashes, _ = adapters.wanted_encoders(adapter)
        names = ("dino", "mae", "clip")
        there = [path for place in (self.weights, self.adapters) for path in (place / f"{n}.safetensors" for n in names)
                 if path.is_file()]
        found = tuple(map(encoders.load_encoder, encoders.match(wanted, hashes, there)))
        if dict(adapter.metadata).get("base_sha256") != self.common[0] or any(
                not item.is_file(wish) for item, wish in zip(found, hashes, strict=True)):
            raise HarnessError(f"{variant}, training seed {seed}, was trained on another base or with other encoders than those "
                               f"in {self.weights.name}; name the folder of its training with --weights.")
        return adapter, encoders.Encoders(found)

    def render(self, row: Row, seed: int) -> tuple[Tensor, float, float]:
        """Pictures (n, 3, 64, 64), seconds for all of them, MiB that the adapter adds."""
        from likeness.models.demo import world

        t = self.trials(seed)
        tools = self.loaded(row.variant, seed) if row.variant else None
        started, memory, out = time.perf_counter(), 0.0, torch.zeros(len(t.identity), 3, 64, 64)
        for kind in range(len(world.KINDS)):
            index = (t.ids["kind"][t.identity] == kind).nonzero()[:, 0]
            out[index], memory = self._batch(row, t, kind, index, tools)
        return out, time.perf_counter() - started, memory

    def _batch(self, row: Row, t: Trials, kind: int, index: Tensor, tools: Any) -> tuple[Tensor, float]:
        import comfy.sample

        from likeness.models.hosting.inject import Strengths, inject
        from likeness.models.hosting.prompt import encode_prompt
        from likeness.models.hosting.subjects import extract_from_picture

        name, texts = sentences(row, t, kind, index)
        rows = {text: self._text(text)[0][0] for text in set(texts)}
        first, word, _ = encode_prompt(self.clip, texts[0], name)
        # One entry with a row a latent. The word's own row is the same in all: what differs stands after it.
        positive = [[torch.cat([rows[text] for text in texts]), first[0][1]]]
        negative, model, memory = self._text(""), self.model, 0.0
        if tools is not None:
            adapter, encoders = tools
            who = (t.identity[index] + 5) % IDENTITIES if row.shuffled else t.identity[index]
            facing = t.mirror[index]
            subject = extract_from_picture(adapter, encoders, t.picture[who, facing].permute(0, 2, 3, 1), t.mask[who, facing],
                                           "one per latent", 0.1, "error").subject
            done = inject(model, positive, negative, subject, word, Strengths(*row.strengths))
            model, positive, negative = done.model, done.positive, done.negative
            memory = extra_bytes(adapter, encoders, model, len(index)) / 2 ** 20
        noise = t.noise[index]
        latents = comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", positive, negative, torch.zeros_like(noise),
                                      seed=0, disable_pbar=True)
        return self.decode(latents), memory

    def time_over_plain(self, name: str, seed: int) -> float:
        """A batch of this row over the same batch of the text alone, one right after the other, the fastest of three each."""
        t = self.trials(seed)
        index = (t.ids["kind"][t.identity] == 0).nonzero()[:, 0]
        row, plain = ROWS[name], ROWS["none"]
        tools = self.loaded(row.variant, seed) if row.variant else None

        def seconds(one: Row, with_: Any) -> float:
            started = time.perf_counter()
            self._batch(one, t, 0, index, with_)
            return time.perf_counter() - started
        times = [(seconds(row, tools), seconds(plain, None)) for _ in range(3)]
        return min(own for own, _ in times) / min(other for _, other in times)

    def _text(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def _keep(self, name: str, seed: int, pictures: Tensor) -> None:
        """The first two pictures of each identity, whose references face both ways: two rows of 16."""
        strip = pictures.unflatten(0, (IDENTITIES, self.each))[:, :2].transpose(0, 1)
        save_grid(strip, self.strip(name, seed))

    def strip(self, name: str, seed: int) -> Path:
        return self.folder / "ablation_pictures" / f"{self.key(name, seed).replace(' ', '_')}.png"


def sentences(row: Row, t: Trials, kind: int, index: Tensor) -> tuple[str, list[str]]:
    """The kind's word and a sentence for each of the pictures, whose creatures are all of this kind."""
    from likeness.models.demo import captions, world

    name, texts = world.KINDS[kind], []
    for who, scene, place in zip(t.identity[index].tolist(), t.scene[index].tolist(), t.place[index].tolist(), strict=True):
        before, after = captions.look(t.ids, who) if row.described else ("", "")
        texts.append(f"a photo of a {before}{' ' * bool(before)}{name}{after} {world.SCENES[scene]}, {world.PLACES[place]}")
    return name, texts


def extra_bytes(adapter: Any, encoders: Any, model: Any, references: int) -> float:
    """Weights of adapter and encoders, and the keys and values that one reference keeps through a sampling."""
    weights = sum(p.patcher.model_size() for p in (adapter, *encoders.items))
    patches = model.model_options["transformer_options"].get("patches", {}).get("middle_patch", [])
    kept = sum(patch.plan.store.model_size() for patch in patches)
    return weights + kept / references


def save_grid(pictures: Tensor, path: Path) -> None:
    """(rows, columns, 3, h, w) in 0..1 as one PNG."""
    from PIL import Image

    rows, columns, _, height, width = pictures.shape
    grid = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy()).save(path)
