"""The golden run of the RealCustom release inside the host: its tiny UNet, adapter, prompts and subject."""
from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from host.support import comfy
from likeness.models.common.records import Guidance, Subject, Word
from likeness.models.hosting.adapters import Adapter, make_adapter
from likeness.models.hosting.guidance import KEEPS, make_guidance
from likeness.models.hosting.inject import Injected, Strengths, inject
from likeness.models.hosting.prompt import HASH_KEY
from likeness.models.realcustom import schedule
from likeness.models.realcustom.config import METADATA_KEY
from unit import recipe

IO = recipe.golden("tiny_unet_io")
METADATA = {METADATA_KEY: json.dumps({"encoders": [["siglip", 64], ["dinov2", 64]], "blocks": [[1], [2]], "size": 42,
                                      "base": "the release in small"})}
UNET = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 2, 2], "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2], "num_head_channels": 64, "use_spatial_transformer": True,
    "use_linear_in_transformer": True, "context_dim": 96, "adm_in_channels": 64, "num_classes": "sequential",
    "legacy": False, "use_temporal_attention": False, "dtype": torch.float32,
}
COLUMNS = tuple(IO["in.target_token"].nonzero()[:, 1].tolist())


class SmallSDXL(comfy.model_base.BaseModel):
    """As the host's own class, with eight numbers for each size."""

    def encode_adm(self, **kwargs: Any) -> Tensor:
        sizes = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        embed = comfy.model_base.Timestep(8)
        rows = [embed(torch.tensor([float(kwargs[name])])) for name in sizes]
        return torch.cat([kwargs["pooled_output"], torch.cat(rows).flatten()[None]], 1)


@cache
def weights() -> dict[str, Tensor]:
    return recipe.weights("tiny_unet")


def new_model(trained: bool = True) -> Any:
    """MODEL with the golden base weights under the host's names, or with zeros in their place."""
    config = comfy.supported_models.SDXL(dict(UNET))
    config.manual_cast_dtype = None
    network = SmallSDXL(config, comfy.model_base.ModelType.EPS, "cpu")
    names = comfy.utils.unet_to_diffusers(UNET)
    state = {names[name]: value if trained else torch.zeros_like(value) for name, value in weights().items() if name in names}
    network.diffusion_model.load_state_dict(state, strict=True)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(network.eval(), device, torch.device("cpu"))


@cache
def model() -> Any:
    with torch.inference_mode():
        return new_model()


def new_adapter(keep_base: bool = False) -> Adapter:
    return make_adapter(weights(), METADATA, "sha256 of the release in small", "release.pth", keep_base)


@cache
def adapter() -> Adapter:
    with torch.inference_mode():
        return new_adapter()


def subject(of: Adapter | None = None) -> Subject:
    of = of or adapter()
    tokens = (("local", IO["single.image_tokens"]), ("black", IO["single.image_tokens_zero"]))
    return Subject("realcustom", tokens, "all", of.config.base, 96, "source", "encoders", of.sha256, of)


def prompts() -> tuple[Any, Any, Word]:
    """(positive, negative, WORD) with the release's size rows of a picture that is 192 wide and 128 high."""
    entries = []
    for kind in ("pos", "neg"):
        options = {"pooled_output": IO[f"in.pooled_{kind}"], HASH_KEY: kind, **schedule.size_rows(192, 128)}
        entries.append([[IO[f"in.text_{kind}"].clone(), options]])
    rows = IO["in.text_pos"][0, list(COLUMNS)]
    word = Word("word", 0, COLUMNS, (0,), 77, "a prompt", "pos", rows, rows, (1.0,) * len(COLUMNS), None, None,
                IO["in.text_pos"][0, 76:])
    return *entries, word


def injected(base: Any = None, of: Adapter | None = None, **more: Any) -> Injected:
    positive, negative, word = prompts()
    return inject(base or model(), positive, negative, subject(of), word, Strengths(0.0, 1.0), **more)


def guidance(norm: str = "max_norm", refresh: int = 3, scope: float = schedule.SCOPE, **more: Any) -> Guidance:
    """As in the golden loop: a quarter of the places, the first three steps."""
    return make_guidance(prompts()[2], scope, norm, KEEPS[0], False, refresh, **more)


def levels(steps: int) -> Tensor:
    return schedule.sigmas(model().get_model_object("model_sampling").sigmas, steps)


def run(base: Any, positive: Any, negative: Any, cfg: float, function: Any, sigmas: Tensor) -> Any:
    """Core's guider with a sampler of ours: function(model, x, sigmas, extra_args)."""
    kept: list[Any] = []

    def sampler(network, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        kept.append(function(network, x, sigmas, extra_args or {}))
        return x
    guider = comfy.samplers.CFGGuider(base)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = IO["in.latent"]
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True, seed=0)
    return kept[0]


def noise_of(base: Any, conditioning: Any) -> Tensor:
    """The network's own prediction (eps) for the golden latent at timestep 599."""
    sigma = model().get_model_object("model_sampling").sigmas[599]
    x = IO["in.latent"] * (1 + sigma ** 2) ** 0.5

    def once(network, _, sigmas, extra_args):
        return (x - network(x, sigma.reshape(1), **extra_args)) / sigma
    return run(base, conditioning, prompts()[1], 1.0, once, torch.stack([sigma, sigma * 0]))
