"""RealCustom++ inside the host: image attention beside the text attention of a layer, before its `to_out`.

out = to_out(softmax(q k_t / sqrt(d)) v_t + sum_r M_r softmax(q k_r / sqrt(d)) v_r). The queries are the text attention's
own, so it has to happen in the host's slot for a replaced text attention, which holds one object a layer. Injections
wait in a list of their own, and an APPLY_MODEL wrapper lays them round whatever stands in the slots when the model runs:
nodes before and after ours keep their places, in either order.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import comfy.patcher_extension
import torch
from torch import Tensor

from .injector import Timing
from .realcustom import Projected
from .row_masks import check_batch, latents_of, row_masks
from .slots import Slot, laid_round, text_attention
from .stamps import KEY, RowStamps, check_rows

LIST = "likeness_image"  # among the MODEL's patches; the host asks all lists there for models(), and runs only its own


class ImagePlan(NamedTuple):
    """All that one injection knows; nothing here changes after the node has run."""
    number: int                              # the id in the stamps of rows with the subject
    black: int                               # the id in the stamps of negative rows
    subject: Any                             # patcher of the subject's Store, or Projected
    nothing: Any                             # the same of the black picture
    pairing: str
    strength: tuple[tuple[str, float], ...]  # layer key -> factor
    timing: Timing
    mask: Tensor | None = None               # (b, h, w) over the whole picture
    guidance: str | None = None              # name of the guidance whose masks limit the subject


class ImageInjection:
    """The object in the MODEL's list; built anew for each apply, never changed."""

    def __init__(self, plan: ImagePlan):
        self.plan = plan
        self.strength = dict(plan.strength)

    @property
    def ids(self) -> set[int]:
        """Stamps that this patch acts on."""
        return {self.plan.number, self.plan.black}

    def models(self) -> list[Any]:
        """Patchers that the host loads together with the diffusion model."""
        return [store for store in (self.plan.subject, self.plan.nothing) if not isinstance(store, Projected)]

    def add(self, out: Tensor, q: Tensor, key: str, extra_options: dict[str, Any]) -> Tensor:
        """Text attention `out` and its queries q, both (b, t, c) -> out with the subject in the rows that carry it."""
        stamps: RowStamps | None = extra_options.get(KEY)
        weight = self.strength.get(key, 0.0)
        if stamps is None or weight == 0.0:
            return out
        groups = [(store, [ids.count(number) for ids in stamps.ids])
                  for number, store in ((self.plan.number, self.plan.subject), (self.plan.black, self.plan.nothing))]
        if not any(any(counts) for _, counts in groups):
            return out
        check_rows(stamps, q.shape[0])
        weight *= self.plan.timing.factor(stamps.sigma, extra_options.get("sample_sigmas"), stamps.level)
        if weight == 0.0:
            return out
        for store, counts in groups:
            for turn in range(max(counts)):
                rows = [row for row, count in enumerate(counts) if count > turn]
                out = self._add(out, q, store.model.get(key), weight, rows, stamps, extra_options)
        return out

    def _add(self, out: Tensor, q: Tensor, pair: Any, weight: float, rows: list[int], stamps: RowStamps,
             extra_options: dict[str, Any]) -> Tensor:
        index = torch.tensor(rows, device=q.device)
        batch = q.shape[0] // max(1, len(extra_options.get("cond_or_uncond", [0])))
        check_batch(self.plan.mask, pair.k.shape[0] if self.plan.pairing == "per latent" else 0, batch, extra_options)
        if pair.k.shape[0] == 1 and not torch.is_grad_enabled():  # under a gradient (null-text) inference tensors must be copied
            k, v = (t.to(q).expand(len(rows), -1, -1) for t in (pair.k, pair.v))
        else:
            picked = [latent % pair.k.shape[0] for latent in latents_of(rows, batch, extra_options)]
            k, v = (t.to(q)[picked] for t in (pair.k, pair.v))
        added = text_attention(None, q[index], k, v, extra_options)  # the host's own, with an artist's override of it
        share = row_masks(self.plan.mask, self.plan.guidance, stamps, rows, batch, q, extra_options)
        if share is not None:
            added = added * share
        return out.index_add(0, index, (added * weight).to(out.dtype))


class Layer:
    """What stands in one layer's slot during one call of the model."""

    def __init__(self, key: str, injections: list[ImageInjection], before: Slot | None):
        self.key, self.injections, self.before = key, injections, before

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        out = text_attention(self.before, q, k, v, extra_options)
        for injection in self.injections:
            out = injection.add(out, q, self.key, extra_options)
        return out


def _lay_round(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """APPLY_MODEL: our layers into the slots of this call's own options."""
    options = dict(transformer_options or {})
    injections = options.get("patches", {}).get(LIST, [])
    keys = {key: None for injection in injections for key in injection.strength}
    options = laid_round(options, keys, lambda key, before: Layer(key, injections, before))
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def add_image_injection(model: Any, plan: ImagePlan) -> None:
    """Into a cloned MODEL; once for a subject that comes over two branches of prompts that meet again."""
    have = model.model_options["transformer_options"].get("patches", {}).get(LIST, [])
    if all(injection.plan.number != plan.number for injection in have):
        model.set_model_patch(ImageInjection(plan), LIST)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    if _lay_round not in model.get_wrappers(kind, LIST):
        model.add_wrapper_with_key(kind, LIST, _lay_round)

