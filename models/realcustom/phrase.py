"""Token columns of a phrase as the RealCustom release finds them: by substring, whatever it is a part of."""
from __future__ import annotations

from collections.abc import Callable

WINDOW = 75  # tokens of one window between its start and its end


def occurrences(prompt: str, phrase: str) -> list[int]:
    """First characters of every exact, case-sensitive, also overlapping occurrence."""
    return [at for at in range(len(prompt)) if phrase and prompt.startswith(phrase, at)]


def substring_ranges(prompt: str, phrase: str, length: Callable[[str], int]) -> list[tuple[int, int]]:
    """[a, b) for each occurrence, from the number of tokens before it and up to its end.

    length: tokens of a text without start and end. "cat" is found in "category"; a phrase that ends inside a token
    gets what the prefixes give, and beyond the first window it gets nothing.
    """
    def count(end: int) -> int:
        return 1 + min(length(prompt[:end]), WINDOW)
    return [(count(at), count(at + len(phrase))) for at in occurrences(prompt, phrase)]


def substring_columns(prompt: str, phrase: str, length: Callable[[str], int]) -> tuple[int, ...]:
    """Every column of every occurrence, each once, in order."""
    return tuple(sorted({column for a, b in substring_ranges(prompt, phrase, length) for column in range(a, b)}))
