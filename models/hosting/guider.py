"""A guider with three kinds of branches: identities, the same prompt without an identity, and the negative.

With row stamps one MODEL serves all branches in one batched call. A `free_model` is only for patches of other packs that cannot
tell whose row they see: its patches are used for the free branch, in a call of its own.
"""
from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..inversion.masks import fit_mask
from .guidance import LIST, RUN, Guide
from .image_attention import ImageInjection
from .injector import LocalInjection
from .stamps import KEY, numbers, stamped, without

OWN = (LocalInjection, ImageInjection, Guide)  # the pack's patches, which look at stamps and not at slots
FIRST, FREE, NEGATIVE = "positive", "free", "negative"
Conditioning = list[list[Any]]


Call = tuple[list[str], dict[str, Any], list[Any]]  # slots, model options, conds


class Identity(NamedTuple):
    """One forward flow: conditioning slot, weight, where it acts (b, h, w), and what it weighs at a batch's first picture.

    first: None, or the weight at the first picture of a batch; the pictures between go evenly to `weight` at the last one.
    """
    slot: str
    weight: float = 1.0
    mask: Tensor | None = None
    first: float | None = None

    def weights(self, batch: int) -> list[float]:
        """One weight a picture of the batch."""
        if self.first is None or batch == 1:
            return [self.weight] * batch
        return [self.first + (self.weight - self.first) * k / (batch - 1) for k in range(batch)]


class EnhancerGuider(comfy.samplers.CFGGuider):
    """d_free + lamF * sum_j w_j M_j (d_id_j - d_free), every d guided by the negative (CFG). Works under any stock sampler."""

    def __init__(self, model: Any, free_model: Any = None):
        super().__init__(model)
        if free_model is not None:
            _check_same(model, free_model)
        self.free_model = free_model
        self.free_options: dict[str, Any] | None = None
        self.identities: tuple[Identity, ...] = ()

    def set_flows(self, identities: list[tuple[Identity, Conditioning]], free: Conditioning, negative: Conditioning,
                  cfg: float) -> None:
        """Conditionings of all branches; stamps make room for one another so that all rows fit into one call."""
        for _, conditioning in identities:
            self._check_subject(conditioning)
        negative = [without(entry, waiting) for entry in negative] if (waiting := self._live()) else negative
        slots = {identity.slot: conditioning for identity, conditioning in identities} | {FREE: free, NEGATIVE: negative}
        if any(KEY in entry[1].get("model_conds", {}) for entries in slots.values() for entry in entries):
            slots = {name: [stamped(entry, 0) for entry in entries] for name, entries in slots.items()}
        self.identities = tuple(identity for identity, _ in identities)
        self.inner_set_conds(slots)
        self.set_cfg(cfg)

    def with_identity(self, conditioning: Conditioning, weight: float, mask: Tensor | None, keep: float,
                      path: bool) -> EnhancerGuider:
        """A new guider with one more identity; the weights of the others are multiplied by `keep`."""
        self._check_subject(conditioning)
        other = copy.copy(self)
        slot = f"identity {len(self.identities) + 1}"
        new = [item._replace(weight=item.weight * keep, first=(item.weight if item.first is None else item.first) if path else
                             None if item.first is None else item.first * keep) for item in self.identities]
        other.identities = (*new, Identity(slot, weight, mask, 0.0 if path else None))
        other.original_conds = dict(self.original_conds)
        carries = any(KEY in entry.get("model_conds", {}) for entries in self.original_conds.values() for entry in entries)
        comes = any(KEY in entry[1].get("model_conds", {}) for entry in conditioning)
        if comes and not carries:
            for name, entries in self.original_conds.items():
                other.original_conds[name] = [stamped([None, entry], 0)[1] for entry in entries]
        other.inner_set_conds({slot: [stamped(entry, 0) for entry in conditioning] if carries or comes else conditioning})
        return other

    def _check_subject(self, conditioning: Conditioning) -> None:
        """LikenessError for a subject whose injector is not on this guider's model: its rows would stay plain without a word."""
        patches = self.model_options.get("transformer_options", {}).get("patches", {})
        here = {number for found in patches.values() for patch in found for number in getattr(patch, "ids", ())}
        if any(number not in here for entry in conditioning for number in numbers(entry[1])):
            raise LikenessError("The prompt carries a subject whose injector is not on the guider's model; chain the injectors "
                                "on one MODEL and connect that one to the CustomEnhancer Guider.")

    def _live(self) -> set[int]:
        """The rows that wait for a live mask. The free flow shares the negative: on the way up, through all the noise from below,
        and on the way down there would be other masks, and what was recorded would not be what is replayed."""
        guides = self.model_options.get("transformer_options", {}).get("patches", {}).get(LIST, [])
        return {number for guide in guides if not guide.guidance.replace for number in guide.numbers}

    def outer_sample(self, *args, **kwargs):
        # the free model's patches need the device as well; the guider's own are moved by the host
        if self.free_model is None:
            return super().outer_sample(*args, **kwargs)
        options = comfy.model_patcher.create_model_options_clone(self.free_model.model_options)
        # the host does this for the guider's own model only; without it the free calls would miss the readers of stamps
        for kind in ("wrappers", "callbacks"):
            comfy.patcher_extension.merge_nested_dicts(options.setdefault("transformer_options", {}).setdefault(kind, {}),
                                                       getattr(self.free_model, kind), copy_dict1=False)
        self.free_options = options
        try:
            comfy.samplers.cast_to_load_options({"to_load_options": options.get("transformer_options", {})},
                                                device=self.model_patcher.load_device, dtype=self.model_patcher.model_dtype())
            return super().outer_sample(*args, **kwargs)
        finally:
            comfy.samplers.cast_to_load_options({"to_load_options": options.get("transformer_options", {})},
                                                device=self.model_patcher.offload_device)
            self.free_options = None

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None,
                      seed: int | None = None) -> Tensor:
        return self.mixed(x, timestep, 1.0, model_options or {})

    def mixed(self, x: Tensor, sigma: Tensor, forward: float, model_options: dict[str, Any], difference: Tensor | None = None,
              null: Tensor | None = None) -> Tensor:
        """Denoised of the free flow plus `forward` times what the identities change; only branches that count are evaluated.

        difference: mask (b, 1, h, w) on the change. null: another negative text (b, tokens, width) for this step.
        """
        rows = [(item, [forward * weight for weight in item.weights(x.shape[0])]) for item in self.identities]
        rows = [(item, weights) for item, weights in rows if any(weights)]
        if not rows:
            return self.denoised(x, sigma, [FREE], model_options, null)[FREE]
        everywhere = difference is None and all(item.mask is None for item, _ in rows)
        sums = [sum(weights[k] for _, weights in rows) for k in range(x.shape[0])]
        whole = everywhere and all(math.isclose(total, 1.0, abs_tol=1e-6) for total in sums)
        slots = [item.slot for item, _ in rows] + ([] if whole else [FREE])
        branches = self.denoised(x, sigma, slots, model_options, null)
        if whole and len(rows) == 1:
            return branches[rows[0][0].slot]
        free = torch.zeros((), device=x.device) if whole else branches[FREE]
        out = free
        for item, weights in rows:
            share = x.new_tensor(weights).view(-1, *[1] * (x.ndim - 1))
            if item.mask is not None:
                share = share * fit_mask(item.mask, tuple(x.shape)).to(x)
            if difference is not None:
                share = share * difference
            out = out + share * (branches[item.slot] - free)
        return out

    def denoised(self, x: Tensor, sigma: Tensor, slots: list[str], model_options: dict[str, Any],
                 null: Tensor | None = None) -> dict[str, Tensor]:
        """Guided denoised of some branches, in one call of the network where that is right."""
        negative = self.negative(null)
        needed = not math.isclose(self.cfg, 1.0) or model_options.get("disable_cfg1_optimization", False)
        out: dict[str, Tensor] = {}
        for group, options, conds in self._calls(slots, negative if needed else None, model_options):
            results = self._run(conds, x, sigma, options)
            if len(results) > len(group):
                uncond, shared = results[-1], conds[-1]
            for slot, result, cond in zip(group, results, conds[:len(group)], strict=False):
                out[slot] = self.guided(x, sigma, cond, shared, result, uncond, options)
        return out

    def _run(self, conds: list[Any], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> list[Tensor]:
        replaced = options.get("sampler_calc_cond_batch_function")
        if replaced is not None:
            return replaced({"conds": conds, "input": x, "sigma": sigma, "model": self.inner_model, "model_options": options})
        return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, sigma, options)

    def free_call_options(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """Model options of a call for the free branch."""
        return self._calls([FREE], None, model_options)[0][1]

    def _calls(self, slots: list[str], negative: Any, model_options: dict[str, Any]) -> list[Call]:
        """(slots, options, conds) of each call; the negative comes last, alone at index 1 where others count slots."""
        free_options = model_options if self.free_options is None else {
            **self.free_options, "transformer_options": {
                **self.free_options.get("transformer_options", {}),
                **{key: value for key, value in model_options.get("transformer_options", {}).items()
                   if key in ("sample_sigmas", RUN)}}}
        own = self.free_options is not None or "sampler_calc_cond_batch_function" in model_options
        if own:  # other weights of the negative too: every branch has its own
            return [([slot], free_options if slot == FREE else model_options, [self.conds[slot], negative]) for slot in slots]
        if counts_slots(model_options):
            return [([slot], model_options, [self.conds[slot], *([negative] if n == 0 else [])]) for n, slot in enumerate(slots)]
        return [(slots, model_options, [*(self.conds[slot] for slot in slots), negative])]

    def guided(self, x: Tensor, sigma: Tensor, cond: Any, negative: Any, result: Tensor, uncond: Tensor,
               options: dict[str, Any]) -> Tensor:
        """CFG of one branch with the functions that other nodes have put before, into and after it."""
        pair = [result, uncond]
        for function in options.get("sampler_pre_cfg_function", []):
            pair = function({"conds": [cond, negative], "conds_out": pair, "cond_scale": self.cfg, "timestep": sigma, "input": x,
                             "sigma": sigma, "model": self.inner_model, "model_options": options})
        return comfy.samplers.cfg_function(self.inner_model, pair[0], pair[1], self.cfg, x, sigma, model_options=options,
                                           cond=cond, uncond=negative)

    def negative(self, null: Tensor | None = None) -> Any:
        """The negative's processed entries, with another text if one is given."""
        entries = self.conds.get(NEGATIVE)
        if null is None or entries is None:
            return entries
        text = comfy.conds.CONDCrossAttn(null)
        return [{**entry, "model_conds": {**entry["model_conds"], "c_crossattn": text}} for entry in entries]


def counts_slots(model_options: dict[str, Any]) -> bool:
    """Whether attention patches of other packs stand in the model; many index a pair by the number of the slot."""
    options = model_options.get("transformer_options", {})
    if any(options.get("patches_replace", {}).values()):
        return True
    return any(not isinstance(patch, OWN) for patches in options.get("patches", {}).values() for patch in patches)


def _check_same(model: Any, free_model: Any) -> None:
    """LikenessError unless both are one checkpoint with the same weight patches, so that one loaded model serves both."""
    if not model.is_clone(free_model):
        raise LikenessError("free_model is another checkpoint than model; connect the same one without the other pack's patches.")
    if not model.clone_has_same_weights(free_model):
        raise LikenessError("free_model has other LoRAs than model, and one sampling can hold only one set of weights; put the "
                            "LoRA on both, or attach it to the identity prompt as a hook.")


def mixes(guider: Any) -> bool:
    """Whether a guider puts its branches together in a way of its own, as core's DualCFGGuider does."""
    own = type(guider).predict_noise in (comfy.samplers.CFGGuider.predict_noise, EnhancerGuider.predict_noise)
    return not own or not {FIRST, FREE} & guider.original_conds.keys()


def enhancer_of(guider: Any) -> EnhancerGuider | None:
    """A private copy as an EnhancerGuider: also of core's CFG and basic guiders, whose prompt is then the free one too.

    None for guiders that put their branches together in a way of their own.
    """
    if isinstance(guider, EnhancerGuider):
        return copy.copy(guider)
    if mixes(guider):
        return None
    own = EnhancerGuider(guider.model_patcher)
    own.model_options = guider.model_options
    own.identities = (Identity(FIRST),)
    own.original_conds = {**guider.original_conds, FREE: guider.original_conds[FIRST]}
    own.cfg = guider.cfg
    return own


def rescale(sampling: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x written at one level so that the network, which divides by the label's own factor, sees the same input at another.

    sqrt((1 + s'^2) / (1 + s^2)) for eps and v models, 1 for flow models.
    """
    one = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    factor = sampling.calculate_input(low.view(1), one) / sampling.calculate_input(high.view(1), one)
    return x * factor.to(x).view(-1)
