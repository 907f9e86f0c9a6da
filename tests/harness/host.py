"""The real host inside this process (tests/host, bench, train, doctor)."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .paths import DEV, HarnessError, host_dir, host_version


def accelerator() -> bool:
    """True when torch sees a CUDA / ROCm card or Apple's GPU; LIKENESS_DEVICE=cpu says no."""
    if os.environ.get("LIKENESS_DEVICE", "").lower() == "cpu":
        return False
    import torch

    mps = getattr(torch.backends, "mps", None)
    return torch.cuda.is_available() or bool(mps and mps.is_available())


def enter(cpu: bool | None = None, base: Path | None = None) -> SimpleNamespace:
    """Put the host first on sys.path and set its arguments before any of its other modules loads.

    `cpu=None` asks torch for a card. `base` moves models, input, output and temp away from the host's
    own folder. Returns a namespace with path, version, args. Calling it again changes nothing.
    """
    path = host_dir()
    if sys.path[:1] != [str(path)]:
        sys.path[:] = [str(path)] + [p for p in sys.path if p != str(path)]
    loaded = sys.modules.get("nodes")
    if loaded is not None and Path(loaded.__file__ or "").resolve() != path / "nodes.py":
        raise HarnessError(f"Another module named `nodes` ({loaded.__file__}) was imported before the host.")
    first = "comfy.model_management" not in sys.modules and "folder_paths" not in sys.modules
    from comfy.cli_args import args

    if first:
        args.cpu = (not accelerator()) if cpu is None else cpu
        # Nothing of ours talks to a network; keep the libraries below it quiet as well.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
            args.base_directory = str(base.resolve())
    return SimpleNamespace(path=path, version=host_version(), args=args)


def private_base() -> Path:
    """Private base directory for host modules inside a test process."""
    return DEV / "base" / "in-process"


def load_checkpoint(path: Path) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of a checkpoint file, through the host's own loader. Needs `enter` first."""
    import comfy.sd
    import torch

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]
