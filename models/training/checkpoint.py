"""The state of a run on disk: a folder that is always either the whole old one or the whole new one.

<out>/state/ holds weights, ema and optimizer as safetensors, names "<module>.<parameter>", and state.json.
"""
from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError

FORMAT_VERSION = 1
PARTS = ("weights", "ema", "optimizer")


class Checkpoint(NamedTuple):
    """Everything a run needs to go on as if it had never stopped; `state` is JSON data."""
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(out_dir: Path, checkpoint: Checkpoint) -> None:
    """Write <out_dir>/state; a kill at any moment leaves a whole checkpoint, the new or the former one."""
    now, new, old = _folders(out_dir)
    _recover(out_dir)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    sizes = {}
    for name in PARTS:
        path = new / f"{name}.safetensors"
        files.save(path, getattr(checkpoint, name), {"likeness.checkpoint": str(FORMAT_VERSION)})
        sizes[path.name] = path.stat().st_size
    state = {"format_version": FORMAT_VERSION, "sizes": sizes, **checkpoint.state}
    with open(new / "state.json", "w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    # A folder cannot be replaced in one step: if killed between the two renames, `_recover` undoes the first.
    if now.exists():
        shutil.rmtree(old, ignore_errors=True)
        now.rename(old)
    new.rename(now)
    shutil.rmtree(old, ignore_errors=True)


def load(out_dir: Path) -> Checkpoint | None:
    """Read <out_dir>/state, None when there is none; raises LikenessError when a file in it is damaged."""
    _recover(out_dir)
    folder = _folders(out_dir)[0]
    if not folder.exists():
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format_version"] != FORMAT_VERSION:
            raise LikenessError(f"The checkpoint in {folder} has the format {state['format_version']}, this "
                                f"version reads {FORMAT_VERSION}; update the pack or start in another "
                                "folder.")
        for name, size in state["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise LikenessError(f"The checkpoint in {folder} is damaged: {name} should hold {size} "
                                    "bytes. Restore it from a copy or start in another folder.")
        weights, ema, optimizer = (files.load(folder / f"{name}.safetensors")[0] for name in PARTS)
    except LikenessError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LikenessError(f"The checkpoint in {folder} cannot be read ({error}); restore it from a copy or "
                            "start in another folder.") from error
    return Checkpoint(weights, ema, optimizer, state)


def pack_rng(generator: torch.Generator) -> str:
    """State of a generator as text."""
    return base64.b64encode(generator.get_state().numpy().tobytes()).decode("ascii")


def unpack_rng(text: str) -> Tensor:
    """`pack_rng` text as the tensor for set_state."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _folders(out_dir: Path) -> tuple[Path, Path, Path]:
    return out_dir / "state", out_dir / "state.new", out_dir / "state.old"


def _recover(out_dir: Path) -> None:
    now, _, old = _folders(out_dir)
    if old.exists() and not now.exists():
        old.rename(now)
