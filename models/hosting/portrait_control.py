"""InstantID's ControlNet: it reads face tokens in place of the text, and acts only on rows whose stamp says so."""
from __future__ import annotations

from typing import Any

import comfy.controlnet
import torch
from torch import Tensor

from ..common.errors import LikenessError
from .row_masks import check_batch
from .stamps import KEY, SLOTS


class FaceControl(comfy.controlnet.ControlBase):
    """Round a ControlNet of the host; `tokens`: id in the stamps -> (references, l, width).

    The host's own way, `cross_attn_controlnet` on the prompt, would give the face to every other ControlNet in the chain
    as well. As one object serves the prompts with, without and against the identity, they still run in one call."""

    def __init__(self, inner: Any, tokens: dict[int, Tensor]):
        super().__init__()
        self.inner, self.tokens = inner, tokens

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int,
                    transformer_options: dict[str, Any]) -> dict[str, list[Any]] | None:
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        batch = x_noisy.shape[0] // batched_number
        rows, context = self._context(cond.get(KEY), batch)
        if not rows:
            return before
        # with weight 0 no attention asks this
        check_batch(None, max(tokens.shape[0] for tokens in self.tokens.values()), batch, transformer_options)
        count = x_noisy.shape[0]
        part = {name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
                for name, value in cond.items()}
        part["crossattn_controlnet"] = context.to(x_noisy.device)
        own = self.inner.get_control(x_noisy[rows], t[rows], part, len(rows) * batched_number // count, transformer_options)
        if own is None:  # outside of its range of steps
            return before
        if len(rows) < count:
            own = {name: [_spread(one, rows, count) for one in outputs] for name, outputs in own.items()}
        return self.control_merge(own, before, output_dtype=None)

    def _context(self, stamp: Tensor | None, batch: int) -> tuple[list[int], Tensor]:
        """Rows that carry one of the ids, and their tokens (rows, l, width)."""
        rows, found = [], []
        for row, ids in enumerate([] if stamp is None else stamp[:, :SLOTS].tolist()):
            tokens = next((self.tokens[number] for number in ids if number in self.tokens), None)
            if tokens is not None:
                rows.append(row)
                found.append(tokens[(row % batch) % tokens.shape[0]])
        return rows, torch.stack(found) if found else torch.empty(0)

    def copy(self) -> FaceControl:
        other = FaceControl(self.inner.copy(), self.tokens)
        self.copy_to(other)
        return other

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> FaceControl:
        other = FaceControl(self.inner.deepclone_multigpu(load_device), self.tokens)
        self.copy_to(other)
        if autoregister:
            self.multigpu_clones[load_device] = other
        return other

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self.inner.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        self.inner.cleanup()
        super().cleanup()

    def get_models(self) -> list[Any]:
        return super().get_models() + self.inner.get_models()

    def get_extra_hooks(self) -> list[Any]:
        return super().get_extra_hooks() + self.inner.get_extra_hooks()

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        return super().inference_memory_requirements(dtype) + self.inner.inference_memory_requirements(dtype)


def _spread(output: Tensor | None, rows: list[int], count: int) -> Tensor | None:
    """Outputs of some rows among zeros for the others."""
    if output is None:
        return None
    out = output.new_zeros(count, *output.shape[1:])
    out[rows] = output
    return out


def check_control(control: Any, width: int) -> None:
    """Raises LikenessError for what cannot read face tokens (b, l, width)."""
    if not isinstance(control, comfy.controlnet.ControlNet):
        raise LikenessError(f"InstantID's ControlNet reads face tokens in place of the text, a {type(control).__name__} reads "
                            "none; load InstantID's own diffusion_pytorch_model.safetensors with Load ControlNet Model.")
    network = control.control_model
    layer = None if network is None else next((m for name, m in network.named_modules() if name.endswith("attn2.to_k")), None)
    if layer is not None and layer.in_features != width:
        raise LikenessError(f"This ControlNet reads text of width {layer.in_features}, the face tokens have {width}; load "
                            "InstantID's own ControlNet, which is one for SDXL.")


def hint_of(control: Any, picture: Tensor, strength: float, start: float, end: float) -> Any:
    """A copy of the host's ControlNet with its picture (b, h, w, 3) and its range of steps."""
    return control.copy().set_cond_hint(picture[..., :3].movedim(-1, 1), strength, (start, end))


def with_control(conditioning: list[list[Any]], made: dict[Any, FaceControl], inner: Any, tokens: dict[int, Tensor],
                 inherited: Any = None) -> list[list[Any]]:
    """Entries with the face's control behind the controls they have; `made` keeps one object for each that was there.

    inherited: what an entry without a control gets from the host in a sampling without ours."""
    out = []
    for rows, options in conditioning:
        before = options.get("control", inherited)
        if before not in made:
            made[before] = FaceControl(inner, tokens)
            made[before].set_previous_controlnet(before)
        # without the second one the host would copy the control into every other prompt
        out.append([rows, {**options, "control": made[before], "control_apply_to_uncond": False}])
    return out
