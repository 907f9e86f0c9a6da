"""`python dev.py train ...`: joins the training engine, the host and the miniature world."""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..models.common.errors import LikenessError
from ..models.demo.ablation import VARIANTS
from . import training_views
from .training_miniature import Progress, begin_with, folder_recipe, metadata_of, same_run, say, train_ablation, train_miniature

log = logging.getLogger("likeness")
OUTPUT = Path(__file__).resolve().parent.parent / "output" / "train"  # the same place from whatever folder it is called
DEVICES = ("auto", "cpu", "cuda")
SHIPPED = ("encoders", "judge", "base", "adapter", "realcustom", "faces")
PARTS = ("all", "first_stage", *SHIPPED, "clip", "ablation")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py train", description="Make the miniature's files again, or train an adapter.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    demo = kinds.add_parser("demo", help="make a part of the miniature world again (resumes)")
    demo.add_argument("part", nargs="?", default="all", choices=PARTS,
                      help="all: what ships, but CustomNet (train customnet). clip: a third encoder, to compare with. "
                           "ablation: all adapters of the tables")
    demo.add_argument("--work", type=Path, default=OUTPUT / "demo",
                      help="folder of checkpoints (default: output/train/demo of the pack)")
    demo.add_argument("--weights", type=Path, default=None, help="where the files go (default: the pack's own)")
    demo.add_argument("--world", choices=("easy", "wide"), default="easy",
                      help="what the base learns to draw. easy: what ships. wide: goes on with varied scenes, sizes, turns and "
                           "creatures that face both ways (more than twice the steps; give --weights, too)")
    demo.add_argument("--from", dest="start", type=Path,
                      help="with --world wide: a base of the easy world to begin with, which spares its stages")
    demo.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    demo.add_argument("--device", choices=DEVICES, default="auto",
                      help="where adapters train (default: as ComfyUI chooses)")
    demo.add_argument("--adapters", type=Path, default=None,
                      help="ablation: folder of its runs, one a variant and seed (default: ablation in --work)")
    demo.add_argument("--only", nargs="+", default=[], choices=tuple(VARIANTS), help="ablation: variants (default: all)")
    demo.add_argument("--seeds", type=int, nargs="+", default=[], help="ablation: training seeds (default: 0 1 2)")
    demo.add_argument("--seed", type=int, default=0, help="faces: seed of the training (default: 0, which ships)")
    demo.add_argument("--steps", type=int, default=None, help="steps of an adapter (default: the recipe's)")
    for kind, title in (("custany", "CustAny"), ("realcustom", "RealCustom++")):
        one = kinds.add_parser(kind, help=f"train a {title} adapter on the miniature or on your own pictures")
        one.add_argument("--world", choices=("demo",), help="train in the miniature world, as its base draws it")
        one.add_argument("--data", type=Path, help="folder with metadata.jsonl (reference, mask, target, caption, category)")
        one.add_argument("--checkpoint", type=Path, help="SD1.5 or SDXL checkpoint file of ComfyUI")
        one.add_argument("--encoders", type=Path, nargs="+", default=[],
                         help="vision encoder files, " + ("e.g. DINOv2 then MAE; in the miniature world: dino, mae, clip"
                                                          if kind == "custany" else "SigLIP then DINOv2"))
        one.add_argument("--weights", type=Path, default=None, help="with --world: folder of the base (default: the pack's own)")
        one.add_argument("--out", type=Path, default=OUTPUT / kind,
                         help=f"folder of checkpoints and of the adapter (default: output/train/{kind} of the pack)")
        one.add_argument("--steps", type=int, default=None)
        one.add_argument("--pairs", type=int, default=None, help="with --world: how many pairs are drawn (default: the recipe's)")
        one.add_argument("--batch", type=int, default=None)
        one.add_argument("--lr", type=float, default=None)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--size", type=int, default=512, help="side of the square training pictures in pixels")
        one.add_argument("--from", dest="start", type=Path, help="begin with the weights of this adapter file")
        one.add_argument("--license", default="", help="licence of the data, written into the file")
        one.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of stopping")
        one.add_argument("--check", action="store_true", help="only check the folder, train nothing")
        one.add_argument("--threads", type=int, default=0)
        if kind == "custany":
            one.add_argument("--decouple", choices=("channel", "token", "off"), default="channel")
            one.add_argument("--contrast", choices=("raw", "clamp", "abs"), default="raw")
            one.add_argument("--correlate", type=float, default=0.0,
                             help="with --world: share of pairs whose reference stands as the target does (default: none)")
        one.add_argument("--device", choices=DEVICES, default="auto", help="with --world: where to train")
    training_views.add_arguments(kinds, OUTPUT)
    return parser


def told(word: str) -> str:
    """A word of the command without the folders of this machine: it stands in the file, and that goes to strangers."""
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={told(value)}"
    path = Path(word)
    return path.name if path.is_absolute() or ".." in path.parts else word


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
    command = "python dev.py train " + " ".join(map(told, argv))
    run = {"demo": _demo, "customnet": training_views.run}.get(args.kind, _adapter)
    try:
        return run(args, command)
    except LikenessError as error:
        log.error("%s", error)
        return 2
    finally:
        torch.set_flush_denormal(False)  # a state of the whole process, and others may call this function too


def _demo(args: argparse.Namespace, command: str) -> int:
    import torch

    from ..models.demo.recipe import Recipe
    from ..models.hosting import demo_faces
    from ..models.hosting.demo import WEIGHTS
    from ..models.hosting.demo_unet import build_trainable_unet

    if args.start is not None and (args.part, args.world) != ("base", "wide"):
        raise LikenessError("--from FILE spares the wide world's base the stages before its own; say: demo base --world wide.")
    weights = args.weights or WEIGHTS
    recipe = Recipe(args.work, weights, command, say)
    settings = {"steps": args.steps} if args.steps else {}
    for part in SHIPPED if args.part == "all" else (args.part,):
        if part == "first_stage":
            recipe.first_stage()
        elif part == "encoders":
            recipe.encoders()
        elif part == "judge":
            recipe.judge()
        elif part == "base":
            torch.manual_seed(0)
            recipe.base(build_trainable_unet(), args.world, args.start)
        elif part == "realcustom":
            from .training_realcustom import train_miniature_realcustom
            train_miniature_realcustom(args.work / "realcustom", weights, command, weights / "realcustom.safetensors",
                                       device=args.device, **settings)
        elif part == "faces":
            demo_faces.train(weights / "faces", command, say, seed=args.seed)
        elif part == "clip":
            recipe.clip()
        elif part == "ablation":
            train_ablation(args.adapters or args.work / "ablation", weights, args.work, args.only, args.seeds, args.steps,
                           args.device)
        else:
            train_miniature(args.work / "custany", weights, command, weights / "custany.safetensors", device=args.device,
                            **settings)
    return 0


def _adapter(args: argparse.Namespace, command: str) -> int:
    from ..models.training.data import validate

    if args.world:
        _train_in_miniature(args, command)
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
    if args.kind == "realcustom":
        from .training_realcustom import train_folder_realcustom
        train_folder_realcustom(args, command)
    else:
        _train_folder(args, command)
    return 0


def _train_in_miniature(args: argparse.Namespace, command: str) -> None:
    from ..models.hosting.demo import WEIGHTS

    settings = {name: getattr(args, name) for name in ("steps", "batch", "lr", "pairs") if getattr(args, name) is not None}
    settings |= {"seed": args.seed, "start": args.start}
    weights = args.weights or WEIGHTS
    if args.kind == "realcustom":
        from .training_realcustom import train_miniature_realcustom
        train_miniature_realcustom(args.out, weights, command, device=args.device, **settings)
    else:
        train_miniature(args.out, weights, command, encoders=args.encoders, correlate=args.correlate, decouple=args.decouple,
                        contrast_mode=args.contrast, device=args.device, **settings)


def _train_folder(args: argparse.Namespace, command: str) -> None:
    from ..models.hosting.training_base import load_checkpoint_base, preset_for
    from ..models.training.config import TrainConfig
    from ..models.training.custany import CustAnyTask, folder_source
    from ..models.training.loop import train

    recipe = folder_recipe(args)
    same_run(args.out, recipe, begin=False)
    base = load_checkpoint_base(args.checkpoint, args.encoders)
    given = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    settings = TrainConfig(seed=args.seed, decouple=args.decouple, contrast_mode=args.contrast, **given)
    config = preset_for(base)
    task = CustAnyTask(base, config, settings, [item.sha256 for item in base.encoders.items])
    begin_with(task, args.start)
    source = folder_source(args.data, config, settings, args.size, args.skip_bad)
    same_run(args.out, recipe)
    result = train(task, settings, source, args.out, log=Progress(), metadata=metadata_of(args, command))
    say(f"adapter: {result.step} steps in {result.seconds:.0f} s, {result.path}")
