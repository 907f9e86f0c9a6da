"""Subject adapters as the sockets carry them, and the tokens that they make of a reference picture."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..common.records import Subject, brief
from ..custany.adapter import CustAny, check_shapes, is_custany
from ..custany.config import CustAnyConfig, from_metadata
from ..realcustom import adapter as realcustom_adapter
from ..realcustom import config as realcustom_config
from ..vision.load import looks_like
from . import realcustom
from .encoders import Encoders, encode, load_encoder, read_weights
from .memory import compute_dtype, patcher_of, ready
from .stores import of_adapter

PAIRINGS = ("concat", "average", "one per latent")


class Adapter(NamedTuple):
    """LIKENESS_ADAPTER: a method's trained modules; `patcher.model` is the method's own module.

    base_weights: (name, tensor) of a whole UNet that came in the file, in diffusers names, when it shall be used.
    """
    method: str
    patcher: Any
    config: Any  # the method's own: CustAnyConfig or RealCustomConfig
    metadata: tuple[tuple[str, str], ...]
    sha256: str
    name: str
    base_weights: tuple[tuple[str, Tensor], ...] = ()
    found_base: int = 0  # tensors of a UNet in the file, used or not

    def __repr__(self) -> str:
        return brief(self)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    # looked up at call time: the host chooses its attention at start, and tests exchange it
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)


def load_adapter(path: str | Path, keep_base: bool = False) -> Adapter:
    """The method is told from tensor names and metadata, never from the file's name. Raises LikenessError.

    keep_base: also take the UNet that a RealCustom++ file may hold."""
    path = Path(path)
    names, only = None, None
    if files.is_safetensors(path):  # a wrong file, perhaps a checkpoint of many gigabytes, is told from its header
        names = list(files.read_header(path).tensors)
        only = _wanted_names(_check_known(names, path.name), keep_base)
    state, metadata = read_weights(path, only)
    adapter = make_adapter(state, metadata, files.sha256(path), path.name, keep_base, path)
    return adapter if names is None else adapter._replace(found_base=_base_count(adapter.method, names))


def _wanted_names(method: str, keep_base: bool) -> Callable[[str], bool] | None:
    """Which tensors of a file are read; None: all."""
    return realcustom_config.is_own if method == "realcustom" and not keep_base else None


def _base_count(method: str, names: Iterable[str]) -> int:
    return len(realcustom_config.split(dict.fromkeys(names)).base) if method == "realcustom" else 0


def _check_known(names: Iterable[str], name: str) -> str:
    """The method of a file with these tensors; raises LikenessError for one that is no adapter."""
    names = list(names)
    if is_custany(names):
        return "custany"
    if realcustom_config.is_realcustom(names):
        return "realcustom"
    guess = looks_like(names)
    raise LikenessError(f"The file {name} is no subject adapter of a method that this pack knows"
                        + (f", it looks like {guess}" if guess else "") + "; choose another file.")


def make_adapter(state: Mapping[str, Tensor], metadata: Mapping[str, str], sha256: str, name: str,
                 keep_base: bool = False, path: Path | None = None) -> Adapter:
    """From tensors that are read already; `path` is where the host can read them again for another device."""
    method = _check_known(state, name)
    patcher, config = _patcher(method, state, metadata)
    if path is not None:
        patcher.cached_patcher_init = (reload_adapter, (path,))
    found = realcustom_config.split(state).base if method == "realcustom" else {}
    kept = tuple(found.items()) if keep_base else ()
    return Adapter(method, patcher, config, tuple(sorted(metadata.items())), sha256, name, kept, len(found))


def reload_adapter(path: Path, disable_dynamic: bool = False) -> Any:
    """The host's factory for a copy with weights of its own."""
    only = None
    if files.is_safetensors(path):
        only = _wanted_names(_check_known(files.read_header(path).tensors, path.name), False)
    state, metadata = read_weights(path, only)
    return _patcher(_check_known(state, path.name), state, metadata, disable_dynamic)[0]


def _patcher(method: str, state: Mapping[str, Tensor], metadata: Mapping[str, str],
             disable_dynamic: bool = False) -> tuple[Any, Any]:
    module, config = (_realcustom if method == "realcustom" else _custany)(state, metadata)
    return patcher_of(module, disable_dynamic), config


def _custany(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[CustAny, CustAnyConfig]:
    config = from_metadata(dict(metadata))
    check_shapes(config, {key: tuple(value.shape) for key, value in state.items()})
    module = CustAny(config, operations=comfy.ops.manual_cast, dtype=torch.float32, device="meta", attention=_attention)
    dtype = compute_dtype(comfy.model_management.get_torch_device())
    module.load_state_dict({key: value.to(dtype) for key, value in state.items()}, strict=True, assign=True)
    return module, config


def _realcustom(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Any, realcustom_config.RealCustomConfig]:
    config = realcustom_config.identify(state, metadata)
    dtype = compute_dtype(comfy.model_management.get_torch_device())
    parts = realcustom_config.split(state)
    return realcustom_adapter.build(config, parts, comfy.ops.manual_cast, dtype, _attention), config


def wanted_encoders(adapter: Adapter) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...], tuple[int, ...]]:
    """(family, width) of the encoders of an adapter's training, their hashes where its file names them, and how many
    registers each must have where that matters. Raises LikenessError."""
    return adapter.config.encoders, encoder_hashes(dict(adapter.metadata)), getattr(adapter.config, "registers", ())


def encoder_hashes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Hashes of the encoders in an adapter's training, "" where its file does not name one. Raises LikenessError."""
    try:
        entries = json.loads(metadata.get("encoders", "[]"))
        return tuple(str(entry.get("sha256", "")) if isinstance(entry, dict) else "" for entry in list(entries))
    except (ValueError, TypeError, RecursionError) as error:
        raise LikenessError(f"The 'encoders' entry of this adapter cannot be read ({error}); download or train the file "
                            "again.") from error


def load_encoders(adapter: Adapter, paths: list[Path]) -> Encoders:
    """The adapter's encoders; RealCustom++ reads no block after its deepest one, and wants the exact GELU."""
    if adapter.method != "realcustom":
        return Encoders(tuple(load_encoder(path) for path in paths))
    return Encoders(tuple(load_encoder(path, max(blocks) + 1, True)
                          for path, blocks in zip(paths, adapter.config.blocks, strict=True)))


def extract(adapter: Adapter, encoders: Encoders, pictures: Tensor, combine: str, source: str) -> Subject:
    """Pictures (b, h, w, 3) in 0..1 -> SUBJECT. Raises LikenessError when the encoders do not fit."""
    if adapter.method == "realcustom":
        return realcustom.extract(adapter, encoders, pictures, combine, source)
    wanted = adapter.config.encoders
    got = tuple((item.config.family, item.config.width) for item in encoders.items)
    if got != wanted:
        def names(pairs):
            return " + ".join(f"{family} {width}" for family, width in pairs)
        raise LikenessError(f"The adapter {adapter.name} was trained with {names(wanted)}, the encoders are {names(got)}; "
                            "connect the ENCODERS output of the same loader.")
    features = encode(encoders, pictures, adapter.config.resolutions)
    ready([adapter.patcher], pictures.shape[0] * 4096 * adapter.config.width)
    parameter = next(adapter.patcher.model.parameters())
    device = adapter.patcher.load_device
    moved = [(c.to(device, parameter.dtype), p.to(device, parameter.dtype)) for c, p in features]
    tokens, local = (t.float().cpu() for t in adapter.patcher.model.encode(moved))
    if combine == "average":
        tokens, local = tokens.mean(0, keepdim=True), local.mean(0, keepdim=True)
    return Subject("custany", (("global", tokens), ("local", local)), "per latent" if combine == "one per latent" else "all",
                   adapter.config.base, adapter.config.width, source, encoders.hash, adapter.sha256, adapter)


def picture_hash(*tensors: Tensor | None) -> str:
    """A short name for the pixels that a subject came from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def project(subject: Subject, layers: list[str]) -> Any:
    """Patcher with the keys and values of every layer, made once for a whole run."""
    return of_adapter(subject.adapter, subject.get("local"), layers)


def word_delta(subject: Subject, word: Tensor) -> Tensor:
    """(references, k, width): what the subject adds to the raw vectors (k, width) of its word.

    References are averaged into one, unless each belongs to a latent of its own."""
    adapter: Adapter = subject.adapter
    ready([adapter.patcher], 1 << 24)
    parameter = next(adapter.patcher.model.parameters())
    tokens = subject.get("global").to(adapter.patcher.load_device, parameter.dtype)
    if subject.pairing != "per latent":
        tokens = tokens.mean(0, keepdim=True)
    word = word.to(tokens)
    delta = adapter.patcher.model.word_delta(tokens.repeat_interleave(word.shape[0], 0), word.repeat(tokens.shape[0], 1))
    return delta.unflatten(0, (tokens.shape[0], word.shape[0])).float().cpu()
