"""Weights of a file into a module: every name and shape is compared before one tensor is taken."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.errors import LikenessError

M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of tensors, header entries or plain shapes."""
    return {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}


def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below `prefix`, without it."""
    return {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}


def depth_of(names: Mapping[str, Any], prefix: str) -> int:
    """How many numbered parts stand below `prefix`."""
    return len({name[len(prefix):].split(".")[0] for name in names if name.startswith(prefix)})


def fill(build: Callable[[Any], M], state: Mapping[str, Tensor], what: str, operations: Any = nn,
         dtype: torch.dtype | None = None) -> M:
    """A frozen module of build(operations), made on the meta device, that holds exactly the tensors of `state`.

    dtype None: the tensors' own. Raises LikenessError for names that are missing or too many, and for wrong shapes."""
    # Compared against a plain torch build: the host's layers may hold no weights before loading.
    wanted = shapes_of(build(nn).state_dict())
    got = shapes_of(state)
    for names, fault in ((wanted.keys() - got.keys(), "lacks"), (got.keys() - wanted.keys(), "has the unknown part")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LikenessError(f"{what} {fault} {min(names)}{more}; download the file again.")
    wrong = min((name for name, shape in wanted.items() if got[name] != shape), default=None)
    if wrong is not None:
        raise LikenessError(f"{what} has {wrong} of the shape {got[wrong]} instead of {wanted[wrong]}; download the file again.")
    module = build(operations)
    module.load_state_dict({name: value if dtype is None else value.to(dtype) for name, value in state.items()},
                           strict=True, assign=True)
    return module.requires_grad_(False).eval()
