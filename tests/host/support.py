"""Bases, adapters, subjects and runs for the tests of the injection core: tiny, random, the same on every machine.

What is cached here is shared by all tests: clone before you change anything.
"""
from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from harness import host as host_module
from harness import mini, tiny

# The modules under test import the host; it has to be in this process before they are.
host_module.enter(cpu=None if os.environ.get("LIKENESS_DEVICE") == "auto" else True,
                  base=host_module.private_base())

# Tests take the host's modules from here: on their own they might be imported before its folder is on the path.
import comfy.context_windows  # noqa: E402, F401
import comfy.controlnet  # noqa: E402, F401
import comfy.latent_formats  # noqa: E402, F401
import comfy.model_base  # noqa: E402, F401
import comfy.model_management  # noqa: E402, F401
import comfy.model_patcher  # noqa: E402, F401
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402, F401
import comfy.supported_models  # noqa: E402, F401
import comfy.utils  # noqa: E402, F401
import comfy_api.latest  # noqa: E402, F401  (before comfy_api.input, which cannot be the first)
import comfy_extras.nodes_custom_sampler  # noqa: E402, F401
import comfy_extras.nodes_model_advanced  # noqa: E402, F401
import comfy_extras.nodes_model_merging  # noqa: E402, F401
import comfy_extras.nodes_pag  # noqa: E402, F401
import comfy_extras.nodes_perpneg  # noqa: E402, F401
import comfy_extras.nodes_sag  # noqa: E402, F401
import comfy_extras.nodes_slg  # noqa: E402, F401
import latent_preview  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import nodes as core  # noqa: E402, F401
from likeness.models.common.records import Guidance, Subject  # noqa: E402
from likeness.models.custany.adapter import CustAny  # noqa: E402
from likeness.models.custany.config import CustAnyConfig, to_metadata  # noqa: E402
from likeness.models.demo.captions import CONTEXT_LENGTH  # noqa: E402
from likeness.models.hosting import demo, stamps  # noqa: E402
from likeness.models.hosting.adapters import Adapter, make_adapter  # noqa: E402
from likeness.models.hosting.blocks import attention_blocks  # noqa: E402
from likeness.models.hosting.guidance import KEEPS, make_guidance  # noqa: E402
from likeness.models.hosting.guidance import LIST as GUIDES  # noqa: E402
from likeness.models.hosting.inject import Injected, Strengths, inject  # noqa: E402
from likeness.models.hosting.injector import LocalInjection, Plan, Timing  # noqa: E402
from likeness.models.hosting.memory import patcher_of  # noqa: E402
from likeness.models.hosting.prompt import encode_prompt  # noqa: E402
from likeness.models.hosting.stores import Pair, Store  # noqa: E402

try:
    from comfy_api.input import CurveInput
except ImportError:  # the oldest host has no curves
    CurveInput = None
CURVES = pytest.mark.skipif(CurveInput is None, reason="this host has no curves")
COPIES = pytest.mark.skipif(not hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"),
                            reason="this host copies no model for a further card")

PROMPT = "a photo of a cat on the beach"
ENCODERS = (("dinov2", 12), ("mae", 8))
KINDS = {"sd15": "sd15", "sdxl": "sdxl", "mini": "miniature"}  # kind of tiny base -> family in the adapter
WINDOWS = {"sd15": 77, "sdxl": 77, "mini": CONTEXT_LENGTH}
CHANNELS = {"sd15": 4, "sdxl": 4, "mini": 48}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def folder() -> Path:
    """A place for files that ends with this process."""
    path = Path(tempfile.mkdtemp(prefix="likeness-host-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


# -- bases ---------------------------------------------------------------------------------------------
@cache
def base(kind: str) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of "sd15", "sdxl", "sd3" (tiny checkpoints) or "mini" (miniature, random weights)."""
    with torch.inference_mode():
        if kind == "mini":
            return demo.load_base(path=miniature() / mini.BASE)
        tiny.register()
        return host_module.load_checkpoint(tiny.ensure()[f"tiny_{kind}.safetensors"])


@cache
def miniature() -> Path:
    """Folder with the files of a random miniature."""
    return mini.make_weights(folder())


# -- adapters and subjects -----------------------------------------------------------------------------
def config_for(kind: str, **changes: Any) -> CustAnyConfig:
    """An adapter layout with blocks that exist in the tiny base."""
    model, clip, _ = base(kind)
    blocks = {key: channels for key, channels in attention_blocks(model).items() if key.startswith("output.")}
    if kind == "sdxl":
        last = {3: 1, 4: 1, 5: 1}
        blocks = {k: c for k, c in blocks.items() if int(k.split(".")[2]) in (0, last.get(int(k.split(".")[1]), 9))}
    width = {"sd15": 64, "sdxl": 160, "mini": 128}[kind]
    fields = {"head_dim": 16, "base": KINDS[kind], "resolutions": (28, 32)} | changes
    return CustAnyConfig(width, ENCODERS, tuple(blocks.items()), **fields)


def adapter_state(config: CustAnyConfig, trained: bool = True, seed: int = 11) -> dict[str, Tensor]:
    """Weights as after training (the zero ends filled) or as before it."""
    module = CustAny(config)
    generator = torch.Generator().manual_seed(seed)
    module.init_weights(generator)
    state = module.state_dict()
    if trained:
        for name, value in state.items():
            if name.endswith(("to_out.weight", "to_out.bias")) or name.startswith("global_mlp.out"):
                noise = torch.randn(value.shape, generator=generator)
                state[name] = noise / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.1 * noise
    return state


def new_adapter(config: CustAnyConfig, trained: bool = True, seed: int = 11) -> Adapter:
    name = f"random_{config.base}_{seed}_{trained}"
    return make_adapter(adapter_state(config, trained, seed), to_metadata(config), f"sha256 of {name}", name)


@cache
def _adapter(kind: str, trained: bool) -> Adapter:
    with torch.inference_mode():
        return new_adapter(config_for(kind), trained)


def adapter(kind: str, trained: bool = True) -> Adapter:
    """The one adapter for a tiny base that all tests share."""
    return _adapter(kind, trained)


def subject(kind: str, seed: int = 1, n: int = 1, pairing: str = "all", of: Adapter | None = None,
            trained: bool = True) -> Subject:
    """A subject with random tokens; another seed is another subject."""
    of = of or adapter(kind, trained)
    width = of.config.width
    tokens = (("global", draw(seed, n, len(ENCODERS), width)), ("local", draw(seed + 500, n, 9, width)))
    return Subject("custany", tokens, pairing, of.config.base, width, f"source {seed} {n}", "encoders",
                   of.sha256, of)


def prompt(kind: str, text: str = PROMPT, word: str = "cat", occurrence: int = 0, **more: Any):
    """(CONDITIONING, WORD)."""
    conditioning, found, _ = encode_prompt(base(kind)[1], text, word, occurrence, **more)
    return conditioning, found


def encode(kind: str, text: str) -> list[list[Any]]:
    """As core's own text node does."""
    clip = base(kind)[1]
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def injected(kind: str = "sd15", seed: int = 1, text: str = PROMPT, word: str = "cat", negative: str = "blurry",
             strengths: Strengths | None = None, **more: Any) -> Injected:
    """One injector with everything it needs, on the shared base."""
    positive, found = prompt(kind, text, word)
    strengths = strengths or Strengths(1.0, 1.0)
    return inject(base(kind)[0], positive, encode(kind, negative), subject(kind, seed), found, strengths, **more)


# -- runs ----------------------------------------------------------------------------------------------
def latent_of(kind: str, batch: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return torch.zeros(batch, CHANNELS[kind], height, width)


def sample(model: Any, positive: Any, negative: Any, *, kind: str = "sd15", steps: int = 1, cfg: float = 4.0,
           sampler: str = "euler", scheduler: str = "normal", latent: Tensor | None = None, seed: int = 0,
           **more: Any) -> Tensor:
    """Core's own sampling from a fixed seed."""
    latent = latent_of(kind) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed,
                               disable_pbar=True, **more)


def run_guider(guider: Any, latent: Tensor, seed: int = 0, sigmas: tuple[float, ...] = (6.0, 0.0),
               sampler: str = "euler") -> Tensor:
    noise = comfy.sample.prepare_noise(latent, seed)
    return guider.sample(noise, latent, comfy.samplers.ksampler(sampler), torch.tensor(sigmas), seed=seed,
                         disable_pbar=True)


def cfg_guider(model: Any, positive: Any, negative: Any, cfg: float = 4.0) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def by_hand(of: Adapter, key: str, x: Tensor, local: Tensor) -> Tensor:
    """CustAny's local attention written out from its weights: x (b, t, c), tokens (b, l, d) -> (b, t, c)."""
    state = of.patcher.model.state_dict()
    w = {name: state[f"layers.{key.replace('.', '_')}.{name}"].float() for name in (
        "norm.weight", "norm.bias", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_out.bias")}
    heads = x.shape[-1] // of.config.head_dim
    q = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"]) @ w["to_q.weight"].T
    k, v = local @ w["to_k.weight"].T, local @ w["to_v.weight"].T
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (share @ v).transpose(1, 2).flatten(2) @ w["to_out.weight"].T + w["to_out.bias"]


def inject_into(model: Any, seed: int = 1, strengths: Strengths | None = None, kind: str = "sd15", **more: Any):
    positive, word = prompt(kind)
    return inject(model, positive, encode(kind, "blurry"), subject(kind, seed), word,
                  strengths or Strengths(0.0, 1.0), **more)


def run(done: Any, **more: Any) -> Tensor:
    return sample(done.model, done.positive, done.negative, **more)


def plain(kind: str = "sd15", model: Any = None, **more: Any) -> Tensor:
    return sample(model or base(kind)[0], prompt(kind)[0], encode(kind, "blurry"), kind=kind, **more)


def guidance(word: Any = None, scope: float = 0.25, norm: str = "max_norm", keep: str = KEEPS[0], binary: bool = False,
             refresh: int = 12, **more: Any) -> Guidance:
    """A GUIDANCE, of the word of PROMPT on the SD1.5 base unless another WORD is given."""
    return make_guidance(word or prompt("sd15")[1], scope, norm, keep, binary, refresh, **more)


def blind(model: Any) -> Any:
    """A clone whose guidance never runs, as under a sampler that asks the model in a way of its own."""
    model = model.clone()
    model.remove_wrappers_with_key("calc_cond_batch", GUIDES)
    return model


# -- one call of the patch ------------------------------------------------------------------------------
def call(patch: LocalInjection, x: Tensor, ids: list[tuple[int, ...]], *, key=("output", 3, 0), areas=None,
         latent=(16, 16), shape=None, sigma=1.0, sigmas=None, chunks=1, **more: Any) -> Tensor:
    rows = stamps.RowStamps(tuple(ids), tuple(areas or [None] * len(ids)), latent, sigma)
    side = int(x.shape[1] ** 0.5)
    options = {stamps.KEY: rows, "block": key[:2], "block_index": key[2], "cond_or_uncond": [0] * chunks,
               "activations_shape": [x.shape[0], x.shape[2], *(shape or (side, x.shape[1] // side))],
               "sample_sigmas": sigmas, **more}
    return patch(x, options)


def patch_for(mask: Tensor | None = None, n: int = 1, pairing: str = "all", timing: Timing | None = None, strength=1.0,
              guidance: str | None = None) -> tuple[LocalInjection, Tensor]:
    of = adapter("sd15")
    tokens = draw(3, n, 9, of.config.width)
    module = of.patcher.model
    store = patcher_of(Store({key: Pair(*module.keys_values(key, tokens)) for key, _ in of.config.layers}))
    plan = Plan(5, of.patcher, store, pairing, tuple((key, strength) for key, _ in of.config.layers), timing or Timing(),
                mask, guidance)
    return LocalInjection(plan), tokens
