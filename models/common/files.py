"""safetensors files: read the header alone, name what is wrong with a file, never leave a half file."""
from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import LikenessError

SUFFIXES = (".safetensors", ".sft")
PORTION = 2 ** 28  # bytes that are read before a file is closed and opened again
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
# Bits of one value; types that are not listed here pass without a check of their size.
_BITS = {"F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
         "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
         "I64": 64, "U64": 64, "F64": 64, "C64": 64}
_AGAIN = "download it again"


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By the file's ending, however it is written."""
    return Path(path).suffix.lower() in SUFFIXES


class TensorInfo(NamedTuple):
    """Type (the format's name, such as "F16") and shape of one tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """What a safetensors file says about itself: {name: TensorInfo} and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def _refuse(path: Path, reason: str, advice: str) -> LikenessError:
    return LikenessError(f"The file {path.name} {reason}: {advice}.")


def _check_start(path: Path) -> tuple[int, bytes]:
    """(size in bytes, first 512 bytes) of a file; LikenessError for what is no weights file at all."""
    if not path.exists():
        raise _refuse(path, "does not exist", "check its name and folder")
    if path.is_dir():
        raise _refuse(path, "is a folder", "choose a file inside it")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise _refuse(path, f"cannot be read ({error.strerror})", "check its rights and its disk") from error
    if size == 0:
        raise _refuse(path, "is empty", _AGAIN)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--")):
        raise _refuse(path, "is a web page that was saved under this name",
                      "download the file itself, often behind a separate download button or a login")
    if text.startswith(b"version https://git-lfs"):
        raise _refuse(path, "is only a git-LFS pointer, not the weights",
                      "run `git lfs pull` in its repository or download the file itself")
    return size, start


def _check_tensor(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """(info, first byte, byte after the last) of one header entry; LikenessError if it makes no sense."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or any(type(number) is not int for number in numbers):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(path, f"has a broken header entry for {name}", _AGAIN) from error
    if min(numbers) < 0 or end < begin:
        raise _refuse(path, f"has negative sizes or offsets in the header entry of {name}", _AGAIN)
    if dtype in _BITS and (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _refuse(path, f"has a header entry for {name} whose shape does not fit its number of bytes",
                      _AGAIN)
    return TensorInfo(dtype, shape), begin, end


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, types, shapes and metadata of a safetensors file, without reading a tensor.

    Raises LikenessError with one sentence for a file that is missing, empty, a web page, a git-LFS pointer,
    cut off, or no safetensors file.
    """
    path = Path(path)
    size, start = _check_start(path)
    # A header of 640 bytes begins like a pickle, but only a safetensors file has a brace at this place.
    if start[8:9] != b"{" and start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        raise _refuse(path, "is a PyTorch file (.pt, .pth or .bin), not a safetensors file",
                      "give it its right ending or download the safetensors version")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 2 <= length <= MAX_HEADER or (len(start) > 8 and start[8:9] != b"{"):
        raise _refuse(path, "is not a safetensors file, its start makes no sense", "choose another file")
    if size < 8 + length:
        raise _refuse(path, f"is cut off inside its header ({size} bytes)", _AGAIN)
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except OSError as error:
        raise _refuse(path, f"cannot be read ({error.strerror})", "check its disk") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _refuse(path, "is not a safetensors file, its header cannot be read", _AGAIN) from error

    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], begin, end = _check_tensor(path, name, entry)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlapping tensors" if begin < position else "a gap between its tensors"
            raise _refuse(path, f"has {kind} at {name}", _AGAIN)
        position = end
    needed = 8 + length + position
    if size < needed:
        raise _refuse(path, f"is cut off: it has {size} bytes of {needed}", _AGAIN)
    if size > needed:
        raise _refuse(path, f"has {size - needed} bytes too many", _AGAIN)
    return Header(tensors, dict(metadata))


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise LikenessError with one sentence if a weights file is unusable; .safetensors are checked whole."""
    if is_safetensors(path):
        read_header(path)
    else:
        _check_start(Path(path))


def version(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """Path, time of the last change and size: what tells whether a file is still the one that was read."""
    stat = os.stat(path)
    return str(path), stat.st_mtime_ns, stat.st_size


def sha256(path: str | os.PathLike[str], step: Callable[[int], None] | None = None) -> str:
    """Hexadecimal SHA-256 of a file; raises LikenessError if there is none. step: called with the bytes of each block."""
    path = Path(path)
    _check_start(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if step is not None:
                step(len(block))
    return digest.hexdigest()


def _ready(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU where needed; the format refuses tensors that share memory."""
    out, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write to that becomes `path` at the end, or nothing: on any failure an existing file stays untouched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because only a rename within one disk is atomic.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        rights = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, rights)  # safetensors makes files that only their owner can read
        with temporary.open("rb+") as file:  # writable, else Windows refuses to flush
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor],
         metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    with whole(path) as temporary:
        save_file(_ready(tensors), temporary, metadata=dict(metadata or {}))


def copy(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copy a file whole or not at all."""
    with whole(path) as temporary:
        shutil.copyfile(source, temporary)


def read_saved(path: str | os.PathLike[str], kind: str, version: int) -> dict[str, str]:
    """Metadata of a file that a save node of ours wrote; kind is "subject" or "inversion".

    Raises LikenessError for a file of another kind and for a format newer than `version`.
    """
    name = Path(path).name
    said = read_header(path).metadata
    if said.get("format") != f"likeness.{kind}":
        raise LikenessError(f"The file {name} is no saved {kind}; choose a file that Save {kind.capitalize()} wrote.")
    written = said.get("format_version", "")
    if not written.isdecimal() or int(written) > version:
        raise LikenessError(f"The {kind} {name} has the format version {written or 'unknown'}, this version of Likeness reads up "
                            f"to {version}; update the pack.")
    return said


def _portions(header: Header, only: Callable[[str], bool] | None) -> Iterator[list[str]]:
    """Names in the header's order, few enough to open the file anew for each list: what was read of a mapped file counts as
    memory until the file is closed, and would stand there twice."""
    names: list[str] = []
    bits = 0
    for name, info in header.tensors.items():
        if only is not None and not only(name):
            continue
        names.append(name)
        bits += _BITS.get(info.dtype, 64) * math.prod(info.shape)
        if bits >= 8 * PORTION:
            yield names
            names, bits = [], 0
    if names:
        yield names


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu",
         only: Callable[[str], bool] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; `only` picks tensors by name.

    Raises LikenessError for a file that read_header refuses."""
    header = read_header(path)
    tensors: dict[str, Tensor] = {}
    try:
        for names in _portions(header, only):
            with safe_open(path, framework="pt", device=str(device)) as file:
                # Copies: a tensor that stays mapped into the file would block its replacement on Windows.
                tensors |= {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise _refuse(Path(path), f"cannot be read ({error})", _AGAIN) from error
    return tensors, header.metadata
