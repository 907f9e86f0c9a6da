"""The miniature's rows of the guidance bench: where the mask lies, and what the trained adapter does under it.

Identities and scenes are held out of the training of base, encoders, adapter and judge. Two subjects are told apart by the
renderer's own pictures: the nearest of 16 renders in each half.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import torch
import torch.nn.functional as F
from custany import candidates, interval  # tests/bench is on the path of every bench
from torch import Tensor

from likeness.models.common import files
from likeness.models.demo import creatures, world
from likeness.models.demo.captions import look
from likeness.models.demo.judge import Judge, likelihoods
from likeness.models.hosting import adapters, demo
from likeness.models.hosting.blocks import attention_blocks
from likeness.models.hosting.encoders import Encoders, make_encoder
from likeness.models.hosting.guidance import KEEPS, make_guidance
from likeness.models.hosting.guidance_runs import RUNS
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.masks_of_run import composed, finished
from likeness.models.hosting.predict_mask import _Look, _marked
from likeness.models.hosting.prompt import encode_prompt
from likeness.models.hosting.stamps import add_reader
from likeness.models.hosting.training_realcustom import config_of
from likeness.models.hosting.word_maps import ALL, FINE, Capture, add_capture
from likeness.models.realcustom.adapter import RealCustom, release_names
from likeness.models.realcustom.config import to_metadata
from likeness.models.realcustom.projector import Projector

NEGATIVE, STEPS, CFG, PROMPTS, NOISES, REFRESH = "", 20, 3.0, 4, 4, 10
RENDERS = 256
SCOPE = 0.22  # the share of a picture's cells that a creature of this world covers by a quarter or more
COVERED, TOUCHED = 0.25, 0.02


class World:
    """The shipped miniature: model, clip, vae, encoders, judge."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = demo.load_base()
        found = []
        for name in ("dino.safetensors", "mae.safetensors"):
            state, metadata = files.load(demo.WEIGHTS / name)
            found.append(make_encoder(state, metadata, files.sha256(demo.WEIGHTS / name), name))
        self.encoders = Encoders(tuple(found))
        state, metadata = files.load(demo.WEIGHTS / "judge.safetensors")
        self.judge, self.judged = Judge().eval(), metadata["accuracy"]
        self.judge.load_state_dict({key: value.float() for key, value in state.items()})

    def decode(self, samples: Tensor) -> Tensor:
        """(b, 3, 64, 64)."""
        return self.vae.decode(samples)[..., :3].movedim(-1, 1).float().clamp(0, 1)


def random_adapter(world_: World) -> Any:
    """A subject of an untrained adapter of the miniature's layout."""
    layers = tuple(attention_blocks(world_.model).items())
    config = config_of(128, layers, [item.config for item in world_.encoders.items], 64)
    module = RealCustom(config, Projector(config.vision, config.width, 4 * config.vision))
    module.init_weights(torch.Generator().manual_seed(0))
    adapter = adapters.make_adapter(release_names(module.state_dict(), 1), to_metadata(config), "random", "random")
    return adapters.extract(adapter, world_.encoders, torch.rand(1, 128, 128, 3), "concat", "random")


def injected(world_: World, who: Any, text: str, word: str, negative: str, refresh: int = REFRESH, live: bool = True,
             scope: float = SCOPE, into: Any = None) -> Any:
    """One injector, with the live mask of its word or without any; `into`: what another injector gave."""
    positive, found, _ = encode_prompt(world_.clip, text, word)
    rest = world_.clip.encode_from_tokens_scheduled(world_.clip.tokenize(negative))
    model, positive, rest = (world_.model, positive, rest) if into is None else into[:3]
    guidance = make_guidance(found, scope, "max_norm", KEEPS[0], False, refresh, layers=FINE) if live else None
    return inject(model, positive, rest, who, found, Strengths(0.0, 1.0), guidance=guidance)


def sampled(model: Any, positive: Any, negative: Any, seed: int) -> Tensor:
    latent = torch.zeros(NOISES, 48, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", positive, negative, latent, seed=seed,
                               disable_pbar=True)


# -- where the mask lies -----------------------------------------------------------------------------------
def true_cells(mask: Tensor, share: float) -> Tensor:
    """(n, 64, 64) -> (n, 8, 8) of 0 and 1: cells of which the creature covers more than this share."""
    return (F.adaptive_avg_pool2d(mask[:, None], 8)[:, 0] > share).float()


def located() -> dict[str, Any]:
    """Renders of held-out identities, noised as at steps 2, 5 and 10 of 20, against the renderer's own masks.

    mask_iou: against the cells that the creature covers by a quarter, as many as the mask keeps. inside: share of the
    mask's weight on cells that it touches; inside_chance: of the mean mask over all pictures. _all: with all layers."""
    with torch.inference_mode():
        world_, generator = World(), torch.Generator().manual_seed(31)
        rows, scene = world.draw_split(RENDERS, generator, training=False)
        pose = world.draw_poses(RENDERS, generator)
        drawn = creatures.draw_pictures(rows, pose, scene, world.draw_scene_parameters(RENDERS, generator))
        truth, touched = true_cells(drawn.mask, COVERED), true_cells(drawn.mask, TOUCHED)
        latents = world_.model.model.process_latent_in(world_.vae.encode(drawn.picture.movedim(1, -1)))
        sigmas = comfy.samplers.calculate_sigmas(world_.model.get_model_object("model_sampling"), "normal", STEPS)
        out: dict[str, Any] = {"renders": RENDERS}
        for end, layers, steps in (("", FINE, (1, 4, 9)), ("_all", ALL, (4,))):
            every: dict[str, list[float]] = {"mask_iou": [], "mask_area": [], "inside": []}
            for step in steps:
                masks = torch.cat([one_mask(world_, rows, pose, scene, k, latents[k:k + 1], sigmas[step:step + 1], generator,
                                            float(truth[k].mean()), layers) for k in range(RENDERS)])
                binary = (masks > 0).float()
                iou = (binary * truth).flatten(1).sum(1) / (binary + truth).clamp(max=1).flatten(1).sum(1)
                inside = (masks * touched).flatten(1).sum(1) / masks.flatten(1).sum(1)
                for name, values in (("mask_iou", iou), ("mask_area", binary.flatten(1).mean(1)), ("inside", inside)):
                    every[name] += values.tolist()
                    out[f"{name}{end}_step{step + 1}"] = round(float(values.mean()), 4)
            for name, values in every.items():
                low, high = interval(values)
                out |= {f"{name}{end}": round(sum(values) / len(values), 4), f"{name}{end}_lo": round(low, 4),
                        f"{name}{end}_hi": round(high, 4)}
        mean = truth.mean(0)
        out["inside_chance"] = round(float((mean * touched).flatten(1).sum(1).mean() / mean.sum()), 4)
    return out


def one_mask(world_: World, rows: Any, pose: Any, scene: Tensor, k: int, latent: Tensor, sigma: Tensor,
             generator: torch.Generator, scope: float, layers: str) -> Tensor:
    """(1, 8, 8) soft mask of the kind's word in this noised render, with its own caption."""
    kind = world.KINDS[int(rows["kind"][k])]
    before, after = look(rows, k)
    text = f"a photo of a {before} {kind}{after} {world.SCENES[int(scene[k])]}, {world.PLACES[int(pose['place'][k])]}"
    positive, word, _ = encode_prompt(world_.clip, text, kind)
    guidance = make_guidance(word, scope, "max_norm", KEEPS[0], False, 1, layers=layers)
    marked, targets = _marked(positive, guidance)
    model = world_.model.clone()
    add_reader(model)
    add_capture(model)
    seen = _Look(Capture(targets, tuple(attention_blocks(model)), True), 1)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(marked, [])
    noise = torch.randn(latent.shape, generator=generator)

    def here(network, _, sigmas, **options):
        return seen(network, latent + sigmas[0] * noise, sigmas, **options)
    guider.sample(noise, torch.zeros_like(latent), comfy.samplers.KSAMPLER(here), torch.cat([sigma, 0 * sigma]),
                  disable_pbar=True, seed=0)
    made = [finished(total, guidance, None, None, (8, 8)) for total in seen.capture.sums.values()]
    return composed(made, (8, 8), None)[:, 0]


# -- the trained adapter -----------------------------------------------------------------------------------
def quality(paths: list[Path], folder: Path) -> dict[str, Any]:
    """Rows of every adapter file; the shipped one without any."""
    paths = paths or [demo.WEIGHTS / demo.METHODS["RealCustom++"][0]]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        return {"quality": f"not measured: {', '.join(missing)} missing; python dev.py train demo realcustom makes it"}
    hits: dict[str, list[float]] = {}
    with torch.inference_mode():
        world_ = World()
        for path in paths:
            one = rows_of(world_, adapters.load_adapter(path))
            for name, values in one.items():
                hits.setdefault(name, []).extend(values)
        right = alike_on_renders()
    out: dict[str, Any] = {"adapters": len(paths), "judge_on_renders": world_.judged, "two_subjects_on_renders": right,
                           "chance": round(1 / 16, 4)}
    for name, values in hits.items():
        low, high = interval(values)
        out |= {name: round(sum(values) / len(values), 4), f"{name}_lo": round(low, 4), f"{name}_hi": round(high, 4)}
    return out


def references(ids: Any) -> Tensor:
    """(16, 128, 128, 3) on white, as ID Extractor cuts them out."""
    pose = world.draw_poses(ids["kind"].shape[0], torch.Generator().manual_seed(7), world.Variation(mirror=True))
    return creatures.draw_references(ids, pose, pixels=128).picture.movedim(1, -1)


def rows_of(world_: World, adapter: Any) -> dict[str, list[float]]:
    """Hits of every picture: with the mask, without it, with a shuffled reference; what changes outside; two subjects."""
    ids = candidates()
    count = ids["kind"].shape[0]
    pictures = references(ids)
    who = [adapters.extract(adapter, world_.encoders, pictures[k:k + 1], "concat", str(k)) for k in range(count)]
    hits: dict[str, list[float]] = {name: [] for name in (
        "retrieval", "scene", "retrieval_no_mask", "scene_no_mask", "retrieval_shuffled", "outside_change", "two_subjects")}
    for k in range(count):
        kind = world.KINDS[int(ids["kind"][k])]
        for j in range(PROMPTS):
            scene, place = (k + j) % len(world.SCENES), (k + 2 * j) % len(world.PLACES)
            text, seed = f"a photo of a {kind} {world.SCENES[scene]}, {world.PLACES[place]}", 1000 * k + j
            latents = {}
            for name, one, live in (("", k, True), ("_no_mask", k, False), ("_shuffled", (k + 5) % count, True)):
                done = injected(world_, who[one], text, kind, NEGATIVE, live=live)
                latents[name] = sampled(done.model, done.positive, done.negative, seed)
                shown = world_.decode(latents[name])
                hits[f"retrieval{name}"] += (likelihoods(world_.judge, shown, ids).argmax(1) == k).float().tolist()
                if name != "_shuffled":
                    hits[f"scene{name}"] += (world_.judge(shown)["scene"].argmax(1) == scene).float().tolist()
            hits["outside_change"] += outside(world_, latents, text, seed)
        hits["two_subjects"] += two(world_, who, ids, k)
    return hits


def outside(world_: World, latents: dict[str, Tensor], text: str, seed: int) -> list[float]:
    """|guided - text only| over |no mask - text only|, outside of the last mask, per picture."""
    positive, negative = (world_.clip.encode_from_tokens_scheduled(world_.clip.tokenize(t)) for t in (text, NEGATIVE))
    plain = world_.decode(sampled(world_.model, positive, negative, seed))
    ((run,),) = (RUNS.find(latents[""]).values(),)
    beyond = F.interpolate((run.masks[-1][1] == 0).float(), (64, 64), mode="nearest")
    near, far = ((world_.decode(latents[name]) - plain).abs() * beyond for name in ("", "_no_mask"))
    return (near.flatten(1).sum(1) / far.flatten(1).sum(1).clamp(min=1e-6)).tolist()


def partner(ids: Any, k: int) -> int:
    """Another identity of another kind: the word has to tell them apart."""
    count = ids["kind"].shape[0]
    return next((k + n) % count for n in range(3, count) if ids["kind"][(k + n) % count] != ids["kind"][k])


def two(world_: World, who: list[Any], ids: Any, k: int) -> list[float]:
    """Both subjects right in their own half of one picture: the first named stands left."""
    other = partner(ids, k)
    kinds = [world.KINDS[int(ids["kind"][n])] for n in (k, other)]
    scene = k % len(world.SCENES)
    text = f"a photo of a {kinds[0]} and a {kinds[1]} {world.SCENES[scene]}"
    first = injected(world_, who[k], text, kinds[0], NEGATIVE)
    both = injected(world_, who[other], text, kinds[1], NEGATIVE, into=first)
    shown = world_.decode(sampled(both.model, both.positive, both.negative, 7000 + k))
    found = nearest_pair(shown, ids, (k, other), scene)
    return ((found[:, 0] == k) & (found[:, 1] == other)).float().tolist()


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
