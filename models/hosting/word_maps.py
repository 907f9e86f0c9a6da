"""The guidance pass: where a word's text attention looks, read while the network runs.

Of each layer only the columns of the asked words are kept, and of these only a running sum: no map is stored. The maps
come from queries and keys, not from the host's attention function, so that every attention back end gives the same.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import comfy.patcher_extension
import torch
from einops import rearrange
from torch import Tensor

from ..realcustom.masks import MaskSum, resized
from .row_masks import layer_size
from .slots import Slot, laid_round, text_attention
from .stamps import KEY, RowStamps, check_rows

CAPTURE = "likeness_capture"
ALL, UP, FINE = LAYERS = ("all", "way up", "finest of the way up")
LIMIT = 1 << 19  # attention weights in memory at a time, 2 MB


class Sought(NamedTuple):
    """A word in one prompt: name of its guidance, its columns, the release's strategy words, which layers are read."""
    name: str
    columns: tuple[int, ...]
    strategy: tuple[str, ...]
    layers: str = ALL


class Target(NamedTuple):
    """One prompt of a guidance pass. length: rows of its text; the host repeats them to match a longer prompt's, and other
    packs append some of their own."""
    length: int
    words: tuple[Sought, ...]


class Enough(BaseException):
    """Ends one call of the network: no later layer has anything to add. Never leaves this module."""


class Capture:
    """What one guidance pass collects: for each prompt and word one sum of (b, 1, h, w)."""

    def __init__(self, targets: list[Target], layers: tuple[str, ...], early: bool):
        """layers: all text attentions in the order of the network."""
        self.targets, self.layers = targets, layers
        self.last = layers[-1] if early else None
        self.sums: dict[tuple[int, str], MaskSum] = {}
        self.areas: dict[int, tuple[int, int, int, int] | None] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

    @property
    def held(self) -> int:
        """Bytes of all sums."""
        return sum(one.total.nbytes for one in self.sums.values() if one.total is not None)

    def add(self, key: str, q: Tensor, k: Tensor, extra_options: dict[str, Any]) -> None:
        """Layer "output.3.0": queries (rows, t, c), keys (rows, l, c), row n of the pass stamped with -(n + 1)."""
        stamps: RowStamps | None = extra_options.get(KEY)
        if stamps is None:
            return
        check_rows(stamps, q.shape[0])
        size = layer_size(q, stamps, extra_options)
        for number, target in enumerate(self.targets):
            rows = [row for row, ids in enumerate(stamps.ids) if mark(number) in ids]
            if not rows:
                continue
            # the first layer of the network is the finest one of all UNets; the release's masks have its size too
            finest = self.sizes.setdefault(number, size)
            words = [word for word in target.words if reads(word.layers, key, size == finest)]
            if not words:
                continue
            part = slice(rows[0], rows[-1] + 1)  # the rows of a prompt stand together
            self.areas[number] = stamps.areas[rows[0]]
            shares = word_shares(q[part], k[part, :target.length], extra_options["n_heads"], [word.columns for word in words])
            for word, share in zip(words, shares.unbind(1), strict=True):
                layer = resized(rearrange(share, "b (h w) -> b 1 h w", h=size[0]), finest)
                total = self.sums.setdefault((number, word.name), MaskSum(word.strategy, finest))
                total.add(layer if total.total is None else layer.to(total.total.device))


def reads(layers: str, key: str, finest: bool) -> bool:
    """Whether a word that reads these layers reads the layer "output.3.0"."""
    return layers == ALL or key.startswith("output.") and (finest or layers == UP)


def mark(number: int) -> int:
    """The id in the stamps of a guidance pass; injections have positive ones."""
    return -(number + 1)


def word_shares(q: Tensor, k: Tensor, heads: int, words: list[tuple[int, ...]], limit: int = LIMIT) -> Tensor:
    """Queries (b, t, c), keys (b, l, c), columns of each word -> (b, words, t): how much of the attention a word gets.

    Softmax over all columns in float32, sum of the word's columns, mean of the heads, a few heads at a time."""
    batch, places, channels = q.shape
    length, width = k.shape[1], channels // heads
    pick = torch.zeros(length, len(words), device=q.device)
    for index, columns in enumerate(words):
        pick[list(columns), index] = 1.0
    out = torch.zeros(batch, places, len(words), device=q.device)
    step = max(1, limit // (batch * places * length))
    for start in range(0, heads, step):
        part = slice(start * width, (start + step) * width)
        qs, ks = (rearrange(t[..., part].float(), "b n (h d) -> b h n d", d=width) for t in (q, k))
        weights = (qs @ ks.mT).mul_(width ** -0.5)
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        out += (weights @ pick).sum(1)
    return out.mT / heads


class Watched:
    """What stands in one layer's slot during a guidance pass."""

    def __init__(self, capture: Capture, key: str, before: Slot | None):
        self.capture, self.key, self.before = capture, key, before

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self.capture.add(self.key, q, k, extra_options)
        if self.key == self.capture.last:
            raise Enough
        return text_attention(self.before, q, k, v, extra_options)


def _watch(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """APPLY_MODEL: in a guidance pass every text attention is read, and nothing after the last one need be computed."""
    capture: Capture | None = (transformer_options or {}).get(CAPTURE)
    if capture is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    options = laid_round(transformer_options, capture.layers, lambda key, before: Watched(capture, key, before))
    try:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    except Enough:
        return torch.zeros_like(x)


def add_capture(model: Any) -> None:
    """Makes a cloned MODEL able to run guidance passes, once."""
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    if _watch not in model.get_wrappers(kind, CAPTURE):
        model.add_wrapper_with_key(kind, CAPTURE, _watch)
