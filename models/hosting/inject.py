"""Dual-level injection: the subject into its word's vector (global) and into new attention layers (local)."""
from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.records import Guidance, LayerWeights, Subject, Word
from .adapters import Adapter, picture_hash, project, word_delta
from .base_weights import apply_base
from .blocks import check_fits
from .guidance import add_guidance
from .image_attention import ImagePlan, add_image_injection
from .injector import LocalInjection, Plan, Timing
from .prompt import HASH_KEY, TEXT_KEY, shift_of
from .realcustom import black_store, subject_store
from .row_masks import checked_mask
from .stamps import Guides, add_reader, stamped, without_rows

DROPPED_KEY = "likeness_dropped"
STORAGE = ("keys and values", "tokens only")  # what RealCustom++ keeps between the steps
Conditioning = list[list[Any]]
Dropped = tuple[tuple[int, int, int], ...]  # first row, rows, end of their window, in the prompt as it was


class Strengths(NamedTuple):
    """global_ and local: 0 = nothing, 1 = as trained; start and end: share of the sampling (0..1)."""
    global_: float
    local: float
    start: float = 0.0
    end: float = 1.0


class Injected(NamedTuple):
    model: Any
    positive: Conditioning
    negative: Conditioning
    report: str


def inject(model: Any, positive: Conditioning, negative: Conditioning, subject: Subject, word: Word, strengths: Strengths,
           mask: Tensor | None = None, guidance: Guidance | None = None, layers: LayerWeights = (), curve: Any = None,
           storage: str = STORAGE[0]) -> Injected:
    """New MODEL and conditionings with the subject; what came in is left as it was. Raises LikenessError."""
    adapter: Adapter = subject.adapter
    if adapter is None:
        raise LikenessError("This subject was loaded without its adapter; connect an ADAPTER to Load Subject.")
    check_fits(model, subject.base, subject.width, dict(adapter.config.layers))
    if word.raw is not None and word.raw.shape[-1] != subject.width:
        raise LikenessError(f"The word's text vectors have the width {word.raw.shape[-1]}, the adapter needs {subject.width}; "
                            "encode the prompt with the CLIP of the same checkpoint.")
    if mask is not None:
        mask = checked_mask(mask)
    unknown = [key for key, _ in layers if key not in dict(adapter.config.layers)]
    if unknown:
        raise LikenessError(f"The layer weights name {unknown[0]}, this adapter has the layers "
                            f"{', '.join(key for key, _ in adapter.config.layers)}; correct the list.")
    if not subject.pictures:
        return Injected(model, positive, negative, "the subject is empty: passed through, nothing injected")
    if not word.columns:
        return Injected(model, positive, negative, f"\"{word.text}\" is not in the prompt: passed through, nothing injected")
    if guidance is not None and not guidance.word.columns:
        return Injected(model, positive, negative, f"\"{guidance.word.text}\", the word of the guidance, is not in the prompt: "
                        "passed through, nothing injected")
    if not 0 <= strengths.start < strengths.end <= 1:
        raise LikenessError(f"The subject would act from {strengths.start:g} to {strengths.end:g} of the sampling; the start "
                            "must be smaller than the end.")
    factors = {key: strengths.local * dict(layers).get(key, 1.0) for key, _ in adapter.config.layers}
    factors = {key: factor for key, factor in factors.items() if factor != 0.0}
    shifts = matches(positive, word)
    guides = _guides(positive, guidance)
    lines = [f"method {subject.method}, adapter {adapter.name}"]

    number = black = 0
    if factors:
        model = model.clone()
        add_reader(model)
        number = _number(subject, word, strengths, factors, mask, guidance, curve)
        timing = Timing(strengths.start, strengths.end, curve)
        name = None if guidance is None else guidance.name
        if adapter.method == "realcustom":
            black = number ^ 1
            keep = storage == STORAGE[0]
            stores = subject_store(subject, list(factors), keep), black_store(subject, keep)
            add_image_injection(model, ImagePlan(number, black, *stores, subject.pairing, tuple(factors.items()), timing, mask,
                                                 name))
        elif number not in _numbers(model):
            # The same subject may come over two branches of prompts that meet again: one patch serves all its rows.
            model.set_model_patch(LocalInjection(Plan(number, adapter.patcher, project(subject, list(factors)), subject.pairing,
                                                      tuple(factors.items()), timing, mask, name)), "middle_patch")
        if guidance is not None:
            add_guidance(model, guidance, (number, black) if black else (number,), timing)
        local = subject.get("local")
        lines.append(f"local {strengths.local:g}: {len(factors)} layers, {local.shape[1]} tokens from "
                     f"{local.shape[0]} reference(s)"
                     + (", limited by a mask" if mask is not None else "")
                     + (f", limited to where \"{guidance.word.text}\" is drawn" if guidance is not None else ""))
        if adapter.method == "realcustom" and mask is None and guidance is None:
            lines.append("no mask and no guidance: the subject acts in the whole picture")
        if adapter.base_weights:
            lines.append(apply_base(model, adapter.base_weights))
    else:
        lines.append("local 0: off" + (", so the mask has no effect: it limits the local level only"
                                       if mask is not None or guidance is not None else ""))
    delta = None
    if adapter.method == "realcustom":
        lines.append("global: this method has none, its subject lives in the local level alone")
    elif strengths.global_ != 0.0:
        delta = _delta(subject, word)
        lines.append(f"global {strengths.global_:g}: {len(word.firsts)} column(s) of \"{word.text}\"")
    else:
        lines.append("global 0: off")
    if delta is None and not factors:
        return Injected(model, positive, negative, "\n".join([*lines, "nothing is left to act: passed through"]))
    if curve is not None or layers:
        lines.append("curve and layer weights act on the local level only")

    out: Conditioning = []
    for entry, shift, guided in zip(positive, shifts, guides, strict=True):
        entry = stamped(entry, number if shift is not None else 0, guided) if number else entry
        if shift is None or delta is None:
            out.append(entry)
        else:
            out += _fused(entry, word, shift, delta * strengths.global_, strengths, adapter.config.category_mode)
    skipped = sum(shift is None for shift in shifts)
    if skipped:
        lines.append(f"{skipped} of {len(shifts)} prompts do not hold the word and stay as they are")
    if number:
        negative = [stamped(entry, black) for entry in negative]
    return Injected(model, out, negative, "\n".join(lines))


def _numbers(model: Any) -> set[int]:
    patches = model.model_options["transformer_options"].get("patches", {}).get("middle_patch", [])
    return {patch.plan.number for patch in patches if isinstance(patch, LocalInjection)}


def matches(positive: Conditioning, word: Word) -> list[int | None]:
    """For each entry how many rows later than in its own prompt the word stands, None where it is not."""
    out: list[int | None] = []
    for entry in positive:
        same = entry[1].get(HASH_KEY) == word.prompt_hash and entry[0].shape[1] > max(word.columns)
        out.append(0 if same else shift_of(entry[0], word))
    if all(shift is None for shift in out):
        other = next((entry[1][TEXT_KEY] for entry in positive if TEXT_KEY in entry[1]), None)
        what = f"was encoded from \"{other}\"" if other is not None else "does not hold that word's vectors"
        raise LikenessError(f"The WORD \"{word.text}\" was found in \"{word.prompt}\", but the positive conditioning {what}; "
                            "connect both outputs of the same Subject Prompt.")
    return out


def _guides(positive: Conditioning, guidance: Guidance | None) -> list[Guides]:
    """For each entry the guidance with the columns of its word, as far as earlier injectors left them there."""
    if guidance is None:
        return [()] * len(positive)
    out: list[Guides] = []
    for entry, shift in zip(positive, matches(positive, guidance.word), strict=True):
        columns = () if shift is None else _remaining(guidance.word, shift, entry[1].get(DROPPED_KEY, ()))
        out.append(((guidance.name, columns),) if columns else ())
    return out


def _remaining(word: Word, shift: int, dropped: Dropped) -> tuple[int, ...]:
    """Where the word's columns stand now, without those that were taken out."""
    there = (column + shift for column in word.columns)
    kept = (column for column in there if not any(start <= column < start + count for start, count, _ in dropped))
    return tuple(_place(column, dropped, word) for column in kept)


def _number(subject: Subject, word: Word, strengths: Strengths, factors: dict[str, float], mask: Tensor | None,
            guidance: Any, curve: Any) -> int:
    """An odd number that stands for this injection with all its settings; the even one below it is free for its negative."""
    # the tokens themselves: concat and average of the same pictures share all other hashes
    tokens = picture_hash(*(tensor for _, tensor in subject.tokens))
    label = repr((tokens, subject.adapter_hash, subject.pairing, word.prompt_hash, word.text, word.columns,
                  sorted(factors.items()), strengths, picture_hash(mask), type(curve).__name__, getattr(curve, "points", None),
                  None if guidance is None else guidance.name))
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:6], "big") | 1


def _delta(subject: Subject, word: Word) -> Tensor:
    """(references, occurrences, width): what is added to the first token of each occurrence, prompt weights included.

    Core turns a row z of weight w into (z - z_empty) * w + z_empty, so fused = word + delta becomes row + w * delta."""
    per = len(word.columns) // len(word.firsts)
    assert word.raw is not None
    raw = torch.stack([word.raw[first:first + per].mean(0) for first in word.firsts])
    weight = torch.tensor([word.weights[first] for first in word.firsts])[:, None]
    return word_delta(subject, raw) * weight


def _fused(entry: list[Any], word: Word, shift: int, delta: Tensor, strengths: Strengths, mode: str) -> Conditioning:
    """The entry with the subject in its word, between start and end; the plain entry before and after."""
    count = max(entry[0].shape[0], delta.shape[0])  # several references only where each belongs to its own latent
    rows = entry[0][[k % entry[0].shape[0] for k in range(count)]]
    changed = entry
    delta = delta[[k % delta.shape[0] for k in range(count)]].to(rows)
    per = len(word.columns) // len(word.firsts)
    dropped = entry[1].get(DROPPED_KEY, ())
    for number, first in enumerate(word.firsts):
        rows[:, _place(word.columns[first] + shift, dropped, word)] += delta[:, number]
    options = entry[1].copy()
    if mode == "drop_rest" and per > 1:
        for first in reversed(word.firsts):
            start = word.columns[first] + shift + 1
            now = _place(start, dropped, word)
            rows = _drop(rows, now, per - 1, word.window)
            changed = without_rows(changed, now, per - 1, (now // word.window + 1) * word.window)
            options[DROPPED_KEY] = (*options.get(DROPPED_KEY, ()), (start, per - 1, (start // word.window + 1) * word.window))
    options = {**options, "model_conds": changed[1]["model_conds"]} if changed is not entry else options
    return between(entry, [rows, options], strengths.start, strengths.end)


def _place(column: int, dropped: Dropped, word: Word) -> int:
    """Where a row of the prompt stands after earlier injectors took rows out: (first row, rows, end of its window)."""
    if any(start <= column < start + count for start, count, _ in dropped):
        raise LikenessError(f"The word \"{word.text}\" is a part of another subject's word, and this adapter takes that part out "
                            "of the prompt; name the subjects by words of their own.")
    return column - sum(count for start, count, end in dropped if start + count <= column < end)


def _drop(rows: Tensor, start: int, count: int, window: int) -> Tensor:
    """Takes `count` rows out of their window; what follows in it moves up and zero rows fill its end."""
    end = (start // window + 1) * window
    zeros = rows.new_zeros(rows.shape[0], count, rows.shape[2])
    return torch.cat([rows[:, :start], rows[:, start + count:end], zeros, rows[:, end:]], 1)


def between(plain: list[Any], fused: list[Any], start: float, end: float) -> Conditioning:
    """Entries with core's own start_percent and end_percent, so that no clock of ours is needed."""
    low = float(plain[1].get("start_percent", 0.0))
    high = float(plain[1].get("end_percent", 1.0))
    parts = ((low, min(start, high), plain), (max(start, low), min(end, high), fused), (max(end, low), high, plain))
    if start <= low and end >= high:
        return [fused]
    return [[entry[0], {**entry[1], "start_percent": a, "end_percent": b}] for a, b, entry in parts if a < b] or [plain]
