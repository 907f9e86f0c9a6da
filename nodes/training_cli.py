"""`python dev.py train ...`: joins the training engine, the host and the miniature world."""
from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("likeness")
OUTPUT = Path(__file__).resolve().parent.parent / "output" / "train"  # the same place from whatever folder it is called
LESSONS_SEED = 21
MINIATURE_ENCODERS = ("dino", "mae")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py train", description="Make the miniature's files again, or train an adapter.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    demo = kinds.add_parser("demo", help="make a part of the miniature world again (resumes)")
    demo.add_argument("part", nargs="?", default="all", choices=("all", "first_stage", "encoders", "judge", "base", "adapter"))
    demo.add_argument("--work", type=Path, default=OUTPUT / "demo",
                      help="folder of checkpoints (default: output/train/demo of the pack)")
    demo.add_argument("--weights", type=Path, default=None, help="where the files go (default: the pack's own)")
    demo.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    custany = kinds.add_parser("custany", help="train a CustAny adapter on the miniature or on your own pictures")
    custany.add_argument("--world", choices=("demo",), help="train in the miniature world")
    custany.add_argument("--data", type=Path, help="folder with metadata.jsonl (reference, mask, target, caption, category)")
    custany.add_argument("--checkpoint", type=Path, help="SD1.5 or SDXL checkpoint file of ComfyUI")
    custany.add_argument("--encoders", type=Path, nargs="+", default=[],
                         help="vision encoder files, e.g. DINOv2 then MAE; in the miniature world: dino, mae, clip")
    custany.add_argument("--weights", type=Path, default=None, help="with --world: folder of the base (default: the pack's own)")
    custany.add_argument("--out", type=Path, default=OUTPUT / "custany",
                         help="folder of checkpoints and of the adapter (default: output/train/custany of the pack)")
    custany.add_argument("--steps", type=int, default=None)
    custany.add_argument("--batch", type=int, default=None)
    custany.add_argument("--lr", type=float, default=None)
    custany.add_argument("--seed", type=int, default=0)
    custany.add_argument("--size", type=int, default=512, help="side of the square training pictures in pixels")
    custany.add_argument("--decouple", choices=("channel", "token", "off"), default="channel")
    custany.add_argument("--contrast", choices=("raw", "clamp", "abs"), default="raw")
    custany.add_argument("--from", dest="start", type=Path, help="begin with the weights of this adapter file")
    custany.add_argument("--license", default="", help="licence of the data, written into the file")
    custany.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of stopping")
    custany.add_argument("--check", action="store_true", help="only check the folder, train nothing")
    custany.add_argument("--threads", type=int, default=0)
    return parser


def main(argv: list[str]) -> int:
    """Runs one training; 0 when it is done."""
    import torch

    args = _parser().parse_args(argv)
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    command = "python dev.py train " + " ".join(argv)
    if args.kind == "demo":
        return _demo(args, command)
    return _custany(args, command)


def _say(text: str) -> None:
    log.info("%s %s", time.strftime("%H:%M:%S"), text)


def _demo(args: argparse.Namespace, command: str) -> int:
    import torch

    from ..models.demo.recipe import Recipe
    from ..models.hosting.demo import WEIGHTS
    from ..models.hosting.demo_unet import build_trainable_unet

    weights = args.weights or WEIGHTS
    recipe = Recipe(args.work, weights, command, _say)
    wanted = ("encoders", "judge", "base", "adapter") if args.part == "all" else (args.part,)
    for part in wanted:
        if part == "first_stage":
            recipe.first_stage()
        elif part == "encoders":
            recipe.encoders()
        elif part == "judge":
            recipe.judge()
        elif part == "base":
            torch.manual_seed(0)
            recipe.base(build_trainable_unet())
        else:
            train_miniature(args.work / "custany", weights, command, weights / "custany.safetensors")
    return 0


def train_miniature(out: Path, weights: Path, command: str, target: Path | None = None, **settings: Any) -> Path:
    """A CustAny adapter in the miniature world; returns the finished file. `settings` override the recipe's."""
    import shutil

    import torch

    from ..models.common import files
    from ..models.custany.config import CustAnyConfig
    from ..models.demo import lessons
    from ..models.demo.recipe import cache_key, keep
    from ..models.hosting.training_base import MiniatureBase
    from ..models.training.base import Batch
    from ..models.training.config import TrainConfig
    from ..models.training.custany import CustAnyTask
    from ..models.training.loop import train

    names = settings.pop("encoders", None) or MINIATURE_ENCODERS
    base = MiniatureBase(weights / "base.safetensors", [weights / f"{name}.safetensors" for name in names])
    pairs, steps = settings.pop("pairs", 10240), settings.pop("steps", None) or 2600
    start = settings.pop("start", None)
    config = CustAnyConfig(base.width, tuple((c.family, c.width) for _, c in base.encoders),
                           tuple(layer for layer in base.layers if layer[0].startswith("output.")), head_dim=32,
                           resolutions=tuple(base.sizes), base="miniature").check()
    started = time.time()
    # Features of another base or encoder would be trained on without a sign.
    frozen = [files.sha256(weights / f"{name}.safetensors") for name in ("base", *names)]
    drawn = (pairs, LESSONS_SEED, lessons.ADAPTER_VARIATION, lessons.REFERENCE_VARIATION, lessons.OTHER_KIND, lessons.GARMENT)
    kept = out.parent / f"lessons_{cache_key(frozen, drawn)}.pt"  # other seeds learn from the same
    if kept.exists():
        data = lessons.Lessons(*torch.load(kept, weights_only=True))
    else:
        data = lessons.prepare(pairs, LESSONS_SEED, lessons.ADAPTER_VARIATION, base.encode_image, base.features, base.embed_image)
        keep(kept, tuple(data))
    _say(f"{pairs} pairs drawn in {time.time() - started:.0f} s")

    class Source:
        def batch(self, n: int, generator: torch.Generator) -> Batch:
            index = torch.randint(0, pairs, (n,), generator=generator)
            captions, words = lessons.told(data, index, generator)
            features = [(c[index].float(), p[index].float()) for c, p in data.features]
            return Batch(None, None, data.latents[index], captions, words, features, data.embeds[index])

    train_config = TrainConfig(**{"steps": steps, "batch": 32, "lr": 1e-3, "warmup": 50, "ema": 0.998, "global_off": 0.1,
                                  "local_off": 0.1, "decouple": "off", "export_dtype": "fp16", "save_every": 200, **settings})
    task = CustAnyTask(base, config, train_config, base.hashes)
    _begin_with(task, start)
    result = train(task, train_config, Source(), out, log=_Progress(),
                   metadata={"command": command, "dataset_license": "drawn by this pack, GPL-3.0"})
    _say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
    if target is not None and result.finished:
        shutil.copyfile(result.path, target)
    return result.path


def _begin_with(task: Any, start: Path | None) -> None:
    """Puts the weights of an adapter file into a new task; the sizes must be the same."""
    from ..models.common import files
    from ..models.custany.adapter import check_shapes

    if start is not None:
        state, _ = files.load(start)
        check_shapes(task.config, {key: tuple(value.shape) for key, value in state.items()})
        task.adapter.load_state_dict({key: value.float() for key, value in state.items()})


class _Progress:
    """One line every hundred steps."""

    def __call__(self, row: dict[str, float]) -> None:
        if int(row["step"]) % 100 == 0:
            _say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))


def _custany(args: argparse.Namespace, command: str) -> int:
    from ..models.common.errors import LikenessError
    from ..models.training.data import validate

    try:
        if args.world:
            settings = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
            from ..models.hosting.demo import WEIGHTS
            settings["encoders"] = [path.name for path in args.encoders]
            train_miniature(args.out, args.weights or WEIGHTS, command, seed=args.seed, decouple=args.decouple,
                            contrast_mode=args.contrast, start=args.start, **settings)
            return 0
        if args.data is None:
            raise LikenessError("Say what to train on: --world demo, or --data FOLDER --checkpoint FILE --encoders FILE FILE.")
        faults = validate(args.data)
        for fault in faults:
            _say(fault)
        if args.check:
            _say(f"{len(faults)} bad row(s)")
            return 1 if faults else 0
        if args.checkpoint is None or not args.encoders:
            raise LikenessError("Training on a folder needs --checkpoint FILE (SD1.5 or SDXL) and --encoders FILE [FILE].")
        _train_folder(args, command)
        return 0
    except LikenessError as error:
        log.error("%s", error)
        return 2


def _train_folder(args: argparse.Namespace, command: str) -> None:
    from ..models.hosting.training_base import load_checkpoint_base, preset_for
    from ..models.training.config import TrainConfig
    from ..models.training.custany import CustAnyTask, folder_source
    from ..models.training.loop import train

    base = load_checkpoint_base(args.checkpoint, args.encoders)
    given = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    settings = TrainConfig(seed=args.seed, decouple=args.decouple, contrast_mode=args.contrast, **given)
    config = preset_for(base)
    task = CustAnyTask(base, config, settings, [item.sha256 for item in base.encoders.items])
    _begin_with(task, args.start)
    source = folder_source(args.data, config, settings, args.size, args.skip_bad)
    result = train(task, settings, source, args.out, log=_Progress(),
                   metadata={"command": command, "dataset_license": args.license})
    _say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
