"""RealCustom++ inside the host: features as the release takes them, tokens, and keys and values under the memory manager."""
from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import to_rgb
from ..common.masks import CutOut, cut_out
from ..common.records import Subject
from ..realcustom.config import RealCustomConfig
from ..realcustom.preprocess import Views, beside, quarters_beside, views
from ..vision.preprocess import normalise
from .encoders import Encoders, label
from .memory import ready, stop_if_asked
from .stores import Pair, of_adapter

CHUNK = 2  # reference pictures at a time; each is five pictures to an encoder
# What an adapter makes of the black picture hangs on the adapter's own patcher and goes with it: {encoders or tokens: ...}.
BLACK_TOKENS, BLACK_STORES = "likeness_black_tokens", "likeness_black_stores"
SUBJECT_STORES = "likeness_subject_stores"


class Projected:
    """In place of a patcher with a Store: keeps the tokens alone and makes keys and values at each step anew.

    The adapter's own projections stay where the host keeps unused weights, and go to the device layer by layer."""

    def __init__(self, adapter: Any, tokens: Tensor):
        self.adapter, self.tokens = adapter, tokens
        self.model = self  # read like a patcher

    def get(self, key: str) -> Pair:
        """Of the layer "output.3.0"."""
        module = self.adapter.patcher.model
        weight = module.layers[key.replace(".", "_")].k.weight
        device = comfy.model_management.get_torch_device()
        return Pair(*module.keys_values(key, self.tokens.to(device, weight.dtype)))


def reference_pictures(image: Tensor, mask: Tensor | None, own: Tensor | None, margin: float, size: int) -> CutOut:
    """Pictures (b, h, w, c) as the encoders get them: whole as in the release, or cut out where a mask or alpha says what."""
    if own is not None:
        return cut_out(image, mask, "white", margin, 2 * size)
    rgb = to_rgb(image)
    return CutOut(rgb, torch.ones_like(rgb[..., 0]), [True] * rgb.shape[0])


def check_encoders(name: str, config: RealCustomConfig, encoders: Encoders) -> None:
    """Raises LikenessError when an encoder is missing, another one, or in another place."""
    got = tuple((item.config.family, item.config.width, item.config.registers) for item in encoders.items)
    wanted = tuple((*entry, registers) for entry, registers in zip(config.encoders, config.registers, strict=True))
    if got != wanted:
        names = " + ".join(label(item.config) for item in encoders.items)
        needs = " + ".join(f"{family} {width}" + (f" with {count} registers" if count else "") for family, width, count in wanted)
        raise LikenessError(f"The adapter {name} was trained with {needs} in this order, the encoders are {names}; connect the "
                            "ENCODERS output of the same loader.")


def _read(encoders: Encoders, pixels: Tensor, blocks: tuple[tuple[int, ...], ...]) -> list[list[Tensor]]:
    """Pixels (b, 3, s, s) in 0..1 -> for each place in `blocks` the patch tokens (b, n, d) of every encoder."""
    out = []
    for item, wanted in zip(encoders.items, blocks, strict=True):
        stop_if_asked()
        model, device = item.patcher.model, item.patcher.load_device
        dtype = next(model.parameters()).dtype
        hidden = model(normalise(pixels, item.config).to(device, dtype), layers=wanted).hidden
        out.append([one[:, item.config.prefix:].float() for one in hidden])
    return [list(level) for level in zip(*out, strict=True)]


def features(encoders: Encoders, seen: Views, config: RealCustomConfig) -> list[Tensor | None]:
    """[shallow 1..3,] deep (b, n, v), local (b, 4 n, v); the shallow form reads no local features, so none are made."""
    levels = [beside(level) for level in _read(encoders, seen.whole, config.blocks)]
    if config.shallow:
        return [*levels, None]
    (local,) = _read(encoders, seen.quarters, tuple(row[-1:] for row in config.blocks))
    return [*levels, quarters_beside(local)]


def make_tokens(adapter: Any, encoders: Encoders, pictures: Tensor) -> Tensor:
    """Pictures (b, h, w, 3) in 0..1 -> tokens (b, l, d), float32 on the CPU."""
    config, patcher = adapter.config, adapter.patcher
    blocks = pictures.split(CHUNK)
    bar = comfy.utils.ProgressBar(len(blocks))
    out = []
    for block in blocks:
        grid = (config.size // min(item.config.patch for item in encoders.items)) ** 2
        ready([item.patcher for item in encoders.items], 5 * CHUNK * grid * config.vision * 80)
        found = features(encoders, views(block, config.size), config)
        ready([patcher], 5 * CHUNK * grid * config.vision * 40)
        place = {"device": patcher.load_device, "dtype": next(patcher.model.parameters()).dtype}
        out.append(patcher.model.encode([None if one is None else one.to(**place) for one in found]).float().cpu())
        bar.update(1)
    return torch.cat(out)


def _kept(adapter: Any, what: str, kind: type = dict) -> MutableMapping[Any, Any]:
    """A store among the attachments of the adapter's patcher, which the host leaves alone."""
    if adapter.patcher.get_attachment(what) is None:
        adapter.patcher.set_attachments(what, kind())
    known: MutableMapping[Any, Any] = adapter.patcher.get_attachment(what)
    return known


def black_tokens(adapter: Any, encoders: Encoders) -> Tensor:
    """(1, l, d) of the black picture, which the negative rows attend to; made once for an adapter and its encoders."""
    known = _kept(adapter, BLACK_TOKENS)
    # one file, read by Load Adapter or by Load Encoders, may compute with another form of GELU
    name = encoders.hash, tuple(item.config.activation for item in encoders.items)
    if name not in known:
        side = 2 * adapter.config.size
        known[name] = make_tokens(adapter, encoders, torch.zeros(1, side, side, 3))
    tokens: Tensor = known[name]
    return tokens


def extract(adapter: Any, encoders: Encoders, pictures: Tensor, combine: str, source: str) -> Subject:
    """Pictures (b, h, w, 3) in 0..1 -> SUBJECT with "local" and "black" tokens. Raises LikenessError for other encoders."""
    config = adapter.config
    check_encoders(adapter.name, config, encoders)
    local = make_tokens(adapter, encoders, pictures)
    if combine == "average":
        local = local.mean(0, keepdim=True)
    return Subject("realcustom", (("local", local), ("black", black_tokens(adapter, encoders))),
                   "per latent" if combine == "one per latent" else "all", config.base, config.width, source, encoders.hash,
                   adapter.sha256, adapter)


def subject_store(subject: Subject, layers: list[str], keep: bool = True) -> Any:
    """Patcher with the subject's keys and values, made once for all steps and injectors. One row unless each belongs to its own
    latent.

    keep False: the tokens alone."""
    local = subject.get("local")
    local = local if subject.pairing == "per latent" else local.flatten(0, 1)[None]
    if not keep:
        return Projected(subject.adapter, local)
    # 243 MB at SDXL's size: several words of one picture share them, and they go with the last MODEL that reads them
    known = _kept(subject.adapter, SUBJECT_STORES, WeakValueDictionary)
    name = hash(local.numpy().tobytes()), local.shape, tuple(layers)
    store = known.get(name)
    if store is None:
        known[name] = store = of_adapter(subject.adapter, local, layers)
    return store


def black_store(subject: Subject, keep: bool = True) -> Any:
    """The same of the black picture: one for all subjects of an adapter and its encoders."""
    if not keep:
        return Projected(subject.adapter, subject.get("black"))
    tokens, known = subject.get("black"), _kept(subject.adapter, BLACK_STORES)
    name = hash(tokens.numpy().tobytes())
    if name not in known:
        known.clear()  # 243 MB at SDXL's size: never two of them
        known[name] = of_adapter(subject.adapter, tokens, [key for key, _ in subject.adapter.config.layers])
    return known[name]
