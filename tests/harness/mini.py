"""The miniature world with random weights, made at test time: same layout, same names, no training.

Needs `host.enter` and the loaded pack. Every part is alive: nothing that an untrained network keeps at zero.
"""
from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

BASE, DINO, MAE, ADAPTER, UNTRAINED = (
    f"{name}.safetensors" for name in ("base", "dino", "mae", "custany", "untrained")
)


def pack(name: str) -> Any:
    """A module of the pack by its path below the root."""
    return importlib.import_module(f"likeness.{name}")


def awaken(module: Any, generator: Any, scale: float = 1.0) -> None:
    """Random numbers in all weights that begin at zero (residual ends, outputs)."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * scale / parameter[0].numel() ** 0.5)


def base_state(generator: Any) -> dict[str, Any]:
    """Tensors of base.safetensors: UNet, text encoder, first stage."""
    import torch

    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # torch's own initialisation has no generator
        unet = pack("models.hosting.demo_unet").build_trainable_unet()
        text = pack("models.demo.text").TextModel()
        stage = pack("models.demo.first_stage").FirstStage()
    awaken(unet, generator)
    stage.init_weights()
    stage.fit(torch.rand(256, 3, 64, 64, generator=generator) * 2 - 1)
    parts = {"unet": unet, "text": text, "first_stage": stage}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def encoder_state(family: str, seed: int, width: int = 48, size: int = 64) -> dict[str, Any]:
    """Tensors of a random two-layer ViT under the names that transformers writes to disk."""
    import torch

    pretrain, vit = pack("models.demo.pretrain"), pack("models.vision.vit")
    config = vit.VitConfig(
        family=family, style="transformers", width=width, depth=2, heads=3, mlp=2 * width, patch=8, grid=size // 8,
        layer_scale=family == "dinov2", eps=1e-6 if family == "dinov2" else 1e-12,
    )
    model, generator = vit.ViT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            plain = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ls1", "ls2"))
            parameter.copy_(noise * 0.1 + plain)
    return pretrain.transformers_names(model)


def encoder_metadata(family: str) -> dict[str, str]:
    return {"likeness.family": family, "num_heads": "3"}


def adapter_config(base: str = "miniature", encoder_width: int = 48, **changes: Any) -> Any:
    """Config of a CustAny adapter for the miniature (or with `layers` and `width` for another base)."""
    config = pack("models.custany.config")
    values = {
        "width": 128, "encoders": (("dinov2", encoder_width), ("mae", encoder_width)), "head_dim": 32,
        "layers": tuple((f"output.{block}.0", 96) for block in range(4)), "resolutions": (64, 64), "base": base,
    }
    return config.CustAnyConfig(**{**values, **changes}).check()


def adapter_state(config: Any, seed: int = 3, trained: bool = True) -> dict[str, Any]:
    """Tensors of an adapter; `trained` False leaves its ends at zero, so that it changes nothing."""
    import torch

    module, generator = pack("models.custany.adapter").CustAny(config), torch.Generator().manual_seed(seed)
    module.init_weights(generator)
    if trained:
        awaken(module, generator)
    return module.state_dict()


def adapter_metadata(config: Any, hashes: tuple[str, ...] = ()) -> dict[str, str]:
    """What the trainer writes, as far as loaders read it."""
    entries = [{"family": family, "width": width, "sha256": digest} for (family, width), digest in
               zip(config.encoders, hashes or ("",) * len(config.encoders), strict=True)]
    return {**pack("models.custany.config").to_metadata(config), "format_version": "1", "method": "custany",
            "base": config.base, "encoders": json.dumps(entries), "dataset_license": "random numbers"}


def make_weights(folder: Path) -> Path:
    """Write base, both encoders, a random adapter and an untrained one under the names of the shipped files."""
    import torch

    files = pack("models.common.files")
    files.save(folder / BASE, base_state(torch.Generator().manual_seed(1)), {"method": "miniature.base"})
    for seed, (name, family) in enumerate(((DINO, "dinov2"), (MAE, "mae")), 10):
        files.save(folder / name, encoder_state(family, seed), encoder_metadata(family))
    hashes = tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (DINO, MAE))
    config = adapter_config()
    for name, trained in ((ADAPTER, True), (UNTRAINED, False)):
        files.save(folder / name, adapter_state(config, trained=trained), adapter_metadata(config, hashes))
    return folder
