"""BiMD: the sampler object that walks a recorded trajectory down again with an identity in it."""
from __future__ import annotations

import logging
import math
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..inversion.levels import differ
from ..inversion.masks import fit_mask
from ..inversion.records import Flows, Inversion
from ..inversion.replay import replay
from .fingerprint import free_hash, model_hash
from .guider import EnhancerGuider
from .memory import stop_if_asked
from .recorder import changes_steps, prediction_of

log = logging.getLogger("likeness")


class BiMDSampler(comfy.samplers.Sampler):
    """For the host's SamplerCustomAdvanced. It takes no noise: the picture's own trajectory is the start.

    accept_mismatch: go on although model, cfg or sigmas are not those of the recording. evaluate_all: never copy an anchor.
    """

    def __init__(self, inversion: Inversion, flows: Flows, accept_mismatch: bool = False, evaluate_all: bool = False):
        self.inversion, self.flows, self.accept, self.evaluate_all = inversion, flows, accept_mismatch, evaluate_all

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
               latent_image: Tensor, denoise_mask: Tensor | None = None, disable_pbar: bool = False) -> Tensor:
        inversion, flows = self.inversion, self.flows
        if denoise_mask is not None and model_wrap.inner_model.concat_keys:
            raise LikenessError("An inpaint checkpoint reads the latent's noise mask, which was not there while recording; give "
                                "the mask to BiMD Sampler in place of the latent.")
        x = latent_image.float()
        self._check(model_wrap, sigmas, tuple(x.shape))
        mask, difference = denoise_mask, None
        if flows.mask is not None:
            own = fit_mask(flows.mask, tuple(x.shape)).to(x)
            if flows.mode == "difference":
                difference = own
            else:
                mask = own if mask is None else mask * own
        options, seed = extra_args["model_options"], extra_args.get("seed")
        enhancer = isinstance(model_wrap, EnhancerGuider)  # its prompts were looked at in `_check`
        tied = not enhancer and not self.accept and inversion.method != "ddim"
        other_prompt = tied and free_hash(model_wrap) != inversion.conditioning_hash
        length = len(inversion.levels) - 1

        def mixed(level: int, here: Tensor, sigma: Tensor, forward: float) -> Tensor:
            stop_if_asked()
            every = sigma.expand(here.shape[0])
            null = None if inversion.nulls is None else inversion.nulls[level - 1].to(here)
            if enhancer:
                return model_wrap.mixed(here, every, forward, options, difference, null)
            if null is not None or difference is not None or forward not in (0.0, 1.0):
                what = ("a null-text inversion" if null is not None else "the mask mode difference" if difference is not None
                        else f"the forward strength {forward:g}")
                raise LikenessError(f"A guider without a free branch cannot do {what}; use the CustomEnhancer Guider.")
            if forward == 0.0 and other_prompt:
                raise LikenessError("Steps without the identity need the prompt of the recording, and this guider has another "
                                    "one; use the CustomEnhancer Guider.")
            return model_wrap(here, every, model_options=options, seed=seed)

        def on_step(n: int, denoised: Tensor, here: Tensor) -> None:
            if callback is not None:
                callback(n, denoised, here, length)

        with torch.no_grad():
            return replay(inversion, flows, mixed, x, on_step, mask, self.evaluate_all)

    def _check(self, guider: Any, sigmas: Tensor, shape: tuple[int, ...]) -> None:
        inversion, flows = self.inversion, self.flows
        if shape[1:] != inversion.shape[1:]:
            raise LikenessError(f"The latent is {' x '.join(map(str, shape[1:]))}, the inversion was recorded at "
                                f"{inversion.describe()} (channels x height x width); connect the latent that was inverted.")
        if inversion.shape[0] not in (1, shape[0]):
            raise LikenessError(f"The latent holds {shape[0]} pictures, the inversion {inversion.shape[0]}; both must be the "
                                "same, or the inversion a single picture.")
        if not 0 <= flows.start <= inversion.steps:
            raise LikenessError(f"The manipulation starts at step {flows.start}, but the recording has {inversion.steps} steps; "
                                f"choose 0 to {inversion.steps}.")
        faults = list(mismatches(inversion, guider, sigmas))
        if faults and not self.accept:
            raise LikenessError(f"The inversion does not belong to this sampling: {'; '.join(faults)}. Record it again, or "
                                "switch accept_mismatch on.")
        for fault in faults:
            log.warning("BiMD goes on although %s", fault)


def mismatches(inversion: Inversion, guider: Any, sigmas: Tensor | None) -> list[str]:
    """What makes a recording untrue for a guider and a sampler's sigmas, a clause each."""
    out = []
    if sigmas is not None and differ(inversion.sigmas, sigmas, inversion.start):
        out.append(f"it was recorded with the {_span(inversion.sigmas)}, the sampler got the {_span(sigmas)} (connect the "
                   "SIGMAS of the ResInversion Sampler)")
    now = model_hash(guider.model_patcher)
    if now != inversion.model_hash:
        out.append(f"its model has the fingerprint {inversion.model_hash}, the guider's {now} (another checkpoint, or other "
                   "LoRAs)")
    predicts = prediction_of(guider.model_patcher)
    if predicts != inversion.prediction:
        out.append(f"its model predicts {inversion.prediction}, the guider's {predicts} (a Model Sampling node)")
    if inversion.method != "ddim" and not math.isclose(guider.cfg, inversion.cfg):
        out.append(f"it was recorded at cfg {inversion.cfg:g}, the guider has {guider.cfg:g}")
    form = type(guider.model_patcher.model.latent_format).__name__
    if form != inversion.latent_format:
        out.append(f"its latents are in the format {inversion.latent_format}, the guider's model works with {form}")
    # A plain DDIM inversion has no residuals that another prompt would make untrue; other guiders are asked where it counts.
    if inversion.method != "ddim" and isinstance(guider, EnhancerGuider) and free_hash(guider) != inversion.conditioning_hash:
        out.append("its free or negative prompt, or what hangs on them (ControlNet, area, hook), is not the guider's")
    skips = changes_steps(guider.model_patcher)
    if skips:
        out.append(f"{skips} on the guider's model skips or changes whole steps")
    return out


def _span(sigmas: Tensor) -> str:
    return f"sigmas of {len(sigmas) - 1} steps from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"
