"""PhotoMaker's prompt: the word before the trigger stands once for every identity token, the trigger itself goes."""
from __future__ import annotations

from typing import Any, NamedTuple

from ..common.errors import LikenessError
from .prompt import locate, trimmed

Entry = tuple[Any, ...]  # token, weight


class Stacked(NamedTuple):
    """tokens: with the repeated class word; free: without the trigger and without repeats. columns: of the repeats.

    word: the class word's last token, spelled. weight: its prompt weight."""
    tokens: dict[str, list[list[Entry]]]
    free: dict[str, list[list[Entry]]]
    columns: tuple[int, ...]
    word: str
    weight: float


def stack(clip: Any, text: str, trigger: str, count: int) -> Stacked:
    """The prompt with its class word `count` times. Raises LikenessError without exactly one trigger behind a word."""
    if clip is None:
        raise LikenessError("The CLIP input is empty: this checkpoint holds no text encoder; load one with a CLIP loader.")
    trigger = trimmed(trigger)
    if not trigger:
        raise LikenessError("The trigger word is empty; write the word of the prompt that follows the person, such as img.")
    tokens = clip.tokenize(text)
    found, key, windows = locate(clip, tokens, trigger, 0)
    if found.total != 1:
        how = f"stands {found.total} times" if found.total else "is not"
        raise LikenessError(f"The trigger word \"{trigger}\" {how} in the prompt \"{text}\"; write it once, behind the word for "
                            f"the person, such as: a woman {trigger} in the rain.")
    size, per = len(windows[0]), len(found.columns)
    window, place = divmod(found.columns[0], size)
    word = _spelled(clip, key, windows[window][place - 1])
    if place < 2 or not any(map(str.isalnum, word)):
        raise LikenessError(f"The trigger word \"{trigger}\" has no word before it in the prompt \"{text}\"; write it behind the "
                            f"word for the person, such as: a woman {trigger} in the rain.")
    if place - 2 + count > size - 2:
        raise LikenessError(f"The class word \"{word}\" would stand {count} times from row {place - 1} of {size} on, more than "
                            "the window holds; move the person to the front of the prompt, or give fewer pictures.")
    empty = clip.tokenize("")
    stacked = {name: _rebuilt(found, empty[name][0], window, place, per, count) for name, found in tokens.items()}
    free = {name: _rebuilt(found, empty[name][0], window, place, per, 1) for name, found in tokens.items()}
    first = window * size + place - 1
    return Stacked(stacked, free, tuple(range(first, first + count)), word, float(windows[window][place - 1][1]))


def _spelled(clip: Any, key: str, entry: Entry) -> str:
    names = getattr(getattr(clip.tokenizer, f"clip_{key}", None), "inv_vocab", {})
    # an embedding of the artist's has no spelling, and is a word all the same
    return names.get(entry[0], "").removesuffix("</w>") if isinstance(entry[0], int) else "embedding"


def _rebuilt(windows: list[list[Entry]], empty: list[Entry], window: int, place: int, per: int, count: int) -> list[list[Entry]]:
    """Windows with `per` trigger tokens at `place` taken out and the one before them `count` times; what does not fit any
    more moves to the next window."""
    start, end, size = empty[0], empty[1], len(empty)
    contents = [_content(one, end[0]) for one in windows]
    before, word, after = contents[window][:place - 2], contents[window][place - 2], contents[window][place - 1 + per:]
    contents[window] = [*before, *[word] * count, *after]
    at = 0
    while at < len(contents):
        over = contents[at][size - 2:]
        if over:
            contents[at] = contents[at][:size - 2]
            contents[at + 1:at + 2] = [[*over, *(contents[at + 1] if at + 1 < len(contents) else [])]]
        at += 1
    return [[start, *content, end, *empty[2 + len(content):]] for content in contents]


def _content(window: list[Entry], end: Any) -> list[Entry]:
    """The entries between the start and the end of a window's text."""
    for at, entry in enumerate(window[1:], 1):
        if isinstance(entry[0], int) and entry[0] == end:
            return window[1:at]
    return window[1:]
