"""The bench of the decoupling branch: what it asks for, how it judges, and that it trains with CustAny's own step."""
from __future__ import annotations

import pytest
import torch
from bench import _decoupling as bench

from harness.paths import HarnessError
from host.support import comfy
from likeness.models.demo import world
from likeness.models.hosting.demo import WEIGHTS
from likeness.models.hosting.training_base import MiniatureBase

assert comfy


@pytest.fixture(scope="module")
def asked() -> bench.Asked:
    base = MiniatureBase(WEIGHTS / "base.safetensors", [WEIGHTS / "dino.safetensors", WEIGHTS / "mae.safetensors"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "TURNS", 2)
        return bench.asked(base, 0)


class Adapter:
    """Says nothing of the reference."""
    def encode(self, features):
        return features[0][0], None

    def word_delta(self, tokens, word):
        return torch.zeros_like(word)


class Task:
    adapter = Adapter()


class Painter:
    """Draws the true latents of an identity at a facing, whatever it is told."""
    def __init__(self, t: bench.Asked, identity: torch.Tensor, facing: torch.Tensor):
        self.latents = t.truth[torch.arange(len(identity)), identity, facing]

    def encode_text(self, captions, words):
        return torch.zeros(len(captions), 4, bench.WIDTH), None, None

    def denoise(self, x_t, t, rows):
        return self.latents


def rates(t: bench.Asked, identity: torch.Tensor, facing: torch.Tensor) -> dict[str, float]:
    hits = bench.judged(Task, Painter(t, identity, facing), t)
    return {name: sum(values) / len(values) for name, values in hits.items()}


def test_every_identity_is_asked_for_from_both_sides(asked):
    assert asked.truth.shape[:3] == (32, 16, 2) and asked.facing.view(16, 2).sum(1).tolist() == [1] * 16
    assert asked.identity.tolist() == [k for k in range(16) for _ in range(2)], "intervals draw identities"
    for (untold, told), facing, word in zip(asked.captions, asked.facing.tolist(), asked.words, strict=True):
        assert untold.split("|")[3] == "" and told.split("|")[3] == bench.TOLD[1 - facing] and told.split("|")[0] == word
        assert untold.split("|")[:3] == told.split("|")[:3] and untold.split("|")[1] in world.SCENES
    assert [cls.shape[1] for cls, _ in asked.features] == [192, 192], "two halves of 96 channels"


def test_drawings_are_judged_by_the_nearest_true_one(asked):
    own, other = asked.identity, (asked.identity + 3) % 16
    assert rates(asked, own, asked.facing) == {"retrieval": 1.0, "leak": 1.0, "facing": 0.0}
    assert rates(asked, own, 1 - asked.facing) == {"retrieval": 1.0, "leak": 0.0, "facing": 1.0}
    assert rates(asked, other, asked.facing)["retrieval"] == 0.0


def test_the_branch_is_trained_where_it_is_asked_for(asked, monkeypatch):
    """All cases, one step each; every number is there with its interval."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it would stay so for all later tests
    monkeypatch.setattr(bench, "PAIRS", 16)
    monkeypatch.setattr(bench, "BATCH", 4)
    monkeypatch.setattr(bench, "asked", lambda base, seed: asked)
    branches, real = {}, bench.trained

    def trained(case, *rest):
        task, drawer = real(case, *rest)
        branches[case] = task.decouple is not None
        assert all(p.grad is not None for p in drawer.parameters()), "the drawer learns, too"
        return task, drawer
    monkeypatch.setattr(bench, "trained", trained)
    out = bench.decoupling([], [0, 1], 1, 1)
    assert branches == {case: case.decouple != "off" for case in bench.CASES.values()}
    for name in bench.CASES:
        for measure in bench.MEASURES:
            assert 0 <= out[f"{measure}_{name}_lo"] <= out[f"{measure}_{name}"] <= out[f"{measure}_{name}_hi"] <= 1
    few = bench.decoupling(["coupled", "abs"], [0], 1, 1)
    assert {key for key in few if key.startswith("verdict")} == {"verdict_leak_coupled_over_abs"} and "leak_free" not in few
    with pytest.raises(HarnessError, match="no row dec"):
        bench.decoupling(["dec"], [0], 1, 1)
    assert out["pictures_a_row"] == 64 * 8 and out["verdict_leak_coupled_over_raw"].startswith("not judged")
