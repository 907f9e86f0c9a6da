"""Finding a word among the tokens of a prompt."""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """columns: index of every token of every chosen occurrence, counted over all windows; firsts: where in `columns`
    each occurrence begins; total: how many occurrences the prompt has."""
    columns: tuple[int, ...]
    firsts: tuple[int, ...]
    total: int


def find_word(windows: Sequence[Sequence[object]], word: Sequence[int], occurrence: int,
              ends_word: Callable[[object], bool]) -> Found:
    """Whole-word search of the token ids `word` in every window of a prompt.

    A match must begin where a word begins, else "melon" would be found in "watermelon". Tokens that are no plain
    numbers (textual inversions) never match. occurrence 0 means all, 1 the first."""
    starts: list[int] = []
    row = 0
    for window in windows:
        for at in range(len(window) - len(word) + 1):
            same = all(isinstance(t, int) and t == w for t, w in zip(window[at:at + len(word)], word, strict=True))
            if same and (at == 0 or ends_word(window[at - 1])):
                starts.append(row + at)
        row += len(window)
    chosen = starts if occurrence == 0 else starts[occurrence - 1:occurrence]
    columns = tuple(start + k for start in chosen for k in range(len(word)))
    return Found(columns, tuple(range(0, len(columns), len(word))) if word else (), len(starts))


def is_cut(windows: Sequence[Sequence[object]], word: Sequence[int], end: int) -> bool:
    """Whether the word stands across the border of two windows; `end` is the token that closes a window's text."""
    for left, right in zip(windows, windows[1:], strict=False):
        close = next((k for k, token in enumerate(left) if isinstance(token, int) and token == end), len(left))
        for before in range(1, len(word)):
            tail, head = left[max(1, close - before):close], right[1:1 + len(word) - before]
            around = [*tail, *head]
            if len(around) == len(word) and all(isinstance(t, int) and t == w for t, w in zip(around, word, strict=True)):
                return True
    return False


def near_words(prompt: str, word: str, count: int = 3) -> list[str]:
    """Words of the prompt that look like the one that was not found."""
    words = list(dict.fromkeys(re.findall(r"[^\s,.;:!?()\[\]{}\"]+", prompt.lower())))
    return difflib.get_close_matches(word.lower(), words, count, 0.5)
