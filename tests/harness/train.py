"""`dev.py train ...`: the pack's own trainer with the host on sys.path, on the CPU when there is no card."""
from __future__ import annotations

import importlib

from . import host, pack
from .paths import ROOT, HarnessError


def main(argv: list[str]) -> int:
    if not (ROOT / "nodes" / "training_cli.py").is_file():
        raise HarnessError("This checkout has no trainer yet (nodes/training_cli.py).")
    host.enter()
    pack.load_pack()
    return int(importlib.import_module(f"{pack.ALIAS}.nodes.training_cli").main(argv) or 0)
