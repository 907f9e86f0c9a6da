"""The cross-layer cross-scale projector (CCP): features of two encoders -> tokens as wide as the text rows."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.attention import Attention, sdpa
from ..common.errors import LikenessError
from .config import PROJECTOR, split

HEAD = 64
# The shallow release computes its local branch and throws the result away.
UNREAD = ("min_attention.", "projector.")


class MinAttention(nn.Module):
    """Attention of the deep features to other ones: neither output projection nor residual."""

    def __init__(self, width: int, operations: Any = nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.heads = width // HEAD
        self.norm1 = operations.LayerNorm(width, **place)
        self.norm2 = operations.LayerNorm(width, **place)
        self.to_q = operations.Linear(width, width, bias=False, **place)
        self.to_k = operations.Linear(width, width, bias=False, **place)
        self.to_v = operations.Linear(width, width, bias=False, **place)

    def forward(self, deep: Tensor, others: Tensor, attention: Attention) -> Tensor:
        """Queries (b, n, v), keys and values (b, m, v) -> (b, n, v)."""
        others = self.norm2(others)
        return attention(self.to_q(self.norm1(deep)), self.to_k(others), self.to_v(others), self.heads)


class Scale(nn.Module):
    """One trained factor."""

    def __init__(self, dtype=None, device=None):
        super().__init__()
        self.value = nn.Parameter(torch.ones((), dtype=dtype, device=device))


def _mlp(vision: int, hidden: int, width: int, operations: Any, place: dict[str, Any]) -> nn.Sequential:
    # numbered as in the release's files: 0, 2, 4, 5
    return nn.Sequential(operations.Linear(vision, hidden, **place), nn.GELU(), operations.Linear(hidden, width, **place),
                         nn.GELU(), operations.Linear(width, width, **place), operations.LayerNorm(width, **place))


class Projector(nn.Module):
    """tokens = base(deep) + s * MLP(attention(deep, local)); shallow: base(deep) beside MLP2(attention2(deep, earlier)).

    The tokens do not depend on the timestep, so they are made once. `attention` (q, k, v, heads) may be replaced.
    whole False leaves out what the shallow form never reads.
    """

    def __init__(self, vision: int, width: int, hidden: int, shallow: bool = False, adaptive: bool = False,
                 operations: Any = nn, dtype=None, device=None, attention: Attention = sdpa, whole: bool = True):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.attention, self.shallow = attention, shallow
        if whole or not shallow:
            self.min_attention = MinAttention(vision, operations, **place)
            self.projector = _mlp(vision, hidden, width, operations, place)
        if shallow:
            self.min_attention2 = MinAttention(vision, operations, **place)
            self.projector2 = _mlp(vision, hidden, width, operations, place)
        self.projector_base = operations.Linear(vision, width, **place)
        self.scale_value = Scale(**place) if adaptive else None

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[deep, local], or [shallow 1..3, deep, local], each (b, n, v) -> tokens (b, n, d), shallow (b, 2 n, d).

        local may be None in the shallow form, which does not read it."""
        *earlier, deep, local = features
        if len(earlier) != (3 if self.shallow else 0):
            raise LikenessError(f"This RealCustom++ projector reads {5 if self.shallow else 2} features, {len(features)} came; "
                                "connect the ENCODERS output of the adapter's own loader.")
        base = self.projector_base(deep)
        if self.shallow:
            fine = self.projector2(self.min_attention2(deep, torch.cat(earlier, 1), self.attention))
            return torch.cat([base, fine], 1)
        fine = self.projector(self.min_attention(deep, local, self.attention))
        return base + (fine if self.scale_value is None else self.scale_value.value.to(fine) * fine)


def build_projector(state: Mapping[str, Any], operations: Any = nn, dtype=None, device=None,
                    attention: Attention = sdpa, whole: bool = True) -> Projector:
    """An empty projector of the sizes that these tensors have, whose names have no prefix."""
    width, vision = state["projector_base.weight"].shape
    return Projector(vision, width, state["projector.0.weight"].shape[0], "projector2.0.weight" in state,
                     "scale_value.value" in state, operations, dtype, device, attention, whole)


def load_projector(state: Mapping[str, Tensor], operations: Any = nn, dtype: torch.dtype = torch.float32) -> Projector:
    """Projector from a release's state dict, with or without the checkpoint's prefix. Raises LikenessError."""
    own = split(state).projector if any(PROJECTOR in name for name in state) else dict(state)
    try:
        module = build_projector(own, operations, dtype, "meta")
        module.load_state_dict({name: value.detach().to(dtype) for name, value in own.items()}, strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        raise LikenessError(f"These tensors are no RealCustom++ projector ({error}); download the file again.") from error
    return module.requires_grad_(False).eval()
