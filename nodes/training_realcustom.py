"""`python dev.py train realcustom`: RealCustom++ in the miniature world, or on a folder of pictures."""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.common import files
from ..models.common.errors import LikenessError
from ..models.demo import lessons, recontext
from ..models.demo.cache import cache_key, kept_or_made
from ..models.hosting.training_base import MiniatureBase, load_checkpoint_base, training_device
from ..models.hosting.training_realcustom import checkpoint_encode, config_of, miniature_encode
from ..models.realcustom.adapter import build
from ..models.realcustom.config import split
from ..models.realcustom.preprocess import SIDE
from ..models.training.base import Batch
from ..models.training.config import TrainConfig
from ..models.training.data import FolderData
from ..models.training.loop import train
from ..models.training.realcustom import RealCustomTask
from .training_miniature import LESSONS_SEED, Progress, digest, folder_recipe, metadata_of, miniature_world, same_run, say

PAIRS, STEPS = 16384, 8000
# A reference decides the first steps of a drawing, and a body is a fifth of a picture. No drop_reference of its own: the
# settings' 0.05 and drop_both leave a tenth of the references black, as many as the release's training code.
RECIPE = {"batch": 32, "lr": 1e-3, "warmup": 50, "ema": 0.998, "drop_both": 0.06, "noisiest_of": 2, "subject_weight": 2.0,
          "export_dtype": "fp16", "save_every": 200}


class Curriculum:
    """Batches of the miniature's pairs: from like poses and sizes to unlike ones over the first two thirds of a run of so many
    batches. batches 0: all of them from the start, for an adapter that goes on from a trained one."""

    def __init__(self, data: recontext.Recontext, batches: int):
        self.data, self.batches, self.count = data, batches, 0

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        progress = self.count / self.batches if self.batches else 1.0
        index = torch.randint(0, recontext.open_pairs(len(self.data.scene), progress), (n,), generator=generator)
        self.count += 1
        captions, words = lessons.told(self.data, index, generator)
        features = [(self.data.deep[index].float(), self.data.local[index].float())]
        return Batch(None, None, self.data.latents[index], captions, words, features, None, self.data.mask[index])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def train_miniature_realcustom(out: Path, weights: Path, command: str, target: Path | None = None, *, device: str = "cpu",
                               **settings: Any) -> Path:
    """A RealCustom++ adapter in the miniature world; returns the finished file. `settings` override the recipe's.

    Raises LikenessError where `out` holds a run on other weights or lessons, or one that began with another adapter."""
    pairs, steps, start = settings.pop("pairs", PAIRS), settings.pop("steps", None) or STEPS, settings.pop("start", None)
    paths = [weights / f"{name}.safetensors" for name in ("base", "dino", "mae")]
    lessons_key = cache_key(pairs, LESSONS_SEED, recontext.LAW)
    frozen = [files.sha256(path) for path in paths]
    same_run(out, {"weights": frozen, "lessons": lessons_key, "begun_with": digest(start)})
    base = MiniatureBase(paths[0], paths[1:], training_device(device))
    config = config_of(base.width, base.layers, [vit for _, vit in base.encoders], max(base.sizes))
    encode = miniature_encode(base, config)
    data = _pairs(out, weights, frozen, pairs, base, encode, 2 * config.size)
    train_config = TrainConfig(**{"steps": steps, **RECIPE, **settings})
    task = RealCustomTask(base, config, train_config, encode, 2 * config.size, base.hashes, base.residual_blocks)
    if start is None:
        task.adapter.even_out(*(part.to(base.device) for part in _spread(data)))
    _begin_with(task, start)
    source = Curriculum(data, 0 if start else steps * train_config.accumulation)
    result = train(task, train_config, source, out, log=Progress(),
                   metadata={"command": command, "dataset_license": "drawn by this pack, GPL-3.0",
                             "device": base.device.type})
    say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
    if target is not None and result.finished:
        files.copy(result.path, target)
    return result.path


def _pairs(out: Path, weights: Path, frozen: list[str], pairs: int, base: MiniatureBase, encode: Any,
           side: int) -> recontext.Recontext:
    """Drawn once for a folder; kept beside its checkpoints under a name that tells all they hang on. frozen: hashes of the
    networks that say something of them."""
    started = time.time()
    kept = out / f"recontext_{cache_key(frozen, pairs, side, LESSONS_SEED, recontext.LAW)}.pt"
    data = kept_or_made(kept, recontext.Recontext, lambda: recontext.prepare(
        pairs, LESSONS_SEED, miniature_world(weights), side, base.encode_image, encode))
    say(f"{pairs} pairs drawn in {time.time() - started:.0f} s, {base.device}")
    return data


def _spread(data: recontext.Recontext) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (v,) of every channel of the deep features."""
    values = data.deep[:1024].float().flatten(0, 1)
    return values.mean(0), values.std(0)


def _begin_with(task: RealCustomTask, start: Path | None) -> None:
    """Puts the weights of an adapter file into a new task; the sizes must be the same."""
    if start is None:
        return
    state, _ = files.load(start)
    own = build(task.config, split(state)).state_dict()
    wrong = next((name for name, value in task.adapter.state_dict().items() if own[name].shape != value.shape), None)
    if wrong is not None:
        raise LikenessError(f"The adapter {start.name} is of another size ({wrong}); begin with one for this base and encoders.")
    task.adapter.load_state_dict({name: value.float() for name, value in own.items()})


def train_folder_realcustom(args: argparse.Namespace, command: str) -> None:
    """On a folder of pictures for an SD1.5 or SDXL checkpoint. Such a folder does not tell where the subject is in the targets
    (its masks are the references'), so no sample learns under a mask and no place counts more. Raises LikenessError where the
    folder of the run holds one on other pictures, another checkpoint, other encoders, or one begun with another adapter."""
    recipe = folder_recipe(args)
    same_run(args.out, recipe, begin=False)
    base = load_checkpoint_base(args.checkpoint, args.encoders, exact_gelu=True)
    config = config_of(base.width, base.layers, [item.config for item in base.encoders.items], SIDE)
    given = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    settings = TrainConfig(seed=args.seed, **{"drop_reference": 0.1, **given})  # as the release's training code
    task = RealCustomTask(base, config, settings, checkpoint_encode(base, config), 2 * SIDE,
                          [item.sha256 for item in base.encoders.items], base.residual_blocks)
    _begin_with(task, args.start)
    source = FolderData(args.data, args.size, 2 * SIDE, augment=settings.reference_augment, skip_bad=args.skip_bad)
    same_run(args.out, recipe)
    result = train(task, settings, source, args.out, log=Progress(), metadata=metadata_of(args, command))
    say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
