"""`dev.py doctor`: a plain text report to paste into a bug report."""
from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from . import host
from .paths import DEV, ROOT, HarnessError, host_dir, host_version

FOLDERS = (
    "likeness", "clip_vision", "checkpoints", "photomaker", "controlnet", "insightface", "instantid", "loras",
)
MODEL_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
# One import name can come from several packages that overwrite each other's files.
SHARED = {"cv2": "opencv", "onnxruntime": "onnxruntime"}


def package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def device_lines() -> list[str]:
    import torch

    built = torch.version.cuda or torch.version.hip or "CPU"
    lines = [f"torch         {torch.__version__} (built for {built})"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        lines.append(f"device        {about.name}, {about.total_memory / 2**30:.0f} GiB")
    mps = getattr(torch.backends, "mps", None)
    if mps and mps.is_available():
        lines.append("device        Apple GPU (mps)")
    if not host.accelerator():
        lines.append(f"device        CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    return lines


def model_lines(roots: list[Path]) -> tuple[list[str], dict[str, int]]:
    """Model files of our folders below each models/ folder, and how many each folder has."""
    lines, counts = [], dict.fromkeys(FOLDERS, 0)
    for place in roots:
        lines.append(f"{place}{'' if place.is_dir() else '  (no such folder)'}")
        for name in FOLDERS:
            files = sorted(p for p in (place / name).rglob("*") if p.suffix.lower() in MODEL_ENDINGS)
            counts[name] += len(files)
            for path in files[:20]:
                size = path.stat().st_size / 1e6
                lines.append(f"  {path.relative_to(place).as_posix()}  {size:.1f} MB")
            if len(files) > 20:
                lines.append(f"  {name}/ and {len(files) - 20} more")
    return lines, counts


def wanted(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return [re.split(r"[<>=;\[]", line)[0] for line in lines]


def main(argv: list[str]) -> int:
    mend: list[str] = []
    pack = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    print(f"Likeness      {pack.group(1) if pack else '?'} in {ROOT}")
    try:
        print(f"ComfyUI       {host_version()} in {host_dir()}")
        models = [host_dir() / "models"]
    except HarnessError as e:
        print("ComfyUI       not found")
        mend.append(str(e))
        models = []
    print(f"Python        {platform.python_version()} in {sys.executable}")
    print(f"System        {platform.platform()}")
    try:
        print("\n".join(device_lines()))
    except ImportError as e:
        print("torch         does not load")
        mend.append(f"torch does not load ({e}): python dev.py setup")

    print("\nPackages")
    basic = wanted("requirements-noface.txt")
    for name in dict.fromkeys([*basic, *wanted("requirements.txt"), "onnx", "comfy-cli", "pytest"]):
        found = package(name)
        print(f"  {name:14}{found or 'missing'}")
        if not found and name in basic:
            mend.append(f"{name} is missing: install requirements-noface.txt with ComfyUI's own Python")
        elif not found and name in ("insightface", "onnx2torch"):
            mend.append(f"{name} is missing, so the face nodes do not work (all others do): install "
                        "requirements.txt with ComfyUI's own Python")
    owners = packages_distributions()
    for module, what in SHARED.items():
        names = sorted(set(owners.get(module, [])))
        print(f"  {module:14}" + (", ".join(f"{n} {package(n)}" for n in names) or "missing"))
        if len(names) > 1:
            mend.append(f"{' and '.join(names)} overwrite each other's files: uninstall all of them, then "
                        f"install the one {what} package that you want")

    print("\nModel files")
    folders, counts = model_lines([*models, DEV / "base" / "run" / "models"])
    print("\n".join("  " + line for line in folders))
    weights = sorted((ROOT / "models" / "demo" / "weights").glob("*.safetensors"))
    print(f"  miniature world: {len(weights)} files, {sum(p.stat().st_size for p in weights) / 1e6:.1f} MB")
    if not weights:
        mend.append("The miniature world's files are missing: fetch the checkout again or dev.py train demo")
    if not counts["likeness"]:
        mend.append("No adapter file in models/likeness: without one only the miniature world can be used")

    print("\n" + ("What to mend" if mend else "Nothing is missing."))
    for line in mend:
        print("  - " + line)
    return 0
