"""CustomEnhancer over PhotoMaker and over InstantID: recorded without the identity, replayed with it, on the tiny SDXL."""
from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from host.inversion_nets import counted, error, guider, psnr, rebuilt, recorded, replayed
from host.portraits import applied, encoded, photomaker
from host.support import base, draw, encode
from host.test_bimd import asked, branch
from likeness.models.common.errors import LikenessError
from likeness.models.hosting.baseline import record_null_text
from likeness.models.inversion.records import Flows

KINDS = ("photomaker", "instantid", "instantid with ControlNet")
STEPS = 3


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


class Graph(NamedTuple):
    model: Any
    positive: Any
    free: Any
    negative: Any

    def guider(self, cfg: float = 2.0, free: Any = None) -> Any:
        return guider(self.model, cfg, self.positive, free or self.free, self.negative)


def graph(kind: str, start: float = 0.0, **more: Any) -> Graph:
    if kind == "photomaker":
        done = encoded(1, 2, start=start, **more)
        return Graph(photomaker(1)[1], done.positive, done.free, encode("sdxl", "blurry"))
    done = applied(1, guided="Control" in kind, **more)
    return Graph(done.model, done.positive, done.free, done.negative)


def picture():
    return base("sdxl")[0].model.latent_format.process_out(draw(5, 1, 4, 8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_three_prompts_in_one_batched_call(kind):
    """Identity, free and negative; each branch is core's own answer for its prompt alone."""
    made = graph(kind)
    who, x = made.guider(2.0), draw(3, 1, 4, 8, 8) * 5
    with counted(made.model) as seen:
        answers = asked(who, x, 4.0, lambda wrap, options: wrap.denoised(x, torch.full((1,), 4.0), ["positive", "free"], options))
    assert (seen.calls, seen.rows) == (1, 3)
    for slot, conditioning in (("positive", made.positive), ("free", made.free)):
        expected = branch(made.model, conditioning, x, 4.0, 2.0, made.negative)
        assert error(answers[slot], expected) < 2e-4 * float(expected.abs().max())
    assert error(answers["positive"], answers["free"]) > 1e-2 * float(answers["free"].abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_without_and_replayed_with_the_identity(kind):
    made = graph(kind)
    latent, who = picture(), made.guider(1.5)
    inversion = recorded(who, STEPS, latent)
    top = inversion.anchors[0]
    assert psnr(rebuilt(who, inversion, latent), top) > 60, "without the forward flow the picture comes back"
    with counted(made.model) as seen:
        out, kept = replayed(who, inversion, latent, Flows(start=STEPS))
    assert seen.rows == 0 and torch.equal(kept.x, base("sdxl")[0].model.process_latent_in(latent)), "MSS = N is the picture"
    with counted(made.model) as seen:
        _, moved = replayed(who, inversion, latent, Flows(start=1))
    assert seen.rows == 2 * (STEPS - 1) and error(moved.x, top) > 1e-2
    with counted(made.model) as seen:
        _, half = replayed(who, inversion, latent, Flows(start=1, forward=0.5))
    assert (seen.calls, seen.rows) == (STEPS - 1, 3 * (STEPS - 1)), "three prompts, one call a step"
    assert 0 < error(half.x, top) and torch.isfinite(half.x).all()


@pytest.mark.parametrize("kind", KINDS)
def test_recording_with_the_identity_leaves_nothing_to_do(kind):
    """A fully functional space, as null-text makes one: the forward flow is cancelled."""
    made = graph(kind)
    latent = picture()
    who = made.guider(1.0, free=made.positive)
    inversion = recorded(who, STEPS, latent)
    assert psnr(replayed(who, inversion, latent)[1].x, inversion.anchors[0]) > 60
    free_space = recorded(made.guider(1.0), STEPS, latent)
    assert psnr(replayed(made.guider(1.0), free_space, latent)[1].x, free_space.anchors[0]) < 40


def test_the_plain_prompt_before_photomakers_share():
    """Its two prompts with ranges of steps go through recording and replay; before its share the identity does nothing."""
    made, at_once = graph("photomaker", start=0.6), graph("photomaker")
    latent = picture()
    inversion = recorded(made.guider(1.5), STEPS, latent)
    late, early = (replayed(g.guider(1.5), inversion, latent, Flows())[1] for g in (made, at_once))
    free = replayed(made.guider(1.5), inversion, latent, Flows(forward=0.0), evaluate_all=True)[1]
    assert torch.allclose(late.steps[0], free.steps[0], atol=1e-4)
    assert not torch.allclose(early.steps[0], free.steps[0], atol=1e-3)
    assert not torch.allclose(late.x, free.x, atol=1e-3)


def test_two_identities_share_one_picture():
    """Identity fusion: the second face enters through its own prompt, with its own stamp, on the model of both."""
    first = applied(1)
    second = applied(2, model=first.model, negative=first.negative)
    who = guider(second.model, 1.5, first.positive, first.free, second.negative)
    both = who.with_identity(second.positive, 0.5, None, 0.5, False)
    latent = picture()
    inversion = recorded(who, 2, latent)
    with counted(second.model) as seen:
        _, kept = replayed(both, inversion, latent, Flows())
    assert (seen.calls, seen.rows) == (2, 2 * 3) and torch.isfinite(kept.x).all()
    alone = replayed(who, inversion, latent, Flows())[1]
    assert not torch.allclose(kept.x, alone.x, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_inside(kind):
    """The other baseline: gradients go past the face's keys and values and past a ControlNet that does not read the text."""
    made = graph(kind)
    latent, who = picture(), made.guider(2.0)
    before = made.model.model.diffusion_model
    inversion, said = record_null_text(who, torch.tensor([3.0, 1.0, 0.0]), latent, 2, False)
    assert made.model.model.diffusion_model is before and torch.is_inference_mode_enabled()
    assert torch.isfinite(inversion.nulls).all() and inversion.nulls.shape[0] == 2 and "4 backward" in said
    negative = made.negative[0][0]
    assert not torch.allclose(inversion.nulls[0], negative.expand_as(inversion.nulls[0]), atol=1e-4), "nothing was fitted"
    assert f"{psnr(rebuilt(who, inversion, latent), inversion.anchors[0]):.1f} dB" in said
    moved = replayed(who, inversion, latent, Flows(start=1))[1]
    assert torch.isfinite(moved.x).all()
    with pytest.raises(LikenessError, match="cfg above 1"):
        record_null_text(made.guider(1.0), torch.tensor([3.0, 0.0]), latent, 1)
