"""BiMD, the CustomEnhancer guider and identity fusion: the way down, through the host's own sampling."""
from __future__ import annotations

import pytest
import torch

from host.inversion_nets import (
    FREE,
    ID,
    KINDS,
    NEG,
    OTHER,
    CoreEuler,
    TwoSlots,
    counted,
    error,
    guider,
    lora,
    make,
    net,
    picture,
    rebuilt,
    recorded,
    replayed,
    schedule,
    text,
    through,
)
from host.support import base, cfg_guider, comfy, comfy_extras, draw, encode, inject_into, injected, prompt, subject
from host.test_rows import Watch
from likeness.models.common.errors import LikenessError
from likeness.models.hosting.bimd import BiMDSampler
from likeness.models.inversion.records import Flows


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


class Probe(comfy.samplers.Sampler):
    """One question to a guider inside a sampling."""

    def __init__(self, ask):
        self.ask, self.answer = ask, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.answer = self.ask(model_wrap, extra_args["model_options"])
        return latent_image


def asked(who, x, sigma, ask=None):
    """Denoised of model-space x by a guider."""
    level = torch.full((x.shape[0],), sigma)
    probe = Probe(ask or (lambda wrap, options: wrap(x, level, model_options=options, seed=0)))
    through(who, probe, torch.ones_like(x), torch.tensor([sigma, 0.0]))
    return probe.answer


def branch(model, conditioning, x, sigma, cfg, negative=NEG):
    """Core's own answer for one prompt."""
    return asked(cfg_guider(model, conditioning, negative, cfg), x, sigma)


# -- exactness -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_mss_n_is_the_hosts_own_round_trip(kind, truncated):
    model, latent = net(kind), picture(kind, 2)
    who = guider(model, 4.0)
    inversion = recorded(who, 6, latent, start=6 if truncated else 0)
    with counted(model) as seen:
        out, kept = replayed(who, inversion, latent, Flows(start=6))
    assert seen.rows == 0 and inversion.evaluations == (0 if truncated else 13)
    assert torch.equal(kept.x, model.model.process_latent_in(latent))
    assert torch.equal(out, model.model.process_latent_out(model.model.process_latent_in(latent)))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_without_backward_flow_it_is_cores_euler(kind, cfg):
    latent, who = picture(kind, 2), guider(net(kind), cfg)
    inversion = recorded(who, 6, latent)
    _, ours = replayed(who, inversion, latent, Flows(backward=0.0))
    _, core = through(who, CoreEuler(inversion.anchors[-1]), latent, inversion.sigmas)
    assert torch.equal(ours.x, core.x) and torch.isfinite(ours.x).all()
    assert error(ours.x, inversion.anchors[0]) > 1e-2


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_recording_with_the_identity_cancels_the_forward_flow(kind, cfg):
    """A fully functional space, as null-text makes one: the identity has nothing left to do."""
    latent, who = picture(kind), guider(net(kind), cfg, free=ID)
    inversion = recorded(who, 5, latent)
    for other in (who, guider(net(kind), cfg)):
        _, kept = replayed(other, inversion, latent, accept=other is not who)  # its free prompt is not the recording's
        assert error(kept.x, inversion.anchors[0]) < 5e-3
    free_space = recorded(guider(net(kind), cfg), 5, latent)
    _, kept = replayed(guider(net(kind), cfg), free_space, latent)
    assert error(kept.x, inversion.anchors[0]) > 5e-2, "in the free space the identity acts"


@pytest.mark.parametrize("kind", KINDS)
def test_outside_a_hard_mask_the_picture_stays(kind):
    latent, who = picture(kind, 2), guider(net(kind), 4.0)
    inversion = recorded(who, 6, latent)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1.0
    out, kept = replayed(who, inversion, latent, Flows(1, mask=mask))
    assert torch.equal(kept.x[..., 4:], inversion.anchors[0][..., 4:])
    assert error(kept.x[..., :4], inversion.anchors[0][..., :4]) > 1e-2
    for n, x in enumerate(kept.steps):
        assert torch.equal(x[..., 4:], inversion.anchors[5 - n][..., 4:])
    noise_mask, set_latent = replayed(who, inversion, latent, Flows(1), denoise_mask=mask)
    assert torch.equal(noise_mask, out), "Set Latent Noise Mask is the same mask"
    other = torch.zeros(1, 64, 64)
    other[:, :32] = 1.0
    _, both = replayed(who, inversion, latent, Flows(1, mask=mask), denoise_mask=other)
    assert torch.equal(both.x[..., 4:, :], inversion.anchors[0][..., 4:, :])
    assert torch.equal(both.x[..., 4:], inversion.anchors[0][..., 4:])
    assert error(both.x[..., :4, :4], inversion.anchors[0][..., :4, :4]) > 1e-3
    assert torch.isfinite(set_latent.x).all()
    white, _ = replayed(who, inversion, latent, Flows(1, mask=torch.ones(1, 100, 60)))
    assert torch.equal(white, replayed(who, inversion, latent, Flows(1))[0])


def test_difference_mask_pushes_inside_only():
    model, latent = net("eps"), picture("eps")
    who = guider(model, 3.0)
    inversion = recorded(who, 6, latent)
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1.0
    _, kept = replayed(who, inversion, latent, Flows(5, 0.8, mask=mask, mode="difference"))
    top, level = inversion.anchors[1], float(inversion.levels[1])
    d_free, d_id = (branch(model, c, top, level, 3.0) for c in (FREE, ID))
    mixed = d_free + 0.8 * mask[:, None] * (d_id - d_free)
    expected = top + (top - mixed) / level * (0 - level) + inversion.residuals[0]
    assert error(kept.x, expected) < 1e-4
    assert error(kept.x[..., 4:], inversion.anchors[0][..., 4:]) < 1e-4 < error(kept.x, inversion.anchors[0])


# -- flows ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_change_grows_with_the_flows(kind):
    latent, who = picture(kind), guider(net(kind), 2.0)
    inversion = recorded(who, 8, latent)

    def change(**flows):
        return float((replayed(who, inversion, latent, Flows(**flows))[1].x - inversion.anchors[0]).abs().mean())
    strengths = [change(start=6, forward=forward) for forward in (0.0, 0.25, 0.5, 1.0, 2.0)]
    assert strengths[0] == 0.0 and strengths == sorted(strengths) and len(set(strengths)) == 5
    starts = [change(start=start) for start in (8, 7, 6, 5)]
    assert starts[0] == 0.0 and starts == sorted(starts) and len(set(starts)) == 4
    assert change(start=6, tether=0.9) < change(start=6)


def test_branches_that_count_are_evaluated():
    model, latent = net("eps"), picture("eps")
    who = guider(model, 4.0)
    inversion = recorded(who, 6, latent)
    for flows, rows in ((Flows(2), 2), (Flows(2, 0.5), 3), (Flows(2, 2.0), 3), (Flows(2, 0.0, backward=0.5), 2)):
        with counted(model) as seen:
            replayed(who, inversion, latent, flows)
        steps = 6 if flows.backward != 1.0 else 4
        assert (seen.calls, seen.rows) == (steps, steps * rows), flows
    calls = []
    latent_out, _ = through(who, BiMDSampler(inversion, Flows(2)), latent, inversion.sigmas,
                            callback=lambda step, denoised, x, total: calls.append((step, total)))
    assert calls == [(k, 6) for k in range(6)] and torch.isfinite(latent_out).all()


def test_a_stock_guider_replays():
    model, latent = net("eps"), picture("eps")
    ours, stock = guider(model, 4.0), cfg_guider(model, ID, NEG, 4.0)
    inversion = recorded(ours, 6, latent)
    a, _ = replayed(ours, inversion, latent, Flows(start=2))
    with counted(model) as seen:
        b, _ = replayed(stock, inversion, latent, Flows(start=2))
    assert error(a, b) < 5e-6 and seen.calls == 4
    for flows in (Flows(forward=0.5), Flows(mask=torch.ones(1, 8, 8), mode="difference")):
        with pytest.raises(LikenessError, match="CustomEnhancer Guider"):
            replayed(stock, inversion, latent, flows)


def test_through_the_hosts_own_node():
    """SamplerCustomAdvanced with Disable Noise: previews, x0 output, a latent's noise mask."""
    nodes = comfy_extras.nodes_custom_sampler
    latent, who = picture("flow"), guider(net("flow"), 3.0)
    inversion = recorded(who, 5, latent)
    noise = nodes.DisableNoise.execute()[0]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    for more in ({}, {"noise_mask": mask}):
        done = nodes.SamplerCustomAdvanced.execute(noise, who, BiMDSampler(inversion, Flows(2)), inversion.sigmas,
                                                   {"samples": latent, **more})
        plain, _ = replayed(who, inversion, latent, Flows(2), **({"denoise_mask": mask} if more else {}))
        assert torch.equal(done[0]["samples"], plain)


def test_a_guidance_pass_fires_at_every_step():
    """As a RealCustom-style mask: a further call inside CALC_COND_BATCH, one mask for each call of the guider."""
    masks, inside = [], []

    def wrapper(executor, model, conds, x, sigma, options):
        if inside:
            return executor(model, conds, x, sigma, options)
        inside.append(True)
        try:
            first = next(cond for cond in conds if cond is not None)
            masks.append((float(sigma[0]), executor(model, [first], x, sigma, options)[0].mean(1)))
        finally:
            inside.pop()
        return executor(model, conds, x, sigma, options)
    model = net("eps").clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "guidance", wrapper)
    who, latent = guider(model, 3.0), picture("eps")
    inversion = recorded(who, 6, latent)
    for forward in (1.0, 0.5):
        masks.clear()
        with counted(model) as seen:
            replayed(who, inversion, latent, Flows(2, forward))
        assert [sigma for sigma, _ in masks] == pytest.approx(inversion.sigmas[2:6].tolist()) and seen.calls == 8
    masks.clear()
    apart = guider(model, 3.0, free_model=model.clone())
    replayed(apart, inversion, latent, Flows(2, 0.5))
    assert len(masks) == 8, "the calls of the free model have their wrappers as well"


# -- the guider ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_stock_sampler_it_is_a_cfg_guider(kind, sampler):
    model, latent = net(kind), picture(kind)
    sigmas, noise = schedule(model, 5), draw(8, *latent.shape)
    outs = [who.sample(noise, latent, comfy.samplers.ksampler(sampler), sigmas, seed=3, disable_pbar=True)
            for who in (guider(model, 4.0), cfg_guider(model, ID, NEG, 4.0))]
    assert torch.equal(*outs) and torch.isfinite(outs[0]).all()


def test_rows_of_an_injection_share_one_call():
    """Identity, free and negative in one call of the network, the subject in its own rows only."""
    done = injected("sd15", 1)
    watch = Watch((done.positive, (subject("sd15", 1),)))
    free = watch.knows(encode("sd15", "a photo of a room"))
    watch.knows(done.negative)
    who = guider(watch.on(done.model), 4.0, done.positive, free, done.negative)
    asked(who, draw(5, 1, 4, 8, 8), 3.0, lambda wrap, options: wrap.mixed(
        draw(5, 1, 4, 8, 8), torch.tensor([3.0]), 0.5, options))
    watch.check((1,), ())
    assert watch.calls == 1 and len(watch.rows) == 3 and watch.together()


def test_an_injection_works_inside_a_picture():
    """CustAny's model under the recorder: the free rows carry nothing, so the recording is the plain model's."""
    done = injected("sd15", 1)
    free, plain = prompt("sd15")[0], base("sd15")[0]
    latent = plain.model.latent_format.process_out(draw(5, 1, 4, 8, 8))
    who = guider(done.model, 3.0, done.positive, free, done.negative)
    inversion = recorded(who, 3, latent)
    bare = recorded(guider(plain, 3.0, free, free, encode("sd15", "blurry")), 3, latent)
    assert error(inversion.residuals, bare.residuals) < 1e-3 and inversion.model_hash == bare.model_hash
    a, _ = replayed(who, inversion, latent, Flows(1))
    b, _ = replayed(guider(plain, 3.0, free, free, encode("sd15", "blurry")), bare, latent, Flows(1), accept=True)
    assert error(a, b) > 1e-3, "the subject does nothing"
    # the same with the injector before another pack's patches
    again = inject_into(plain, 1)
    patched = TwoSlots()
    model = again.model.clone()
    model.set_model_attn2_replace(patched, "output", 3, 0)
    apart = guider(model, 3.0, again.positive, free, again.negative, free_model=again.model)
    third = recorded(apart, 3, latent)
    assert not patched.calls and error(third.residuals, bare.residuals) < 1e-3


def test_free_model_of_another_sampling_is_refused():
    model = net("eps")
    with pytest.raises(LikenessError, match="another checkpoint"):
        guider(model, free_model=make("eps", seed=4))
    for pair in ((lora(model), model), (model, lora(model)), (lora(model, 0.4), lora(model))):
        with pytest.raises(LikenessError, match="other LoRAs"):
            guider(pair[0], free_model=pair[1])
    one = lora(model)
    assert guider(one, free_model=one.clone()).free_model is not None


def test_free_model_keeps_the_options_apart():
    """Branches against core's own guider on each of the two models; afterwards nothing is left in the guider."""
    model, x = net("eps"), draw(6, 2, 4, 8, 8)
    patched = TwoSlots().on(model)
    who = guider(patched, 3.0, free_model=model)
    got = asked(who, x, 2.0, lambda wrap, options: wrap.mixed(x, torch.full((2,), 2.0), 0.25, options))
    d_free, d_id = branch(model, FREE, x, 2.0, 3.0), branch(patched, ID, x, 2.0, 3.0)
    assert error(got, d_free + 0.25 * (d_id - d_free)) < 2e-5 and who.free_options is None
    assert not model.model_options["transformer_options"].get("patches_replace")


@pytest.mark.parametrize("name", ["rescale", "pre", "batch function"])
def test_guidance_functions_act_on_each_branch(name):
    from comfy_extras.nodes_model_advanced import RescaleCFG
    model, x = net("eps"), draw(6, 2, 4, 8, 8)
    if name == "rescale":
        model = RescaleCFG().patch(model, 0.7)[0]
    elif name == "pre":
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0], 0.8 * args["conds_out"][1]])
    else:
        model = model.clone()
        model.model_options["sampler_calc_cond_batch_function"] = lambda args: [
            1.1 * out for out in comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"],
                                                               args["model_options"])]
    got = asked(guider(model, 5.0), x, 2.0, lambda wrap, options: wrap.mixed(x, torch.full((2,), 2.0), 0.5, options))
    d_free, d_id = (branch(model, c, x, 2.0, 5.0) for c in (FREE, ID))
    assert error(got, d_free + 0.5 * (d_id - d_free)) < 5e-5
    plain = asked(guider(net("eps"), 5.0), x, 2.0, lambda wrap, options: wrap.mixed(x, torch.full((2,), 2.0), 0.5, options))
    assert error(got, plain) > 1e-3


# -- identity fusion -----------------------------------------------------------------------------------
def fused_by_hand(x, sigma, weights, masks, model=None, cfg=3.0):
    """d_free + sum_j w_j M_j (d_j - d_free); weights: a list a picture of the batch."""
    model = model or net("eps")
    free = branch(model, FREE, x, sigma, cfg)
    out = free.double()
    for number, conditioning in enumerate((ID, OTHER, text(40))[:len(masks)]):
        share = torch.tensor([row[number] for row in weights]).double().view(-1, 1, 1, 1)
        if masks[number] is not None:
            share = share * masks[number].double()
        out = out + share * (branch(model, conditioning, x, sigma, cfg) - free).double()
    return out.float()


def test_fusion_against_the_formula():
    x = draw(6, 3, 4, 8, 8)
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = 1.0
    one = guider(net("eps"), 3.0)
    two = one.with_identity(OTHER, 0.5, None, 0.5, False)
    assert error(asked(two, x, 2.0), fused_by_hand(x, 2.0, [[0.5, 0.5]] * 3, [None, None])) < 2e-5
    uneven = one.with_identity(OTHER, 0.7, None, 0.6, False)
    assert error(asked(uneven, x, 2.0), fused_by_hand(x, 2.0, [[0.6, 0.7]] * 3, [None, None])) < 2e-5
    masked = one.with_identity(OTHER, 0.7, left, 1.0, False)
    assert error(asked(masked, x, 2.0), fused_by_hand(x, 2.0, [[1.0, 0.7]] * 3, [None, left[:, None]])) < 2e-5
    three = two.with_identity(text(40), 0.2, None, 0.5, False)
    assert error(asked(three, x, 2.0), fused_by_hand(x, 2.0, [[0.25, 0.25, 0.2]] * 3, [None, None, None])) < 2e-5
    assert len(one.identities) == 1 and set(one.original_conds) == {"positive", "free", "negative"}
    assert error(asked(one, x, 2.0), branch(net("eps"), ID, x, 2.0, 3.0)) < 1e-6, "the guider that came in has changed"
    assert set(two.original_conds) == {"positive", "free", "negative", "identity 2"}


def test_fusion_over_a_batch_is_a_path():
    x = draw(6, 3, 4, 8, 8)
    path = guider(net("eps"), 3.0).with_identity(OTHER, 0.8, None, 0.2, True)
    assert error(asked(path, x, 2.0), fused_by_hand(x, 2.0, [[1.0, 0.0], [0.6, 0.4], [0.2, 0.8]], [None, None])) < 2e-5
    assert error(asked(path, x[:1], 2.0), fused_by_hand(x[:1], 2.0, [[0.2, 0.8]], [None, None])) < 2e-5
    further = path.with_identity(text(40), 1.0, None, 0.5, False)
    weights = [[0.5, 0.0, 1.0], [0.3, 0.2, 1.0], [0.1, 0.4, 1.0]]
    assert error(asked(further, x, 2.0), fused_by_hand(x, 2.0, weights, [None, None, None])) < 2e-5


def test_fusion_evaluates_what_counts():
    model, latent = net("eps"), picture("eps", 3)
    who = guider(model, 1.0).with_identity(OTHER, 1.0, None, 0.0, True)
    inversion = recorded(who, 4, latent)
    for forward, rows in ((1.0, 2), (0.5, 3)):
        with counted(model) as seen:
            out, _ = replayed(who, inversion, latent, Flows(forward=forward))
        assert seen.rows == 3 * 4 * rows, "whole weights need no free branch"
        assert torch.isfinite(out).all()
    single = recorded(guider(model, 1.0), 4, latent[:1])
    first, _ = replayed(guider(model, 1.0), single, latent[:1])
    last, _ = replayed(guider(model, 1.0, positive=OTHER), recorded(guider(model, 1.0), 4, latent[2:]), latent[2:])
    out, _ = replayed(who, inversion, latent)
    assert error(out[:1], first) < 1e-3 and error(out[2:], last) < 1e-3


def test_fusion_of_two_injected_subjects():
    """Two subjects on two prompts of one MODEL: all rows fit into one call, each with its own subject."""
    first = injected("sd15", 1)
    second = inject_into(first.model, 2)
    watch = Watch((first.positive, (subject("sd15", 1),)))
    free = watch.knows(encode("sd15", "a photo of a room"))
    watch.knows(first.negative)
    watch.texts += [(row, (subject("sd15", 2),)) for entry in _marked(second.positive) for row in entry[0]]
    who = guider(watch.on(second.model), 4.0, first.positive, free, first.negative)
    who = who.with_identity(_marked(second.positive), 0.5, None, 0.6, False)
    asked(who, draw(5, 1, 4, 8, 8), 3.0)
    watch.check((1,), (2,), ())
    assert watch.calls == 1 and len(watch.rows) == 4


def _marked(conditioning):
    """The same prompt with a text that tells it from the other's."""
    return [[entry[0] + 0.01, entry[1]] for entry in conditioning]


def test_a_subject_without_its_injector_is_refused():
    """Its rows would stay plain and nobody would know why."""
    first, second = injected("sd15", 1), injected("sd15", 2)  # two models: neither has both injectors
    free = encode("sd15", "a photo of a room")
    with pytest.raises(LikenessError, match="injector is not on the guider's model"):
        guider(base("sd15")[0], 4.0, first.positive, free, first.negative)
    who = guider(first.model, 4.0, first.positive, free, first.negative)
    with pytest.raises(LikenessError, match="chain the injectors on one MODEL"):
        who.with_identity(second.positive, 0.5, None, 0.5, False)


# -- bad input -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("truncated", [0, 2])
def test_what_does_not_belong_together_is_refused(truncated):
    model, latent = net("eps"), picture("eps", 2)
    who = guider(model, 3.0)
    inversion = recorded(who, 4, latent, start=truncated)
    cases = [
        ({"latent": picture("eps", 2, side=16)}, {}, "4 x 16 x 16, the inversion was recorded at 4 x 8 x 8"),
        ({"latent": picture("flow", 2)}, {}, "16 x 8 x 8, the inversion was recorded at 4 x 8 x 8"),
        ({"latent": picture("eps", 3)}, {}, "3 pictures, the inversion 2"),
        ({}, {"flows": Flows(start=5)}, "step 5, but the recording has 4 steps"),
        ({}, {"flows": Flows(start=-1)}, "0 to 4"),
        ({}, {"sigmas": schedule(model, 5)}, "sigmas of 5 steps"),
        ({}, {"sigmas": schedule(model, 4).flip(0)}, "sigmas of 4 steps from 0 to"),
        ({}, {"sigmas": schedule(model, 4, "karras")}, "SIGMAS of the ResInversion"),
        ({}, {"flows": Flows(mask=torch.zeros(1, 8, 8))}, "mask is empty"),
        ({}, {"flows": Flows(mask=torch.ones(3, 8, 8))}, "3 masks for 2 pictures"),
    ]
    for where, more, says in cases:
        with counted(model) as seen, pytest.raises(LikenessError, match=says):
            replayed(who, inversion, where.get("latent", latent), **more)
        assert seen.rows == 0, says
    whole, _ = replayed(who, inversion, latent, Flows(start=3), sigmas=schedule(model, 4))
    assert torch.equal(whole, replayed(who, inversion, latent, Flows(start=3))[0]), "the uncut schedule is no mismatch"
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 5e-3
