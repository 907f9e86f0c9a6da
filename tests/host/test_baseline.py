"""Plain DDIM inversion and null-text optimisation: honest opponents that leave nothing behind."""
from __future__ import annotations

import pytest
import torch

from harness import tiny
from host.inversion_nets import (
    FREE,
    ID,
    NEG,
    OTHER,
    counted,
    guider,
    make,
    net,
    picture,
    psnr,
    rebuilt,
    recorded,
    replayed,
    schedule,
)
from host.support import base, cfg_guider, comfy, comfy_extras, core, draw, encode
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import baseline
from likeness.models.hosting.baseline import record_ddim, record_null_text
from likeness.models.inversion.records import Flows

KINDS = ("eps", "v", "flow")


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def unchanged(model, before):
    network = model.model.diffusion_model
    assert network is before, "the loaded network was not put back"
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("kind", KINDS)
def test_ddim(kind):
    model, latent = net(kind), picture(kind)
    who = guider(model, 4.0)
    with counted(model) as seen:
        inversion = record_ddim(who, schedule(model, 6), latent)
    assert seen.rows == inversion.evaluations == 6 and inversion.method == "ddim"
    assert not inversion.residuals.any() and inversion.residuals.shape[0] == 6
    with counted(model) as seen:
        out = rebuilt(who, inversion, latent)
    assert seen.rows == 12
    ours = recorded(who, 6, latent)
    assert psnr(out, inversion.anchors[0]) + 20 < psnr(rebuilt(who, ours, latent), ours.anchors[0])
    # it is no recording of a cfg, so another one is no mismatch
    replayed(guider(model, 2.0), inversion, latent)


@pytest.mark.parametrize("kind", KINDS)
def test_null_text_comes_nearer_than_ddim(kind):
    model, latent = net(kind), picture(kind)
    who = guider(model, 3.0)
    before = model.model.diffusion_model
    sigmas = schedule(model, 4)
    ddim = record_ddim(who, sigmas, latent)
    with counted(model) as seen:
        inversion, said = record_null_text(who, sigmas, latent, 10, False)
    unchanged(model, before)
    assert "44 backward" not in said and "48 forward and 40 backward" in said and seen.rows == 4 + 48 == inversion.evaluations
    assert inversion.nulls.shape == (4, 1, 4, 32) and inversion.method == "null-text" and torch.isfinite(inversion.nulls).all()
    near, far = rebuilt(who, inversion, latent), rebuilt(who, ddim, latent)
    assert psnr(near, inversion.anchors[0]) > psnr(far, inversion.anchors[0]) + 0.3
    assert f"{psnr(near, inversion.anchors[0]):.1f} dB" in said, "the replay is not what was optimised"
    with pytest.raises(LikenessError, match="recorded at cfg 3, the guider has 5"):
        rebuilt(guider(model, 5.0), inversion, latent)
    batch = latent.expand(2, -1, -1, -1)
    out, _ = replayed(who, inversion, batch, Flows(start=1))
    assert torch.isfinite(out).all() and torch.allclose(out[0], out[1], atol=1e-5)


def test_early_stop_spares_steps(monkeypatch):
    """The threshold rises from step to step, as published."""
    model, latent = net("eps"), picture("eps")
    who = guider(model, 3.0)

    def backward(early):
        said = record_null_text(who, schedule(model, 3), latent, 3, early)[1]
        return int(said.split(" backward")[0].split()[-1])
    monkeypatch.setattr(baseline, "THRESHOLD_STEP", 1e9)
    assert (backward(True), backward(False)) == (3 + 1 + 1, 9)


@pytest.mark.parametrize("end", ["error", "cancel"])
def test_null_text_leaves_nothing_behind(end):
    model, latent = make("eps", seed=6), picture("eps")
    before, sigmas = model.model.diffusion_model, schedule(model, 3)
    who = guider(model, 3.0)
    kept = dict(vars(who))

    def at(call):
        if call == 9 and end == "cancel":
            comfy.model_management.interrupt_current_processing(True)
        if call == 9 and end == "error":
            raise RuntimeError("out of luck")
    expected = comfy.model_management.InterruptProcessingException if end == "cancel" else RuntimeError
    with counted(model) as seen:
        seen.at = at
        with pytest.raises(expected):
            record_null_text(who, sigmas, latent, 5, False)
    assert seen.calls == 9
    unchanged(model, before)
    assert vars(who).keys() == kept.keys()
    inversion, _ = record_null_text(who, sigmas, latent, 2, False)
    again, _ = record_null_text(who, sigmas, latent, 2, False)
    assert torch.equal(inversion.nulls, again.nulls)
    unchanged(model, before)


def test_too_little_memory_is_one_sentence(monkeypatch):
    model, latent = make("eps", seed=6), picture("eps")
    before, real = model.model.diffusion_model, baseline.management.get_free_memory
    who = guider(model, 3.0)
    needed = sum(p.numel() * p.element_size() for p in before.parameters())
    monkeypatch.setattr(baseline, "GRADIENT_FACTOR", 0)
    monkeypatch.setattr(baseline.management, "get_free_memory",
                        lambda device, torch_free_too=False: (needed - 1,) * 2 if torch_free_too else needed - 1)
    with pytest.raises(LikenessError, match="second copy of the model.*GiB are free"):
        record_null_text(who, schedule(model, 3), latent, 2)
    unchanged(model, before)
    monkeypatch.setattr(baseline.management, "get_free_memory", real)
    record_null_text(who, schedule(model, 3), latent, 1)


def test_what_null_text_cannot_do_is_refused():
    model, latent, sigmas = net("eps"), picture("eps"), schedule(net("eps"), 3)
    dual = comfy_extras.nodes_custom_sampler.DualCFGGuider.execute(model, ID, OTHER, NEG, 3.0, 2.0, "regular")[0]
    for who, says in ((guider(model, 1.0), "cfg above 1"), (dual, "CFG guider"),
                      (guider(model, 3.0, negative=NEG + OTHER), "exactly one negative")):
        with pytest.raises(LikenessError, match=says):
            record_null_text(who, sigmas, latent)
    inversion, _ = record_null_text(cfg_guider(model, FREE, NEG, 3.0), sigmas, latent, 1)
    with pytest.raises(LikenessError, match="null-text inversion; use the CustomEnhancer"):
        replayed(cfg_guider(model, FREE, NEG, 3.0), inversion, latent)
    assert torch.isfinite(rebuilt(guider(model, 3.0), inversion, latent)).all()


def test_null_text_beside_a_controlnet():
    model = base("sd15")[0]
    control = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    free, negative = core.ControlNetApplyAdvanced().apply_controlnet(encode("sd15", "a room"), encode("sd15", "blurry"), control,
                                                                     hint, 0.8, 0.0, 1.0)
    latent, before = model.model.latent_format.process_out(draw(5, 1, 4, 8, 8)), model.model.diffusion_model
    who = guider(model, 3.0, free, free, negative)
    inversion, said = record_null_text(who, torch.tensor([3.0, 0.0]), latent, 1)
    unchanged(model, before)
    assert f"{psnr(rebuilt(who, inversion, latent), inversion.anchors[0]):.1f} dB" in said
