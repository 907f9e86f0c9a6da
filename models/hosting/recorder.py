"""ResInversion: records a picture's way to noise and, for every step back, what plain sampling would miss.

All runs inside one sampling of the host: one load of the model, previews, cancel. Anchors and residuals wait outside of the
sampling device, one level at a time comes to it.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..inversion.anchors import climb
from ..inversion.levels import ascending, truncated
from ..inversion.records import Inversion
from ..inversion.steps import euler, residual
from .fingerprint import free_hash, guided, model_hash
from .guidance import LIST as GUIDES
from .guider import FREE, NEGATIVE, EnhancerGuider, counts_slots, enhancer_of, rescale
from .image_attention import LIST as IMAGES
from .memory import stop_if_asked, to_intermediate
from .stamps import KEY
from .word_maps import CAPTURE

MAX_CHUNK = 16
OWN_KEYS = (KEY, IMAGES, GUIDES, CAPTURE)  # of the pack's wrappers
FULL_CARD = 128 * 128  # latent cells in one call above which a batch of levels gains nothing
STEP_CACHES = (("easycache", "EasyCache"), ("lazycache", "LazyCache"))
TIED = ("timestep_start", "timestep_end", "control", "hooks", "area", "mask")  # conditioning that looks at one sigma or one place


class Settings(NamedTuple):
    """estimate and refine: see `climb`. start: manipulation start. closed: sequential recording that replays bit for bit.

    residuals: False records the plain DDIM inversion. chunk: levels in one call, 0 = as many as are right and fit.
    """
    estimate: str = "source"
    refine: int = 0
    start: int = 0
    closed: bool = False
    chunk: int = 0
    residuals: bool = True


class Branches:
    """What a recording asks of a guider, counted: one branch without guidance, and the guided free flow."""

    def __init__(self, guider: Any, model_options: dict[str, Any], seed: int | None, batch: int):
        self.guider, self.options, self.seed, self.batch = guider, model_options, seed, batch
        self.own = isinstance(guider, EnhancerGuider)
        free = self.own and guider.free_options is not None
        self.free_options = guider._calls([FREE], None, model_options)[0][1] if free else model_options
        self.guides = self.own and guided(guider)
        self.evaluations = self.calls = 0
        if not self.own:
            self.options = comfy.model_patcher.create_model_options_clone(model_options)
            comfy.patcher_extension.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "likeness_count",
                                                         self._look, self.options, is_model_options=True)

    def count(self, branches: int, levels: int = 1) -> None:
        self.evaluations += branches * levels
        self.calls += 1

    def _look(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """APPLY_MODEL: counts what a guider of its own kind asks the network, in rows of one picture."""
        self.count(x.shape[0] // self.batch or 1)
        return executor(x, *args, **kwargs)

    def conditional(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoised of the free prompt alone (of the whole guider where it mixes in its own way)."""
        stop_if_asked()
        if not self.own:
            return self.guider(x, sigma.expand(x.shape[0]), model_options=self.options, seed=self.seed)
        self.count(1)
        return self.guider._run([self.guider.conds[FREE], None], x, sigma.expand(x.shape[0]), self.free_options)[0]

    def guided(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoised of the free flow, as a replay asks for it."""
        stop_if_asked()
        if not self.own:
            return self.guider(x, sigma.expand(x.shape[0]), model_options=self.options, seed=self.seed)
        self.count(2 if self.guides else 1)
        return self.guider.denoised(x, sigma.expand(x.shape[0]), [FREE], self.options)[FREE]

    def pair(self, x: Tensor, sigma: Tensor, levels: int, known: bool) -> tuple[Tensor | None, Tensor]:
        """(conditional or None where it is known, unconditional) of several levels in one call; sigma is a number a row."""
        stop_if_asked()
        guider = self.guider
        self.count((0 if known else 1) + (1 if self.guides else 0), levels)
        negative = guider.negative() if self.guides else None
        if known:
            return None, guider._run([None, negative], x, sigma, self.free_options)[1]
        cond, uncond = guider._run([guider.conds[FREE], negative], x, sigma, self.free_options)
        return cond, uncond

    def combine(self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        """Guidance over predictions that were made before."""
        guider = self.guider
        return guider.guided(x, sigma.expand(x.shape[0]), guider.conds[FREE], guider.negative() if self.guides else None, cond,
                             uncond, self.free_options)


class Recorder(comfy.samplers.Sampler):
    """A sampler that walks upwards; the inversion lies in `result` afterwards."""

    def __init__(self, settings: Settings, levels: Tensor, steps: int):
        self.settings, self.levels, self.steps = settings, levels, steps
        self.result: dict[str, Any] = {}

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
               latent_image: Tensor, denoise_mask: Tensor | None = None, disable_pbar: bool = False) -> Tensor:
        branches = Branches(model_wrap, extra_args["model_options"], extra_args.get("seed"), latent_image.shape[0])
        x, settings = latent_image.float(), self.settings
        levels, sampling = self.levels.to(x.device), model_wrap.inner_model.model_sampling
        length = len(levels) - 1
        rows = 1 if not settings.residuals else 2
        progress = _Progress(callback, length * ((2 if settings.estimate == "midpoint" else 1) + settings.refine + rows - 1))
        reusable = settings.residuals and not settings.closed and not meets_others(branches)

        def denoise(there: Tensor, sigma: Tensor) -> Tensor:
            denoised = branches.conditional(there, sigma)
            progress(denoised, there)
            return denoised

        anchors, known = [to_intermediate(x).float()], {}
        for anchor in climb(x, levels, denoise, partial(rescale, sampling), settings.estimate, settings.refine):
            anchors.append(to_intermediate(anchor.x))
            if anchor.denoised is not None and reusable:
                known[anchor.level - 1] = to_intermediate(anchor.denoised)
        drift = None
        residuals: list[Tensor] = []
        if not settings.residuals:
            residuals = [torch.zeros_like(anchor) for anchor in anchors[1:]]
        elif settings.closed:
            anchors, residuals, drift = _closed_loop(anchors, levels, branches, x, progress)
        else:
            # subtracted where the anchors wait, so that no second level has to come to the sampling device
            home = levels.to(anchors[0].device)
            for i, denoised in _guided_levels(anchors, levels, known, branches, settings.chunk, x, progress):
                residuals.append(residual(anchors[i], anchors[i - 1], to_intermediate(denoised), home[i], home[i - 1]))
        self.result = {"anchors": torch.stack(anchors), "drift": drift,
                       "residuals": torch.stack(residuals) if residuals else anchors[0][None][:0],
                       "evaluations": branches.evaluations, "calls": branches.calls}
        return latent_image


class _Progress:
    """Steps of a recording as the host's callback wants them."""

    def __init__(self, callback: Any, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, denoised: Tensor, x: Tensor, count: int = 1) -> None:
        self.done = min(self.done + count, self.total)
        if self.callback is not None and self.total:
            self.callback(max(0, self.done - 1), denoised, x, self.total)


def _closed_loop(anchors: list[Tensor], levels: Tensor, branches: Branches, x: Tensor,
                 progress: _Progress) -> tuple[list[Tensor], list[Tensor], float]:
    """Residuals one after the other from where the replay itself will stand, so that its rounding is recorded too.

    The anchors become the points of that replay; x*_0 stays the picture. The drift is what the last rounding leaves.
    """
    out, found = list(anchors), {}
    here = anchors[-1].to(x.device)
    for i in range(len(levels) - 1, 0, -1):
        denoised = branches.guided(here, levels[i])
        plain = euler(here, denoised, levels[i], levels[i - 1])
        found[i] = anchors[i - 1].to(x.device) - plain
        here = plain + found[i]
        progress(denoised, here)
        found[i] = to_intermediate(found[i])
        if i > 1:
            out[i - 1] = to_intermediate(here)
    drift = float((here - x).abs().max()) if len(levels) > 1 else 0.0
    return out, [found[i] for i in range(1, len(levels))], drift


def _guided_levels(anchors: list[Tensor], levels: Tensor, known: dict[int, Tensor], branches: Branches, chunk: int, x: Tensor,
                   progress: _Progress) -> Iterator[tuple[int, Tensor]]:
    """(level, guided denoised at its anchor) for levels 1 to L; what the way up has evaluated is not evaluated again."""
    length = len(levels) - 1
    chunk = chunk_of(branches, chunk, x.shape)
    together = not branches.own or meets_others(branches)
    i = 1
    while i <= length:
        if i in known and not branches.guides:
            here = anchors[i].to(x.device)
            found = known.pop(i).to(x.device)
            progress(found, here)
            yield i, branches.combine(here, levels[i], found, torch.zeros_like(found)) if branches.own else found
            i += 1
            continue
        if together:
            here = anchors[i].to(x.device)
            denoised = branches.guided(here, levels[i])
            progress(denoised, here)
            del here
            yield i, denoised
            i += 1
            continue
        have = i in known
        stop = i
        while stop < length and stop + 1 - i < chunk and (stop + 1 in known) == have:
            stop += 1
        span = range(i, stop + 1)
        here = torch.cat([anchors[k] for k in span]).to(x.device)
        cond, uncond = branches.pair(here, levels[i:stop + 1].repeat_interleave(x.shape[0]), len(span), have)
        for n, k in enumerate(span):
            rows = slice(n * x.shape[0], (n + 1) * x.shape[0])
            mine = known.pop(k).to(x.device) if cond is None else cond[rows]
            denoised = branches.combine(here[rows], levels[k], mine, uncond[rows])
            progress(denoised, here[rows])
            del mine  # nothing that has been used stays on the device while the next levels go through the network
            yield k, denoised
        i = stop + 1
        del here


def chunk_of(branches: Branches, wanted: int, shape: tuple[int, ...]) -> int:
    """How many levels may go through the network in one call.

    1 for whatever looks at a single sigma: ranges, controls, hooks, areas, stamps, wrappers and patches of other packs.
    """
    if not branches.own:
        return 1
    guider = branches.guider
    entries = [entry for slot in (FREE, NEGATIVE) for entry in guider.conds.get(slot, ())]
    tied = any(entry.get(key) is not None for entry in entries for key in TIED)
    stamps = any(KEY in entry["model_conds"] and bool(entry["model_conds"][KEY].cond.any()) for entry in entries)
    if tied or stamps or meets_others(branches):
        return 1
    if wanted:
        return wanted
    cells = math.prod(shape[2:]) * shape[0]
    chunk = max(1, min(MAX_CHUNK, FULL_CARD // cells))
    free = management.get_free_memory(guider.model_patcher.load_device)
    while chunk > 1 and guider.inner_model.memory_required([2 * chunk * shape[0], *shape[1:]]) * 1.5 > free:
        chunk //= 2
    return chunk


def meets_others(branches: Branches) -> bool:
    """Whether wrappers, patches or functions of other packs act in a call.

    They may let one branch see the other, so branches that a replay asks for together are recorded together too.
    """
    if not branches.own:
        return False
    options = branches.options
    transformer = branches.free_options.get("transformer_options", {})
    wrapped = any(key not in OWN_KEYS for kind in transformer.get("wrappers", {}).values()
                  for key, found in kind.items() if found)
    replaced = "sampler_calc_cond_batch_function" in options or "model_function_wrapper" in branches.free_options
    return wrapped or replaced or counts_slots(branches.free_options)


def changes_steps(patcher: Any) -> str:
    """Name of what on a MODEL repeats an earlier step's answer, or changes a whole step's, behind a recording's back; "" for
    nothing."""
    keys = {key for kind in patcher.wrappers.values() for key, found in kind.items() if found}
    known = next((name for key, name in STEP_CACHES if key in keys), "")
    whole = any(patcher.wrappers.get(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, {}).values())
    return known or ("a node such as CFG Override" if whole else "")


def record(guider: Any, sigmas: Tensor, latent: Tensor, settings: Settings | None = None, callback: Any = None) -> Inversion:
    """The recorded inversion of a LATENT's samples (b, c, ...). The guider stays as it was. Raises LikenessError."""
    settings = settings or Settings()
    levels = ascending(sigmas)
    steps = len(levels) - 1
    kept = truncated(levels, settings.start)
    if getattr(latent, "is_nested", False):
        raise LikenessError("A latent of several parts (video with sound) cannot be inverted; invert the picture part alone.")
    skips = changes_steps(guider.model_patcher)
    if skips:
        raise LikenessError(f"{skips[0].upper()}{skips[1:]} on the model skips or changes whole steps, so the recording would "
                            "not hold what the model does; bypass it for the recording and the replay.")
    private = enhancer_of(guider)
    recorder = Recorder(settings, kept, steps)
    run = private if private is not None else copy.copy(guider)
    bar = None if callback is not None else comfy.utils.ProgressBar(1)

    def report(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if bar is not None:
            bar.update_absolute(step + 1, total)

    with torch.no_grad():
        # what a replay will get, so that patches which look at the whole schedule see the same one both times
        run.sample(torch.zeros_like(latent), latent, recorder, kept.flip(0), callback=callback or report, disable_pbar=True,
                   seed=0)
    found = recorder.result
    return Inversion(
        method="resinversion" if settings.residuals else "ddim", anchors=found["anchors"], residuals=found["residuals"],
        levels=kept, steps=steps, start=settings.start, cfg=float(run.cfg), estimate=settings.estimate, refine=settings.refine,
        closed=settings.closed, prediction=prediction_of(guider.model_patcher),
        latent_format=type(guider.model_patcher.model.latent_format).__name__, model_hash=model_hash(guider.model_patcher),
        conditioning_hash=free_hash(run),
        evaluations=found["evaluations"], calls=found["calls"],
        to_latent=_to_latent(guider.model_patcher.model, found["anchors"]), drift=found["drift"])


def _to_latent(model: Any, anchors: Tensor) -> Tensor:
    """(2, c) factor and shift of the host's way out of model space, which is straight in every channel."""
    zero = model.process_latent_out(torch.zeros_like(anchors[0, :1]).float())
    one = model.process_latent_out(torch.ones_like(anchors[0, :1]).float())
    channels = [(one - zero).flatten(2)[0, :, 0], zero.flatten(2)[0, :, 0]]
    return torch.stack(channels)


def prediction_of(patcher: Any) -> str:
    """The host's name for what the network predicts: EPS, V_PREDICTION, CONST (flow), ..."""
    kinds = type(patcher.get_model_object("model_sampling")).__mro__
    return next((kind.__name__ for kind in kinds if "calculate_denoised" in vars(kind)), "unknown")
