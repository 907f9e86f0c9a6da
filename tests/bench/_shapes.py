"""True SD1.5 and SDXL networks with random weights: what one step costs with and without the injection."""
from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
             "num_head_channels": -1, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
             "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
             "use_linear_in_transformer": False, "adm_in_channels": None},
    "sdxl": {"model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_heads": -1,
             "num_head_channels": 64, "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
             "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential"},
}
SIZES = {"sd15": 64, "sdxl": 128}
LARGE: dict[str, Any] = {"style": "timm", "width": 1024, "depth": 24, "heads": 16, "mlp": 4096}  # of DINOv2-L and MAE-L


def peak_ram() -> float:
    """The most memory that this process ever held, in GiB."""
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 2 ** 30
    # kilobytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def reference_tokens(pictures: int, config: Any) -> tuple[Any, list[Any]]:
    """Features of random pictures from DINOv2-L and MAE-L with random weights, and the two encoders, which stay in memory
    as the host's cache keeps them."""
    import torch

    from likeness.models.vision.preprocess import preprocess
    from likeness.models.vision.vit import ViT, VitConfig

    configs = (VitConfig("dinov2", patch=14, grid=37, layer_scale=True, **LARGE), VitConfig("mae", patch=16, grid=14, **LARGE))
    features, encoders = [], []
    for vit, size in zip(configs, config.resolutions, strict=True):
        model = ViT(vit).eval().requires_grad_(False)
        for parameter in model.parameters():  # some are left as memory was: what is no number would slow down all that follows
            parameter.uniform_(-0.01, 0.01)
        result = model(preprocess(torch.rand(pictures, size, size, 3), vit, size))
        features.append((result.cls, result.patches))
        encoders.append(model)
    return features, encoders


def step_seconds(family: str, threads: int, encoders: bool = False) -> tuple[float, float, float]:
    """Seconds of a plain and of an injected step (two rows, the positive one with two references), peak RAM in GiB.

    encoders: the references come from two vision encoders of their real size, not from random tokens.
    """
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from likeness.models.custany.adapter import CustAny
    from likeness.models.custany.config import preset
    from likeness.models.hosting.injector import LocalInjection, Plan, Timing
    from likeness.models.hosting.stamps import KEY, RowStamps
    from likeness.models.hosting.stores import Pair, Store

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        unet = UNetModel(image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False,
                         dtype=torch.float32, operations=comfy.ops.disable_weight_init, **CONFIGS[family])
        for parameter in unet.parameters():  # cheap random numbers: only the time counts, but no NaN may slow it down
            parameter.uniform_(-0.01, 0.01)
        config = preset(family)
        adapter = CustAny(config)
        adapter.init_weights(torch.Generator().manual_seed(0))
        kept: list[Any] = []
        local = torch.randn(2, 256, config.width)
        if encoders:
            features, kept = reference_tokens(2, config)
            local = adapter.encode(features)[1]
        store = Store({key: Pair(*adapter.keys_values(key, local)) for key, _ in config.layers})

        plan = Plan(1, SimpleNamespace(model=adapter), SimpleNamespace(model=store), "all",
                    tuple((key, 1.0) for key, _ in config.layers), Timing())
        size = SIZES[family]
        t = torch.tensor([500.0, 500.0])
        context = torch.randn(2, 77, config.width)
        y = {"y": torch.randn(2, 2816)} if family == "sdxl" else {}
        stamps = RowStamps(((), (1,)), (None, None), (size, size), 1.0)
        options: dict[str, Any] = {KEY: stamps, "cond_or_uncond": [1, 0], "patches": {"middle_patch": [LocalInjection(plan)]}}

        def run(transformer_options: dict[str, Any], side: int = size) -> float:
            x = torch.randn(2, 4, side, side)
            begin = time.perf_counter()
            unet(x, t, context=context, transformer_options=dict(transformer_options), **y)
            return time.perf_counter() - begin

        run(options, 16)  # the first run pays for much that is done once; for memory of the real size the first of the two does
        plain, injected = [], []
        for _ in range(2):
            injected.append(run(options))
            plain.append(run({}))
        del kept
    return min(plain), min(injected), peak_ram()


def customnet(_: str, threads: int, repeats: int = 2) -> dict[str, float]:
    """A step at 256 x 256 (two rows) without and with the object, and peak RAM with the file's other
    parts (image tower, text encoder, VAE) run once each before and kept in memory as the host keeps them on a CPU."""
    import comfy.clip_model
    import comfy.ops
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from likeness.models.hosting.customnet_unet import DualUNet

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
              "num_channels": 3, "patch_size": 14, "image_size": 224, "intermediate_size": 4096, "hidden_act": "quick_gelu",
              "projection_dim": 768}
    text = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
            "hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407}
    stage = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
             "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    with torch.inference_mode():
        unet = DualUNet(image_size=32, in_channels=8, out_channels=4, use_spatial_transformer=True, legacy=False,
                        dtype=torch.float32, operations=comfy.ops.disable_weight_init, **CONFIGS["sd15"])
        tower = comfy.clip_model.CLIPVisionModelProjection(vision, torch.float32, "cpu", comfy.ops.manual_cast)
        encoder = comfy.clip_model.CLIPTextModel(text, torch.float32, "cpu", comfy.ops.manual_cast)
        first_stage = AutoencoderKL(ddconfig=stage, embed_dim=4)
        for part in (unet, tower, encoder, first_stage):
            for parameter in part.parameters():
                parameter.uniform_(-0.01, 0.01)
        tower(pixel_values=torch.rand(1, 3, 224, 224))
        encoder(torch.full((2, 77), 49407))
        first_stage.decode(first_stage.encode(torch.rand(1, 3, 256, 256)))
        t, context, tokens = torch.tensor([500.0, 500.0]), torch.randn(2, 77, 768), torch.randn(2, 1, 768)

        def run(side: int = 32, **more: Any) -> float:
            begin = time.perf_counter()
            unet(torch.randn(2, 8, side, side), t, context=context, **more)
            return time.perf_counter() - begin
        run(16, object_context=tokens)  # the first run pays for memory that the system hands out
        shown = min(run(object_context=tokens) for _ in range(repeats))
        plain = min(run() for _ in range(repeats))
        del tower, encoder, first_stage
    return {"peak_ram_gib": peak_ram(), "plain_step_s": plain, "object_step_s": shown, "ratio": shown / plain}


def custany(family: str, threads: int) -> dict[str, float]:
    """The row of `bench shapes`: encoders, adapter and UNet, two rows of CFG with two references."""
    plain, injected, peak = step_seconds(family, threads, encoders=True)
    return {"peak_ram_gib": peak, "plain_step_s": plain, "injected_step_s": injected, "ratio": injected / plain}
