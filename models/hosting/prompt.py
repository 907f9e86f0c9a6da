"""Encoding a prompt and finding the subject's word in it."""
from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.sd1_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.columns import Found, find_word, is_cut, near_words
from ..common.errors import LikenessError
from ..common.records import Word
from ..realcustom.phrase import substring_ranges
from ..realcustom.schedule import size_rows

HASH_KEY, TEXT_KEY = "likeness_prompt_hash", "likeness_prompt"
# How alike another node's rows must be to ours, as cosines: its weighting and layer may differ, its text may not.
WORD_ALIKE, END_ALIKE = 0.7, 0.6
WHOLE_WORDS, SUBSTRING = "whole words", "as in the RealCustom release (substring)"
RULES = (WHOLE_WORDS, SUBSTRING)
POOLED = ("projected, as core", "as in the RealCustom release (unprojected)")
Conditioning = list[list[Any]]


def prompt_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _windows(tokens: Any) -> tuple[str, list[list[tuple]]]:
    """The windows of the CLIP tokenizer that decides the columns; l and g of SDXL have the same positions."""
    known = ("l", "g", "h")
    if isinstance(tokens, dict) and set(tokens) <= set(known):  # a T5 beside them fills the rows with its own tokens
        for key in known:
            if key in tokens:
                return key, tokens[key]
    kinds = ", ".join(tokens) if isinstance(tokens, dict) else type(tokens).__name__
    raise LikenessError(f"The subject's word can only be found by a CLIP text encoder as SD1.5 and SDXL have it, this CLIP "
                        f"has the tokenizers {kinds}; use an SD1.5 or SDXL checkpoint.")


def _plain(text: str) -> str:
    """The word as text that core's prompt grammar takes literally."""
    return text.replace("\\", "").replace("(", "\\(").replace(")", "\\)")


def trimmed(word: str) -> str:
    """The word without the space and punctuation that come along when it is copied out of a prompt."""
    return word.strip(string.whitespace + ",.;:!?\"'`")


def _end(clip: Any) -> int:
    """The token that closes a text."""
    return _windows(clip.tokenize(""))[1][0][1][0]


def _ids(clip: Any, text: str) -> list[int]:
    """Token ids of a piece of text without start, end and padding."""
    end = _end(clip)
    ids = []
    for entry in _windows(clip.tokenize(_plain(text)))[1][0][1:]:
        if not isinstance(entry[0], int):
            raise LikenessError(f"The subject's word is the embedding \"{text}\", which has no word of its own; write a plain "
                                "word of the prompt, such as cat, and leave the embedding beside it.")
        if entry[0] == end:
            break
        ids.append(entry[0])
    return ids


def _word_ends(clip: Any, key: str, start: Any):
    """Whether a token ends a word: CLIP's vocabulary marks it with </w>."""
    tokenizer = getattr(clip.tokenizer, f"clip_{key}", None)
    names = getattr(tokenizer, "inv_vocab", {})

    def ends(token: object) -> bool:
        return not isinstance(token, int) or token == start or names.get(token, "</w>").endswith("</w>")
    return ends


def locate(clip: Any, tokens: Any, word: str, occurrence: int) -> tuple[Found, str, list[list[tuple]]]:
    """Where `word` stands in tokenised text; also the tokenizer's key and its windows."""
    key, windows = _windows(tokens)
    if not word.strip():
        raise LikenessError("The subject's word is empty; write the word of the prompt that names the subject.")
    # A comma is a token like any other, and no subject.
    ids = _ids(clip, trimmed(word)) if word.strip(string.punctuation + string.whitespace) else []
    if not ids:
        return Found((), (), 0), key, windows
    start = windows[0][0][0]
    found = find_word([[entry[0] for entry in window] for window in windows], ids, occurrence, _word_ends(clip, key, start))
    return found, key, windows


def locate_as_release(clip: Any, tokens: Any, text: str, word: str, occurrence: int) -> tuple[Found, str, list[list[tuple]]]:
    """As `locate`, by the RealCustom release's rule: a substring of the text after prompt weights are read, in its first
    window, upper and lower case apart."""
    key, windows = _windows(tokens)
    tokenizer = getattr(clip.tokenizer, f"clip_{key}").tokenizer
    plain = "".join(comfy.sd1_clip.unescape_important(part)
                    for part, _ in comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0))

    def ids(part: str) -> list[int]:
        return tokenizer(part)["input_ids"][1:-1]
    own = [entry[0] for entry in windows[0][1:-1]]
    if any(not isinstance(a, int) or a != b for a, b in zip(own, ids(plain), strict=False)):
        raise LikenessError("The substring rule counts the tokens of the text one after the other, and here an embedding, or a "
                            "part in brackets that did not fit into the first window, moves them; take the embedding out, "
                            f"shorten the prompt, or choose the rule {WHOLE_WORDS}.")
    ranges = substring_ranges(plain, word.strip(), lambda part: len(ids(part)))
    chosen = [range(a, b) for a, b in (ranges if occurrence == 0 else ranges[occurrence - 1:occurrence]) if b > a]
    columns = tuple(dict.fromkeys(column for one in chosen for column in one))
    regular = len({len(one) for one in chosen}) == 1 and len(columns) == sum(map(len, chosen))
    # occurrences that overlap or have different lengths count as one
    firsts = tuple(range(0, len(columns), len(chosen[0]))) if regular else (0,) if columns else ()
    return Found(columns, firsts, len(ranges)), key, windows


def encode_prompt(clip: Any, text: str, word: str, occurrence: int = 0, conditioning: Conditioning | None = None,
                  on_missing: str = "error", rule: str = WHOLE_WORDS, pooled: str = POOLED[0],
                  release_size: tuple[int, int] | None = None) -> tuple[Conditioning, Word, bool]:
    """CONDITIONING with the prompt's hash, WORD, and whether the word was found.

    With `conditioning` the word is looked up in it and its rows stay as they are. pooled: which of CLIP-G's vectors goes
    beside the rows; release_size (width, height) in pixels: written in as the RealCustom release does it, width first.
    Raises LikenessError for a missing word and for a CONDITIONING of another text."""
    if clip is None:
        raise LikenessError("The CLIP input is empty: this checkpoint holds no text encoder; load one with a CLIP loader.")
    tokens = clip.tokenize(text)
    if rule == WHOLE_WORDS:
        found, key, windows = locate(clip, tokens, word, occurrence)
    else:
        found, key, windows = locate_as_release(clip, tokens, text, word, occurrence)
    digest = prompt_hash(text)
    if not found.columns and on_missing == "error":
        raise LikenessError(_missing(clip, text, word, occurrence, found, windows, rule))
    # Rows that were joined with another prompt's do not begin with this text for sure: they stay without its hash.
    total = sum(len(window) for window in windows)
    if conditioning is None:
        conditioning = clip.encode_from_tokens_scheduled(tokens, unprojected=pooled != POOLED[0])
        own = [True] * len(conditioning)
    elif pooled != POOLED[0]:
        raise LikenessError("The pooled vector belongs to the CONDITIONING, which another node encoded; disconnect it, or leave "
                            f"pooled at {POOLED[0]}.")
    else:
        other = next((e[1][TEXT_KEY] for e in conditioning if e[1].get(HASH_KEY, digest) != digest), None)
        if other is not None:
            raise LikenessError(f"The CONDITIONING was encoded from \"{other}\", the text here is \"{text}\"; write the same "
                                "text.")
        alike = _comparer(clip, tokens, found.columns, len(windows[0]))
        own = [entry[1].get(HASH_KEY) == digest or entry[0].shape[1] == total and alike(entry[0])
               for entry in conditioning]
    sizes = {} if release_size is None else size_rows(*release_size)
    conditioning = [[entry[0], {**entry[1], HASH_KEY: digest, TEXT_KEY: text, **sizes}] if mine else entry
                    for entry, mine in zip(conditioning, own, strict=True)]
    rows = raw = end = None
    weights = tuple(float(w[found_at][1]) for w, found_at in _entries(windows, found.columns))
    if found.columns:
        _rows(conditioning, found.columns, text)
        source = [entry for entry, mine in zip(conditioning, own, strict=True) if mine]
        source = source or clip.encode_from_tokens_scheduled(tokens)
        size = len(windows[0])
        rows = _rows(source, found.columns, text)
        end = _rows(source, (found.columns[-1] // size * size + size - 1,), text)
        raw = rows if all(weight == 1.0 for weight in weights) else unweighted(clip, tokens, found.columns, text)
    spelled = trimmed(word) if rule == WHOLE_WORDS else word.strip()  # the release looks for punctuation too
    place = Word(spelled, occurrence, found.columns, found.firsts, len(windows[0]), text, digest, rows, raw, weights,
                 tokens, clip, end)
    if found.columns and not any(own) and all(shift_of(entry[0], place) is None for entry in conditioning):
        if any(entry[0].shape[1] == total for entry in conditioning):
            raise LikenessError(f"The CONDITIONING was encoded from another text than \"{text}\" (its vectors at "
                                f"\"{spelled}\" are far from those of this text); connect the one of this text, or write "
                                "the same text here.")
        raise LikenessError(f"The CONDITIONING has {conditioning[0][0].shape[1]} rows and none of them hold \"{text}\", which "
                            f"has {total}; connect the CONDITIONING that was encoded from this text.")
    return conditioning, place, bool(found.columns)


def _comparer(clip: Any, tokens: Any, columns: tuple[int, ...], window: int) -> Callable[[Tensor], bool]:
    """Tells whether rows (1, n, width) of another node can be this text: at the word, and at the end, which saw it all.

    At the word the empty prompt is taken off first: prompt weights move a row along just that difference."""
    @cache
    def ours() -> tuple[Tensor, Tensor]:
        return tuple(clip.encode_from_tokens_scheduled(t)[0][0][0].float() for t in (tokens, clip.tokenize("")))

    def alike(rows: Tensor) -> bool:
        text, empty = ours()
        if rows.shape[-1] != text.shape[-1]:
            return False
        got = rows[0].to(text)
        if F.cosine_similarity(got[-1], text[-1], dim=0) < END_ALIKE:
            return False
        nothing = empty[[column % window for column in columns]]
        near = F.cosine_similarity(got[list(columns)] - nothing, text[list(columns)] - nothing, dim=-1)
        return not columns or bool(near.mean() >= WORD_ALIKE)
    return alike


def _entries(windows: list[list[tuple]], columns: tuple[int, ...]):
    size = len(windows[0])
    return [(windows[column // size], column % size) for column in columns]


def _rows(conditioning: Conditioning, columns: tuple[int, ...], text: str) -> Tensor:
    """(k, width) rows of the first entry that is long enough."""
    for entry in conditioning:
        if entry[0].shape[1] > max(columns):
            return entry[0][0, list(columns)].clone()
    raise LikenessError(f"The CONDITIONING has {conditioning[0][0].shape[1]} rows, but the word stands at row {max(columns)} of "
                        f"\"{text}\"; connect the CONDITIONING that was encoded from this text.")


def unweighted(clip: Any, tokens: Any, columns: tuple[int, ...], text: str) -> Tensor:
    """(k, width) the word's rows as they were before prompt weights pulled them towards the empty prompt."""
    plain = {key: [[(entry[0], 1.0, *entry[2:]) for entry in window] for window in windows]
             for key, windows in tokens.items()}
    return _rows(clip.encode_from_tokens_scheduled(plain), columns, text)


def _missing(clip: Any, text: str, word: str, occurrence: int, found: Found, windows: list[list[tuple]], rule: str) -> str:
    if rule == SUBSTRING and found.total >= max(1, occurrence):
        return (f"The release's rule finds \"{word}\" in the text, but no token of its own among the first {len(windows[0]) - 2}"
                ": it stands behind them, or inside a longer word; move it forward, write the whole word, or choose the rule "
                f"{WHOLE_WORDS}.")
    if found.total:
        return (f"The prompt has the word \"{word}\" {found.total} time{'s' if found.total > 1 else ''}, occurrence "
                f"{occurrence} was asked for; choose a smaller number or 0 for all.")
    if not word.strip(string.punctuation + string.whitespace):
        return f"The word \"{word}\" is not found: it has no letters; write the word of the prompt that names the subject."
    if is_cut([[entry[0] for entry in window] for window in windows], _ids(clip, trimmed(word)), _end(clip)):
        return (f"The word \"{word}\" is cut in two where the prompt goes on in another window of {len(windows[0])} tokens; "
                "move it by a word or two.")
    near = near_words(text, word)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; write it into the prompt as it is written here."
    return f"The word \"{word}\" is not in the prompt \"{text}\"{hint}"


def tokens_report(word: Word) -> str:
    """For the artist: which word, in which window and at which columns."""
    if not word.columns:
        return f"\"{word.text}\": not in the prompt, nothing will be injected"
    per = len(word.columns) // len(word.firsts)
    lines = [f"word: \"{word.text}\", {len(word.firsts)} time{'s' if len(word.firsts) > 1 else ''}, {per} token"
             f"{'s' if per > 1 else ''} each"]
    for first in word.firsts:
        columns = word.columns[first:first + per]
        weight = f", weight {word.weights[first]:g}" if word.weights[first] != 1.0 else ""
        places = ", ".join(str(column % word.window) for column in columns)
        lines.append(f"window {columns[0] // word.window + 1}: columns {places}{weight}")
    return "\n".join(lines)


def shift_of(entry_rows: Tensor, word: Word) -> int | None:
    """How many rows later the word stands in this entry (a concatenated prompt), or None if it is not there.

    CLIP reads from left to right: all prompts that begin alike have the same rows at the word. Only the last row of
    its window has seen the whole of it."""
    assert word.rows is not None and word.end is not None
    rows = torch.cat([word.rows, word.end]).to(entry_rows)
    last = word.columns[-1] // word.window * word.window + word.window - 1
    for shift in range(0, entry_rows.shape[1], word.window):
        places = [column + shift for column in (*word.columns, last)]
        if places[-1] < entry_rows.shape[1] and torch.allclose(entry_rows[0, places], rows, atol=1e-6):
            return shift
    return None
