"""What the guidance costs at the true shapes of SDXL and SD1.5 with random weights: seconds of each kind of call, put together
over a run."""
from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from _shapes import CONFIGS, SIZES, peak_ram  # tests/bench is on the path of every bench
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from guidance import REFRESH, STEPS

from likeness.models.hosting.blocks import attention_blocks
from likeness.models.hosting.image_attention import LIST, ImageInjection, ImagePlan, Layer
from likeness.models.hosting.injector import Timing
from likeness.models.hosting.row_masks import GUIDANCE_KEY
from likeness.models.hosting.slots import laid_round
from likeness.models.hosting.stamps import KEY, MADE, RowStamps
from likeness.models.hosting.stores import Pair, Store
from likeness.models.hosting.word_maps import Capture, Enough, Sought, Target, Watched, mark

TOKENS, REPEATS = 729, 3
SUBJECT, BLACK = 5, 4


def overhead(family: str, threads: int, steps: int, refresh: int) -> dict[str, Any]:
    """Seconds of a plain CFG step, one under a live mask and a guidance pass, whole and ended early, each the median of three;
    their sum over a run."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size, shape = SIZES[family], CONFIGS[family]
    with torch.inference_mode():
        unet = UNetModel(image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False,
                         dtype=torch.float32, operations=comfy.ops.disable_weight_init, **shape)
        for parameter in unet.parameters():  # cheap random numbers: only the time counts, but no NaN may slow it down
            parameter.uniform_(-0.01, 0.01)
        layers = attention_blocks(SimpleNamespace(get_model_object=lambda name: unet))

        def store() -> Any:
            pairs = {key: Pair(torch.randn(1, TOKENS, c), torch.randn(1, TOKENS, c)) for key, c in layers.items()}
            return SimpleNamespace(model=Store(pairs))
        plan = ImagePlan(SUBJECT, BLACK, store(), store(), "all", tuple((key, 1.0) for key in layers), Timing(), None, "word")
        injection = ImageInjection(plan)

        def run(rows: int, options: dict[str, Any], side: int = size) -> float:
            x, context = torch.randn(rows, 4, side, side), torch.randn(rows, 77, shape["context_dim"])
            y = torch.randn(rows, shape["adm_in_channels"]) if shape["adm_in_channels"] else None
            begin = time.perf_counter()
            try:
                unet(x, torch.full((rows,), 500.0), context=context, y=y, transformer_options=options)
            except Enough:
                pass
            return time.perf_counter() - begin

        def guided(side: int = size) -> dict[str, Any]:
            # MADE is new in every call of the host's: layers of one size share what a mask is shrunk to
            options = {KEY: RowStamps(((BLACK,), (SUBJECT,)), (None, None), (side, side), 1.0), "cond_or_uncond": [1, 0],
                       MADE: {}, "patches": {LIST: [injection]},
                       GUIDANCE_KEY: {"word": torch.rand(1, 1, side // 2, side // 2)}}
            return laid_round(options, layers, lambda key, before: Layer(key, [injection], before))

        def looking(early: bool, side: int = size) -> dict[str, Any]:
            capture = Capture([Target(77, (Sought("word", (5, 6), ("max_norm",)),))], tuple(layers), early)
            options = {KEY: RowStamps(((mark(0),),), (None,), (side, side), 1.0), "cond_or_uncond": [0]}
            return laid_round(options, layers, lambda key, before: Watched(capture, key, before))

        def typical(rows: int, options: Callable[[], dict[str, Any]]) -> float:
            return median(run(rows, options()) for _ in range(REPEATS))

        run(2, guided(16), 16)  # the first run pays for memory that the system hands out
        plain, under = typical(2, lambda: {"cond_or_uncond": [1, 0]}), typical(2, guided)
        whole, early = typical(1, lambda: looking(False)), typical(1, lambda: looking(True))
    base = steps * plain
    return {f"overhead_{family}": round((steps * under + refresh * whole) / base, 4),
            f"overhead_{family}_early_end": round((steps * under + refresh * early) / base, 4),
            f"seconds_plain_{family}": round(plain, 2), f"seconds_guided_{family}": round(under, 2),
            f"seconds_pass_{family}": round(whole, 2), f"seconds_pass_early_{family}": round(early, 2),
            f"peak_ram_gib_{family}": round(peak_ram(), 2)}


def realcustom(family: str, threads: int) -> dict[str, float]:
    """The row of `bench shapes`: keys and values of the subject and of the black picture, under a live mask."""
    numbers = overhead(family, threads, STEPS, REFRESH)
    plain, guided, whole, peak = (numbers[f"{name}_{family}"] for name in
                                  ("seconds_plain", "seconds_guided", "seconds_pass", "peak_ram_gib"))
    return {"peak_ram_gib": peak, "plain_step_s": plain, "injected_step_s": guided, "ratio": guided / plain, "pass_s": whole}
