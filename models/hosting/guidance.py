"""The live mask of a word: a guidance pass over the text alone before the model is asked, at the first steps of a run.

It hangs on CALC_COND_BATCH, which every guider and sampler goes through. All guided words of a run share one pass a step
and latent; the state of a run is an object in that run's own options.
"""
from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import comfy.patcher_extension
import torch
from torch import Tensor

from ..common.records import Guidance, Word
from .adapters import picture_hash
from .blocks import attention_blocks
from .guidance_runs import RUNS, WordRun
from .injector import Timing
from .masks_of_run import Area, Made, composed, finished, fitted, shared
from .row_masks import GUIDANCE_KEY, check_batch, checked_mask, frames_of
from .stamps import KEY, CondStamp, Level, stamp_of
from .word_maps import ALL, CAPTURE, Capture, Sought, Target, add_capture, mark

LIST = "likeness_guides"  # among the MODEL's patches, where the host runs only lists that it knows
RUN = "likeness_run"
NORMS = ("max_norm", "min_max_norm", "min_max_per_channel")
KEEPS = ("top share", "threshold")


class Guide(NamedTuple):
    """One injection under a guidance: whose rows wait for the mask, and when."""
    guidance: Guidance
    numbers: tuple[int, ...]
    timing: Timing
    layers: tuple[str, ...]  # all text attentions of the MODEL


def make_guidance(word: Word, scope: float, norm: str, keep: str, binary: bool, refresh: int, mask: Tensor | None = None,
                  replace: bool = False, share: bool = False, early: bool = False, layers: str = ALL) -> Guidance:
    """GUIDANCE of a word. Raises LikenessError for an empty mask."""
    if mask is not None:
        mask = checked_mask(mask)
    strategy = (norm, *(("threshold",) if keep == KEEPS[1] else ()), *(("binary",) if binary else ()))
    word = word._replace(clip=None, tokens=None)  # a MODEL holds its guidance, and must not hold the text encoder with it
    fields = (scope, strategy, refresh, replace and mask is not None, share, early, layers)
    label = repr((word.prompt_hash, word.text, word.columns, picture_hash(mask), fields))
    return Guidance(hashlib.sha256(label.encode()).hexdigest()[:16], word, scope, strategy, refresh, mask, *fields[3:])


class State:
    """The masks of a run (of one window of a video). alone: before overlaps are shared; masks: of the words that act, sharing
    among themselves; x, sigma: what they are for."""

    def __init__(self) -> None:
        self.alone: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.active: set[str] = set()
        self.x: Tensor | None = None
        self.sigma = -1.0

    def is_for(self, x: Tensor, sigma: float) -> bool:
        """Whether the masks were made for this very latent."""
        return self.sigma == sigma and self.x is not None and self.x.shape == x.shape and torch.equal(self.x, x)


class Run:
    """One sampling: its prompts that hold guided words, its masks, and those of every step for the preview."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.states: dict[Any, State] = {}
        self.steps: dict[str, dict[int, Tensor]] = {}
        self.texts: dict[str, str] = {}
        self.length = 0  # steps of the sampling

    def note(self, guides: list[Guidance], masks: dict[str, Tensor], step: int, at_level: bool,
             frames: tuple[int, ...] = ()) -> None:
        """Keeps a step's masks; an evaluation between two levels does not take the place of one at a level. frames: which of the
        latents they are for, where a call sees a window of a video."""
        for guidance in guides:
            if guidance.name in masks:
                steps = self.steps.setdefault(guidance.name, {})
                self.texts[guidance.name] = guidance.word.text
                if frames and len(frames) == masks[guidance.name].shape[0]:
                    steps[step] = _laid_in(steps.get(step), masks[guidance.name], frames)
                elif at_level or step not in steps:
                    steps[step] = masks[guidance.name]

    def held(self, sigma: float | None = None) -> set[str]:
        """The guidances whose word stands in a prompt, in one that acts at this noise where sigma is given (prompt editing)."""
        return {name for entry in self.entries if (stamp := stamp_of(entry)) is not None and (sigma is None or acts(entry, sigma))
                for name, _ in stamp.guides}

    def nowhere(self, names: set[str], x: Tensor) -> dict[str, Tensor]:
        """The mask of words whose prompts all rest: their negative rows wait for one too."""
        return {name: x.new_zeros(x.shape[0], 1, *x.shape[-2:]) for name in names & self.held()}

    def words(self) -> dict[str, WordRun]:
        """What the recorder keeps."""
        return {name: WordRun(self.texts[name], tuple((step, mask.cpu()) for step, mask in sorted(steps.items())), self.length)
                for name, steps in self.steps.items()}


def _laid_in(known: Tensor | None, mask: Tensor, frames: tuple[int, ...]) -> Tensor:
    """Masks (b, 1, h, w) of some frames among those of the frames that earlier windows saw."""
    count = max(*frames, -1 if known is None else known.shape[0] - 1) + 1
    whole = mask.new_zeros(count, *mask.shape[1:])
    if known is not None:
        whole[:known.shape[0]] = known
    whole[list(frames)] = mask
    return whole


def step_of(sigma: float, schedule: Tensor | None) -> tuple[int, bool]:
    """Which step an evaluation belongs to, the last whose level is not below it, and whether it is at that level.

    Samplers that ask several times a step do not count faster."""
    levels = [] if schedule is None else schedule[:-1].tolist()
    step = max(0, sum(level >= sigma * (1 - 1e-4) for level in levels) - 1)
    return step, not levels or abs(levels[step] - sigma) <= 1e-4 * sigma


def acts(entry: dict[str, Any], sigma: float) -> bool:
    """Whether the host runs a prompt at this noise."""
    return entry.get("timestep_end", sigma) <= sigma <= entry.get("timestep_start", sigma)


def _guide(executor, model, conds, x_in, timestep, model_options):
    """CALC_COND_BATCH: makes the masks that the rows of this call wait for, or hands on those that are there."""
    options = model_options.get("transformer_options", {})
    run, guides = options.get(RUN), options.get("patches", {}).get(LIST, [])
    if run is None or CAPTURE in options:
        return executor(model, conds, x_in, timestep, model_options)
    sigma, schedule, level = float(timestep.max()), options.get("sample_sigmas"), Level(model)
    stamps = [stamp for entries in conds for entry in entries or () if (stamp := stamp_of(entry)) is not None]
    ids = {number for stamp in stamps for number in stamp.cond[0].tolist() if number}
    timely = [guide for guide in guides if guide.timing.factor(sigma, schedule, level)]
    acting = [guide for guide in timely if ids & set(guide.numbers)]
    if not acting:
        return executor(model, conds, x_in, timestep, model_options)
    state = run.states.setdefault(_window(options), State())
    names = {guide.guidance.name for guide in acting}
    resting = run.held() - run.held(sigma)
    # At the noise of its step a call without the subject's own prompt (SAG's second look at the negative) takes the step's masks.
    holds_word = any(stamp.guides for stamp in stamps)
    if not names - resting <= state.masks.keys() or state.sigma != sigma or holds_word and not state.is_for(x_in, sigma):
        awake = [guide for guide in timely if guide.guidance.name not in resting]
        _renew(executor, model, x_in, timestep, model_options, run, state, awake)
    masks = {**options.get(GUIDANCE_KEY, {}), **run.nowhere(names - state.masks.keys(), x_in), **state.masks}
    options = {**options, GUIDANCE_KEY: masks}
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})


def _window(options: dict[str, Any]) -> Any:
    """A name of the part of a video that a call sees; None for pictures."""
    window = options.get("context_window")
    if window is None:
        return None
    return getattr(window, "dim", 0), getattr(window, "causal_anchor_index", None), *getattr(window, "index_list", ())


def _seen(entry: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A prompt as this call sees it: in a window of a batch, what has a row or a mask for each of its latents is cut to those of
    the window, as the host does with the prompts that it runs."""
    frames = frames_of(options)
    if not frames:
        return entry
    total = getattr(options["context_window"], "total_frames", 0)

    def cut(t: Tensor) -> Tensor:
        return t[list(frames)] if t.shape[0] == total else t
    conds = {name: one._copy_with(cut(one.cond)) if name != KEY and isinstance(getattr(one, "cond", None), Tensor) else one
             for name, one in entry["model_conds"].items()}
    return {**entry, "model_conds": conds, **({"mask": cut(entry["mask"])} if "mask" in entry else {})}


def _renew(executor: Any, model: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], run: Run, state: State,
           guides: list[Guide]) -> None:
    """New masks for all words that are due at this step, in one pass; the others keep theirs, but share with those that act.

    guides: those that act now."""
    options = model_options["transformer_options"]
    sigma, schedule = float(timestep.max()), options.get("sample_sigmas")
    step, at_level = step_of(sigma, schedule)
    frames = frames_of(options)
    active = {guide.guidance.name: guide.guidance for guide in guides}
    due = {name: one for name, one in active.items() if step < one.refresh or name not in state.alone}
    state.x, state.sigma = x.clone(), sigma
    if not due and state.active == active.keys():
        return
    asked = {name: one for name, one in due.items() if not one.replace}
    made = _pass(executor, model, x, timestep, model_options, run, asked, guides[0].layers) if asked else {}
    latent = (x.shape[-2], x.shape[-1])
    for name, one in due.items():
        check_batch(one.mask, 0, x.shape[0], options, "Guidance Mask Generator")
        own = one.mask if one.mask is None or not frames else one.mask[[frame % one.mask.shape[0] for frame in frames]]
        if one.replace and own is not None:
            state.alone[name] = fitted(own, latent).to(x.device)
        elif name in made:
            state.alone[name] = composed(made[name], latent, own)
    # a word whose injector rests takes no part of a place from those that act
    masks = shared({name: mask for name, mask in state.alone.items() if name in active},
                   {name for name, one in active.items() if one.share})
    changed = [one for name, one in active.items()
               if name in due or name in masks and not torch.equal(masks[name], state.masks.get(name, masks[name].new_empty(0)))]
    state.masks, state.active = masks, set(active)
    run.note(changed, masks, step, at_level, frames or ())


def _pass(executor: Any, model: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], run: Run,
          asked: dict[str, Guidance], layers: tuple[str, ...]) -> dict[str, list[Made]]:
    """One guidance pass over the text alone: {name: masks of every prompt that holds the word}."""
    targets: list[Target] = []
    entries: list[dict[str, Any]] = []
    options = model_options["transformer_options"]
    for entry in (_seen(one, options) for one in run.entries):
        stamp = stamp_of(entry)
        words = () if stamp is None else tuple(Sought(name, columns, asked[name].strategy, asked[name].layers)
                                               for name, columns in stamp.guides if name in asked)
        if stamp is None or not words:
            continue
        row = CondStamp(torch.zeros_like(stamp.cond).index_fill(1, torch.tensor([0]), mark(len(targets))))
        targets.append(Target(entry["model_conds"]["c_crossattn"].cond.shape[1], words))
        entries.append({**entry, "model_conds": {**entry["model_conds"], KEY: row}})
    if not targets:
        return {}
    capture = Capture(targets, layers, any(one.early for one in asked.values()))
    options = {**options, CAPTURE: capture}
    # all in one list: to patches of other packs they are one kind of prompt; the host leaves out what rests at this noise
    executor(model, [entries], x, timestep, {**model_options, "transformer_options": options})
    latent = (x.shape[-2], x.shape[-1])
    out: dict[str, list[Made]] = {}
    for (number, name), total in capture.sums.items():
        area: Area | None = capture.areas[number]
        out.setdefault(name, []).append(finished(total, asked[name], area, entries[number].get("mask"), latent))
    return out


def _note_prompts(executor, guider, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE: which of the guider's prompts hold guided words; an entry that stands in several slots once."""
    run = extra_args["model_options"].get("transformer_options", {}).get(RUN)
    if run is not None:
        found = {}
        for entries in guider.conds.values():
            for entry in entries or ():
                stamp = stamp_of(entry)
                if stamp is not None and stamp.guides:
                    # all that the pass hangs on; slots share control and hooks, but each has a copy of the mask
                    times = entry.get("timestep_start"), entry.get("timestep_end")
                    place = tuple(entry.get("area") or ()), picture_hash(entry.get("mask"))
                    asks = id(stamp), id(entry.get("cross_attn")), id(entry.get("control")), id(entry.get("hooks"))
                    found[asks, place, times] = entry
        run.entries, run.length = list(found.values()), len(sigmas) - 1
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _run(executor, *args, **kwargs):
    """OUTER_SAMPLE: a new run before, its masks to the recorder after it. Of a run that was cancelled nothing stays."""
    options = executor.class_obj.model_options.setdefault("transformer_options", {})  # the guider's copy for this run
    options[RUN] = run = Run()
    try:
        latent = executor(*args, **kwargs)
    finally:
        options.pop(RUN, None)
    words = run.words()
    if words:
        RUNS.keep(latent, words)
    return latent


def add_guidance(model: Any, guidance: Guidance, numbers: tuple[int, ...], timing: Timing) -> None:
    """Into a cloned MODEL that has the readers of stamps: rows stamped with `numbers` wait for this guidance."""
    guide = Guide(guidance, numbers, timing, tuple(attention_blocks(model)))
    have = model.model_options["transformer_options"].get("patches", {}).get(LIST, [])
    if all((other.guidance.name, other.numbers) != (guidance.name, numbers) for other in have):
        model.set_model_patch(guide, LIST)
    add_capture(model)
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.OUTER_SAMPLE, _run), (kinds.SAMPLER_SAMPLE, _note_prompts), (kinds.CALC_COND_BATCH, _guide)):
        if wrapper not in model.get_wrappers(kind, LIST):
            model.add_wrapper_with_key(kind, LIST, wrapper)
