"""Very small networks inside the host's own model classes, an independent counter, and runs in model space.

`net("eps" | "v" | "flow")`: a UNet of one resolution and two attentions, with the latent formats of SD1.5, SDXL and SD3
(shifted).
What is cached here is shared by all tests: clone before you change anything.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from host.support import comfy, draw
from likeness.models.hosting.bimd import BiMDSampler
from likeness.models.hosting.inversions import build_guider
from likeness.models.hosting.recorder import Settings, record
from likeness.models.inversion.records import Flows, Inversion

KINDS = ("eps", "v", "flow")
WIDTH = 32
FORMATS = {"eps": "SD15", "v": "SDXL", "flow": "SD3"}
TYPES = {"eps": "EPS", "v": "V_PREDICTION", "flow": "FLOW"}
UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "model_channels": 32, "num_res_blocks": [1],
        "channel_mult": [1], "transformer_depth": [0], "transformer_depth_output": [0, 1], "transformer_depth_middle": 1,
        "context_dim": WIDTH, "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
        "num_heads": 4, "num_head_channels": -1, "dtype": torch.float32}


def make(kind: str, seed: int = 0, gain: float = 1.0, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL with seeded random weights, made in inference mode as the host's loader does it."""
    form = getattr(comfy.latent_formats, FORMATS[kind])
    channels = form.latent_channels
    shape = {**UNET, "in_channels": channels, "out_channels": channels, "dtype": dtype}
    with torch.inference_mode():
        config = comfy.supported_models.SD15(shape)
        config.unet_config, config.latent_format, config.sampling_settings = shape, form(), {}
        config.set_inference_dtype(dtype, None)
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[TYPES[kind]], device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.diffusion_model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(gain * noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.05 * noise + (1.0 if name.endswith("weight") else 0.0))
        cpu = torch.device("cpu")
        return comfy.model_patcher.CoreModelPatcher(model, cpu, cpu)


@cache
def net(kind: str) -> Any:
    return make(kind)


def channels(kind: str) -> int:
    return net(kind).model.latent_format.latent_channels


def text(seed: int, tokens: int = 4) -> list[list[Any]]:
    """A CONDITIONING."""
    return [[draw(seed, 1, tokens, WIDTH), {}]]


ID, FREE, NEG, OTHER = (text(seed) for seed in (31, 32, 33, 34))


def picture(kind: str, batch: int = 1, side: int = 8, seed: int = 5) -> Tensor:
    """Samples of a LATENT, of which model space is about unit normal."""
    with torch.inference_mode():
        return net(kind).model.latent_format.process_out(draw(seed, batch, channels(kind), side, side))


def schedule(model: Any, steps: int, scheduler: str = "normal") -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def guider(model: Any, cfg: float = 1.0, positive: Any = ID, free: Any = FREE, negative: Any = NEG,
           free_model: Any = None) -> Any:
    return build_guider(model, positive, free, negative, cfg, free_model)


@contextmanager
def counted(model: Any) -> Iterator[SimpleNamespace]:
    """Rows and calls that reach the network itself; `at` runs before each call."""
    seen = SimpleNamespace(rows=0, calls=0, sizes=[], at=None)

    def look(module, args, kwargs):
        seen.rows += args[0].shape[0]
        seen.calls += 1
        seen.sizes.append(args[0].shape[0])
        if seen.at is not None:
            seen.at(seen.calls)
    handle = model.model.diffusion_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class Kept(comfy.samplers.Sampler):
    """Another sampler, whose result stays in model space; `steps` has the latent after each."""

    def __init__(self, inner: Any):
        self.inner, self.x, self.steps = inner, None, []

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        def keep(step, denoised, x, total):
            self.steps.append(x.clone())
            if callback is not None:
                callback(step, denoised, x, total)
        self.x = self.inner.sample(model_wrap, sigmas, extra_args, keep, noise, latent_image, denoise_mask, disable_pbar)
        return self.x


class CoreEuler(comfy.samplers.Sampler):
    """Core's own Euler from a latent in model space."""

    def __init__(self, start: Tensor):
        self.start = start

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        return comfy.k_diffusion.sampling.sample_euler(model_wrap, self.start, sigmas, extra_args=extra_args, disable=True)


def through(who: Any, sampler: Any, latent: Tensor, sigmas: Tensor, **more: Any) -> tuple[Tensor, Kept]:
    """(samples of the LATENT that comes out, the sampler with its model space)."""
    kept = Kept(sampler)
    with torch.no_grad():
        out = who.sample(torch.zeros_like(latent), latent, kept, sigmas, disable_pbar=True, seed=0, **more)
    return out, kept


def replayed(who: Any, inversion: Inversion, latent: Tensor, flows: Flows | None = None, sigmas: Tensor | None = None,
             evaluate_all: bool = False, accept: bool = False, **more: Any) -> tuple[Tensor, Kept]:
    sampler = BiMDSampler(inversion, flows or Flows(), accept, evaluate_all)
    return through(who, sampler, latent, inversion.sigmas if sigmas is None else sigmas, **more)


def rebuilt(who: Any, inversion: Inversion, latent: Tensor, **more: Any) -> Tensor:
    """x_0 after every step was evaluated without an identity."""
    return replayed(who, inversion, latent, Flows(forward=0.0), evaluate_all=True, **more)[1].x


def recorded(who: Any, steps: int, latent: Tensor, **settings: Any) -> Inversion:
    return record(who, schedule(who.model_patcher, steps), latent, Settings(**settings))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(float((b.max() - b.min()) ** 2 / (a - b).square().mean()))


def lora(model: Any, strength: float = 0.5, seed: int = 3, where: str = ".attn2.to_k.weight") -> Any:
    """A clone with other weights in its text attentions, as a LoRA leaves it."""
    out = model.clone()
    state = model.model.state_dict()
    names = [name for name in state if name.startswith("diffusion_model.") and where in name]
    patches = {name: (draw(seed, *state[name].shape),) for name in names}
    assert out.add_patches(patches, strength)
    return out


class TwoSlots:
    """An attention patch as IPAdapter-style packs write it: one value for the positive, one for the negative, by the slot's
    number."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def __call__(self, q, k, v, extra):
        self.calls.append(list(extra["cond_or_uncond"]))
        pair = (draw(71, 1, 3, k.shape[-1]), torch.zeros(1, 3, k.shape[-1]))
        size = q.shape[0] // len(extra["cond_or_uncond"])
        tokens = torch.cat([pair[slot].expand(size, -1, -1) for slot in extra["cond_or_uncond"]])
        attention = comfy.ldm.modules.attention.optimized_attention
        return attention(q, k, v, extra["n_heads"]) + 0.5 * attention(q, tokens, tokens, extra["n_heads"])

    def on(self, model: Any) -> Any:
        model = model.clone()
        for key in (("middle", 0, 0), ("output", 0, 0), ("output", 1, 0)):
            model.set_model_attn2_replace(self, *key)
        return model
