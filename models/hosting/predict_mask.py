"""The mask of a word before anything is injected: the guidance branch alone, a few steps into the sampling."""
from __future__ import annotations

from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import LikenessError
from ..common.records import Guidance
from ..realcustom.overlay import overlay
from .blocks import attention_blocks
from .inject import matches
from .masks_of_run import composed, finished
from .memory import stop_if_asked, to_intermediate
from .stamps import add_reader, numbers, stamp_of, stamped, without
from .word_maps import CAPTURE, Capture, Sought, Target, add_capture, mark

SCHEDULERS = tuple(comfy.samplers.SCHEDULER_NAMES)
CELL = 8  # pixels of a latent cell, in SD1.5, SDXL and the miniature


class Predicted(NamedTuple):
    """mask (b, h, w) at the size of the picture; picture (b, h, w, 3): what the model has in mind, the mask laid over it."""
    mask: Tensor
    picture: Tensor
    report: str


class Plan(NamedTuple):
    """How far the guidance branch is run: `stop` of `steps`; scheduler: core's name; seed, or a NOISE of core's."""
    steps: int
    stop: int
    scheduler: str
    seed: int
    noise: Any = None
    cfg: float = 1.0


class Walk(NamedTuple):
    """A part of a sampling: from a LATENT's samples under a NOISE (b, c, h, w), Euler steps along the first `stop` of the levels;
    kept: the LATENT's noise_mask, as the host takes it, or None."""
    samples: Tensor
    noise: Tensor
    sigmas: Tensor
    stop: int
    kept: Tensor | None = None
    seed: int = 0


def predict_mask(model: Any, positive: list[Any], guidance: Guidance, latent: dict[str, Any], plan: Plan,
                 negative: list[Any] | None = None) -> Predicted:
    """Euler steps on the text alone; the attention of the last one makes the mask. Raises LikenessError."""
    if not guidance.word.columns:
        raise LikenessError(f"\"{guidance.word.text}\" is not in the prompt, so there is nothing to look for; write it into the "
                            "text of Subject Prompt.")
    if not attention_blocks(model):
        raise LikenessError(f"{type(model.model).__name__} has no text attention of the kind that a word's mask is read from; "
                            "load an SD1.5 or SDXL checkpoint.")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), plan.scheduler, plan.steps)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = (plan.noise.generate_noise({**latent, "samples": samples}) if plan.noise is not None
             else comfy.sample.prepare_noise(samples, plan.seed, latent.get("batch_index")))
    # some schedulers give fewer levels than steps
    walk = Walk(samples, noise, sigmas, min(plan.stop, plan.steps, len(sigmas) - 1), latent.get("noise_mask"), plan.seed)
    mask, x0 = mask_after(model, positive, guidance, walk, negative, plan.cfg)
    size = CELL * samples.shape[-2], CELL * samples.shape[-1]
    full = F.interpolate(mask[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    picture = overlay(_seen(model, x0, size), mask)
    share = 100 * float((mask > 0).float().mean())
    report = (f"\"{guidance.word.text}\" after {walk.stop} of {plan.steps} steps: the mask covers {share:.0f} % of the picture"
              + ("" if negative else "; without a negative prompt the model is asked at cfg 1")
              + ("; it starts from full noise, so where a sampler keeps a part of the LATENT's picture (denoise below 1), that "
                 "part is not foreseen" if samples.any() else ""))
    return Predicted(to_intermediate(full), to_intermediate(picture), report)


def mask_after(model: Any, positive: list[Any], guidance: Guidance, walk: Walk, negative: list[Any] | None = None,
               cfg: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mask (b, h, w) of the word from the attention of the walk's last step, and what that step took for the clean latent
    (b, c, h, w). Raises LikenessError where no prompt with the word acts there."""
    marked, targets = _marked(positive, guidance)
    model = model.clone()
    add_reader(model)
    add_capture(model)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(marked, [_silent(entry) for entry in negative or []])
    guider.set_cfg(cfg if negative else 1.0)
    look = _Look(guider, Capture(targets, tuple(attention_blocks(model)), False), walk.stop)
    guider.sample(walk.noise, walk.samples, comfy.samplers.KSAMPLER(look), walk.sigmas, walk.kept, disable_pbar=True,
                  seed=walk.seed)
    if not look.capture.sums:
        raise LikenessError(f"No prompt that holds \"{guidance.word.text}\" acts at step {walk.stop}; choose another stop_step, "
                            "or connect the prompt before its timestep range.")
    size = (walk.samples.shape[-2], walk.samples.shape[-1])
    made = [finished(total, guidance, look.capture.areas[number], look.regions.get(number), size)
            for (number, _), total in look.capture.sums.items()]
    return composed(made, size, guidance.mask)[:, 0].float().cpu(), look.x0


def _silent(entry: list[Any]) -> list[Any]:
    """The entry without the subjects that injectors before this one put into it, which wait for masks that nobody makes here."""
    return without(entry, numbers(entry[1]))


def _marked(positive: list[Any], guidance: Guidance) -> tuple[list[Any], list[Target]]:
    """The positive with each entry that holds the word stamped as a prompt of a guidance pass, subjects taken off."""
    out: list[Any] = []
    targets: list[Target] = []
    for entry, shift in zip(positive, matches(positive, guidance.word), strict=True):
        entry = _silent(entry)
        if shift is not None:
            entry = stamped(entry, mark(len(targets)))
            columns = tuple(column + shift for column in guidance.word.columns)
            targets.append(Target(entry[0].shape[1], (Sought(guidance.name, columns, guidance.strategy, guidance.layers),)))
        out.append(entry)
    return out, targets


class _Look:
    """A sampler that walks a few steps and reads the attention at the last of them."""

    def __init__(self, guider: Any, capture: Capture, stop: int):
        self.guider, self.capture, self.stop = guider, capture, stop
        self.x0 = torch.zeros(0)
        self.regions: dict[int, Tensor] = {}  # number of a target -> mask of its prompt, brought to the latent by the host

    def __call__(self, network: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None, callback: Any = None,
                 disable: bool | None = None) -> Tensor:
        args = dict(extra_args or {})
        for entry in self.guider.conds["positive"]:
            stamp = stamp_of(entry)
            if "mask" in entry and stamp is not None and int(stamp.cond[0, 0]) < 0:
                self.regions[-1 - int(stamp.cond[0, 0])] = entry["mask"]
        bar = comfy.utils.ProgressBar(self.stop)
        for step in range(self.stop):
            stop_if_asked()
            if step == self.stop - 1:
                options = args["model_options"]
                args["model_options"] = {**options, "transformer_options": {**options["transformer_options"],
                                                                            CAPTURE: self.capture}}
            self.x0 = network(x, sigmas[step].expand(x.shape[0]), **args)
            x = self.x0 + (sigmas[step + 1] / sigmas[step]) * (x - self.x0)
            bar.update(1)
        return x


def _seen(model: Any, x0: Tensor, size: Any) -> Tensor:
    """(b, h, w, 3) of a predicted latent in model space, by core's own factors of its latent format; grey without them."""
    form = model.get_model_object("latent_format")
    if form.latent_rgb_factors is None:
        return torch.full((x0.shape[0], *size, 3), 0.5)
    factors = torch.tensor(form.latent_rgb_factors)
    bias = torch.tensor(getattr(form, "latent_rgb_factors_bias", None) or [0.0] * 3)
    plain = x0.float().cpu()
    rgb = torch.einsum("bchw,cr->brhw", plain, factors) + bias.view(1, 3, 1, 1)
    return F.interpolate((rgb + 1) / 2, tuple(size), mode="bilinear", align_corners=False).clamp(0, 1).movedim(1, -1)
