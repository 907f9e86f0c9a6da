"""Adapters trained in the miniature world: one run, and all the runs that the tables of evidence compare."""
from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.demo.world import Variation

log = logging.getLogger("likeness")
LESSONS_SEED = 21
PAIRS = 10240
ENCODERS = ("dino", "mae")


def say(text: str) -> None:
    """One line with the time."""
    log.info("%s %s", time.strftime("%H:%M:%S"), text)


class Progress:
    """One line every hundred steps."""

    def __call__(self, row: dict[str, float]) -> None:
        if int(row["step"]) % 100 == 0:
            say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))


def begin_with(task: Any, start: Path | None) -> None:
    """Puts the weights of an adapter file into a new task; the sizes must be the same."""
    from ..models.common import files
    from ..models.custany.adapter import check_shapes

    if start is not None:
        state, _ = files.load(start)
        check_shapes(task.config, {key: tuple(value.shape) for key, value in state.items()})
        task.adapter.load_state_dict({key: value.float() for key, value in state.items()})


def miniature_world(weights: Path) -> Variation:
    """What the base in this folder can draw, and so what adapters on it are taught with."""
    from ..models.common import files
    from ..models.demo.world import WORLDS, world_of

    return WORLDS[world_of(files.read_header(weights / "base.safetensors").metadata)]


def train_miniature(out: Path, weights: Path, command: str, target: Path | None = None, *, encoders: Iterable[str | Path] = (),
                    pairs: int = PAIRS, correlate: float = 0.0, start: Path | None = None, device: str = "cpu",
                    cache: Path | None = None, **settings: Any) -> Path:
    """A CustAny adapter in the miniature world; returns the finished file. A finished run is not made again.

    encoders: names of files in `weights`, or paths. correlate: share of pairs whose reference stands as the target does.
    cache: folder where runs with the same lessons find them (default: out). settings override the recipe's. Raises
    LikenessError where `out` holds a run on other weights or lessons, or one that began with another adapter."""
    import torch

    from ..models.common import files
    from ..models.custany.config import CustAnyConfig
    from ..models.demo import lessons
    from ..models.demo.cache import cache_key, kept_or_made
    from ..models.hosting.training_base import MiniatureBase, training_device
    from ..models.training.base import Batch
    from ..models.training.config import TrainConfig
    from ..models.training.custany import CustAnyTask
    from ..models.training.loop import train

    train_config = TrainConfig(**{"steps": 2600, "batch": 32, "lr": 1e-3, "warmup": 50, "ema": 0.998, "global_off": 0.1,
                                  "local_off": 0.1, "decouple": "off", "export_dtype": "fp16", "save_every": 200, **settings})
    paths = [encoder_file(weights, name) for name in encoders or ENCODERS]
    # Features of another base or encoder would be trained on without a sign.
    frozen = [files.sha256(path) for path in (weights / "base.safetensors", *paths)]
    variation = miniature_world(weights)
    drawn = (pairs, LESSONS_SEED, variation, lessons.REFERENCE_VARIATION, lessons.OTHER_KIND, lessons.GARMENT, lessons.CELLS)
    drawn += (correlate,) if correlate else ()
    same_run(out, {"weights": frozen, "lessons": cache_key(drawn), "begun_with": digest(start)})
    result_path = out / "adapter.safetensors"
    if _finished(result_path, train_config):
        say(f"{out.name}: finished already")
    else:
        base = MiniatureBase(weights / "base.safetensors", paths, training_device(device))
        config = CustAnyConfig(base.width, tuple((c.family, c.width) for _, c in base.encoders),
                               tuple(layer for layer in base.layers if layer[0].startswith("output.")), head_dim=32,
                               resolutions=tuple(base.sizes), base="miniature").check()
        started = time.time()
        kept = (cache or out) / f"lessons_{cache_key(frozen, drawn)}.pt"
        data = kept_or_made(kept, lessons.Lessons, lambda: lessons.prepare(
            pairs, LESSONS_SEED, variation, base.encode_image, base.features, base.embed_image, correlate))
        say(f"{pairs} pairs drawn in {time.time() - started:.0f} s, {base.device}")

        class Source:
            def batch(self, n: int, generator: torch.Generator) -> Batch:
                index = torch.randint(0, pairs, (n,), generator=generator)
                captions, words = lessons.told(data, index, generator)
                features = [(c[index].float(), p[index].float()) for c, p in data.features]
                return Batch(None, None, data.latents[index], captions, words, features, data.embeds[index],
                             data.mask[index])

        task = CustAnyTask(base, config, train_config, base.hashes)
        begin_with(task, start)
        result = train(task, train_config, Source(), out, log=Progress(),
                       metadata={"command": command, "dataset_license": "drawn by this pack, GPL-3.0",
                                 "base_sha256": frozen[0], "correlate": str(correlate), "device": base.device.type})
        say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
    if target is not None and _finished(result_path, train_config):
        files.copy(result_path, target)
    return result_path


def folder_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """What a run on a folder of pictures is made from, for `same_run`."""
    from ..models.common import files

    return {"weights": [files.sha256(path) for path in (args.checkpoint, *args.encoders)], "size": args.size,
            "lessons": files.sha256(args.data / "metadata.jsonl"), "begun_with": digest(args.start)}


def metadata_of(args: argparse.Namespace, command: str) -> dict[str, str]:
    """What the command says for the file of a run on pictures; a licence that is not given stays the loop's "unknown"."""
    return {"command": command} | ({"dataset_license": args.license} if args.license else {})


def encoder_file(weights: Path, name: str | Path) -> Path:
    """A name such as dino stands for the file in `weights`; a path stands for itself."""
    return Path(name) if Path(name).suffix else weights / f"{name}.safetensors"


def digest(start: Path | None) -> str:
    """Of the file that a run begins with; empty without one."""
    from ..models.common import files

    return "" if start is None else files.sha256(start)


def same_run(out: Path, recipe: dict[str, Any], begin: bool = True) -> None:
    """Notes what a run is made from; the checkpoint does not know it and would go on with other lessons.

    begin False only refuses: a run that cannot begin leaves no note."""
    from ..models.common import files
    from ..models.common.errors import LikenessError

    note = out / "recipe.json"
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != recipe:
            raise LikenessError(f"The folder {out.name} holds a run on another base, other encoders, other lessons, "
                                "another ablation or another file to begin with; train in a new folder, or delete that one.")
        return
    if not begin:
        return
    with files.whole(note) as part:
        part.write_text(json.dumps(recipe), encoding="utf-8")


def _finished(path: Path, wanted: Any) -> bool:
    """Whether the adapter at `path` is the end of a run with these settings (a TrainConfig)."""
    from ..models.common import files

    if not path.is_file():
        return False
    said = files.read_header(path).metadata
    return int(said["steps"]) >= wanted.steps and not wanted.differences(type(wanted).from_json(said["train_config"]))


def train_ablation(adapters: Path, weights: Path, clip_work: Path, variants: Iterable[str] = (), seeds: Iterable[int] = (),
                   steps: int | None = None, device: str = "cpu", pairs: int = PAIRS) -> list[Path]:
    """Every variant of the table with every seed, seed by seed, each in a folder of its own; resumes, skips what is done."""
    from ..models.demo import ablation
    from ..models.demo.recipe import Recipe
    from ..models.hosting.demo import WEIGHTS

    steps = steps or ablation.STEPS
    # The folder's name alone: the file goes to strangers.
    where = "" if weights.resolve() == WEIGHTS.resolve() else f" --weights {weights.name}"
    chosen = list(variants) or list(ablation.VARIANTS)
    made = []
    for seed in list(seeds) or ablation.SEEDS:
        for name in chosen:
            variant = ablation.VARIANTS[name]
            encoders: list[str | Path] = list(variant.encoders)
            if "clip" in encoders and not encoder_file(weights, "clip").exists():
                # Beside the adapters and not beside the weights: it must never come into the pack by chance.
                if not encoder_file(adapters, "clip").exists():
                    Recipe(clip_work, adapters, "python dev.py train demo clip", say).clip()
                encoders = [encoder_file(adapters, "clip") if e == "clip" else e for e in encoders]
            say(f"{name}, seed {seed}")
            command = f"python dev.py train demo ablation --only {name} --seeds {seed} --steps {steps}{where}"
            made.append(train_miniature(ablation.folder_of(adapters, name, seed), weights, command, encoders=encoders,
                                        correlate=variant.correlate, decouple=variant.decouple, global_off=variant.global_off,
                                        local_off=variant.local_off, seed=seed, steps=steps, device=device, pairs=pairs,
                                        cache=adapters, **ablation.RECIPE))
    return made
