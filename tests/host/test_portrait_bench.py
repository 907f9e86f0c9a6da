"""The rows of `bench shapes` for portraits, on tiny files: what they measure has to run before the large ones are begun."""
from __future__ import annotations

import importlib

import pytest
import torch

from harness import portraits
from harness.paths import ROOT

from .support import comfy  # noqa: F401


@pytest.mark.parametrize(("name", "keys"), [("instantid", {"plain_step_s", "injected_step_s", "ratio", "peak_ram_gib"}),
                                            ("photomaker", {"plain_step_s", "encode_s", "peak_ram_gib"})])
def test_the_rows_run_at_small_sizes(monkeypatch, name, keys):
    from harness.tiny_models import families  # it needs the host on the path

    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))  # as the harness does for benches
    bench = importlib.import_module("bench._portrait_shapes")
    torch.manual_seed(0)
    numbers = getattr(bench, name)("sdxl", torch.get_num_threads(), portraits.TINY, families.SDXL_UNET, 16)
    assert numbers.keys() == keys and all(value > 0 for value in numbers.values())
