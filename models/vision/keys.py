"""Tell the family and the sizes of a vision encoder from its tensor names and shapes, and rename its tensors.

The releases of one model name their tensors in three styles (timm / original, transformers, open_clip), and
transformers 5 has other names in memory than on disk. No name has two meanings, so one table serves all.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.errors import LikenessError
from .vit import ACTIVATIONS, VitConfig

FAMILIES = ("dinov2", "mae", "siglip", "clip")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24, 1664: 16}
FAMILY_HEADS = {("siglip", 1536): 16}  # SigLIP 2 giant has wider heads than DINOv2 giant

_PREFIX = r"(?:(?:vit|dinov2|dinov2_with_registers|vision_model|model|visual|trunk|module)\.)*"
_PATCH = {"patch_embed.proj": "timm", "embeddings.patch_embeddings.projection": "transformers",
          "embeddings.patch_embedding": "transformers", "conv1": "open_clip"}
_PATCH_KEY = re.compile(rf"({_PREFIX})({'|'.join(map(re.escape, _PATCH))})\.weight")
_BLOCK_KEY = re.compile(r"(?:blocks(?:\.\d+)?|encoder\.layers?|layers|transformer\.resblocks)\.(\d+)\.(.+)")
# Heads, decoders, text towers and training leftovers: no part of the encoder.
_IGNORED = re.compile(
    r"(decoder\w*|head\w*|proj|attn_pool|fc_norm|pooler|classifier|(embeddings\.)?(mask_token|position_ids)"
    r"|text|text_model|token_embedding|ln_final|(visual|text)_projection|logit_scale|logit_bias)(\.|$)")
_TOP = {
    **{name: "patch" for name in _PATCH},
    **dict.fromkeys(("cls_token", "embeddings.cls_token", "class_embedding", "embeddings.class_embedding"),
                    "cls"),
    **dict.fromkeys(("reg_token", "register_tokens", "embeddings.register_tokens"), "registers"),
    **dict.fromkeys(("pos_embed", "embeddings.position_embeddings", "embeddings.position_embedding.weight",
                     "positional_embedding"), "position"),
    **dict.fromkeys(("norm_pre", "pre_layrnorm", "ln_pre"), "pre_norm"),
    **dict.fromkeys(("norm", "layernorm", "post_layernorm", "ln_post"), "norm"),
}
_INNER = {
    **dict.fromkeys(("norm1", "layernorm_before", "layer_norm1", "ln_1"), "norm1"),
    **dict.fromkeys(("norm2", "layernorm_after", "layer_norm2", "ln_2"), "norm2"),
    **dict.fromkeys(("attn.qkv", "attn.in_proj"), "qkv"),
    **dict.fromkeys(("attention.attention.query", "attention.q_proj", "self_attn.q_proj"), "q"),
    **dict.fromkeys(("attention.attention.key", "attention.k_proj", "self_attn.k_proj"), "k"),
    **dict.fromkeys(("attention.attention.value", "attention.v_proj", "self_attn.v_proj"), "v"),
    **dict.fromkeys(("attn.proj", "attn.out_proj", "attention.output.dense", "attention.o_proj",
                     "self_attn.out_proj"), "o"),
    **dict.fromkeys(("mlp.fc1", "mlp.c_fc", "intermediate.dense", "mlp.w12", "mlp.weights_in"), "fc1"),
    **dict.fromkeys(("mlp.fc2", "mlp.c_proj", "output.dense", "mlp.w3", "mlp.weights_out", "mlp.down_proj"),
                    "fc2"),
    "mlp.gate_proj": "gate", "mlp.up_proj": "up",
    **dict.fromkeys(("ls1.gamma", "layer_scale1.lambda1", "ls_1.gamma"), "ls1"),
    **dict.fromkeys(("ls2.gamma", "layer_scale2.lambda1", "ls_2.gamma"), "ls2"),
}


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a tensor, of an entry of a file header, or of a plain list of sizes."""
    return tuple(getattr(value, "shape", value))


def _rename(key: str) -> str | None:
    """Name of one tensor inside our ViT (or qkv, gate, up: see fuse), None if it is not understood."""
    block = _BLOCK_KEY.fullmatch(key)
    names, stem = (_INNER, block[2]) if block else (_TOP, key)
    end = re.fullmatch(r"(.+?)([._])(weight|bias)", stem)
    if stem in names:  # a bare parameter
        name = names[stem]
    elif end and end[1] in names and (end[2] == "." or end[1] == "attn.in_proj"):
        name = f"{names[end[1]]}.{end[3]}"
    else:
        return None
    return f"blocks.{block[1]}.{name}" if block else name


def _find(names: Iterable[str]) -> tuple[str, str] | None:
    """(prefix, key style) of the encoder among the tensor names; of several the first by name."""
    found = (match for match in map(_PATCH_KEY.fullmatch, names) if match)
    return min(((match[1], _PATCH[match[2]]) for match in found), default=None)


def rename(tensors: Mapping[str, Any]) -> tuple[dict[str, tuple[str, Any]], list[str], str] | None:
    """({our name: (name in the file, tensor)}, names that are not understood, key style); None if no ViT."""
    found = _find(tensors)
    if found is None:
        return None
    prefix, style = found
    known, unknown = {}, []
    for key, value in tensors.items():
        inner = key[len(prefix):]
        if not key.startswith(prefix) or _IGNORED.match(inner):
            continue
        name = _rename(inner)
        if name is None or name in known:
            unknown.append(key)
        else:
            known[name] = (key, value)
    return known, unknown, style


def _family(shapes: dict[str, tuple[int, ...]], cls: bool) -> str:
    if not cls:
        return "siglip"
    if "pre_norm.weight" in shapes:
        return "clip"
    if "blocks.0.ls1" in shapes or "registers" in shapes:
        return "dinov2"
    return "mae"


def has_mae_parts(names: Iterable[str]) -> bool:
    """Whether an MAE's decoder or mask token stands beside the encoder; releases of the encoder alone have neither."""
    return any(part in name for name in names for part in ("decoder_", "decoder.", "mask_token"))


def _activation(family: str, style: str, width: int, depth: int, patch: int) -> str:
    if family == "clip":  # LAION's H and bigG have the exact GELU, OpenAI's models the quick one
        return "gelu" if (width, depth) in ((1280, 32), (1664, 48)) else "quick_gelu"
    if family == "siglip":  # timm runs the first release with the exact GELU, transformers with the tanh form
        return "gelu_tanh" if style == "transformers" or (width >= 1152 and patch == 16) else "gelu"
    return "gelu"


def _heads(family: str, width: int, metadata: Mapping[str, str]) -> int:
    text = metadata.get("num_heads")
    if text is None:
        heads = FAMILY_HEADS.get((family, width)) or HEADS.get(width)
        if heads is None:
            raise LikenessError(f"The vision encoder has the unknown width {width}: add num_heads to the "
                                f"metadata of its file.")
        return heads
    try:
        heads = int(text)
    except ValueError:
        heads = 0
    if heads < 1 or width % heads:
        raise LikenessError(f"The metadata of the vision encoder says num_heads = {text}, which does not "
                            f"divide its width {width}: correct num_heads in the metadata.")
    return heads


def _choice(metadata: Mapping[str, str], key: str, default: str, allowed: Iterable[str]) -> str:
    value = metadata.get(key, default)
    if value not in allowed:
        raise LikenessError(f"The metadata of the vision encoder says {key} = {value}, but only "
                            f"{', '.join(allowed)} are known: correct it in the metadata.")
    return value


def identify(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> VitConfig | None:
    """Config from names and shapes alone (tensors, header entries or plain shapes); None if no ViT of ours.

    Metadata: `num_heads`, `likeness.family`, `likeness.activation` override. Raises LikenessError for an
    unknown width without num_heads and for metadata that make no sense.
    """
    metadata = metadata or {}
    renamed = rename(tensors)
    if renamed is None:
        return None
    known, _, style = renamed
    shapes = {name: shape_of(value) for name, (_, value) in known.items()}
    patch, table = shapes["patch.weight"], shapes.get("position", ())
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    fc2 = next((shape for name, shape in shapes.items() if name.endswith(".fc2.weight")), ())
    registers = shapes.get("registers", (0, 0))
    square = len(patch) == 4 and patch[1] == 3 and patch[2] == patch[3]
    if not square or not blocks or len(fc2) != 2 or len(registers) < 2:
        return None
    if len(table) not in (2, 3) or table[-1] != patch[0]:
        return None
    width, rows = patch[0], table[-2]
    cls_position = math.isqrt(rows) ** 2 != rows
    side = math.isqrt(rows - int(cls_position))
    if side < 1 or side ** 2 != rows - int(cls_position):
        return None
    fc1 = next((shape for name, shape in shapes.items() if name.endswith(".fc1.weight")), (0,))
    cls = "cls" in shapes or "registers" in shapes or cls_position
    family = _choice(metadata, "likeness.family", _family(shapes, cls), FAMILIES)
    depth = max(blocks) + 1
    activation = _choice(metadata, "likeness.activation",
                         _activation(family, style, width, depth, patch[2]), tuple(ACTIVATIONS))
    mae_eps = 1e-12 if style == "transformers" else 1e-6
    return VitConfig(
        family=family, style=style, width=width, depth=depth, heads=_heads(family, width, metadata),
        mlp=fc2[1], patch=patch[2], grid=side, cls=cls, cls_position=cls_position, registers=registers[-2],
        pre_norm="pre_norm.weight" in shapes, patch_bias="patch.bias" in shapes or family != "clip",
        qkv_bias=any(name.endswith((".qkv.bias", ".q.bias")) for name in shapes),
        layer_scale=any(name.endswith((".ls1", ".ls2")) for name in shapes),
        swiglu=fc1[0] == 2 * fc2[1] or any(name.endswith(".gate.weight") for name in shapes),
        activation=activation, eps={"clip": 1e-5, "mae": mae_eps}.get(family, 1e-6),
        # The models with registers were trained with an antialiased table, those without were not.
        antialias="registers" in shapes)


def fuse(known: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors as our ViT holds them: qkv split into three, gate and up joined, bare parameters (1, n, d)."""
    out: dict[str, Tensor] = {}
    for name, (_, tensor) in known.items():
        stem, _, leaf = name.rpartition(".")
        owner, _, part = stem.rpartition(".")
        if part == "qkv" and tensor.shape[0] % 3 == 0:
            for target, piece in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{owner}.{target}.{leaf}"] = piece
        elif part == "gate" and f"{owner}.up.{leaf}" in known:
            out[f"{owner}.fc1.{leaf}"] = torch.cat([tensor, known[f"{owner}.up.{leaf}"][1]])
        elif part == "up" and f"{owner}.gate.{leaf}" in known:
            continue
        elif name in ("cls", "registers", "position"):
            out[name] = tensor.reshape(1, -1, tensor.shape[-1])
        else:
            out[name] = tensor
    return out
