"""Schedules and sampler of releases, as core's SIGMAS and SAMPLER."""
from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.samplers
from torch import Tensor

from ..common.errors import LikenessError
from ..customnet import schedule as customnet_schedule
from ..realcustom import schedule

RELEASES = {"RealCustom++": schedule.sigmas, "CustomNet": customnet_schedule.sigmas}


def release_sigmas(model: Any, steps: int, denoise: float = 1.0, release: str = "RealCustom++") -> Tensor:
    """About (steps + 1,) from the MODEL's own table, as many as the release takes; denoise below 1: the last steps of a longer
    schedule, as core does it.

    Raises LikenessError for a model without the table of Stable Diffusion, and for fewer steps than the release can take."""
    sampling = model.get_model_object("model_sampling")
    table: Any = getattr(sampling, "sigmas", ())
    if len(table) != schedule.TRAINED or not hasattr(sampling, "log_sigmas"):  # flow models have a table without
        raise LikenessError(f"The release's schedule needs the {schedule.TRAINED} noise levels of Stable Diffusion, and this "
                            f"model has another kind ({type(sampling).__name__}); load an SDXL or SD1.5 checkpoint, or use "
                            "core's Basic Scheduler.")
    total = max(steps, int(steps / denoise))
    if total > schedule.TRAINED:
        raise LikenessError(f"{steps} steps at denoise {denoise:g} are the last of {total}, and the model has "
                            f"{schedule.TRAINED}; take fewer steps or more denoise.")
    levels = RELEASES[release](table, total)
    return (levels if denoise >= 1 else levels[-(steps + 1):]).cpu()


def single_step_sampler() -> Any:
    """The release's solver: one evaluation a step, second order, no random numbers."""
    return comfy.samplers.KSAMPLER(_sample)


def _sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None, callback: Any = None,
            disable: bool | None = None) -> Tensor:
    sampling = model.inner_model.inner_model.model_sampling
    if isinstance(sampling, comfy.model_sampling.CONST):
        raise LikenessError("The release's sampler steps through the noise of Stable Diffusion, and this is a flow model; load "
                            "an SDXL or SD1.5 checkpoint, or use core's euler.")
    rows = x.new_ones(x.shape[0])

    def note(step: int, x: Tensor, x0: Tensor) -> None:
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": x0})
    return schedule.single_step(lambda x, sigma: model(x, sigma * rows, **(extra_args or {})), x, sigmas, note)
