"""Makes the miniature's files again, part by part: first stage, encoders, judge, base. Adapters come from the engine.

Every part leaves its state in a work folder and is not made twice; the base writes checkpoints and resumes.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import files
from ..common.errors import LikenessError
from ..vision.preprocess import normalise
from . import base, judge, packed, pretrain
from .base import BaseRun, Stage
from .cache import cache_key, keep
from .first_stage import FirstStage
from .pool import Pool, render_pool
from .world import WORLDS, Variation, world_of

SEEN = Variation(scene=0.6, offset=1.0, turn=0.1, mirror=True)  # what first stage and encoders learn from
JUDGED = SEEN._replace(sizes=True, cells=1)
POOL = 8192  # pictures
FIRST_STAGE_STEPS, DINO_STEPS, MAE_STEPS, CLIP_STEPS, JUDGE_STEPS = 1000, 400, 600, 600, 600

Log = Callable[[str], None]


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they ship; the PCA stays in float32, it is small and exact."""
    return {key: value.float() if key.endswith((".mean", ".basis", ".scale")) else value.half() for key, value in state.items()}


class Recipe:
    """One work folder with all that has been made so far."""

    def __init__(self, folder: Path, weights: Path, command: str, log: Log):
        self.folder, self.weights, self.command, self.log = folder, weights, command, log
        folder.mkdir(parents=True, exist_ok=True)

    def metadata(self, part: str, seconds: float, **more: str) -> dict[str, str]:
        return {"format_version": "1", "method": f"miniature.{part}", "command": self.command, "seconds": f"{seconds:.0f}",
                "torch": torch.__version__, "dataset_license": "drawn by this pack, GPL-3.0", **more}

    def _kept(self, name: str, module: nn.Module, make: Callable[[], nn.Module], *recipe: object) -> tuple[nn.Module, float]:
        """The module of this recipe from the work folder, or made now; also the seconds that making it took."""
        path = self.folder / f"{name}_{cache_key(*recipe)}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            module.load_state_dict(kept["state"])
            return module.eval().requires_grad_(False), kept["seconds"]
        started = time.time()
        module = make()
        seconds = time.time() - started
        keep(path, {"state": module.state_dict(), "seconds": seconds})
        return module, seconds

    def first_stage(self) -> tuple[FirstStage, float]:
        def make() -> nn.Module:
            return base.train_first_stage(render_pool(POOL, 77, SEEN), FIRST_STAGE_STEPS, self.log)
        stage, seconds = self._kept("first_stage", FirstStage(), make, POOL, 77, SEEN, FIRST_STAGE_STEPS)
        assert isinstance(stage, FirstStage)
        return stage, seconds

    def encoders(self) -> None:
        """dino.safetensors and mae.safetensors."""
        self._encoder("dino", "dinov2", DINO_STEPS, pretrain.train_dino)
        self._encoder("mae", "mae", MAE_STEPS, pretrain.train_mae)

    def clip(self) -> None:
        """clip.safetensors: an encoder that learned from captions, only to compare with; it does not ship."""
        self._encoder("clip", "clip", CLIP_STEPS, pretrain.train_clip)

    @cached_property
    def _seen(self) -> Pool:
        """What all encoders learn from."""
        return render_pool(POOL, 11, SEEN)

    def _encoder(self, name: str, family: str, steps: int, train: Callable[..., pretrain.ViT]) -> None:
        config = pretrain.vit_config(family)

        def make() -> nn.Module:
            return train(self._seen, lambda pixels: normalise(pixels, config), steps, self.log)
        model, seconds = self._kept(family, pretrain.ViT(config), make, POOL, 11, SEEN, steps, config)
        assert isinstance(model, pretrain.ViT)
        self._write(name, half(pretrain.transformers_names(model)), seconds, num_heads=str(config.heads),
                    **{"likeness.family": family})

    def judge(self) -> judge.Judge:
        """judge.safetensors, with its own accuracy on held-out renders in the metadata."""
        def make() -> nn.Module:
            return judge.train_judge(render_pool(POOL, 11, JUDGED), JUDGE_STEPS, self.log)
        model, seconds = self._kept("judge", judge.Judge(), make, POOL, 11, JUDGED, JUDGE_STEPS)
        assert isinstance(model, judge.Judge)
        pool = render_pool(1024, 99, JUDGED, training=False)
        right = judge.accuracy(model, pool.picture.float() / 255, judge.truth(pool, torch.arange(1024)))
        self.log(f"judge on held-out renders: {right}")
        self._write("judge", half(model.state_dict()), seconds, accuracy=json.dumps(right), worlds=" ".join(WORLDS))
        return model

    def base(self, unet: nn.Module, world: str = "easy", start: Path | None = None) -> None:
        """base.safetensors: UNet, text encoder, first stage. world: one of base.STAGES_OF, each with checkpoints of its own:
        the learning rate follows the length of the whole recipe. start: a base file of the easy world, which stands for the
        stages before the last and gives the first stage. Raises LikenessError for a start that draws another world."""
        known = None if start is None else packed.load(start)
        if start is not None and world_of(files.read_header(start).metadata) != "easy":
            raise LikenessError(f"{start.name} draws another world than the easy one: later stages have changed it already.")
        stage, seconds = self.first_stage() if known is None else (base.part(FirstStage(), "first_stage", known), 0.0)
        folder, stages = self.folder if world == "easy" else self.folder / world, base.STAGES_OF[world]
        if start is not None:  # never the checkpoint of a run from nothing, nor of one from another file
            folder = folder / files.sha256(start)[:12]
        folder.mkdir(parents=True, exist_ok=True)

        def export(run: BaseRun, last: Stage) -> None:
            done = stages[:stages.index(last) + 1]
            self.export_base(run, stage, seconds, done, world if done == stages else "easy")
        export(base.train_base(unet, stage, folder, self.log, export, stages, known), stages[-1])

    def export_base(self, run: BaseRun, stage: FirstStage, seconds: float, done: tuple[Stage, ...], world: str) -> None:
        """After the stages `done`, by which it draws `world`; a file that names no world draws the easy one."""
        unet, text = run.averaged()
        state = {**{f"unet.{k}": v for k, v in unet.items()}, **{f"text.{k}": v for k, v in text.items()},
                 **{f"first_stage.{k}": v for k, v in stage.state_dict().items()}}
        stages = "; ".join(f"{s.name}: {s.steps} steps, {s.variation}" for s in done)
        more = {} if world == "easy" else {"world": world}
        self._write("base", packed.pack(half(state)), run.seconds + seconds, steps=str(run.step), batch=str(base.BATCH),
                    stages=stages, **more)

    def _write(self, name: str, state: dict[str, Tensor], seconds: float, **more: str) -> None:
        path = self.weights / f"{name}.safetensors"
        files.save(path, state, self.metadata(name, seconds, **more))
        self.log(f"wrote {path.name}, {path.stat().st_size / 1e6:.1f} MB, made in {seconds:.0f} s")
