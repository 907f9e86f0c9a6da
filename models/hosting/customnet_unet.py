"""CustomNet's network: the host's own UNet with a second pair of K/V projections in every cross-attention.

out = to_out(A_obj + A_txt), two softmaxes over one query (arXiv 2310.19784, section 3.2). The stock names to_k and to_v
hold the TEXT projections here, so that LoRAs and other packs' attention patches meet a normal text attention; the
object's own pair is called to_k_obj and to_v_obj. Files keep the authors' names, see `renamed` and `restored`.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ..common.errors import LikenessError

OBJECT_KEY = "likeness_object"  # in transformer_options: this call's Carrier
_SWAP = ((".attn2.to_k.", ".attn2.to_k_obj."), (".attn2.to_v.", ".attn2.to_v_obj."),
         (".attn2.to_k_text.", ".attn2.to_k."), (".attn2.to_v_text.", ".attn2.to_v."))


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' tensor names -> ours."""
    return {_swap(name, _SWAP): value for name, value in state.items()}


def restored(state: Mapping[str, Any]) -> dict[str, Any]:
    """Our tensor names -> the authors'."""
    back = tuple((ours, theirs) for theirs, ours in _SWAP)
    return {_swap(name, back): value for name, value in state.items()}


def _swap(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if old in name:
            return name.replace(old, new)
    return name


class Carrier:
    """The object tokens (b, n, d) of one call of the network, and whether the current block has added them yet."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens
        self.added = False


class DualAttention(CrossAttention):
    """Text attention as the host has it, plus the object's, before their common `to_out`."""

    def __init__(self, query_dim: int, context_dim: int, heads: int, dim_head: int, attn_precision: Any = None,
                 dtype: Any = None, device: Any = None, operations: Any = comfy.ops.disable_weight_init):
        super().__init__(query_dim, context_dim, heads, dim_head, attn_precision=attn_precision, dtype=dtype, device=device,
                         operations=operations)
        width = heads * dim_head
        self.to_k_obj = operations.Linear(context_dim, width, bias=False, dtype=dtype, device=device)
        self.to_v_obj = operations.Linear(context_dim, width, bias=False, dtype=dtype, device=device)

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        """x (b, t, c), text context (b, n, d) -> (b, t, c); the object comes by `transformer_options`."""
        options = transformer_options or {}
        carrier: Carrier | None = options.get(OBJECT_KEY)
        # with rows that another pack multiplied the object waits until they are one a picture again (`late_object`)
        if carrier is None or carrier.tokens.shape[0] != x.shape[0]:
            return super().forward(x, context, value, mask, options)
        q = self.to_q(x)
        k, v = self.to_k(context), self.to_v(context if value is None else value)
        function = comfy.ldm.modules.attention.optimized_attention
        masked = {} if mask is None else {"mask": mask}
        text = function(q, k, v, self.heads, attn_precision=self.attn_precision, transformer_options=options, **masked)
        carrier.added = True
        return self.to_out(self.object_values(carrier.tokens, q) + text)

    def object_values(self, tokens: Tensor, q: Tensor) -> Tensor:
        """What the object's own attention gives: with one token the softmax is 1, so its value at every position."""
        if tokens.shape[1] == 1:
            return self.to_v_obj(tokens)
        return comfy.ldm.modules.attention.optimized_attention(q, self.to_k_obj(tokens), self.to_v_obj(tokens), self.heads)

    def late_object(self, tokens: Tensor) -> Tensor:
        """(b, 1, c) that `to_out` would have made of the object: W_out W_v token, without the bias, which was added once.

        Through the layers, not their weights: those may be quantised, patched or on another device."""
        value = self.to_v_obj(tokens)
        return self.to_out(value) - self.to_out(torch.zeros_like(value))


class DualUNet(UNetModel):
    """forward(x, timesteps, context=text, object_context=tokens, text_scale=None): x with its extra channels already in.

    object_context (b, 1, d) or None; text_scale (b, 1) multiplies the text attention of each row."""

    def __init__(self, *args: Any, operations: Any = comfy.ops.disable_weight_init, device: Any = None, **config: Any):
        super().__init__(*args, operations=operations, device=device, **config)
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock):
                old = block.attn2
                block.attn2 = DualAttention(old.to_q.in_features, old.to_k.in_features, old.heads, old.dim_head,
                                            old.attn_precision, self.dtype, device, operations)

    def _forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, object_context=None,
                 text_scale=None, **kwargs):
        options = dict(transformer_options or {})
        patches = dict(options.get("patches", {}))
        options.pop(OBJECT_KEY, None)
        if object_context is not None:
            options[OBJECT_KEY] = Carrier(object_context)
            patches["attn2_output_patch"] = [*patches.get("attn2_output_patch", []), self._add_late]
        if text_scale is not None:
            patches["attn2_patch"] = [_Scaled(text_scale), *patches.get("attn2_patch", [])]
        options["patches"] = patches
        return super()._forward(x, timesteps, context, y, control, options, **kwargs)

    def _add_late(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """attn2_output_patch, the last in the list: the object where our attention did not run because another pack
        replaced it, or ran on other rows."""
        carrier: Carrier = extra_options[OBJECT_KEY]
        if carrier.added:
            carrier.added = False
            return out
        if out.shape[0] != carrier.tokens.shape[0]:
            raise LikenessError(f"Another node made {out.shape[0]} rows out of {carrier.tokens.shape[0]} inside the model, and "
                                "nothing tells which of them show the object; leave that node out.")
        if carrier.tokens.shape[1] != 1:
            raise LikenessError("Another node replaced the text attention of this model, and more than one object token cannot "
                                "be kept then; leave that node out.")
        return out + self._attention_at(extra_options).late_object(carrier.tokens)

    def _attention_at(self, extra_options: dict[str, Any]) -> DualAttention:
        part, number = extra_options["block"]
        block = self.middle_block if part == "middle" else getattr(self, f"{part}_blocks")[number]
        for layer in block:
            if hasattr(layer, "transformer_blocks"):
                return layer.transformer_blocks[extra_options.get("block_index", 0)].attn2
        raise KeyError(part)


class _Scaled:
    """attn2_patch: the text's values times a number a row; attention is linear in them, also where it is replaced."""

    def __init__(self, scale: Tensor):
        self.scale = scale

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return n, context, value * self.scale.to(value)[:, :, None]


def host_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet config in the host's words; also takes the authors' (attention_resolutions, one depth for all)."""
    out = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    levels = list(out["channel_mult"])
    blocks = out["num_res_blocks"]
    blocks = list(blocks) if isinstance(blocks, (list, tuple)) else [blocks] * len(levels)
    resolutions = out.pop("attention_resolutions", None)
    depth = out.get("transformer_depth", 1)
    if not isinstance(depth, list):
        depth = [depth if resolutions is None or 2 ** level in resolutions else 0 for level in range(len(levels))]
    elif len(depth) == sum(blocks):  # the host's: one a block; its levels are even
        depth = [depth[sum(blocks[:level])] for level in range(len(levels))]
    out["transformer_depth"] = [d for d, count in zip(depth, blocks, strict=True) for _ in range(count)]
    if not isinstance(out.get("transformer_depth_output"), list):
        out["transformer_depth_output"] = [d for d, count in zip(depth, blocks, strict=True) for _ in range(count + 1)]
    if out.get("transformer_depth_middle") is None:
        out["transformer_depth_middle"] = depth[-1]
    return {"image_size": 32, "legacy": False, "use_spatial_transformer": True, **out, "channel_mult": levels,
            "num_res_blocks": blocks}


def build_unet(unet_config: Mapping[str, Any], state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32,
               device: Any = "cpu", operations: Any = comfy.ops.disable_weight_init) -> DualUNet:
    """The network with weights under the authors' names, with or without the prefix of a whole checkpoint.

    Raises LikenessError when a tensor is missing or left over."""
    prefix = "model.diffusion_model."
    whole = any(name.startswith(prefix) for name in state_dict)
    state = {name.removeprefix(prefix): value for name, value in state_dict.items() if not whole or name.startswith(prefix)}
    unet = DualUNet(**{**host_config(unet_config), "dtype": dtype}, device=device, operations=operations)
    load_unet(unet, state)
    return unet.eval().requires_grad_(False)


def load_unet(unet: DualUNet, state: Mapping[str, Tensor], assign: bool = False) -> None:
    """Weights under the authors' names (no prefix) into the network. Raises LikenessError for others than its own."""
    missing, unexpected = unet.load_state_dict(renamed(state), strict=False, assign=assign)
    if missing or unexpected:
        which = f"{len(missing)} tensors are missing ({missing[0]})" if missing else (
            f"{len(unexpected)} tensors belong to no part of it ({unexpected[0]})")
        raise LikenessError(f"The file is no whole CustomNet: {which}; download it again.")
