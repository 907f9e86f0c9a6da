"""Sentences of the miniature world and the small part of CLIP's vocabulary that they use."""
from __future__ import annotations

import re

import torch
from torch import Tensor

from .world import ACCESSORIES, COLOUR_NAMES, KINDS, PATTERNS, PLACES, SCENES, SIZES, Rows

# ids of CLIP's byte-pair vocabulary; every word of this world is one token
TOKEN_IDS = {
    "a": 320, "an": 550, "photo": 1125, "of": 539, "picture": 1674, "the": 518, "with": 593, "and": 537, "in": 530,
    "on": 525, "at": 536, ",": 267, ".": 269, "left": 1823, "center": 2119, "right": 1155, "big": 1205,
    "small": 2442, "red": 736, "orange": 4287, "yellow": 4481, "green": 1901, "blue": 1746, "purple": 5496,
    "pink": 3360, "white": 1579, "striped": 22192, "half": 2349, "round": 2522, "belly": 10404, "cat": 2368,
    "dog": 1929, "bear": 4298, "bunny": 9258, "robot": 8797, "duck": 6910, "hat": 3801, "scarf": 13365,
    "beach": 2117, "forest": 4167, "night": 930, "snow": 2583, "room": 1530, "creature": 14317,
}
UNKNOWN, START, END = range(3)  # the first rows of the small token table
ROWS = {word: row + 3 for row, word in enumerate(TOKEN_IDS)}
CONTEXT_LENGTH = 32


def row_ids(captions: list[str]) -> Tensor:
    """(n, 32) rows of the small token table: start, words, then end up to the window's length."""
    out = torch.full((len(captions), CONTEXT_LENGTH), END)
    for index, caption in enumerate(captions):
        words = re.findall(r"[a-z]+|[,.]", caption.lower())
        ids = [START] + [ROWS.get(word, UNKNOWN) for word in words][:CONTEXT_LENGTH - 2]
        out[index, :len(ids)] = torch.tensor(ids)
    return out


def word_rows(captions: list[str], words: list[str]) -> Tensor:
    """(n,) index of each caption's word in its token row; -1 where the word is missing or cut off."""
    out = []
    for caption, word in zip(captions, words, strict=True):
        tokens = re.findall(r"[a-z]+|[,.]", caption.lower())
        place = tokens.index(word) + 1 if word in tokens else -1
        out.append(place if place < CONTEXT_LENGTH - 1 else -1)
    return torch.tensor(out)


def look(identity: Rows, k: int, chance: Tensor | None = None) -> tuple[str, str]:
    """Words before and after the kind. `chance` (4,) of uniform numbers drops parts; None says everything."""
    said = [True] * 4 if chance is None else (chance < torch.tensor([0.75, 0.7, 0.65, 0.8])).tolist()
    before: list[str] = []
    if said[0]:
        before.append(COLOUR_NAMES[int(identity["colour"][k])])
        if said[1]:
            before += ["and", COLOUR_NAMES[int(identity["second"][k])]]
    if said[2]:
        before.append(PATTERNS[int(identity["pattern"][k])])
    worn = int(identity["accessory"][k])
    after = f" with a {COLOUR_NAMES[int(identity['accent'][k])]} {ACCESSORIES[worn]}" if worn and said[3] else ""
    return " ".join(before), after


def _phrase(identity: Rows, k: int, chance: Tensor, size: str, described: bool) -> str:
    before, after = look(identity, k, chance) if described else ("", "")
    return " ".join(part for part in (size, before, KINDS[int(identity["kind"][k])]) if part) + after


def captions(identity: Rows, pose: Rows, scene: Tensor, generator: torch.Generator, described: bool = True,
             other: Rows | None = None) -> list[str]:
    """One sentence a picture with parts left out at random; described=False never tells the look.

    With `other`, rows whose other["kind"] is >= 0 hold a second creature on the right."""
    n = scene.shape[0]
    chance = torch.rand(n, 16, generator=generator)
    out = []
    for k in range(n):
        c = chance[k]
        size = int(pose["size"][k])
        told = SIZES[size] if size < 2 and c[0] < 0.6 else ""
        text = "a " + _phrase(identity, k, c[4:8], told, described)
        two = False
        if other is not None and int(other["kind"][k]) >= 0:
            two = True
            text += " and a " + _phrase(other, k, c[8:12], "", described)
        if c[1] < 0.7:
            text = "a photo of " + text
        if c[2] < 0.93:
            text += " " + SCENES[int(scene[k])]
        if c[3] < 0.7 and not two:
            text += ", " + PLACES[int(pose["place"][k])]
        text = text.replace("a orange", "an orange")
        if c[12] < 0.1:  # a word from outside of this world teaches the unknown row to mean nothing
            words = text.split(" ")
            at = 1 + int(c[13] * (len(words) - 1))
            text = " ".join([*words[:at], "lovely", *words[at:]])
        out.append(text)
    return out
