"""All trained parts of a RealCustom++ adapter: the projector, and image keys and values of every text attention."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.attention import Attention, sdpa
from ..common.errors import LikenessError
from .config import PROJECTOR, RealCustomConfig, Split, layer_name
from .projector import UNREAD, build_projector


class ImageProjection(nn.Module):
    """Keys and values of one layer: tokens (b, l, d) -> (b, l, channels), no bias."""

    def __init__(self, width: int, channels: int, operations: Any = nn, dtype=None, device=None):
        super().__init__()
        self.k = operations.Linear(width, channels, bias=False, dtype=dtype, device=device)
        self.v = operations.Linear(width, channels, bias=False, dtype=dtype, device=device)


class RealCustom(nn.Module):
    """projector and layers; `attention` (q, k, v, heads) of the projector may be replaced, as the host does."""

    def __init__(self, config: RealCustomConfig, projector: nn.Module, operations: Any = nn, dtype=None, device=None):
        super().__init__()
        self.config, self.projector = config, projector
        self.layers = nn.ModuleDict({key.replace(".", "_"): ImageProjection(config.width, channels, operations, dtype, device)
                                     for key, channels in config.layers})

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every weight (host layers come without); values begin at zero, so that it changes nothing yet."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if ".norm" in name or name.endswith("projector.5.weight"):
                    parameter.fill_(float(name.endswith("weight")))
                elif name.endswith("bias") or name.endswith(".v.weight"):
                    parameter.zero_()
                elif parameter.ndim == 2:
                    bound = parameter.shape[1] ** -0.5
                    parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)

    def even_out(self, mean: Tensor, deviation: Tensor) -> None:
        """Folds (x - mean) / deviation, both (v,), into every layer that reads features: encoders whose features are of
        different size begin on equal terms. For the form that reads deep and local features."""
        projector: Any = self.projector
        scale = 1 / deviation.clamp_min(1e-6)
        with torch.no_grad():
            first = projector.projector_base
            first.weight.mul_(scale)
            first.bias.sub_(first.weight @ mean)
            normed = (mean - mean.mean()) / _size(mean, deviation)
            for norm in (projector.min_attention.norm1, projector.min_attention.norm2):
                own = scale * _size(mean, deviation)
                norm.bias.sub_(norm.weight * normed * own)
                norm.weight.mul_(own)

    def encode(self, features: list[Tensor]) -> Tensor:
        """Features in the release's order -> tokens (b, l, d)."""
        return self.projector(features)

    def keys_values(self, key: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, l, d) -> keys and values (b, l, channels) of layer "output.3.0"."""
        layer: Any = self.layers[key.replace(".", "_")]
        return layer.k(tokens), layer.v(tokens)


def _size(mean: Tensor, deviation: Tensor) -> Tensor:
    """Root mean square by which a LayerNorm divides a token, for a token of average size."""
    return (deviation.square() + (mean - mean.mean()).square()).mean().sqrt()


def release_names(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Our tensors under the names of the release's files; blocks: residual blocks a level of the base."""
    out = {}
    for name, value in state.items():
        if name.startswith("projector."):
            out[PROJECTOR + name.removeprefix("projector.")] = value
        else:
            _, key, which, _ = name.split(".")
            out[layer_name(key.replace("_", "."), which, blocks)] = value
    return out


def build(config: RealCustomConfig, parts: Split, operations: Any = nn, dtype=None,
          attention: Attention = sdpa) -> RealCustom:
    """The adapter with these tensors; what the shallow form never reads is left out. Raises LikenessError."""
    unread = UNREAD if config.shallow else ()
    state = {f"projector.{name}": value for name, value in parts.projector.items() if not name.startswith(unread)}
    for name, value in parts.layers.items():
        key, _, which = name.rpartition(".")
        state[f"layers.{key.replace('.', '_')}.{which}.weight"] = value
    projector = build_projector(parts.projector, operations, dtype, "meta", attention, whole=False)
    module = RealCustom(config, projector, operations, dtype, "meta")
    _check(state, module.state_dict())
    module.load_state_dict({name: value.detach().to(dtype) for name, value in state.items()}, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(state.keys() ^ expected.keys()):
        what = "lacks" if name in expected else "should not have"
        raise LikenessError(f"This RealCustom++ file {what} the tensor {name}; download or train the file again.")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise LikenessError(f"In this RealCustom++ file {name} is {list(state[name].shape)} instead of "
                                f"{list(tensor.shape)}; download or train the file again.")
