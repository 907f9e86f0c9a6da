"""Keys and values that were made once for all steps, as a network that the host can count and move."""
from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
from torch import Tensor, nn

from .memory import patcher_of, ready


class Pair(nn.Module):
    """Keys and values (n, l, channels) of one layer."""

    def __init__(self, k: Tensor, v: Tensor):
        super().__init__()
        self.k, self.v = nn.Parameter(k, requires_grad=False), nn.Parameter(v, requires_grad=False)


class Store(nn.Module):
    """Keys and values of all layers: a network without layers, so that the host can count, load and offload it."""

    def __init__(self, pairs: dict[str, Pair]):
        super().__init__()
        self.pairs = nn.ModuleDict({key.replace(".", "_"): pair for key, pair in pairs.items()})

    def get(self, key: str) -> Pair:
        """Of the layer "output.3.0"."""
        pair: Any = self.pairs[key.replace(".", "_")]
        return pair


def projected(patcher: Any, tokens: Tensor, layers: dict[str, str], memory: int) -> Any:
    """Patcher with the keys and values of tokens (n, l, d) in every layer, made once for a whole run.

    layers: the base's name of a layer -> the adapter's. memory: bytes that the adapter wants for it."""
    ready([patcher], memory)
    parameter = next(patcher.model.parameters())  # the type in which the adapter computes
    tokens = tokens.to(patcher.load_device, parameter.dtype)
    away = comfy.model_management.unet_offload_device()
    return _patcher(Store({key: Pair(*(t.to(away) for t in patcher.model.keys_values(name, tokens)))
                           for key, name in layers.items()}))


def of_adapter(adapter: Any, tokens: Tensor, layers: list[str]) -> Any:
    """The same of an adapter that calls its layers as the base does."""
    memory = tokens.shape[0] * tokens.shape[1] * adapter.config.width * 16
    return projected(adapter.patcher, tokens, {key: key for key in layers}, memory)


def _patcher(store: Store, disable_dynamic: bool = False) -> Any:
    patcher = patcher_of(store, disable_dynamic)
    patcher.cached_patcher_init = (copy_store, (store,))
    return patcher


def copy_store(store: Store, disable_dynamic: bool = False) -> Any:
    """The host's factory for a patcher with tensors of its own, for another device."""
    return _patcher(copy.deepcopy(store), disable_dynamic)
