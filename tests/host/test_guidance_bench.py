"""The rows of `bench guidance` on a handful of pictures: that they run, and that what they say is so."""
from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: Any) -> Any:
    """By name: a part of the bench, with tests/bench on the path as in every bench."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_where_the_mask_lies_is_measured_on_two_renders(bench, monkeypatch):
    rows = bench("_guidance_located")
    monkeypatch.setattr(rows, "RENDERS", 2)
    out = rows.located()
    assert out["renders"] == 2 and out["inside"] > 0.5 and 0 < out["inside_chance"] <= 1
    for name in ("mask_iou", "mask_iou_step2", "mask_iou_step5", "mask_iou_step10", "mask_iou_all"):
        assert 0 < out[name] <= 1, name
