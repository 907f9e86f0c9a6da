"""CustAny's local path inside the host: attention to the subject's patch tokens after each block's self-attention.

x = x + SA(x); x = x + strength * mask * LOCAL(x, tokens); x = x + CA(x, text). The host's list slot `middle_patch` sits at
exactly this place, stacks with any number of patches and leaves the text attention to other packs.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .row_masks import check_batch, latents_of, row_masks
from .stamps import KEY, Level, RowStamps, check_rows


class Timing(NamedTuple):
    """When a patch acts: shares of the sampling, as core's start_percent and end_percent, times a curve over the steps."""
    start: float = 0.0
    end: float = 1.0
    curve: Any = None

    def factor(self, sigma: float, schedule: Tensor | None, level: Level) -> float:
        """Strength at this sigma; the curve's x is the share of steps that are done. level: of the model that runs, since a
        node behind the injector may have given it other noise."""
        if self.start > 0 and sigma > level(self.start) or self.end < 1 and sigma < level(self.end):
            return 0.0
        if self.curve is None:
            return 1.0
        return float(self.curve.interp(progress(sigma, schedule)))


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
    store: Any                                        # patcher of the Store with its keys and values
    pairing: str
    strength: tuple[tuple[str, float], ...]           # layer key -> factor
    timing: Timing
    mask: Tensor | None = None                        # (b, h, w) over the whole picture
    guidance: str | None = None                       # name of the guidance whose masks limit the subject


class LocalInjection:
    """The patch object in the `middle_patch` list; built anew for each apply, never changed."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._strength = dict(plan.strength)

    @property
    def ids(self) -> set[int]:
        """Stamps that this patch acts on."""
        return {self.plan.number}

    def models(self) -> list[Any]:
        """Patchers that the host loads together with the diffusion model."""
        return [self.plan.patcher, self.plan.store]

    def __call__(self, x: Tensor, extra_options: dict[str, Any]) -> Tensor:
        stamps: RowStamps | None = extra_options.get(KEY)
        block = extra_options.get("block")
        if stamps is None or block is None:
            return x
        key = f"{block[0]}.{block[1]}.{extra_options.get('block_index', 0)}"
        weight = self._strength.get(key, 0.0)
        if weight == 0.0:
            return x
        counts = [ids.count(self.plan.number) for ids in stamps.ids]
        if not any(counts):
            return x
        check_rows(stamps, x.shape[0])
        weight *= self.plan.timing.factor(stamps.sigma, extra_options.get("sample_sigmas"), stamps.level)
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
        pair = self.plan.store.model.get(key)
        check_batch(self.plan.mask, pair.k.shape[0] if self.plan.pairing == "per latent" else 0, batch, extra_options)
        k, v = (self._references(t.to(x), rows, batch, extra_options) for t in (pair.k, pair.v))
        added = self.plan.patcher.model.local(key, x[index], k, v)
        mask = row_masks(self.plan.mask, self.plan.guidance, stamps, rows, batch, x, extra_options)
        if mask is not None:
            added = added * mask
        return x.index_add(0, index, (added * weight).to(x.dtype))

    def _references(self, tokens: Tensor, rows: list[int], batch: int, extra_options: dict[str, Any]) -> Tensor:
        """(references, l, c) -> (rows, l', c): all references in one row of tokens, or each row's own."""
        if self.plan.pairing == "per latent":
            return tokens[[latent % tokens.shape[0] for latent in latents_of(rows, batch, extra_options)]]
        return tokens.flatten(0, 1)[None].expand(len(rows), -1, -1)
