"""What the inversion nodes do beside sampling: build guiders, check, judge, draw."""
from __future__ import annotations

import copy
from typing import Any

import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..inversion import report
from ..inversion.records import Flows, Inversion
from .bimd import BiMDSampler, mismatches
from .guider import FIRST, EnhancerGuider, Identity


def build_guider(model: Any, positive: Any, free: Any, negative: Any, cfg: float, free_model: Any = None) -> EnhancerGuider:
    """Guider of one identity."""
    guider = EnhancerGuider(model, free_model)
    guider.set_flows([(Identity(FIRST), positive)], free, negative, cfg)
    return guider


def samples_of(guider: Any, latent: dict[str, Any]) -> Tensor:
    """Samples of a LATENT with the channels of the guider's model. Raises LikenessError when they are another model's."""
    samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    wanted = guider.model_patcher.get_model_object("latent_format").latent_channels
    if not getattr(samples, "is_nested", False) and samples.shape[1] != wanted:
        raise LikenessError(f"The latent has {samples.shape[1]} channels, this model works with {wanted}; encode the picture "
                            "with the VAE of the same checkpoint.")
    return samples


def check_belongs(inversion: Inversion, guider: Any, accept: bool) -> list[str]:
    """Notes on what differs between a recording and a guider. Raises LikenessError for what matters unless it is accepted."""
    faults = mismatches(inversion, guider, None)
    if faults and not accept:
        raise LikenessError(f"The inversion does not belong to this guider: {'; '.join(faults)}. Record it again, or switch "
                            "accept_mismatch on.")
    return [f"note: {fault}; accepted" for fault in faults]


def judge(inversion: Inversion, vae: Any, pictures: int, guider: Any = None) -> tuple[str, Tensor, Tensor]:
    """(report, plot (1, h, w, 3), strip (1, h, n w, 3)); with a guider every step is replayed without an identity."""
    replayed = None
    if guider is not None:
        replayed = _replay(inversion, guider)
    return report.describe(inversion, replayed), report.plot(inversion), strip(inversion, vae, pictures)


def _replay(inversion: Inversion, guider: Any) -> Tensor:
    """x_0 in model space after a replay of every step without forward flow."""
    held: list[Tensor] = []

    class Kept(BiMDSampler):
        def sample(self, *args: Any, **kwargs: Any) -> Tensor:
            held.append(super().sample(*args, **kwargs))
            return held[0]

    faults = mismatches(inversion, guider, None)
    if faults:
        raise LikenessError(f"The inversion does not belong to this guider: {'; '.join(faults)}. Connect the guider of the "
                            "recording, or leave the guider out.")
    sampler = Kept(inversion, Flows(forward=0.0), evaluate_all=True)
    latent, bar = inversion.as_latent(0), comfy.utils.ProgressBar(len(inversion.levels) - 1)
    with torch.no_grad():
        copy.copy(guider).sample(torch.zeros_like(latent), latent, sampler, inversion.sigmas, disable_pbar=True, seed=0,
                                 callback=lambda step, *_: bar.update_absolute(step + 1))
    return held[0].cpu()


def strip(inversion: Inversion, vae: Any, count: int) -> Tensor:
    """(1, h, n w, 3) the recording's first picture from noise to itself, every level at the spread of a latent."""
    rows = []
    for level in report.strip_levels(inversion, count):
        sigma = float(inversion.levels[level])
        shrink = 1.0 if inversion.prediction == "CONST" else (1 + sigma ** 2) ** 0.5
        rows.append(inversion._replace(anchors=inversion.anchors[level][None, :1] / shrink).as_latent(0))
    pictures = vae.decode(torch.cat(rows)).float()
    if pictures.ndim == 5:  # a video: its first frame
        pictures = pictures[:, 0]
    return torch.cat(list(pictures.clamp(0, 1)[..., :3].cpu()), 1)[None]
