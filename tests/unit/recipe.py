"""Golden numbers that are made by a rule, not stored (recipe.json of their folder checks them by hash)."""
from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden" / "realcustom"
RECIPE = json.loads((GOLDEN / "recipe.json").read_text(encoding="utf-8"))


def manifest(name: str, folder: Path = GOLDEN) -> dict[str, list[int]]:
    """{tensor name: shape} of a golden key list."""
    return json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))


def golden(name: str, folder: Path = GOLDEN) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def stream(seed: int, count: int) -> np.ndarray:
    """z: close to standard normal, from the raw 64-bit numbers of PCG64."""
    raw = np.random.PCG64(seed).random_raw(count).astype("<u8")
    return (raw.view("<u2").reshape(count, 4).sum(1, dtype="i8") - 131070) / 37837


def byte_stream(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.random.PCG64(seed).random_raw(-(-count // 8)).astype("<u8").view("u1")[:count].reshape(shape)


def weights(name: str, folder: Path = GOLDEN) -> dict[str, torch.Tensor]:
    """The weights of a golden model: float16 values as float32."""
    rule = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["weights"][name]
    shapes = dict(sorted(manifest(rule["keys"].removesuffix(".json.gz"), folder).items()))
    values, at, out, digest = stream(rule["seed"], rule["values"]), 0, {}, hashlib.sha256()
    for key, shape in shapes.items():
        count = int(np.prod(shape))
        z, at = values[at : at + count].reshape(shape), at + count
        if any(word in key for word in ("pos_embed", "token", "latent")):
            z = 0.5 * z
        elif len(shape) >= 2:
            z = z / np.prod(shape[1:]) ** 0.5
            if any(word in key for word in rule.get("gain_1p5", ())):
                z = 1.5 * z
        else:
            z = 1 + 0.1 * z if key.endswith(("weight", "gamma")) else 0.1 * z
        half = z.astype("<f2")
        digest.update(half.tobytes())
        out[key] = torch.from_numpy(half.astype(np.float16)).float()
    assert digest.hexdigest() == rule["sha256_float16"]
    return out
