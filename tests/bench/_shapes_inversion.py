"""ResInversion and BiMD on true SD1.5 and SDXL networks with random weights, through the host's own sampling."""
from __future__ import annotations

import time
from typing import Any

from _shapes import CONFIGS, SIZES, peak_ram

STEPS, CFG = 2, 4.0


def model_of(family: str) -> Any:
    """A MODEL of the real size in float32 on the CPU; cheap random numbers, since only time and memory count."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    shape = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
             "dtype": torch.float32, **CONFIGS[family]}
    sdxl = family == "sdxl"
    config = (comfy.supported_models.SDXL if sdxl else comfy.supported_models.SD15)(shape)
    config.unet_config = shape
    config.set_inference_dtype(torch.float32, None)
    kind = comfy.model_base.SDXL if sdxl else comfy.model_base.BaseModel
    model = kind(config, comfy.model_base.ModelType.EPS, device="cpu")
    for parameter in model.diffusion_model.parameters():
        parameter.uniform_(-0.01, 0.01)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(model, cpu, cpu)


def inversion(family: str, threads: int) -> dict[str, float]:
    """Seconds of a plain CFG step, a recorded step and a replayed step with an identity; evaluations of each; peak RAM."""
    import comfy.samplers
    import torch

    from likeness.models.hosting.bimd import BiMDSampler
    from likeness.models.hosting.inversions import build_guider
    from likeness.models.hosting.recorder import Settings, record
    from likeness.models.inversion.records import Flows

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    width, size = CONFIGS[family]["context_dim"], SIZES[family]
    with torch.inference_mode():
        model = model_of(family)
        texts = [[[torch.randn(1, 77, width), {"pooled_output": torch.randn(1, 1280)}]] for _ in range(3)]
        guider = build_guider(model, *texts, CFG)
        latent = torch.randn(1, 4, size, size)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        plain = comfy.samplers.CFGGuider(model)
        plain.set_conds(texts[0], texts[2])
        plain.set_cfg(CFG)

        def timed(run: Any) -> tuple[float, Any]:
            begin = time.perf_counter()
            found = run()
            return (time.perf_counter() - begin) / STEPS, found

        def sample(who: Any, sampler: Any, levels: Any) -> Any:
            return who.sample(torch.randn_like(latent), latent, sampler, levels, disable_pbar=True, seed=0)

        small = torch.randn(1, 4, 16, 16)  # the first run pays for memory that the system hands out
        plain.sample(small, small, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
        plain_s, _ = timed(lambda: sample(plain, comfy.samplers.sampler_object("euler"), sigmas))
        record_s, recorded = timed(lambda: record(guider, sigmas, latent, Settings()))
        replay_s, _ = timed(lambda: sample(guider, BiMDSampler(recorded, Flows(forward=0.7)), recorded.sigmas))
    return {"peak_ram_gib": peak_ram(), "plain_step_s": plain_s, "record_step_s": record_s, "replay_step_s": replay_s,
            "record_ratio": record_s / plain_s, "replay_ratio": replay_s / plain_s,
            "record_evaluations": float(recorded.evaluations)}
