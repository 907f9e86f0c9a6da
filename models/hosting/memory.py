"""Our networks under the host's memory management."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn


def compute_dtype(device: torch.device) -> torch.dtype:
    """Half precision where the host would choose it for a model, else float32."""
    return torch.float16 if management.should_use_fp16(device) else torch.float32


def patcher_class(disable_dynamic: bool = False) -> Any:
    """The host's class of patchers, looked up at call time because it is exchanged at start."""
    return comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher


def patcher_of(module: nn.Module, disable_dynamic: bool = False) -> Any:
    """A patcher round a module; disable_dynamic is what the host asks of a copy for another device."""
    return patcher_class(disable_dynamic)(module.eval().requires_grad_(False), load_device=management.get_torch_device(),
                                          offload_device=management.unet_offload_device())


def ready(patchers: list[Any], memory: int) -> None:
    """Loads all patchers together with room for `memory` bytes of activations."""
    management.load_models_gpu(patchers, memory_required=memory)


def stop_if_asked() -> None:
    """Raises the host's own exception when the artist pressed cancel."""
    management.throw_exception_if_processing_interrupted()


def counted(total: int) -> Callable[[int], None]:
    """A function that moves the node's progress bar towards `total`, and stops where the artist pressed cancel."""
    bar = comfy.utils.ProgressBar(max(total, 1))

    def step(amount: int) -> None:
        stop_if_asked()
        bar.update(amount)

    return step


def to_intermediate(tensor: torch.Tensor) -> torch.Tensor:
    """Where node outputs live between nodes."""
    return tensor.to(management.intermediate_device())
