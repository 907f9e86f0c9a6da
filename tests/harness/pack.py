"""The pack under its alias `likeness`, and copies of it for a server or a mutation run."""
from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .paths import PACK_PARTS, ROOT, HarnessError

ALIAS = "likeness"


def load_pack(root: Path = ROOT) -> ModuleType:
    """Import the checkout once as package `likeness`, whatever its folder is called.

    The checkout never stands on sys.path: the host has top-level modules named `nodes` and `models` too.
    """
    if ALIAS in sys.modules:
        return sys.modules[ALIAS]
    if not (root / "__init__.py").is_file():
        raise HarnessError(f"{root} has no __init__.py, so it is not the pack.")
    spec = importlib.util.spec_from_file_location(
        ALIAS, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[ALIAS]
        raise
    return module


async def _nodes() -> list[type]:
    extension = load_pack().comfy_entrypoint()
    if asyncio.iscoroutine(extension):
        extension = await extension
    return await extension.get_node_list()


def pack_nodes() -> dict[str, Any]:
    """Node classes of the pack by node id, as the host registers them (call host.enter before)."""
    return {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(_nodes())}


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith((".pyc", ".part"))
    }


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def mirror(source: Path, target: Path, parts: tuple[str, ...] = PACK_PARTS) -> Path:
    """Make `target` hold exactly the named parts of `source`; unchanged files stay. No links, so it
    works on every system and the server sees what an installed pack looks like."""
    wanted: dict[str, Path] = {}
    for part in parts:
        if (source / part).is_dir():
            wanted.update({f"{part}/{name}": path for name, path in _files(source / part).items()})
        elif (source / part).is_file():
            wanted[part] = source / part
    target.mkdir(parents=True, exist_ok=True)
    for name, path in _files(target).items():
        if name not in wanted:
            path.unlink()
    for name, path in wanted.items():
        copy = target / name
        if copy.is_file() and _stamp(copy) == _stamp(path):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    for folder in sorted((p for p in target.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    return target
