"""Where things are. Standard library only; every place can be moved by an environment variable."""
from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEV = Path(os.environ.get("LIKENESS_DEV") or ROOT / ".dev")
WORKFLOWS = ROOT / "workflows"
PACK_FOLDER = "ComfyUI-Likeness"
# What the registry ships and what a server gets; the rest of the checkout is for developers.
PACK_PARTS = (
    "__init__.py", "pyproject.toml", "requirements.txt", "requirements-noface.txt", "README.md", "LICENSE",
    "nodes", "models", "workflows", "subgraphs", "js", "locales",
)


class HarnessError(RuntimeError):
    """One sentence that says what is missing and how to mend it."""


def stored_setup() -> dict:
    """What `dev.py setup` noted down, or an empty dict."""
    try:
        return json.loads((DEV / "setup.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def host_dir() -> Path:
    """The ComfyUI source folder: COMFYUI_PATH, else the one of the last set-up, else .dev/ComfyUI."""
    place = os.environ.get("COMFYUI_PATH") or stored_setup().get("comfyui") or DEV / "ComfyUI"
    path = Path(place).expanduser().resolve()
    if not (path / "main.py").is_file():
        raise HarnessError(f"No ComfyUI in {path}: run `python dev.py setup`, or set COMFYUI_PATH.")
    return path


def host_version() -> str:
    """Version string of the host, read from its source without importing it."""
    text = (host_dir() / "comfyui_version.py").read_text(encoding="utf-8")
    return text.split("__version__", 1)[1].split('"')[1]
