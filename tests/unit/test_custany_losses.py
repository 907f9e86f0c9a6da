"""CustAny's losses against values worked out by hand, their gradients' signs, and the decoupling branch."""
from __future__ import annotations

import math

import pytest
import torch

from likeness.models.common.errors import LikenessError
from likeness.models.custany import losses
from likeness.models.custany.decouple import Decouple
from unit.training_toy import draw


def test_denoise_by_hand():
    prediction = torch.tensor([[[[1.0]], [[2.0]]]], requires_grad=True)  # one sample, two channels
    target = torch.tensor([[[[0.0]], [[5.0]]]])
    loss = losses.denoise(prediction, target)
    assert loss.item() == pytest.approx((1 + 9) / 2)
    loss.backward()
    assert prediction.grad.flatten().tolist() == [1.0, -3.0]
    assert losses.denoise(prediction, target, torch.tensor([2.0, 0.5])).item() == pytest.approx((2 + 4.5) / 2)
    per_sample = torch.tensor([3.0]).view(1, 1, 1, 1)
    assert losses.denoise(prediction, target, per_sample).item() == pytest.approx(15)


def test_denoise_is_float_32():
    big = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)  # its square overflows half precision
    assert losses.denoise(big, torch.zeros_like(big)).item() == pytest.approx(90000)


@pytest.mark.parametrize("degrees, values", [
    (0, (1, 1, 1)), (90, (0, 0, 0)), (120, (-0.5, 0, 0.5)), (180, (-1, 0, 1))])
def test_contrast_by_hand(degrees, values):
    fused = torch.tensor([[2.0, 0.0]])
    masked = 3 * torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])
    for mode, value in zip(("raw", "clamp", "abs"), values, strict=True):
        assert losses.contrast(fused, masked, mode).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("degrees, moves", [
    (60, {"raw": 1, "clamp": 1, "abs": 1}), (120, {"raw": 1, "clamp": 0, "abs": -1})])
def test_contrast_pushes_the_angle(degrees, moves):
    """A positive move opens the angle further when gradient descent follows the loss."""
    for mode, move in moves.items():
        angle = torch.tensor(math.radians(degrees), requires_grad=True)
        masked = torch.stack([angle.cos(), angle.sin()])[None]
        losses.contrast(torch.tensor([[1.0, 0.0]]), masked, mode).backward()
        assert round(float(torch.sign(-angle.grad))) == move


def test_contrast_leaves_samples_out():
    fused, masked = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert losses.contrast(fused, masked).item() == pytest.approx(0)
    assert losses.contrast(fused, masked, keep=torch.tensor([0.0, 1.0])).item() == pytest.approx(-1)
    assert losses.contrast(fused, masked, keep=torch.zeros(2)).item() == 0


def test_unknown_modes_are_refused():
    with pytest.raises(LikenessError, match="raw, clamp, abs"):
        losses.contrast(torch.ones(1, 2), torch.ones(1, 2), "sine")
    with pytest.raises(LikenessError, match="channel or token"):
        Decouple(4, 4, "row")


def test_total_has_the_weights_of_the_paper():
    parts = [torch.tensor(value) for value in (1.0, 10.0, 100.0)]
    assert losses.total(*parts).item() == 2 + 10 + 50
    assert losses.total(*parts, weights=(0.0, 1.0, 0.0)).item() == 10


@pytest.mark.parametrize("kind", ["channel", "token"])
@pytest.mark.parametrize("embed, width", [(6, 6), (6, 10)])
def test_decouple_by_hand(kind, embed, width):
    branch = Decouple(embed, width, kind)
    branch.init_weights(torch.Generator().manual_seed(0))
    tokens = draw(1, 2, 5, embed)
    half = tokens.mean(1) / 2  # an untrained mask lets half through
    expected = branch.project(half + branch.mlp(half))
    out = branch(tokens)
    assert out.shape == (2, width) and torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(branch(tokens[:, 0]), branch(tokens[:, :1]), atol=1e-6)


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_decouple_learns_everything(kind):
    branch = Decouple(6, 10, kind)
    branch.init_weights(torch.Generator().manual_seed(0))
    if kind == "token":
        branch.gate.out.weight.data.fill_(0.1)
    branch(draw(1, 2, 5, 6)).square().sum().backward()
    dead = [name for name, p in branch.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_closed_gates_shut_channels_out():
    branch = Decouple(4, 4)
    branch.init_weights(torch.Generator().manual_seed(0))
    branch.mask.data[2] = -200
    e = draw(1, 2, 4)
    changed = e.clone()
    changed[:, 2] += 5
    assert torch.equal(branch(e), branch(changed))
    changed[:, 1] += 5
    assert not torch.equal(branch(e), branch(changed))
