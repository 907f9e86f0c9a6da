"""What a training draws or computes once and keeps in its work folder."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def cache_key(*parts: object) -> str:
    """A short name for all that a cached file depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def keep(path: Path, value: object) -> None:
    """Saves a cache for this work folder whole or not at all: half a file would be taken for a whole one.

    Several runs may share a folder, each writes a part of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save(value, part)
    os.replace(part, path)


def kept_or_made(path: Path, kind: Callable[..., Any], make: Callable[[], Any]) -> Any:
    """The record of `kind` (a NamedTuple of tensors) that lies at `path`, or what `make` gives, kept there for the next run."""
    if path.exists():
        return kind(*torch.load(path, weights_only=True))
    made = make()
    keep(path, tuple(made))
    return made
