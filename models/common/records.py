"""What travels through the sockets: immutable records, tuples all the way so that the host can weigh and share them."""
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

SUBJECT_VERSION = 1


def brief(record: NamedTuple) -> str:
    """A record with its tensors as shapes: the host prints the inputs of a node that fails into messages and history, where
    numbers that were read off a person's picture have no place."""
    fields = zip(record._fields, map(_short, record), strict=True)
    return f"{type(record).__name__}({', '.join(f'{name}={value}' for name, value in fields)})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{' x '.join(map(str, value.shape))} numbers"
    return f"({', '.join(map(_short, value))})" if type(value) is tuple else repr(value)


class Subject(NamedTuple):
    """Tokens of one subject from n reference pictures.

    tokens: (name, tensor) pairs; CustAny has "global" (n, encoders, width) and "local" (n, tokens, width).
    pairing: "all" (every picture of the batch sees all references) or "per latent" (reference i for picture i).
    adapter: the loaded adapter whose layers will read the tokens. maker: name and hash of the one that made them, where it is
    another.
    """
    method: str
    tokens: tuple[tuple[str, Tensor], ...]
    pairing: str
    base: str
    width: int
    source_hash: str
    encoder_hash: str
    adapter_hash: str
    adapter: Any
    version: int = SUBJECT_VERSION
    maker: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return brief(self)

    def get(self, name: str) -> Tensor:
        """The tokens called `name`; KeyError when the method has none."""
        return dict(self.tokens)[name]

    @property
    def pictures(self) -> int:
        """Rows of tokens; 0 for a subject that was looked for and not found."""
        return self.tokens[0][1].shape[0]


class Word(NamedTuple):
    """Where the subject's word stands in an encoded prompt.

    columns: rows of the CONDITIONING tensor that hold the word's tokens, every chosen occurrence one after the other.
    firsts: how many tokens into `columns` each occurrence begins. rows and raw (k, width): what stands at `columns`,
    with and without prompt weights. weights: one number a column. tokens, clip: what they were encoded from, so that
    a method that encodes again (S+) can. end (1, width): last row of the last column's window, which tells prompts
    with the same beginning apart.
    """
    text: str
    occurrence: int
    columns: tuple[int, ...]
    firsts: tuple[int, ...]
    window: int
    prompt: str
    prompt_hash: str
    rows: Tensor | None
    raw: Tensor | None
    weights: tuple[float, ...]
    tokens: Any
    clip: Any
    end: Tensor | None = None

    def __repr__(self) -> str:
        return brief(self)


class Guidance(NamedTuple):
    """How the mask of a word is made, used and refreshed; the masks themselves belong to a sampling.

    name: stands for all of it. scope: share of the places that are kept, or 1 - threshold. strategy: words of the release.
    refresh: how many steps make a mask of their own. mask (b, h, w): the artist's, times the word's, or in its place
    (replace). share: where masks of several words overlap they are divided by their sum. early: the guidance pass ends
    with the last text attention. layers: which text attentions are read.
    """
    name: str
    word: Word
    scope: float
    strategy: tuple[str, ...]
    refresh: int
    mask: Tensor | None = None
    replace: bool = False
    share: bool = False
    early: bool = False
    layers: str = "all"


LayerWeights = tuple[tuple[str, float], ...]
