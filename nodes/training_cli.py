"""`python dev.py train ...`: joins the training engine, the host and the miniature world."""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..models.common.errors import LikenessError
from ..models.demo.ablation import VARIANTS
from .training_miniature import Progress, begin_with, say, train_ablation, train_miniature

log = logging.getLogger("likeness")
OUTPUT = Path(__file__).resolve().parent.parent / "output" / "train"  # the same place from whatever folder it is called
DEVICES = ("auto", "cpu", "cuda")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py train", description="Make the miniature's files again, or train an adapter.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    demo = kinds.add_parser("demo", help="make a part of the miniature world again (resumes)")
    demo.add_argument("part", nargs="?", default="all",
                      choices=("all", "first_stage", "encoders", "judge", "base", "adapter", "clip", "ablation"),
                      help="all: what ships. clip: a third encoder, to compare with. ablation: all adapters of the tables")
    demo.add_argument("--work", type=Path, default=OUTPUT / "demo",
                      help="folder of checkpoints (default: output/train/demo of the pack)")
    demo.add_argument("--weights", type=Path, default=None, help="where the files go (default: the pack's own)")
    demo.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    demo.add_argument("--device", choices=DEVICES, default="auto", help="where adapters train (default: as ComfyUI chooses)")
    demo.add_argument("--adapters", type=Path, default=None,
                      help="ablation: folder of its runs, one a variant and seed (default: ablation in --work)")
    demo.add_argument("--only", nargs="+", default=[], choices=tuple(VARIANTS), help="ablation: variants (default: all)")
    demo.add_argument("--seeds", type=int, nargs="+", default=[], help="ablation: training seeds (default: 0 1 2)")
    demo.add_argument("--steps", type=int, default=None, help="steps of an adapter (default: 2600)")
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
    custany.add_argument("--correlate", type=float, default=0.0,
                         help="with --world: share of pairs whose reference stands as the target does (default: none)")
    custany.add_argument("--device", choices=DEVICES, default="auto", help="with --world: where to train")
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
    try:
        return (_demo if args.kind == "demo" else _custany)(args, command)
    except LikenessError as error:
        log.error("%s", error)
        return 2


def _demo(args: argparse.Namespace, command: str) -> int:
    import torch

    from ..models.demo.recipe import Recipe
    from ..models.hosting.demo import WEIGHTS
    from ..models.hosting.demo_unet import build_trainable_unet

    weights = args.weights or WEIGHTS
    recipe = Recipe(args.work, weights, command, say)
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
        elif part == "clip":
            recipe.clip()
        elif part == "ablation":
            train_ablation(args.adapters or args.work / "ablation", weights, args.work, args.only, args.seeds, args.steps,
                           args.device)
        else:
            settings = {"steps": args.steps} if args.steps else {}
            train_miniature(args.work / "custany", weights, command, weights / "custany.safetensors", device=args.device,
                            **settings)
    return 0


def _custany(args: argparse.Namespace, command: str) -> int:
    from ..models.hosting.demo import WEIGHTS
    from ..models.training.data import validate

    if args.world:
        settings = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
        train_miniature(args.out, args.weights or WEIGHTS, command, encoders=args.encoders, correlate=args.correlate,
                        seed=args.seed, decouple=args.decouple, contrast_mode=args.contrast, start=args.start,
                        device=args.device, **settings)
        return 0
    if args.data is None:
        raise LikenessError("Say what to train on: --world demo, or --data FOLDER --checkpoint FILE --encoders FILE FILE.")
    faults = validate(args.data)
    for fault in faults:
        say(fault)
    if args.check:
        say(f"{len(faults)} bad row(s)")
        return 1 if faults else 0
    if args.checkpoint is None or not args.encoders:
        raise LikenessError("Training on a folder needs --checkpoint FILE (SD1.5 or SDXL) and --encoders FILE [FILE].")
    _train_folder(args, command)
    return 0


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
    begin_with(task, args.start)
    source = folder_source(args.data, config, settings, args.size, args.skip_bad)
    result = train(task, settings, source, args.out, log=Progress(),
                   metadata={"command": command, "dataset_license": args.license})
    say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
