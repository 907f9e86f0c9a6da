"""Child processes of `bench customnet --load`: one writes a file of the true shapes, one loads it and tells its peak memory.

    python tests/bench/_load_peak.py write|load FOLDER [--ending .pt]     .pt is what the authors give out"""
from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[0] = str(HERE.parents[1])
ENDINGS = (".safetensors", ".pt")
KEYS = HERE.parents[1] / "golden" / "customnet" / "keys_customnet.json.gz"


def write(path: Path) -> None:
    """Random float32 of every tensor that the manifest names."""
    import torch
    from safetensors.torch import save_file

    keys = json.loads(gzip.decompress(KEYS.read_bytes()))
    state = {name: torch.zeros(entry["shape"], dtype=torch.int64) if "int" in entry["dtype"]
             else torch.empty(entry["shape"]).uniform_(-0.01, 0.01) for name, entry in keys.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def load(path: Path) -> None:
    """In a process that has done nothing else."""
    from harness import host, pack

    host.enter(cpu=True, base=host.private_base())
    pack.load_pack()
    import torch
    from bench._shapes import peak_ram

    from likeness.models.hosting import customnet

    with torch.inference_mode():
        loaded = customnet.load(path)
    assert loaded.variant == "normal"
    print(json.dumps({"peak": peak_ram() * 2 ** 30, "file": path.stat().st_size}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("write", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ending", choices=ENDINGS, default=ENDINGS[0])
    words = parser.parse_args()
    {"write": write, "load": load}[words.step](words.folder / f"true_shapes{words.ending}")
