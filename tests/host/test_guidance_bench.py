"""The rows of `bench guidance` on a handful of pictures: that they run, and that what they say is so."""
from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(host: Any, monkeypatch: Any) -> Any:
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


def test_what_changes_beyond_the_mask_is_a_ratio_of_sums(bench):
    """One picture that hardly changes at all does not decide the row; the interval holds the value."""
    share = bench("custany").ratio
    assert share([1.0, 1.0], [2.0, 2.0]) == (0.5, 0.5, 0.5)
    value, low, high = share([1.0, 2.0, 3.0, 0.5], [4.0, 4.0, 4.0, 1e-9])
    assert value == pytest.approx(6.5 / 12) and low < value < high < float("inf")


@pytest.mark.parametrize("lows, word", (((0.6, 0.6), "both up"), ((0.6, 0.4), "not shown"), ((0.4, 0.6), "not shown")))
def test_the_word_on_similarity_and_control(bench, lows, word):
    numbers = {f"{name}_lo": low for name, low in zip(("retrieval", "scene"), lows, strict=True)}
    assert bench("_guidance_quality").together(numbers | {"retrieval_no_mask_hi": 0.5, "scene_no_mask_hi": 0.5}) == word


@pytest.mark.parametrize("family", ("sdxl", "sd15"))
def test_the_cost_is_the_median_of_three(bench, monkeypatch, family):
    """At the true shapes a call takes a minute: here a network of nothing, and a clock that says 1, 9, 2 seconds."""
    rows = bench("_guidance_shapes")
    assert (rows.STEPS, rows.REFRESH, rows.REPEATS) == (25, 12, 3)
    seen: list[Any] = []

    class Nothing(torch.nn.Module):
        def __init__(self, **settings: Any):
            super().__init__()

        def forward(self, x: Any, t: Any, context: Any, y: Any, transformer_options: Any) -> Any:
            assert (context.shape[2], y is None) == ((2048, False) if family == "sdxl" else (768, True))
            seen.append(transformer_options)
            return x
    ticks = iter([time for seconds in (5, *(1, 9, 2) * 4) for time in (0.0, float(seconds))])
    monkeypatch.setattr(rows, "UNetModel", Nothing)
    monkeypatch.setattr(rows, "attention_blocks", lambda holder: {"output.3.0": 8})
    monkeypatch.setattr(rows, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    numbers = rows.realcustom(family, 1)
    assert (numbers["plain_step_s"], numbers["injected_step_s"], numbers["ratio"], numbers["pass_s"]) == (2, 2, 1, 2)
    shared = [options[rows.MADE] for options in seen if rows.MADE in options]
    assert len(shared) == 1 + 3 and len({id(one) for one in shared}) == 4, "new in every call"


def test_training_seeds_stand_by_themselves_and_together(bench, monkeypatch):
    """Two seeds of four pictures: the mean of all, each seed's own, and an interval that knows how far seeds lie apart."""
    rows = bench("_guidance_quality")
    monkeypatch.setattr(rows, "IDENTITIES", 2)

    def seed(hits: list[float], near: float) -> dict[str, list[float]]:
        return {"retrieval": hits, "outside_near": [near] * 4, "outside_far": [2.0] * 4}
    one, other = seed([1.0] * 4, 1.0), seed([0.0] * 4, 0.5)
    out = rows.numbers([one, other])
    assert (out["retrieval"], out["retrieval_seeds"], out["retrieval_n"]) == (0.5, [1.0, 0.0], 8)
    assert (out["retrieval_lo"], out["retrieval_hi"]) == (0.0, 1.0), "no picture of a seed tells of another seed"
    assert (out["outside_change"], out["outside_change_seeds"], out["outside_change_n"]) == (0.375, [0.5, 0.25], 8)
    alone = rows.numbers([one])
    assert alone["retrieval"] == 1.0 and "retrieval_seeds" not in alone
