"""InstantID with its ControlNet, and PhotoMaker, at SDXL's true sizes with random weights.

UNet and ControlNet lie in memory as float16, as their files do, and the host casts each layer to float32 for its work.
"""
from __future__ import annotations

import time
from typing import Any

from _shapes import CONFIGS, SIZES, peak_ram

from harness import portraits

SDXL = CONFIGS["sdxl"]


def _filled(module: Any) -> Any:
    """Cheap random numbers: only the time counts, but no NaN may slow it down."""
    for parameter in module.parameters():
        parameter.uniform_(-0.01, 0.01)
    return module.eval().requires_grad_(False)


def _unet(shape: dict[str, Any]) -> Any:
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return _filled(UNetModel(image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False,
                             dtype=torch.float16, operations=comfy.ops.manual_cast, **shape))


def _control(unet: dict[str, Any]) -> Any:
    import comfy.cldm.cldm
    import comfy.ops
    import torch

    shape = {key: value for key, value in unet.items() if key != "transformer_depth_output"}
    return _filled(comfy.cldm.cldm.ControlNet(image_size=32, in_channels=4, hint_channels=3, use_spatial_transformer=True,
                                              legacy=False, dtype=torch.float16, operations=comfy.ops.manual_cast, **shape))


class _Steps:
    """Times of steps with two rows, the second one the positive."""

    def __init__(self, shape: dict[str, Any]):
        import torch

        self.unet, self.width, self.pooled = _unet(shape), shape["context_dim"], shape["adm_in_channels"]
        self.t = torch.tensor([500.0, 500.0])

    def seconds(self, options: dict[str, Any], side: int, control: Any = None, tokens: Any = None) -> float:
        import torch

        x, y = torch.randn(2, 4, side, side), torch.randn(2, self.pooled)
        context, hint = torch.randn(2, 77, self.width), torch.rand(2, 3, 8 * side, 8 * side)
        begin = time.perf_counter()
        out = None if control is None else control(x=x, hint=hint, timesteps=self.t, context=tokens, y=y)
        self.unet(x, self.t, context=context, transformer_options=dict(options), control=out, y=y)
        return time.perf_counter() - begin


def instantid(_: str, threads: int, size: portraits.Sizes = portraits.TRUE, shape: dict[str, Any] = SDXL,
              side: int = SIZES["sdxl"]) -> dict[str, float]:
    """One step plain and one with both parts; all networks stay in memory, as the host's cache keeps them.

    size, shape: of the files and of the UNet. side: of the latent."""
    import torch

    from likeness.models.hosting.image_attention import ImageInjection, ImagePlan, Layer
    from likeness.models.hosting.injector import Timing
    from likeness.models.hosting.stamps import KEY, RowStamps
    from likeness.models.hosting.stores import Pair, Store
    from likeness.models.portrait import instantid as method

    torch.set_num_threads(threads)
    with torch.inference_mode():
        steps, control = _Steps(shape), _control(shape)
        module = _filled(method.InstantID(method.identify(portraits.flat(portraits.instantid(size)))))
        tokens = module.tokens(torch.cat([torch.zeros(1, 512), torch.randn(1, 512)]))
        depths = (("input", 4, 2), ("input", 5, 2), ("input", 7, 10), ("input", 8, 10), *(("output", n, 10) for n in range(3)),
                  *(("output", n, 2) for n in range(3, 6)), ("middle", 0, 10))
        keys = [(part, number, depth) for part, number, count in depths for depth in range(count)]
        names = [".".join(map(str, key)) for key in keys]

        class Holder:
            def __init__(self, row: Any):
                self.model = Store({name: Pair(*module.keys_values(number, row))
                                    for name, (number, _) in zip(names, module.config.layers, strict=True)})

        plan = ImagePlan(1, 2, Holder(tokens[1:]), Holder(tokens[:1]), "all", tuple((name, 0.8) for name in names), Timing())
        slots = {key: Layer(name, [ImageInjection(plan)], None) for key, name in zip(keys, names, strict=True)}
        options = {KEY: RowStamps(((2,), (1,)), (None, None), (side, side), 1.0), "cond_or_uncond": [1, 0],
                   "patches_replace": {"attn2": slots}}
        steps.seconds(options, 16, control, tokens)  # the first run pays for memory that the system hands out
        both, plain = steps.seconds(options, side, control, tokens), steps.seconds({}, side)
    return {"peak_ram_gib": peak_ram(), "plain_step_s": plain, "injected_step_s": both, "ratio": both / plain}


def photomaker(_: str, threads: int, size: portraits.Sizes = portraits.TRUE, shape: dict[str, Any] = SDXL,
               side: int = SIZES["sdxl"]) -> dict[str, float]:
    """One step, which is the plain one (the LoRA is in the weights), and the encoding of four pictures by v2."""
    import torch

    from likeness.models.portrait import photomaker as method

    torch.set_num_threads(threads)
    with torch.inference_mode():
        steps = _Steps(shape)
        module = _filled(method.build({name: torch.empty(shape) for name, shape in portraits.id_encoder(2, size).items()}))
        steps.seconds({}, 16)
        begin = time.perf_counter()
        identities = module.identities(torch.randn(4, 3, size.image, size.image), torch.randn(4, 512)).flatten(0, 1)
        module.fuse(torch.randn(len(identities), size.width), identities)
        encode = time.perf_counter() - begin
        plain = steps.seconds({}, side)
    return {"peak_ram_gib": peak_ram(), "plain_step_s": plain, "encode_s": encode}

