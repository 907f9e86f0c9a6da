"""CustAny's local path inside the host: attention to the subject's patch tokens after each block's self-attention.

x = x + SA(x); x = x + strength * mask * LOCAL(x, tokens); x = x + CA(x, text). The host's list slot `middle_patch` sits at
exactly this place, stacks with any number of patches and leaves the text attention to other packs.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .row_masks import check_batch, row_masks
from .stamps import KEY, RowStamps, check_rows


class Timing(NamedTuple):
    """When a patch acts: sigmas between start and end, times a curve over the sampler's steps."""
    start: float = float("inf")
    end: float = 0.0
    curve: Any = None

    def factor(self, sigma: float, schedule: Tensor | None) -> float:
        """Strength at this sigma; the curve's x is the share of steps that are done."""
        if not self.end <= sigma <= self.start:
            return 0.0
        if self.curve is None:
            return 1.0
        return float(self.curve.interp(progress(sigma, schedule)))


def timing_of(model: Any, start: float, end: float, curve: Any = None) -> Timing:
    """start and end: shares of the sampling (0..1) of this MODEL."""
    sampling = model.get_model_object("model_sampling")
    return Timing(float("inf") if start <= 0 else float(sampling.percent_to_sigma(start)),
                  0.0 if end >= 1 else float(sampling.percent_to_sigma(end)), curve)


def progress(sigma: float, schedule: Tensor | None) -> float:
    """0 at the first step's sigma, 1 at the last step's, straight between; works for samplers that ask in between."""
    if schedule is None or len(schedule) < 3:
        return 0.0
    levels = [float(s) for s in schedule[:-1]]
    for index, level in enumerate(levels):
        if sigma >= level:
            if index == 0 or level == levels[index - 1]:
                return index / (len(levels) - 1)
            return (index - (sigma - level) / (levels[index - 1] - level)) / (len(levels) - 1)
    return 1.0


class Plan(NamedTuple):
    """All that one injection knows; nothing here changes after the node has run."""
    number: int                                       # the id in the row stamps
    patcher: Any                                      # the adapter, under the host's memory management
    keys_values: tuple[tuple[str, Tensor, Tensor], ...]  # layer key, K and V (references, tokens, channels)
    pairing: str
    strength: tuple[tuple[str, float], ...]           # layer key -> factor
    timing: Timing
    mask: Tensor | None = None                        # (b, h, w) over the whole picture
    guidance: str | None = None                       # name of the guidance whose masks limit the subject


class LocalInjection:
    """The patch object in the `middle_patch` list; built anew for each apply, never changed."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._layers = {key: (k, v) for key, k, v in plan.keys_values}
        self._strength = dict(plan.strength)

    @property
    def ids(self) -> set[int]:
        """Stamps that this patch acts on."""
        return {self.plan.number}

    def models(self) -> list[Any]:
        """Patchers that the host loads together with the diffusion model."""
        return [self.plan.patcher]

    def to(self, target: Any) -> LocalInjection:
        """A copy with its tensors on a device; the host also calls this with a dtype, which the layers see to themselves."""
        if not isinstance(target, torch.device):
            return self
        moved = tuple((key, k.to(target), v.to(target)) for key, k, v in self.plan.keys_values)
        mask = None if self.plan.mask is None else self.plan.mask.to(target)
        return LocalInjection(self.plan._replace(keys_values=moved, mask=mask))

    def __call__(self, x: Tensor, extra_options: dict[str, Any]) -> Tensor:
        stamps: RowStamps | None = extra_options.get(KEY)
        block = extra_options.get("block")
        if stamps is None or block is None:
            return x
        key = f"{block[0]}.{block[1]}.{extra_options.get('block_index', 0)}"
        weight = self._strength.get(key, 0.0)
        if weight == 0.0 or key not in self._layers:
            return x
        counts = [ids.count(self.plan.number) for ids in stamps.ids]
        if not any(counts):
            return x
        check_rows(stamps, x.shape[0])
        weight *= self.plan.timing.factor(stamps.sigma, extra_options.get("sample_sigmas"))
        if weight == 0.0:
            return x
        for turn in range(max(counts)):
            x = self._add(x, key, weight, [row for row, count in enumerate(counts) if count > turn], stamps, extra_options)
        return x

    def _add(self, x: Tensor, key: str, weight: float, rows: list[int], stamps: RowStamps,
             extra_options: dict[str, Any]) -> Tensor:
        """x with the subject in these rows."""
        index = torch.tensor(rows, device=x.device)
        batch = x.shape[0] // max(1, len(extra_options.get("cond_or_uncond", [0])))
        references = self._layers[key][0].shape[0] if self.plan.pairing == "per latent" else 0
        check_batch(self.plan.mask, references, batch, extra_options)
        k, v = (self._references(t, rows, batch).to(x) for t in self._layers[key])
        added = self.plan.patcher.model.local(key, x[index], k, v)
        mask = row_masks(self.plan.mask, self.plan.guidance, stamps, rows, batch, x, extra_options)
        if mask is not None:
            added = added * mask
        return x.index_add(0, index, (added * weight).to(x.dtype))

    def _references(self, tokens: Tensor, rows: list[int], batch: int) -> Tensor:
        """(references, l, c) -> (rows, l', c): all references in one row of tokens, or the row's own."""
        if self.plan.pairing == "per latent":
            return tokens[[(row % batch) % tokens.shape[0] for row in rows]]
        return tokens.flatten(0, 1)[None].expand(len(rows), -1, -1)
