"""The inversions that ResInversion is measured against: plain DDIM, and null-text optimisation."""
from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..inversion.records import Inversion
from ..inversion.report import psnr
from ..inversion.steps import euler
from .guider import FREE, NEGATIVE, EnhancerGuider, enhancer_of
from .memory import stop_if_asked, to_intermediate
from .recorder import Settings, record

RATE, THRESHOLD, THRESHOLD_STEP = 1e-2, 1e-5, 2e-5  # the published settings of null-text inversion (CVPR 2023)
GRADIENT_FACTOR = 8  # activations kept for the way back, over what the host estimates for the way there; a rough upper bound


def record_ddim(guider: Any, sigmas: Tensor, latent: Tensor, start: int = 0) -> Inversion:
    """Plain DDIM inversion at cfg 1 ("target" labels, as diffusers does it), without residuals."""
    return record(guider, sigmas, latent, Settings("target", start=start, residuals=False))


def record_null_text(guider: Any, sigmas: Tensor, latent: Tensor, inner: int = 10, early_stop: bool = True,
                     start: int = 0) -> tuple[Inversion, str]:
    """DDIM inversion, then a negative text for every step that leads back along it (null-text inversion, arXiv 2211.09794).

    inner: optimisation steps a sampling step. Returns the inversion and a report with the number of forward and backward
    evaluations. Raises LikenessError without guidance, for several negative prompts, and when the memory does not suffice.
    """
    private = enhancer_of(guider)
    if private is None or math.isclose(private.cfg, 1.0):
        raise LikenessError("Null-text inversion changes the negative prompt, so it needs a CFG guider with cfg above 1; raise "
                            "cfg.")
    if len(private.original_conds.get(NEGATIVE, ())) != 1:
        raise LikenessError("Null-text inversion takes exactly one negative prompt, without areas or Combine; use a single one.")
    if private.model_patcher.is_dynamic():
        private.model_patcher = private.model_patcher.get_non_dynamic_delegate()
        private.model_options = private.model_patcher.model_options
    _check_memory(private.model_patcher.model, private.model_patcher.load_device, list(latent.shape))
    inversion = record_ddim(private, sigmas, latent, start)
    optimiser = _NullText(inversion, inner, early_stop)
    with torch.inference_mode(False):
        private.sample(torch.zeros_like(latent), latent.clone(), optimiser, inversion.sigmas.clone(), disable_pbar=True, seed=0)
    nulls = torch.stack(optimiser.nulls[::-1]) if optimiser.nulls else inversion.anchors.new_zeros(0, inversion.shape[0], 1, 1)
    result = inversion._replace(
        method="null-text", nulls=nulls, evaluations=inversion.evaluations + optimiser.forward,
        calls=inversion.calls + optimiser.forward)
    quality = psnr(optimiser.end, inversion.anchors[0])
    text = (f"null-text: {optimiser.forward} forward and {optimiser.backward} backward evaluations beside "
            f"{inversion.evaluations} of the inversion, {inner} inner steps, early stop {'on' if early_stop else 'off'}; "
            "reconstruction "
            + ("exact" if math.isinf(quality) else f"{quality:.1f} dB"))
    return result, text


class _NullText(comfy.samplers.Sampler):
    """Walks down the anchors and fits the negative text of each step; `nulls` begins at the highest level."""

    def __init__(self, inversion: Inversion, inner: int, early_stop: bool):
        self.inversion, self.inner, self.early_stop = inversion, inner, early_stop
        self.nulls: list[Tensor] = []
        self.forward = self.backward = 0
        self.end = inversion.anchors[0]

    def sample(self, model_wrap: EnhancerGuider, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
               latent_image: Tensor, denoise_mask: Tensor | None = None, disable_pbar: bool = False) -> Tensor:
        inversion = self.inversion
        # as the replay asks for the free flow; clones on further cards hold weights that autograd refuses
        options = model_wrap.free_call_options(extra_args["model_options"])
        options = {key: value for key, value in options.items() if key != "multigpu_clones"}
        levels = inversion.levels.clone().to(latent_image.device)
        length, batch = len(levels) - 1, inversion.shape[0]
        scale = 0.0 if inversion.prediction == "CONST" else 1.0
        bar = comfy.utils.ProgressBar(max(1, length * self.inner))
        with _trainable(model_wrap, latent_image):
            text = model_wrap.conds[NEGATIVE][0]["model_conds"]["c_crossattn"].cond
            null = text.detach().clone().float().expand(batch, -1, -1).clone()
            x = inversion.anchors[length].clone().to(latent_image.device)
            for n, i in enumerate(range(length, 0, -1)):
                sigma, goal = levels[i].expand(batch), inversion.anchors[i - 1].clone().to(x.device)
                with torch.no_grad():
                    cond = model_wrap._run([model_wrap.conds[FREE], None], x, sigma, options)[0]
                self.forward += 1
                null = self._fit(model_wrap, null, cond, x, goal, levels[i], levels[i - 1], n, scale, options, bar)
                with torch.no_grad():
                    denoised = self._guided(model_wrap, null, cond, x, sigma, options)
                    x = euler(x, denoised, levels[i], levels[i - 1])
                self.nulls.append(to_intermediate(null.detach()).clone())
                bar.update_absolute((n + 1) * self.inner, length * self.inner)
        self.end = to_intermediate(x)
        return latent_image

    def _guided(self, guider: EnhancerGuider, null: Tensor, cond: Tensor, x: Tensor, sigma: Tensor,
                options: dict[str, Any]) -> Tensor:
        stop_if_asked()
        self.forward += 1
        negative = guider.negative(null)
        uncond = guider._run([None, negative], x, sigma, options)[1]
        return guider.guided(x, sigma, guider.conds[FREE], negative, cond, uncond, options)

    def _fit(self, guider: EnhancerGuider, null: Tensor, cond: Tensor, x: Tensor, goal: Tensor, high: Tensor, low: Tensor,
             step: int, scale: float, options: dict[str, Any], bar: Any) -> Tensor:
        """The negative text (b, tokens, width) whose step from x ends nearest to `goal`, by Adam from the step before."""
        null = null.detach().clone().requires_grad_(True)
        adam = torch.optim.Adam([null], lr=RATE * max(0.01, 1 - step / 100))
        for turn in range(self.inner):
            with torch.enable_grad():
                after = euler(x, self._guided(guider, null, cond, x, high.expand(x.shape[0]), options), high, low)
                # the published loss is over variance-preserving latents
                loss = (after - goal).square().mean() / (1 + scale * float(low) ** 2)
                # a mean over a large latent has gradients that half precision rounds to 0: they come back as those of a sum
                null.grad = torch.autograd.grad(loss * after.numel(), null)[0] / after.numel()
            self.backward += 1
            adam.step()
            bar.update_absolute(step * self.inner + turn + 1)
            if self.early_stop and float(loss.detach()) < THRESHOLD + step * THRESHOLD_STEP:
                break
        return null.detach()


@contextmanager
def _trainable(guider: EnhancerGuider, latent: Tensor) -> Iterator[None]:
    """Gradients through the host's model: its weights were made in inference mode, where autograd refuses them, so the loaded
    network is copied for the time of the optimisation and put back whatever happens."""
    model = guider.inner_model
    network = model.diffusion_model
    _check_memory(model, latent.device, list(latent.shape))  # again: now the model itself is loaded
    for slot, entries in guider.conds.items():
        guider.conds[slot] = [_plain(entry) for entry in entries]
    try:
        model.diffusion_model = copy.deepcopy(network).requires_grad_(False)
        yield
    finally:
        model.diffusion_model = network


def _check_memory(model: Any, device: torch.device, shape: list[int]) -> None:
    """LikenessError unless a second copy of the network and the activations of a way back fit."""
    weights = sum(p.numel() * p.element_size() for p in model.diffusion_model.parameters())
    needed = weights + int(model.memory_required(shape) * GRADIENT_FACTOR)
    management.free_memory(needed, device)  # text encoder and VAE may still lie there
    free = management.get_free_memory(device)
    if needed > free:
        raise LikenessError("Null-text inversion needs a second copy of the model and room for gradients, about "
                            f"{needed / 2 ** 30:.1f} GiB, and {free / 2 ** 30:.1f} GiB are free; use a smaller picture, or the "
                            "ResInversion Sampler, which needs neither.")


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """A processed conditioning entry with tensors that autograd may keep, and controls that it does not look into."""
    out = {**entry, "model_conds": {key: _clone_cond(cond) for key, cond in entry["model_conds"].items()}}
    if out.get("control") is not None:
        out["control"] = _StillControl(out["control"])
    return out


def _clone_cond(cond: Any) -> Any:
    if not isinstance(getattr(cond, "cond", None), Tensor):
        return cond
    other = copy.copy(cond)
    other.cond = cond.cond.clone()
    return other


class _StillControl:
    """A control whose part of the gradient is left out: it is the same for every negative text but for its own cross
    attention."""

    def __init__(self, control: Any):
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            found = self._control.get_control(*args, **kwargs)
        if found is None:
            return None
        return {name: [row.as_subclass(_Apart) if isinstance(row, Tensor) else row for row in rows]
                for name, rows in found.items()}


class _Apart(Tensor):
    """A control's output. The host adds it in place to what the way back still needs; this one is added to a copy."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, _Apart) else arg for arg in args]
        if func.__name__ in ("add_", "__iadd__"):
            return plain[0] + plain[1]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain, **(kwargs or {}))
