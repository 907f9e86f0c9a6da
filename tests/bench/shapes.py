"""True shapes: peak RAM and seconds a step of each method at the real sizes with random weights, a child process a row."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.paths import ROOT, HarnessError

# method, family -> GiB of free memory below which the row is not begun
ROWS = {("custany", "sd15"): 10, ("custany", "sdxl"): 20, ("customnet", "256"): 8}


def free_gib() -> float:
    """Memory that a new process may take before the machine swaps or kills."""
    import psutil

    return psutil.virtual_memory().available / 2 ** 30


def row(method: str, family: str, threads: int) -> dict[str, float]:
    """In this process, which therefore must be a fresh one: encoders, adapter and UNet, two rows of CFG.

    customnet: all four parts of the file; plain is the same network without object."""
    from _shapes import customnet_seconds, step_seconds

    if method == "customnet":
        plain, shown, peak = customnet_seconds(threads)
        return {"peak_ram_gib": peak, "plain_step_s": plain, "object_step_s": shown, "ratio": shown / plain}
    plain, injected, peak = step_seconds(family, threads, encoders=True, repeats=1)
    return {"peak_ram_gib": peak, "plain_step_s": plain, "injected_step_s": injected, "ratio": injected / plain}


def measured(method: str, family: str, threads: int) -> dict:
    """The row of a child process: its peak is that of this row alone."""
    name = f"{method}_{family}"
    free = free_gib()
    if free < ROWS[method, family]:
        return {f"{name}_peak_ram_gib": f"not measured: {free:.0f} GiB free, {ROWS[method, family]} wanted"}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "row.json"
        words = ["bench", "shapes", "--child", f"{method}_{family}", "--threads", str(threads), "--json", str(file)]
        # The bench may run on a card one day; this column is about RAM.
        env = {**os.environ, "LIKENESS_DEVICE": "cpu", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, str(ROOT / "tests" / "harness"), *words], env=env, capture_output=True, text=True)
        if done.returncode:
            raise HarnessError(f"The row {name} ended with code {done.returncode}, -9 is the system's word for no memory:\n"
                               + done.stderr[-2000:])
        numbers = json.loads(file.read_text(encoding="utf-8"))
    return {f"{name}_{key}": value for key, value in numbers.items() if key != "seconds"}


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="dev.py bench shapes")
    parser.add_argument("--only", default="", help="sd15, sdxl or 256 (CustomNet)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return row(*args.child.split("_"), args.threads)
    out: dict = {"threads": args.threads, "pictures": 1, "references": 2}
    for method, family in ROWS:
        if args.only in ("", family):
            out |= measured(method, family, args.threads)
    return out
