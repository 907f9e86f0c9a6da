"""The import rules of the house, read from the source: which room may import what.

    nodes            comfy_api, torch (tensors, no networks), models.*; folder_paths only in nodes/_paths.py
    models/hosting   the host's comfy.*, every other room of models but training
    models/training  methods, common, vision; never the host
    models/*         torch and the plain libraries, common, vision; never one another, never the host
"""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.paths import ROOT

ROOMS_OF_METHODS = ("custany", "realcustom", "customcontrast", "customnet", "inversion", "face", "portrait")
SHARED = ("common", "vision")
MODELS = (*ROOMS_OF_METHODS, *SHARED, "demo", "hosting", "training")
PLAIN = {"torch", "einops", "safetensors", "numpy"}
HOST = {
    "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "execution",
    "folder_paths", "latent_preview", "main", "models", "node_helpers", "nodes", "server", "app", "utils",
}
# No network and no foreign program at run time, ever. pickle: only the host's safe loader opens such files.
NEVER = {
    "aiohttp", "asyncore", "cv2", "diffusers", "ftplib", "httpx", "pip", "requests", "smtplib", "socket", "urllib3",
    "urllib.request", "http.client", "http.server", "subprocess", "pickle", "huggingface_hub",
}


class Rule(NamedTuple):
    """What a room may import. rooms: of this pack. lazily: only inside functions, and only these."""

    rooms: set[str]
    libraries: set[str]
    lazily: set[str] = set()


FACE_LIBRARIES = {"insightface", "onnx", "onnx2torch", "onnxruntime", "PIL"}
METHODS_AND_SHARED = {*ROOMS_OF_METHODS, *SHARED}
RULES = {
    # The pack's own entry is light: everything else is imported when the host asks for the nodes.
    "root": Rule({"nodes"}, set(), {"comfy_api", "folder_paths", "typing_extensions"}),
    "nodes": Rule({"nodes", *MODELS}, {"comfy_api", "torch", "typing_extensions"}),
    "hosting": Rule({"hosting", "demo", *METHODS_AND_SHARED}, {"comfy", *PLAIN}, {"transformers"}),
    "training": Rule(
        {"training", *METHODS_AND_SHARED}, {*PLAIN, "PIL"}, {"accelerate", "bitsandbytes", "tensorboard"}
    ),
    # transformers is the fallback for a local folder with a config.json.
    "vision": Rule({*SHARED}, PLAIN, {"transformers"}),
    "common": Rule({*SHARED}, PLAIN),
    "demo": Rule({"demo", *SHARED}, PLAIN),
    **{name: Rule({name, *SHARED}, PLAIN) for name in ROOMS_OF_METHODS},
    "inversion": Rule({"inversion", *SHARED}, PLAIN, {"PIL"}),  # draws the plot of the residuals
    "realcustom": Rule({"realcustom", *SHARED}, PLAIN, {"PIL"}),  # writes labels on the sheet of masks
    "customnet": Rule({"customnet", *SHARED}, PLAIN, {"PIL"}),  # shrinks the reference as the release does
    "face": Rule({"face", *SHARED}, PLAIN, FACE_LIBRARIES),
}


class Import(NamedTuple):
    line: int
    name: str  # dotted; relative ones resolved to pack:<...>
    inside: bool  # inside a function


def room_of(path: str) -> str:
    """Room of a file, from its path in the checkout."""
    parts = path.split("/")
    if len(parts) == 1:
        return "root"
    if parts[0] == "nodes":
        return "nodes"
    return parts[1] if len(parts) > 2 else "models"


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, also those by name (import_module, __import__ with a plain text)."""
    package = ["pack:", *path.split("/")[:-1]]

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package[: len(package) - child.level + 1] or ["outside"]
                    base = ".".join([*above, *([child.module] if child.module else [])])
                # `from x import y`: y may be a module, so both names count.
                yield from (Import(child.lineno, f"{base}.{alias.name}", inside) for alias in child.names)
            elif isinstance(child, ast.Call):
                called = child.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in ("import_module", "__import__"):
                    first = child.args[0] if child.args else None
                    known = isinstance(first, ast.Constant) and isinstance(first.value, str)
                    yield Import(child.lineno, first.value if known else "<computed>", inside)
            yield from walk(child, deeper)

    return walk(ast.parse(source), False)


def faults(source: str, path: str) -> list[str]:
    """What a file at `path` does against the rules, one sentence each."""
    room, found = room_of(path), []
    rule = RULES.get(room, Rule(set(), set()))
    for item in imports(source, path):
        top, where = item.name.split(".")[0], f"{path}:{item.line}"
        second = ".".join(item.name.split(".")[:2])
        if item.name == "<computed>" or item.name.startswith("."):
            # The one place that gathers the families by name, guarded, so that one failing leaves the others.
            if path not in ("nodes/__init__.py", "__init__.py"):
                found.append(f"{where} imports a computed name")
        elif top == "pack:":
            parts = item.name.split(".")
            target = parts[2] if parts[1:2] == ["models"] and len(parts) > 2 else "".join(parts[1:2])
            if target not in rule.rooms:
                found.append(f"{where} ({room}) imports {item.name}")
        elif top in NEVER or second in NEVER:
            found.append(f"{where} imports {item.name}, which the pack never does")
        elif path == "nodes/_paths.py" and top == "folder_paths":
            continue
        elif top in rule.libraries:
            if room == "nodes" and second == "torch.nn":
                found.append(f"{where} imports {item.name}: networks live in models")
        elif top in rule.lazily:
            if not item.inside:
                found.append(f"{where} imports {item.name} outside of a function")
        elif top in HOST or top not in sys.stdlib_module_names:
            found.append(f"{where} ({room}) imports {item.name}")
    for node in ast.walk(ast.parse(source)):
        if room == "nodes" and isinstance(node, ast.ClassDef):
            bases = [ast.unparse(b) for b in node.bases]
            if any(b in ("nn.Module", "torch.nn.Module", "Module") for b in bases):
                found.append(f"{path}:{node.lineno} defines a network ({node.name}) in nodes")
    return found


def pack_files() -> list[Path]:
    return [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py")), *sorted((ROOT / "models").rglob("*.py"))]


@pytest.mark.parametrize("path", pack_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_rules(path):
    found = faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n" + "\n".join(found)


def test_every_room_has_a_rule():
    rooms = {p.name for p in (ROOT / "models").iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    assert rooms <= set(MODELS), f"rooms without a rule: {sorted(rooms - set(MODELS))}"


BAD = [
    ("models/custany/a.py", "import comfy.ops"),
    ("models/custany/a.py", "from comfy import ops"),
    ("models/custany/a.py", "def f():\n    import comfy.ops"),
    ("models/custany/a.py", "from ..realcustom import b"),
    ("models/custany/a.py", "from ..hosting.injector import b"),
    ("models/custany/a.py", "from ..training.loop import train"),
    ("models/custany/a.py", "from ...nodes import b"),
    ("models/custany/a.py", "from .. import hosting"),
    ("models/custany/a.py", "from .. import training as t"),
    ("models/custany/a.py", "import models.common"),
    ("models/custany/a.py", "import likeness.models.common.masks"),
    ("nodes/a.py", "from likeness.models.hosting import stamps"),
    ("models/custany/a.py", "import diffusers"),
    ("models/custany/a.py", "import cv2"),
    ("models/custany/a.py", "import folder_paths"),
    ("models/custany/a.py", "import PIL.Image"),
    ("models/custany/a.py", "from ....outside import x"),
    ("models/custany/a.py", "import importlib\nimportlib.import_module('comfy.ops')"),
    ("models/custany/a.py", "__import__('comfy')"),
    ("models/custany/a.py", "from importlib import import_module\nx = 'a'\nimport_module(x)"),
    ("models/common/a.py", "from ..custany import adapter"),
    ("models/vision/a.py", "import transformers"),
    ("models/face/a.py", "import insightface"),
    ("models/face/a.py", "from PIL import Image"),
    ("models/demo/a.py", "from ..custany.adapter import CustAny"),
    ("models/hosting/a.py", "import comfy_api.latest"),
    ("models/hosting/a.py", "import folder_paths"),
    ("models/hosting/a.py", "import server"),
    ("models/hosting/a.py", "from ...nodes import x"),
    ("models/hosting/a.py", "from ..training import loop"),
    ("models/training/a.py", "import comfy.sd"),
    ("models/training/a.py", "from ..hosting import demo"),
    ("models/training/a.py", "from ..demo import renderer"),
    ("models/training/a.py", "import accelerate"),
    ("models/training/a.py", "import urllib.request"),
    ("models/training/a.py", "from urllib import request"),
    ("models/training/a.py", "import subprocess"),
    ("models/new_room/a.py", "import torch"),
    ("nodes/a.py", "import comfy.model_management"),
    ("nodes/a.py", "import folder_paths"),
    ("nodes/a.py", "from server import PromptServer"),
    ("nodes/a.py", "import nodes"),
    ("nodes/a.py", "import torch.nn as nn"),
    ("nodes/a.py", "from torch import nn"),
    ("nodes/a.py", "import torch\nclass A(torch.nn.Module): ..."),
    ("nodes/a.py", "import importlib\nimportlib.import_module('.b', __package__)"),
    ("__init__.py", "import torch"),
    ("__init__.py", "import folder_paths"),
    ("__init__.py", "from .models import common"),
]
GOOD = [
    ("models/custany/a.py", "import math\nimport torch.nn.functional as F\nfrom einops import rearrange"),
    ("models/custany/a.py", "from ..common.masks import as_mask\nfrom ..vision import vit\nfrom .config import C"),
    ("models/face/a.py", "def f():\n    import insightface\n    from PIL import Image"),
    ("models/vision/a.py", "def f():\n    import transformers"),
    ("models/hosting/a.py", "import comfy.ops\nfrom comfy.sd import VAE\nfrom ..custany.adapter import CustAny"),
    ("models/training/a.py", "import PIL.Image\nfrom ..custany import losses\ndef f():\n    import accelerate"),
    ("nodes/a.py", "from comfy_api.latest import io\nimport torch\nfrom ..models.hosting import injector"),
    ("nodes/_paths.py", "import folder_paths"),
    ("nodes/__init__.py", "from importlib import import_module\nimport_module(f'.{x}', __package__)"),
    ("__init__.py", "import logging\nasync def f():\n    import folder_paths\n    from .nodes import x"),
]


@pytest.mark.parametrize(("path", "source"), BAD)
def test_a_breach_is_seen(path, source):
    assert faults(source, path)


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_what_is_allowed_passes(path, source):
    assert faults(source, path) == []


def test_importing_the_pack_loads_nothing_heavy():
    """In a process of its own: neither torch nor the host nor any weights when the host imports the pack."""
    import subprocess

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from harness.pack import load_pack; load_pack()\n"
        "heavy = {'torch', 'numpy', 'transformers', 'insightface', 'comfy', 'comfy_api', 'folder_paths'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not {'nodes', 'models'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "tests")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
