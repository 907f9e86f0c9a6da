"""Subject adapters as the sockets carry them, and the tokens that they make of a reference picture."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.ldm.modules.attention
import comfy.ops
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..common.records import Subject
from ..custany.adapter import CustAny, check_shapes, is_custany
from ..custany.config import CustAnyConfig, from_metadata
from ..vision.load import looks_like
from .encoders import Encoders, encode, read_weights
from .memory import compute_dtype, patcher_of, ready

PAIRINGS = ("concat", "average", "one per latent")


class Adapter(NamedTuple):
    """LIKENESS_ADAPTER: a method's trained modules; `patcher.model` is the method's own module."""
    method: str
    patcher: Any
    config: CustAnyConfig
    metadata: tuple[tuple[str, str], ...]
    sha256: str
    name: str


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    # looked up at call time: the host chooses its attention at start, and tests exchange it
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)


def load_adapter(path: str | Path) -> Adapter:
    """The method is told from tensor names and metadata, never from the file's name. Raises LikenessError."""
    path = Path(path)
    if files.is_safetensors(path):  # a wrong file, perhaps a checkpoint of many gigabytes, is told from its header
        _check_known(files.read_header(path).tensors, path.name)
    state, metadata = read_weights(path)
    return make_adapter(state, metadata, files.sha256(path), path.name, path)


def _check_known(names: Iterable[str], name: str) -> None:
    """Raises LikenessError for the tensor names of a file that is no adapter."""
    names = list(names)
    if not is_custany(names):
        guess = looks_like(names)
        raise LikenessError(f"The file {name} is no subject adapter of a method that this pack knows"
                            + (f", it looks like {guess}" if guess else "") + "; choose another file.")


def make_adapter(state: Mapping[str, Tensor], metadata: Mapping[str, str], sha256: str, name: str,
                 path: Path | None = None) -> Adapter:
    """From tensors that are read already; `path` is where the host can read them again for another device."""
    _check_known(state, name)
    config = from_metadata(dict(metadata))
    check_shapes(config, {key: tuple(value.shape) for key, value in state.items()})
    patcher = _patcher(state, config)
    if path is not None:
        patcher.cached_patcher_init = (reload_adapter, (path,))
    return Adapter("custany", patcher, config, tuple(sorted(metadata.items())), sha256, name)


def reload_adapter(path: Path, disable_dynamic: bool = False) -> Any:
    """The host's factory for a copy with weights of its own."""
    state, metadata = read_weights(path)
    return _patcher(state, from_metadata(metadata), disable_dynamic)


def _patcher(state: Mapping[str, Tensor], config: CustAnyConfig, disable_dynamic: bool = False) -> Any:
    module = CustAny(config, operations=comfy.ops.manual_cast, dtype=torch.float32, device="meta", attention=_attention)
    patcher = patcher_of(module, disable_dynamic)
    dtype = compute_dtype(patcher.load_device)
    module.load_state_dict({key: value.to(dtype) for key, value in state.items()}, strict=True, assign=True)
    module.requires_grad_(False)
    return patcher


def wanted_encoders(path: str | Path) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """(family, width) of the encoders that an adapter file was trained with, and their hashes where it names them."""
    metadata = files.read_header(path).metadata if files.is_safetensors(path) else {}
    return from_metadata(metadata).encoders, encoder_hashes(metadata)


def encoder_hashes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Hashes of the encoders in an adapter's training, "" where its file does not name one. Raises LikenessError."""
    try:
        entries = json.loads(metadata.get("encoders", "[]"))
        return tuple(str(entry.get("sha256", "")) if isinstance(entry, dict) else "" for entry in list(entries))
    except (ValueError, TypeError, RecursionError) as error:
        raise LikenessError(f"The 'encoders' entry of this adapter cannot be read ({error}); download or train the file "
                            "again.") from error


def extract(adapter: Adapter, encoders: Encoders, pictures: Tensor, combine: str, source: str) -> Subject:
    """Cut-out pictures (b, s, s, 3) in 0..1 -> SUBJECT. Raises LikenessError when the encoders do not fit."""
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


def project(subject: Subject, layers: list[str]) -> tuple[tuple[str, Tensor, Tensor], ...]:
    """K and V of every layer, made once for a whole run: (key, (n, l, channels), (n, l, channels))."""
    adapter: Adapter = subject.adapter
    local = subject.get("local")
    ready([adapter.patcher], local.shape[0] * local.shape[1] * adapter.config.width * 16)
    parameter = next(adapter.patcher.model.parameters())
    local = local.to(adapter.patcher.load_device, parameter.dtype)
    out = []
    for key in layers:
        k, v = adapter.patcher.model.keys_values(key, local)
        out.append((key, k.cpu(), v.cpu()))
    return tuple(out)


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
