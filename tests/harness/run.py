"""`dev.py run`: the server left running for a person."""
from __future__ import annotations

import argparse
import time
from pathlib import Path

from . import workflows
from .paths import DEV, host_dir, host_version
from .server import Server


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py run")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", type=Path)
    args = parser.parse_args(argv)
    # A folder that stays: what the artist saved is there the next time.
    base = DEV / "base" / "run"
    models = [host_dir() / "models", *([args.models] if args.models else [])]
    server = Server(base, models=models, port=args.port)
    print("Starting ComfyUI ...", flush=True)
    with server:
        workflows.copy_inputs(server.input)
        where = "the CPU" if server.cpu else "the graphics card"
        print(f"\n  ComfyUI {host_version()} with Likeness on {where}:  {server.url}\n\n"
              "  The shipped workflows: Templates in the side bar, then ComfyUI-Likeness.\n"
              f"  Your own model files go into {base / 'models'}\n"
              "  Ctrl-C ends it.\n", flush=True)
        shown = server.log_path.stat().st_size
        while server.process is not None and server.process.poll() is None:
            with open(server.log_path, "rb") as log:
                log.seek(shown)
                new = log.read()
            if new:
                shown += len(new)
                print(new.decode("utf-8", errors="replace"), end="", flush=True)
            time.sleep(0.3)
        print("The server ended by itself.")
        return 1
