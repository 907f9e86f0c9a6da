"""Recipe of the miniature's text-to-image base: first stage, latents, and the diffusion training loop.

The world widens in stages from the trained weights: an aligned world is learned in minutes on a CPU, a world
with free offsets from the start is not learned in an hour.
"""
from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .cache import kept_or_made
from .captions import captions, row_ids
from .first_stage import FirstStage
from .pool import Pool, render_pool
from .schedule import STEPS, noised
from .text import TextModel
from .world import EASY, WIDE, Variation, select

Module = TypeVar("Module", bound=nn.Module)


class Stage(NamedTuple):
    name: str
    steps: int
    variation: Variation
    pool: int
    seed: int


STAGES = (
    Stage("easy", 3600, EASY, 14336, 1),
    Stage("pairs", 1300, Variation(pairs=0.25), 12288, 2),
)
WIDE_STAGES = (*STAGES, Stage("wide", 9000, WIDE._replace(pairs=0.2), 16384, 3))
STAGES_OF = {"easy": STAGES, "wide": WIDE_STAGES}  # by the world that the finished base draws
BATCH, LEARNING_RATE, EMA = 32, 1e-3, 0.998


def train_first_stage(pool: Pool, steps: int, log: Callable[[str], None]) -> FirstStage:
    """PCA in closed form, then the refiner on latents with up to a quarter of a standard deviation of noise."""
    torch.manual_seed(0)
    model = FirstStage()
    model.init_weights()
    model.fit(pool.picture[:4000].float() / 127.5 - 1)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=1e-4)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        x = pool.picture[torch.randint(0, pool.picture.shape[0], (32,))].float() / 127.5 - 1
        z = model.encode(x)
        error = model.decode(z + 0.25 * torch.rand(32, 1, 1, 1) * torch.randn_like(z)) - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 0.5 * edges
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += error.detach().square().mean().item() / 4
        if step % 100 == 99:
            log(f"first stage {step + 1}: {-10 * math.log10(total / 100):.2f} dB on noisy latents")
            total = 0.0
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_pool(stage: FirstStage, pictures: Tensor) -> Tensor:
    """(n, 48, 8, 8) float32 latents of byte pictures."""
    return torch.cat([stage.encode(block.float() / 127.5 - 1) for block in pictures.split(256)])


def channel_weights(stage: FirstStage) -> Tensor:
    """(1, 48, 1, 1): whitened channels weigh by what they mean in pixels, else noise would rule the loss."""
    return (stage.scale / stage.scale.mean()).view(1, -1, 1, 1)


class BaseRun:
    """Base and text encoder under training, with moving averages; resumes from its own file."""

    def __init__(self, unet: nn.Module, folder: Path, log: Callable[[str], None]):
        torch.manual_seed(0)
        self.unet, self.text, self.folder, self.log = unet, TextModel(), folder, log
        self.parameters = [*unet.parameters(), *self.text.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.generator = torch.Generator().manual_seed(5)
        self.step, self.seconds = 0, 0.0

    @property
    def state_file(self) -> Path:
        return self.folder / "base_state.pt"

    def save(self) -> None:
        state = {"parameters": [p.detach() for p in self.parameters], "average": self.average, "step": self.step,
                 "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(), "seconds": self.seconds}
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state_file)

    def begin_with(self, known: dict[str, Tensor], step: int) -> None:
        """The weights of a base file, as if they had been trained here for so many steps."""
        part(self.unet, "unet", known)
        part(self.text, "text", known)
        for module in (self.unet, self.text):
            module.requires_grad_(True)
        self.average, self.step = [p.detach().clone() for p in self.parameters], step

    def resume(self) -> None:
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, weights_only=True)
        with torch.no_grad():
            for p, value in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(value)
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = True, None
        self.generator.set_state(state["generator"])
        self.log(f"base resumes at step {self.step}")

    def averaged(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State dicts of unet and text with the moving averages."""
        count = len(list(self.unet.parameters()))
        out = []
        for module, values in ((self.unet, self.average[:count]), (self.text, self.average[count:])):
            out.append({name: v.clone() for (name, _), v in zip(module.named_parameters(), values, strict=True)})
        return out[0], out[1]

    def _rate(self, total: int) -> float:
        share = self.step / total
        decay = 1.0 if share < 0.6 else max(0.03, 0.5 + 0.5 * math.cos(math.pi * (share - 0.6) / 0.4))
        return LEARNING_RATE * min(1.0, (self.step + 1) / 100) * decay

    def train_stage(self, stage: Stage, first_step: int, total: int, pool: Pool, latents: Tensor, weight: Tensor) -> None:
        """Runs one stage of the recipe; a resumed run goes on where it stood."""
        started, losses = time.time() - self.seconds, []
        g = self.generator
        while self.step < first_step + stage.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(total)
            index = torch.randint(0, latents.shape[0], (BATCH,), generator=g)
            told = captions(select(pool.identity, index), select(pool.pose, index), pool.scene[index], g,
                            other=select(pool.other, index))
            drop = (torch.rand(BATCH, generator=g) < 0.1).tolist()
            rows = row_ids(["" if gone else text for gone, text in zip(drop, told, strict=True)])
            # one time step from each of BATCH equal slices: less noise in the loss than free draws
            t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=g)) * (STEPS / BATCH)).long().clamp(max=STEPS - 1)
            clean = latents[index]
            noisy, target = noised(clean, t, torch.randn(clean.shape, generator=g))
            error = self.unet(noisy, t.float(), context=self.text(rows)) - target
            loss = (error.square() * weight).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(EMA, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            losses.append(loss.item())
            self.seconds = time.time() - started
            if self.step % 100 == 0:
                mean, losses = sum(losses) / len(losses), []
                self.log(f"base {stage.name} step {self.step}: loss {mean:.4f}, {self.seconds:.0f} s")
                with open(self.folder / "base_loss.csv", "a", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerow([self.step, f"{mean:.5f}", f"{self.seconds:.1f}"])
            if self.step % 500 == 0:
                self.save()
        self.save()


def stage_pool(folder: Path, stage: Stage) -> Pool:
    """The stage's pictures, kept in the work folder so that a resumed run does not draw them again."""
    return kept_or_made(folder / f"pool_{stage.name}.pt", Pool, lambda: render_pool(stage.pool, stage.seed, stage.variation))


def part(module: Module, name: str, known: dict[str, Tensor]) -> Module:
    """The module with its weights out of a base file's tensors, frozen."""
    module.load_state_dict({key[len(name) + 1:]: value.float() for key, value in known.items() if key.startswith(name + ".")})
    return module.eval().requires_grad_(False)


def train_base(unet: nn.Module, first_stage: FirstStage, folder: Path, log: Callable[[str], None],
               on_stage: Callable[[BaseRun, Stage], None], stages: tuple[Stage, ...] = STAGES,
               known: dict[str, Tensor] | None = None) -> BaseRun:
    """All stages of the base; `on_stage` is called after each one with the run. known: tensors of a base file that stand for all
    stages but the last."""
    run = BaseRun(unet, folder, log)
    if known is not None:
        run.begin_with(known, sum(stage.steps for stage in stages[:-1]))
    run.resume()
    total, first = sum(stage.steps for stage in stages), 0
    weight = channel_weights(first_stage)
    for stage in stages:
        if run.step < first + stage.steps:
            pool = stage_pool(folder, stage)
            log(f"{stage.pool} pictures of the {stage.name} world")
            run.train_stage(stage, first, total, pool, encode_pool(first_stage, pool.picture), weight)
            on_stage(run, stage)
        first += stage.steps
    return run
