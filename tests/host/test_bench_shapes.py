"""The row of CustAny in the bench of true shapes, on small networks."""
from __future__ import annotations

import pytest
import torch
from bench import _shapes as bench


@pytest.fixture
def small(host, monkeypatch) -> list[tuple[int, ...]]:
    """All networks of the row made small; the shapes of what the injection changed, each with the row without a subject whole."""
    from likeness.models.custany import adapter, config
    from likeness.models.hosting import injector

    changed = []

    class Counted(injector.LocalInjection):
        def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
            out = super().__call__(x, extra_options)
            if not torch.equal(out, x):
                changed.append(tuple(x.shape) if torch.equal(out[:1], x[:1]) else ())
            return out

    class Trained(adapter.CustAny):
        """An untrained one changes nothing."""
        def init_weights(self, generator: torch.Generator) -> None:
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    unet = {"model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "num_head_channels": -1,
            "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
            "context_dim": 16, "use_linear_in_transformer": False, "adm_in_channels": None}
    sizes = config.CustAnyConfig(16, (("dinov2", 32), ("mae", 32)), (("output.1.0", 64), ("output.3.0", 32)), grid=16,
                                 resolutions=(224, 256), head_dim=16)
    monkeypatch.setattr(bench, "CONFIGS", {"sd15": unet})
    monkeypatch.setattr(bench, "SIZES", {"sd15": 16})
    monkeypatch.setattr(bench, "LARGE", bench.LARGE | {"width": 32, "depth": 1, "heads": 2, "mlp": 64})
    monkeypatch.setattr(config, "preset", lambda _: sizes)
    monkeypatch.setattr(adapter, "CustAny", Trained)
    monkeypatch.setattr(injector, "LocalInjection", Counted)
    return changed


def test_the_injected_step_is_injected_and_the_plain_one_is_not(small):
    """Two layers in each of three runs, the first of which only warms up; the row without the subject is left alone."""
    row = bench.custany("sd15", torch.get_num_threads())
    assert small == [(2, 64, 64), (2, 256, 32)] * 3
    assert row["ratio"] == row["injected_step_s"] / row["plain_step_s"] and row["peak_ram_gib"] > 0


def test_encoders_make_the_references_and_stay_in_memory(small):
    from likeness.models.custany import config

    with torch.inference_mode():
        features, kept = bench.reference_tokens(2, config.preset("sd15"))
    assert [tuple(cls.shape) for cls, _ in features] == [(2, 32)] * 2
    assert [tuple(patches.shape) for _, patches in features] == [(2, 256, 32)] * 2
    assert len(kept) == 2 and all(bool(torch.isfinite(p).all()) for vit in kept for p in vit.parameters())
