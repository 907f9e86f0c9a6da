"""The live mask against the numbers of the release: one pass, the masked call, and the whole loop."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from host import release
from host.release import IO
from host.test_realcustom_golden import check_loop, loop
from likeness.models.hosting import guidance, word_maps
from likeness.models.realcustom import schedule

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


class Spy:
    """What the guidance passes of a run summed up, and the masks that came of it."""

    def __init__(self, monkeypatch: Any):
        self.captures: list[Any] = []
        self.masks: list[torch.Tensor] = []
        self.layers: list[torch.Tensor] = []
        made, added = guidance.Capture, word_maps.MaskSum.add

        def capture(*args):
            self.captures.append(made(*args))
            return self.captures[-1]

        def note(run, guides, masks, *rest):
            self.masks += masks.values()
            return keep(run, guides, masks, *rest)

        def add(total, layer):
            self.layers.append(layer)
            return added(total, layer)
        keep = guidance.Run.note
        monkeypatch.setattr(guidance, "Capture", capture)
        monkeypatch.setattr(guidance.Run, "note", note)
        monkeypatch.setattr(word_maps.MaskSum, "add", add)


def by_formula(norm: str) -> torch.Tensor:
    """The mask from the release's own maps, written out in float64; a quarter of 96 places is kept."""
    maps = [IO[f"single.t599.target_map.{index}"].double() for index in range(22)]
    s = torch.stack([torch.nn.functional.interpolate(one, (8, 12), mode="bilinear") for one in maps])

    def to_one(planes):
        low, high = planes.amin((-2, -1), keepdim=True), planes.amax((-2, -1), keepdim=True)
        return (planes - low) / (high - low + 1e-6)
    mean = {"max_norm": lambda: s.mean(0) / (s.mean(0).max() + 1e-6), "min_max_norm": lambda: to_one(s.mean(0)),
            "min_max_per_channel": lambda: to_one(to_one(s).mean(0))}[norm]()
    least = mean.flatten().sort().values[-24]
    return torch.where(mean >= least, mean, 0.0).float()


@pytest.mark.parametrize("norm", guidance.NORMS)
def test_the_mask_of_one_pass(norm, monkeypatch):
    """Ending the pass early changes not one bit of it."""
    spy = Spy(monkeypatch)
    for early in (False, True):
        done = release.injected(guidance=release.guidance(norm, early=early))
        release.noise_of(done.model, done.positive)
    torch.testing.assert_close(spy.masks[0], by_formula(norm), **CLOSE)
    assert torch.equal(*spy.masks)


@pytest.mark.parametrize("early", (False, True))
def test_one_call_under_the_live_mask(early):
    done = release.injected(guidance=release.guidance(early=early))
    torch.testing.assert_close(by_formula("max_norm"), IO["single.t599.mask.max_norm"], **CLOSE)
    torch.testing.assert_close(release.noise_of(done.model, done.positive), IO["single.t599.cond_eps.max_norm"], **CLOSE)


def test_every_layer_sees_the_word_where_the_release_does(monkeypatch):
    spy = Spy(monkeypatch)
    done = release.injected(guidance=release.guidance())
    release.noise_of(done.model, done.positive)
    assert len(spy.layers) == 22
    for index, layer in enumerate(spy.layers):
        want = IO[f"single.t599.target_map.{index}"]
        torch.testing.assert_close(layer, word_maps.resized(want, tuple(layer.shape[-2:])), **CLOSE)


def test_the_whole_loop_with_the_live_mask(monkeypatch):
    """Six steps, fresh masks at the first three: masks, latents and predictions of the release."""
    spy = Spy(monkeypatch)
    done = release.injected(guidance=release.guidance(refresh=3))
    check_loop(*loop(done.model, done.positive, done.negative))
    golden = IO["loop.6steps.reuse3.max_norm.masks"]
    assert len(spy.masks) == 3 == len(spy.captures)
    for mine, want in zip(spy.masks, golden, strict=False):
        torch.testing.assert_close(mine[0], want, atol=2e-5, rtol=0)
    torch.testing.assert_close(spy.masks[-1][0], golden[-1], atol=2e-5, rtol=0)  # the last one was kept
    assert max(one.held for one in spy.captures) == 4 * 8 * 12
    assert schedule.REUSE == 12
