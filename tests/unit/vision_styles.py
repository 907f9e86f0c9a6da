"""Tiny random transformers models, and their weights under the names that other releases use."""

from __future__ import annotations

import re

import torch
import transformers

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
CLASSES = {
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config),
    "registers": (transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig),
    "swiglu": (transformers.Dinov2Model, transformers.Dinov2Config),
    "mae": (transformers.ViTMAEModel, transformers.ViTMAEConfig),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
}
EXTRA = {
    "dinov2": {"mlp_ratio": 2},
    "registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "swiglu": {"use_swiglu_ffn": True},
    "mae": {"intermediate_size": 96, "mask_ratio": 0.0},
    "siglip": {"intermediate_size": 96},
    "clip": {"intermediate_size": 96},
}
FAMILY = {"registers": "dinov2", "swiglu": "dinov2"}
HEADS = {"num_heads": "4"}

_INNER = {
    "layernorm_before": "norm1",
    "layer_norm1": "norm1",
    "layernorm_after": "norm2",
    "layer_norm2": "norm2",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "mlp.down_proj": "mlp.w3",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "pre_layrnorm": "norm_pre",
}
_OPEN_CLIP = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv": "attn.in_proj",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OLD = (  # transformers 4 and every file on disk
    (r"^layers\.", "encoder.layer."),
    (
        r"attention\.([qkv])_proj",
        lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]],
    ),
    (r"attention\.o_proj", "attention.output.dense"),
)


def oracle(kind: str, **changes) -> torch.nn.Module:
    """Tiny transformers model in evaluation mode, every parameter random (norms and tokens too)."""
    model_class, config_class = CLASSES[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**TINY, **EXTRA[kind], **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def meta_state(kind: str, **config) -> dict[str, torch.Tensor]:
    """Names and shapes of a true-size transformers model, on the meta device."""
    model_class, config_class = CLASSES[kind]
    with torch.device("meta"):
        return model_class(config_class(**config)).state_dict()


def _replace(key: str, table: dict[str, str]) -> str:
    stem, _, leaf = key.rpartition(".")
    if key in table:
        return table[key]
    return f"{table[stem]}.{leaf}" if stem in table else key


def to_timm(state: dict[str, torch.Tensor], packed: str = "w12") -> dict[str, torch.Tensor]:
    """transformers 5 names in memory -> timm / original: qkv fused, SwiGLU packed as w12, w3 or fc1, fc2."""
    out: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        block = re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", key)
        if not block:
            name = _replace(key, _TOP)
            shape = {"cls_token": (1, 1, -1), "pos_embed": (1, *tensor.shape[-2:])}.get(name, tensor.shape)
            out[name] = tensor.reshape(shape)
            continue
        head, inner = f"blocks.{block[1]}.", block[2]
        fused = re.fullmatch(r"(?:attention|self_attn)\.q_proj\.(\w+)", inner)
        gate = re.fullmatch(r"mlp\.gate_proj\.(\w+)", inner)
        if fused:
            parts = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[f"{head}attn.qkv.{fused[1]}"] = torch.cat(parts)
        elif gate:
            out[f"{head}mlp.w12.{gate[1]}"] = torch.cat([tensor, state[key.replace("gate_proj", "up_proj")]])
        elif not re.search(r"[kv]_proj|up_proj", inner):
            out[head + _replace(inner, _INNER)] = tensor
    if packed == "fc1":
        out = {key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): t for key, t in out.items()}
    return out


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers names of CLIP vision -> those of OpenAI's releases, a text tower beside it."""
    out = {}
    for key, tensor in to_timm(state).items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if block:
            name = f"transformer.resblocks.{block[1]}.{_replace(block[2], _OPEN_CLIP)}"
            name = name.replace("in_proj.", "in_proj_")
        else:
            name = _replace(
                key,
                {
                    "cls_token": "class_embedding",
                    "pos_embed": "positional_embedding",
                    "patch_embed.proj": "conv1",
                    "norm_pre": "ln_pre",
                    "norm": "ln_post",
                },
            )
        shape = {"class_embedding": (-1,), "positional_embedding": tensor.shape[-2:]}.get(name, tensor.shape)
        out["visual." + name] = tensor.reshape(shape)
    width = tensor.shape[0]
    other = {
        "visual.proj": (width, 7),
        "transformer.resblocks.0.ln_1.weight": (9,),
        "positional_embedding": (77, 9),
        "token_embedding.weight": (50, 9),
        "ln_final.bias": (9,),
        "text_projection": (9, 7),
        "logit_scale": (),
    }
    return {**out, **{name: torch.zeros(shape, device=tensor.device) for name, shape in other.items()}}


def to_old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 names in memory of DINOv2 or MAE -> the names of transformers 4."""
    out = {}
    for key, tensor in state.items():
        if key.startswith("layers."):
            key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        if "gate_proj" in key:
            tensor = torch.cat([tensor, state[key.replace("gate_proj", "up_proj")]])
        if "up_proj" in key:
            continue
        for pattern, target in (*_OLD, ("gate_proj", "weights_in"), ("down_proj", "weights_out")):
            key = re.sub(pattern, target, key)
        out[key] = tensor
    return out


def on_meta(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Empty tensors of these shapes on the meta device."""
    return {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}
