"""PhotoMaker and InstantID files: names and shapes of the public ones, and small ones of the same layout with random weights.

The lists come from the description of the files (counts of tensors and parameters are checked against it), not from the pack's
own modules.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

Shapes = dict[str, tuple[int, ...]]


class Sizes(NamedTuple):
    """Of a base model with its two text encoders, a CLIP tower, and the two resamplers."""
    text: tuple[int, int] = (768, 1280)
    channels: tuple[int, int] = (640, 1280)  # of SDXL's two levels with attention
    vision: int = 1024
    depth: int = 24
    image: int = 224
    qformer: tuple[int, int] = (4, 2048)     # depth, all heads together
    resampler: tuple[int, int, int] = (4, 1280, 1280)  # depth, width, all heads together
    tokens: int = 16
    rank: int = 64

    @property
    def width(self) -> int:
        return sum(self.text)


TRUE = Sizes()
# Fits tests/harness/tiny.py's SDXL; heads are as wide as the true ones, 64 and 128.
TINY = Sizes((64, 96), (64, 128), 128, 2, 28, (2, 256), (2, 64, 128), 4, 4)
PATCH, EMBEDDING = 14, 512


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, source: int, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width, source)} | ({f"{name}.bias": (width,)} if bias else {})


def clip_tower(size: Sizes) -> Shapes:
    """CLIP's vision transformer in the names of transformers."""
    w = size.vision
    out = {"embeddings.class_embedding": (w,), "embeddings.patch_embedding.weight": (w, 3, PATCH, PATCH),
           "embeddings.position_embedding.weight": ((size.image // PATCH) ** 2 + 1, w)}
    out |= _norm("pre_layrnorm", w) | _norm("post_layernorm", w)
    for n in range(size.depth):
        layer = f"encoder.layers.{n}"
        out |= _norm(f"{layer}.layer_norm1", w) | _norm(f"{layer}.layer_norm2", w)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= _linear(f"{layer}.self_attn.{part}", w, w)
        out |= _linear(f"{layer}.mlp.fc1", w, 4 * w) | _linear(f"{layer}.mlp.fc2", 4 * w, w)
    return {f"vision_model.{name}": shape for name, shape in out.items()}


def _resampler(source: int, dim: int, output: int, depth: int, inner: int) -> Shapes:
    out = _linear("proj_in", source, dim) | _linear("proj_out", dim, output) | _norm("norm_out", output)
    for n in range(depth):
        attention, mlp = f"layers.{n}.0", f"layers.{n}.1"
        out |= _norm(f"{attention}.norm1", dim) | _norm(f"{attention}.norm2", dim)
        out |= _linear(f"{attention}.to_q", dim, inner, False) | _linear(f"{attention}.to_kv", dim, 2 * inner, False)
        out |= _linear(f"{attention}.to_out", inner, dim, False)
        out |= _norm(f"{mlp}.0", dim) | _linear(f"{mlp}.1", dim, 4 * dim, False) | _linear(f"{mlp}.3", 4 * dim, dim, False)
    return out


def id_encoder(version: int, size: Sizes = TRUE) -> Shapes:
    """The part `id_encoder` of photomaker-v1.bin or photomaker-v2.bin."""
    w = size.width
    out = clip_tower(size)
    out |= _linear("visual_projection", size.vision, size.text[0], False)
    out |= _linear("visual_projection_2", size.vision, size.text[1], False)
    for mlp, source in (("fuse_module.mlp1", 2 * w), ("fuse_module.mlp2", w)):
        out |= _norm(f"{mlp}.layernorm", source) | _linear(f"{mlp}.fc1", source, w) | _linear(f"{mlp}.fc2", w, w)
    out |= _norm("fuse_module.layer_norm", w)
    if version == 2:
        q = "qformer_perceiver."
        out |= _linear(f"{q}token_proj.0", EMBEDDING, 4 * EMBEDDING) | _linear(f"{q}token_proj.2", 4 * EMBEDDING, 2 * w)
        out |= _norm(f"{q}token_norm", w)
        inner = _resampler(size.vision, w, w, *size.qformer)
        out |= {f"{q}perceiver_resampler.{name}": shape for name, shape in inner.items()}
    return out


def attention_widths(size: Sizes = TRUE) -> list[int]:
    """Channels of SDXL's 70 transformer blocks, down, up, middle."""
    low, high = size.channels
    return [low] * 4 + [high] * 20 + [high] * 30 + [low] * 6 + [high] * 10


def lora(size: Sizes = TRUE) -> Shapes:
    """Low-rank changes of all four matrices of both attentions of the 70 blocks, as diffusers named them."""
    names = [f"down_blocks.{b}.attentions.{a}.transformer_blocks.{t}" for b, depth in ((1, 2), (2, 10)) for a in range(2)
             for t in range(depth)]
    names += [f"up_blocks.{b}.attentions.{a}.transformer_blocks.{t}" for b, depth in ((0, 10), (1, 2)) for a in range(3)
              for t in range(depth)]
    names += [f"mid_block.attentions.0.transformer_blocks.{t}" for t in range(10)]
    out: Shapes = {}
    for name, channels in zip(names, attention_widths(size), strict=True):
        for attention, source in (("attn1", channels), ("attn2", size.width)):  # itself, and the text
            for matrix in ("q", "k", "v", "out"):
                stem = f"unet.{name}.{attention}.processor.to_{matrix}_lora"
                wide = source if matrix in "kv" else channels
                out |= {f"{stem}.down.weight": (size.rank, wide), f"{stem}.up.weight": (channels, size.rank)}
    return out


def instantid(size: Sizes = TRUE) -> dict[str, Shapes]:
    """Both parts of InstantID's ip-adapter.bin."""
    depth, dim, inner = size.resampler
    image = {"latents": (1, size.tokens, dim)} | _resampler(EMBEDDING, dim, size.width, depth, inner)
    layers: Shapes = {}
    for n, channels in enumerate(attention_widths(size)):
        layers |= _linear(f"{2 * n + 1}.to_k_ip", size.width, channels, False)
        layers |= _linear(f"{2 * n + 1}.to_v_ip", size.width, channels, False)
    return {"image_proj": image, "ip_adapter": layers}


def photomaker(version: int, size: Sizes = TRUE) -> dict[str, Shapes]:
    return {"id_encoder": id_encoder(version, size), "lora_weights": lora(size)}


def flat(parts: dict[str, Any]) -> dict[str, Any]:
    """As the .safetensors variants name them."""
    return {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}


def random(parts: dict[str, Shapes], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Seeded weights: 1/sqrt(fan in) for matrices, norms near one, biases near zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    out: dict[str, dict[str, Any]] = {}
    for part, shapes in parts.items():
        out[part] = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            near_one = len(shape) == 1 and name.endswith("weight")
            fan = noise[0].numel() ** 0.5 if len(shape) > 1 and name != "latents" else 1.0
            out[part][name] = 1 + 0.05 * noise if near_one else noise / fan if len(shape) > 1 else 0.05 * noise
    return out


def write(path: Path, parts: dict[str, dict[str, Any]]) -> Path:
    """As nested dicts (.bin) or with prefixes (.safetensors), by the ending of `path`."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        torch.save(parts, path)
    else:
        save_file(flat(parts), path)
    return path


def control_net(path: Path, seed: int = 40) -> Path:
    """A ControlNet of the tiny SDXL, whose outputs are not zero."""
    import comfy.cldm.cldm
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    from . import tiny
    from .tiny_models import families

    shape = {key: value for key, value in families.SDXL_UNET.items() if key != "transformer_depth_output"}
    network = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, use_spatial_transformer=True, legacy=False, dtype=torch.float32,
        device="cpu", operations=comfy.ops.disable_weight_init, **shape)
    state = tiny.prefixed("control_model.", tiny.random_weights(network, torch.Generator().manual_seed(seed)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path
