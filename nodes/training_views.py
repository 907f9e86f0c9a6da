"""`python dev.py train customnet ...`: the miniature CustomNet in the training engine."""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .training_miniature import Progress, digest, same_run, say

LESSONS_SEED, PICTURES = 41, 10240


def add_arguments(kinds: Any, output: Path) -> None:
    """The words of this training."""
    parser = kinds.add_parser("customnet", help="train CustomNet on the miniature's toy buildings (resumes)")
    parser.add_argument("--world", choices=("demo",), default="demo", help="train in the miniature world")
    parser.add_argument("--out", type=Path, default=output / "customnet",
                        help="folder of checkpoints and of the file (default: output/train/customnet of the pack)")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablation", choices=("none", "shared attention", "no location"), default="none",
                        help="leave a part of the method out, to measure what it does")
    parser.add_argument("--easy", action="store_true",
                        help="one place and one distance only: a first part of a training, before --from")
    parser.add_argument("--from", dest="start", type=Path, help="begin with the weights of this file")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="copy the finished file to the pack's own weights")


def run(args: argparse.Namespace, command: str) -> int:
    """One training; 0 when it is done."""
    from ..models.hosting.demo import WEIGHTS

    settings = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    target = WEIGHTS / "customnet.safetensors" if args.ship else None
    train_miniature(args.out, WEIGHTS, command, target, seed=args.seed, ablation=args.ablation, easy=args.easy,
                    start=args.start, **settings)
    return 0


def train_miniature(out: Path, weights: Path, command: str, target: Path | None = None, pictures: int = PICTURES,
                    ablation: str = "none", easy: bool = False, start: Path | None = None, **settings: Any) -> Path:
    """Trains in the miniature world and returns the finished file. `settings` override the recipe's."""
    import torch

    from ..models.common import files
    from ..models.demo import views
    from ..models.demo.cache import cache_key, kept_or_made
    from ..models.hosting.customnet_demo import Lessons, MiniatureViews
    from ..models.training.config import TrainConfig
    from ..models.training.customnet import CustomNetTask, ViewBatch
    from ..models.training.loop import train

    config = TrainConfig(**{"steps": 8000, "batch": 24, "lr": 1e-3, "warmup": 100, "ema": 0.998, "drop_text": 0.15,
                            "export_dtype": "fp16", "save_every": 250, **settings})
    base = MiniatureViews(weights, config.seed)
    started = time.time()
    drawn = (pictures, LESSONS_SEED, views.AZIMUTH, views.ELEVATION, views.DISTANCE, views.SIDES, views.REFERENCE, easy)
    lessons = cache_key(base.hashes, drawn)
    same_run(out, {"weights": list(base.hashes), "lessons": lessons, "ablation": ablation, "easy": easy,
                   "begun_with": digest(start)})
    kept = out / f"views_{lessons}.pt"
    data = kept_or_made(kept, Lessons, lambda: base.lessons(views.draw(pictures, LESSONS_SEED, easy=easy)))
    say(f"{pictures} pictures drawn in {time.time() - started:.0f} s")

    class Source:
        def batch(self, n: int, generator: torch.Generator) -> ViewBatch:
            index = torch.randint(0, pictures, (n,), generator=generator)
            captions = views.captions(views.select(data.identity, index), data.scene[index], generator)
            return ViewBatch(data.latents[index].float(), data.location[index].float(), data.embed[index], data.camera[index],
                             captions)

    # The miniature begins from nothing, so neither the release's start nor its zero embedding means anything to it.
    task = CustomNetTask(base, config, "token", ablation, text_rate=1.0)
    if start is not None:
        task.projection.load_state_dict(base.begin(start))
    result = train(task, config, Source(), out, log=Progress(),
                   metadata={"command": command, "dataset_license": "drawn by this pack, GPL-3.0", "base": "miniature",
                             "parts": " ".join(digest[:16] for digest in base.hashes)})
    say(f"CustomNet: {result.step} steps in {result.seconds:.0f} s, {result.path}")
    if target is not None and result.finished:
        files.copy(result.path, target)
    return result.path
