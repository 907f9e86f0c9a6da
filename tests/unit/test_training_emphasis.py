"""What a step learns most from: noisy timesteps, the subject's own places; in every method that trains with them."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from likeness.models.training import custany, emphasis, realcustom
from unit import test_training_custany as of_custany
from unit import test_training_realcustom as of_realcustom
from unit.training_toy import ToySource

TASKS = {"custany": (of_custany.build, ToySource, custany.losses),
         "realcustom": (of_realcustom.task, of_realcustom.Source, realcustom)}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Enough(Exception):
    """The rest of the step is not looked at."""


def heard(monkeypatch: Any, target: Any, name: str, of: int) -> list[Any]:
    """What the function `name` of `target` is called with, at place `of`; the call itself ends the step."""
    seen: list[Any] = []

    def listen(*args: Any) -> None:
        seen.append(args[of])
        raise Enough
    monkeypatch.setattr(target, name, listen)
    return seen


def test_the_loss_counts_more_inside_the_subject():
    """By hand: 1 + 3 m, times the base's weight for a channel; without a mask every place counts alike."""
    latents, here = torch.zeros(2, 4, 4, 4), torch.zeros(2, 8, 8)
    here[:, :2, :2] = 1.0
    here[:, 2:4, :1] = 1.0
    want = torch.ones(2, 1, 4, 4)
    want[:, :, 0, 0], want[:, :, 1, 0] = 4.0, 2.5
    assert torch.equal(emphasis.loss_weight(None, here, latents, 3.0), want)
    channels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(emphasis.loss_weight(channels, here, latents, 3.0), want * channels.view(1, 4, 1, 1))
    assert emphasis.loss_weight(channels, None, latents, 3.0) is channels
    assert emphasis.loss_weight(None, here, latents, 0.0) is None


@pytest.mark.parametrize("method", TASKS)
def test_a_method_weighs_its_loss_by_the_mask(method, monkeypatch):
    make, source, module = TASKS[method]
    here = torch.zeros(2, 8, 8)
    here[:, :4] = 1.0
    batch = source().batch(2, seeded())._replace(mask=here)
    seen = heard(monkeypatch, module, "denoise", 2)
    with pytest.raises(Enough):
        make(subject_weight=3.0).step(batch, seeded())
    assert torch.equal(seen[0], emphasis.loss_weight(None, here, batch.latents, 3.0))


@pytest.mark.parametrize("method", TASKS)
@pytest.mark.parametrize("draws", (1, 3))
def test_the_noisiest_of_some_draws_is_taken(method, draws, monkeypatch):
    """Density k t^(k - 1), mean k / (k + 1) of the range, also where a base spreads its draws evenly in order."""
    make, source, _ = TASKS[method]
    own = make(noisiest_of=draws)
    monkeypatch.setattr(own.base, "timesteps", lambda n, generator: (torch.arange(n) + torch.rand(n, generator=generator)) / n)
    seen = heard(monkeypatch, own.base, "noised", 1)
    with pytest.raises(Enough):
        own.step(source().batch(4000, seeded()), seeded())
    assert abs(float(seen[0].mean()) - draws / (draws + 1)) < 0.02
