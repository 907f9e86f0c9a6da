"""The real word's mask (adaptive mask guidance): from text cross-attention to where, and how much, the subject acts.

Only the columns of the word count, and every strategy of the release needs of each layer no more than its own resized
map: a running sum of (b, 1, h, w) takes the place of the release's 505 MB of stored maps a call.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
STRATEGIES = ("max_norm", "min_max_norm", "min_max_per_channel")


def word_map(probabilities: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Softmax maps (b, heads, tokens, h, w) -> (b, 1, *size): mean of the heads, sum of the word's columns, resized."""
    mean = probabilities.float().mean(1)
    one = torch.einsum("bthw,t->bhw", mean, columns.reshape(-1).to(mean))[:, None]
    return resized(one, size)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, c, h, w) -> (b, c, *size), bilinear; by size, where the release takes one factor from the height alone."""
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def min_max(maps: Tensor) -> Tensor:
    """(b, c, h, w): each plane brought to 0..1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + EPS)


def words_of(strategy: Iterable[str]) -> frozenset[str]:
    """The release's strategy words; unknown ones (decoder_map, selfmap, crossmap_32) change nothing, as in the release."""
    return frozenset([strategy] if isinstance(strategy, str) else strategy)


class MaskSum:
    """Adds up the layers of one guidance pass and makes the mask of them; holds one (b, 1, h, w) tensor."""

    def __init__(self, strategy: Iterable[str], size: tuple[int, int]):
        self.words, self.size = words_of(strategy), tuple(size)
        # the release looks for the words in this order
        self.per_layer = "min_max_per_channel" in self.words and not self.words & {"max_norm", "min_max_norm"}
        self.total: Tensor | None = None
        self.count = 0

    def add(self, layer: Tensor) -> None:
        """One layer's word map (b, 1, h, w), already of the mask's size."""
        layer = min_max(layer) if self.per_layer else layer
        self.total = layer if self.total is None else self.total + layer
        self.count += 1

    def mean(self) -> Tensor:
        """(b, 1, h, w) over the layers, before the normalisation."""
        assert self.total is not None
        return self.total / self.count

    def finish(self, scope: float, self_map: Tensor | None = None, region: Tensor | None = None) -> Tensor:
        """(b, 1, h, w) mask; self_map (b, n, n) spreads the mean over places that look alike, n = h w.

        As in the release, a mean that no strategy word normalises is not spread. region (b or 1, 1, h, w): where the
        prompt itself counts; beyond it the word is not looked for."""
        mean = self.mean() if region is None else self.mean() * region
        if self_map is not None and self.words & set(STRATEGIES):
            mean = (self_map @ mean.flatten(1)[..., None]).reshape(mean.shape)
        mask = cut(normalised(mean, self.words), scope, self.words)
        return mask if region is None else torch.where(region > 0, mask, 0.0)


def normalised(mean: Tensor, words: frozenset[str]) -> Tensor:
    """(b, 1, h, w) by the first strategy word that is named; without one as it is."""
    if "max_norm" in words:
        return mean / (mean.amax((-2, -1), keepdim=True) + EPS)
    return min_max(mean) if words & {"min_max_norm", "min_max_per_channel"} else mean


def cut(mask: Tensor, scope: float, words: frozenset[str]) -> Tensor:
    """Keeps the `scope` share of the largest values (top-k), or with "threshold" those from 1 - scope on; "binary": as 1."""
    if "threshold" in words:
        mask = torch.where(mask < 1 - scope, 0.0, mask)
        return torch.where(mask > 1 - scope, 1.0, mask) if "binary" in words else mask
    flat = mask.flatten(1)
    values, places = flat.topk(int(flat.shape[1] * scope), dim=1)
    kept = torch.ones_like(values) if "binary" in words else values
    return torch.zeros_like(flat).scatter(1, places, kept).reshape(mask.shape)


def self_similarity(maps: Sequence[Tensor], strategy: Iterable[str], places: int) -> Tensor:
    """Self-attention maps (b, c, m, m) -> (b, n, n), n = places: resized, normalised, mean of all channels."""
    words = words_of(strategy)
    planes = torch.cat([resized(one.float(), (places, places)) for one in maps], 1)
    if "selfmap_min_max_per_channel" in words:
        planes = min_max(planes)
    elif "selfmap_max_norm" in words:
        planes = planes / (planes.amax((1, 2, 3), keepdim=True) + 1e-10)
    return planes.mean(1)


def subject_mask(maps: Sequence[Tensor], columns: Tensor, scope: float, strategy: Iterable[str], size: tuple[int, int],
                 self_maps: Sequence[Tensor] = ()) -> Tensor:
    """Softmax maps (b, heads, tokens, h, w) of all layers and the word's 0/1 columns (tokens,) -> mask (b, 1, *size).

    RealCustom++, adaptive mask guidance. Values 0..1 are both scope and strength; a word that is nowhere gives zeros.
    """
    total = MaskSum(strategy, size)
    for one in maps:
        total.add(word_map(one, columns, size))
    spread = self_similarity(self_maps, total.words, size[0] * size[1]) if self_maps else None
    return total.finish(float(scope), spread)
