"""True shapes: peak RAM and seconds a step of each method at the real sizes with random weights, a child process a row."""
from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.paths import ROOT, HarnessError

# method, family -> GiB of free memory below which the row is not begun
ROWS = {("custany", "sd15"): 10, ("custany", "sdxl"): 20, ("inversion", "sd15"): 7, ("inversion", "sdxl"): 16,
        ("instantid", "sdxl"): 14, ("photomaker", "sdxl"): 12, ("realcustom", "sdxl"): 16,
        ("realcustom", "sd15"): 7, ("customnet", "256"): 8}
# Each has a function of the method's name: family, threads -> numbers of the row.
MODULES = {"custany": "_shapes", "inversion": "_shapes_inversion", "instantid": "_portrait_shapes",
           "photomaker": "_portrait_shapes", "realcustom": "_guidance_shapes",
           "customnet": "_shapes"}


def free_gib() -> float:
    """Memory that a new process may take before the machine swaps or kills."""
    import psutil

    return psutil.virtual_memory().available / 2 ** 30


def row(method: str, family: str, threads: int) -> dict[str, float]:
    """In this process, which therefore must be a fresh one: all networks of the method, two rows of CFG."""
    return getattr(importlib.import_module(MODULES[method]), method)(family, threads)


def measured(method: str, family: str, threads: int) -> dict:
    """The row of a child process: its peak is that of this row alone."""
    name = f"{method}_{family}"
    free = free_gib()
    if free < ROWS[method, family]:
        return {f"{name}_peak_ram_gib": f"not measured: {free:.0f} GiB free, {ROWS[method, family]} wanted"}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "row.json"
        words = ["bench", "shapes", "--child", method, family, "--threads", str(threads), "--json", str(file)]
        # The bench may run on a card one day; this column is about RAM.
        env = {**os.environ, "LIKENESS_DEVICE": "cpu", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, str(ROOT / "tests" / "harness"), *words], env=env, capture_output=True, text=True)
        if done.returncode:
            raise HarnessError(f"The row {name} ended with code {done.returncode}, -9 is the system's word for no memory:\n"
                               + done.stderr[-2000:])
        numbers = json.loads(file.read_text(encoding="utf-8"))
    return {f"{name}_{key}": value for key, value in numbers.items() if key != "seconds"}


def chosen(words: list[str]) -> list[tuple[str, str]]:
    """Rows with one of the named methods and one of the named families; none named is all."""
    methods, families = ({pair[place] for pair in ROWS} for place in (0, 1))
    unknown = [word for word in words if word not in methods | families]
    if unknown:
        raise HarnessError(f"There is no row for {unknown[0]}; choose among {', '.join(sorted(methods | families))}.")
    return [(method, family) for method, family in ROWS
            if (method in words or not methods & set(words)) and (family in words or not families & set(words))]


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="dev.py bench shapes")
    parser.add_argument("--only", default=[], nargs="+", help="methods and families: inversion sd15")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return row(*args.child, args.threads)
    out: dict = {"threads": args.threads, "pictures": 1, "references": 2}
    for method, family in chosen(args.only):
        out |= measured(method, family, args.threads)
    return out
