"""The CustAny adapter: a global path into the subject's word and a local path into new attention layers."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..common.attention import Attention, sdpa
from ..common.errors import LikenessError
from .config import CustAnyConfig
from .layers import LocalAttention, Mlp, resample_grid

Features = Sequence[tuple[Tensor, Tensor]]


class CustAny(nn.Module):
    """All trained parts of CustAny; `attention` (q, k, v, heads) may be replaced, as the host does."""

    def __init__(self, config: CustAnyConfig, operations: Any = nn, dtype=None, device=None,
                 attention: Attention | None = None):
        super().__init__()
        self.config = config.check()
        self.attention = attention or sdpa
        d, count = config.width, len(config.encoders)
        kwargs = {"operations": operations, "dtype": dtype, "device": device}
        self.encoder_mlps = nn.ModuleList(Mlp(width, d, d, **kwargs) for _, width in config.encoders)
        self.global_mlp = Mlp((count + 1) * d, 2 * d, d, zero=True, **kwargs)
        self.local_mlp = Mlp(count * d if config.fuse == "features" else d, d, d, **kwargs)
        self.layers = nn.ModuleDict({module_key(key): LocalAttention(channels, d, config.head_dim, **kwargs)
                                     for key, channels in config.layers})

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every weight (host layers come without); the zero ends make it change nothing yet."""
        for module in (*self.encoder_mlps, self.global_mlp, self.local_mlp, *self.layers.values()):
            module.init_weights(generator)

    def encode(self, features: Features) -> tuple[Tensor, Tensor]:
        """Per encoder (class token (b, d_e), patches (b, n, d_e)) -> global (b, E, d), local (b, l, d)."""
        widths = tuple(width for _, width in self.config.encoders)
        got = tuple(patches.shape[-1] for _, patches in features)
        if got != widths:
            names = ", ".join(f"{family} {width}" for family, width in self.config.encoders)
            raise LikenessError(f"This adapter was trained with the encoders {names}, got features of the "
                                f"widths {list(got)}; load those encoders in that order.")
        parts = [mlp(torch.cat([cls[:, None], patches], 1))
                 for mlp, (cls, patches) in zip(self.encoder_mlps, features, strict=True)]
        tokens = torch.stack([part[:, 0] for part in parts], 1)
        patches = [part[:, 1:] for part in parts]
        if self.config.fuse == "tokens":
            return tokens, self.local_mlp(torch.cat(patches, 1))
        side = self.config.grid or math.isqrt(patches[0].shape[1])
        if self.config.grid or len({part.shape[1] for part in patches}) > 1:
            patches = [resample_grid(part, side) for part in patches]
        return tokens, self.local_mlp(torch.cat(patches, -1))

    def word_delta(self, tokens: Tensor, word: Tensor) -> Tensor:
        """Global tokens (b, E, d) and word rows (b, d) -> delta (b, d); the fused word is word + delta."""
        return self.global_mlp(torch.cat([tokens.flatten(1), word.to(tokens.dtype)], -1))

    def keys_values(self, key: str, local: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (b, l, d) -> keys and values (b, l, channels) of layer "output.3.0"."""
        return cast(LocalAttention, self.layers[module_key(key)]).keys_values(local)

    def local(self, key: str, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (b, t, channels) of one layer, to_out included, WITHOUT the residual."""
        return self.layers[module_key(key)](x, k, v, self.attention)


def module_key(key: str) -> str:
    """Module names may not hold dots."""
    return key.replace(".", "_")


def is_custany(keys: Iterable[str]) -> bool:
    """Whether a file with these tensor names is a CustAny adapter."""
    keys = set(keys)
    return {"encoder_mlps.0.norm.weight", "global_mlp.out.weight", "local_mlp.out.weight"} <= keys and any(
        key.startswith("layers.") and key.endswith(".to_k.weight") for key in keys)


def expected_shapes(config: CustAnyConfig) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of an adapter with this config."""
    return {key: tuple(value.shape) for key, value in CustAny(config, device="meta").state_dict().items()}


def check_shapes(config: CustAnyConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise LikenessError, naming both shapes, when a file's tensors are not what its metadata says."""
    expected = expected_shapes(config)
    for key, shape in expected.items():
        if key not in shapes:
            raise LikenessError(f"The adapter's metadata promises the tensor {key} {list(shape)}, but the "
                                "file does not hold it; download or train the file again.")
        if tuple(shapes[key]) != shape:
            raise LikenessError(f"The adapter's metadata says that {key} is {list(shape)}, but the file "
                                f"holds {list(shapes[key])}; download or train the file again.")
    extra = sorted(set(shapes) - set(expected))
    if extra:
        raise LikenessError(f"The adapter file holds {extra[0]} {list(shapes[extra[0]])}, which its metadata "
                            "does not name; download or train the file again.")
