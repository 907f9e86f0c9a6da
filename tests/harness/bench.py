"""`dev.py bench NAME`: tests/bench/NAME.py inside the virtual environment.

A bench is a module with a docstring and `main(argv: list[str]) -> dict`: flat, keys as the issue names
them, values numbers or short texts. The pack is loaded as `likeness` and the host stands on sys.path.
"""
from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from . import host, pack
from .paths import ROOT, HarnessError

FOLDER = ROOT / "tests" / "bench"


def available() -> dict[str, str]:
    """Name of each bench and the first line of its docstring (read, not imported)."""
    found = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.splitlines()[0] if text else ""
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py bench", add_help=False)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--json", type=Path)
    args, words = parser.parse_known_args(argv)
    names = available()
    if args.name not in names:
        listed = "".join(f"\n  {name:16} {about}" for name, about in names.items()) or " nothing yet"
        if args.name:
            raise HarnessError(f"There is no bench named {args.name}. There is:{listed}")
        print(f"What can be measured:{listed}")
        return 0
    host.enter()
    pack.load_pack()
    sys.path.insert(1, str(FOLDER))  # benches may share helpers; the host stays first
    spec = importlib.util.spec_from_file_location(f"bench_{args.name}", FOLDER / f"{args.name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    begin = time.monotonic()
    numbers = module.main(words)
    if not isinstance(numbers, dict):
        raise HarnessError(f"The bench {args.name} gave {type(numbers).__name__}, not a dict of numbers.")
    numbers = {**numbers, "seconds": round(time.monotonic() - begin, 1)}
    width = max(map(len, numbers))
    for key, value in numbers.items():
        print(f"{key:{width}}  {value:.4g}" if isinstance(value, float) else f"{key:{width}}  {value}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        os.replace(part, args.json)
    return 0
