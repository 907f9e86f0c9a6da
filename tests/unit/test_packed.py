"""The base in 8 bits: half a step of error at most, and the shipped files below their limit."""
from __future__ import annotations

from pathlib import Path

import torch

from likeness.models.common import files
from likeness.models.demo import packed

WEIGHTS = Path(__file__).parents[2] / "models" / "demo" / "weights"


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor([1e-3, 1.0, 40.0, 0.0]).repeat(24)[:, None, None, None]
    return {"unet.conv.weight": (torch.randn(96, 16, 3, 3, generator=generator) * rows).half(),
            "text.embedding.weight": torch.randn(300, 64, generator=generator).half(),
            "unet.norm.weight": torch.randn(8192, generator=generator).half(),
            "unet.small.weight": torch.randn(8, 8, generator=generator).half(),
            "first_stage.basis": torch.randn(192, 48, generator=generator)}


def test_packed_weights_come_back_within_half_a_step():
    """float64, row by row: a row of small weights has small errors though its neighbour is large."""
    whole = state()
    back = packed.unpack(packed.pack(whole))
    assert back.keys() == whole.keys()
    for name in ("unet.conv.weight", "text.embedding.weight"):
        was, now = whole[name].double().flatten(1), back[name].double().flatten(1)
        largest = was.abs().amax(1, keepdim=True)
        assert back[name].dtype == torch.float16 and not torch.equal(was, now)
        assert ((was - now).abs() <= largest * (1 / 254 + 2 ** -11) + 1e-7).all()


def test_small_tensors_and_the_first_stage_stay_bit_equal():
    whole = state()
    back = packed.unpack(packed.pack(whole))
    assert all(torch.equal(back[name], whole[name]) for name in ("unet.norm.weight", "unet.small.weight", "first_stage.basis"))
    again = packed.unpack(whole)
    assert all(torch.equal(again[name], value) for name, value in whole.items()), "a file that is not packed is read as it is"


def test_all_shipped_weights_fit_their_limit():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 16_000_000
    header = files.read_header(WEIGHTS / "base.safetensors")
    large = [name for name, info in header.tensors.items()
             if not name.startswith("first_stage.") and len(info.shape) > 1 and torch.Size(info.shape).numel() >= packed.LARGE]
    assert large and all(header.tensors[name].dtype == "I8" for name in large)
