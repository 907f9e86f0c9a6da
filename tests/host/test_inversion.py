"""ResInversion: what is recorded, at what price, for which models and prompts."""
from __future__ import annotations

import math

import pytest
import torch

from harness import tiny
from host.inversion_nets import (
    FREE,
    ID,
    KINDS,
    NEG,
    OTHER,
    TwoSlots,
    counted,
    error,
    guider,
    lora,
    make,
    net,
    picture,
    psnr,
    rebuilt,
    recorded,
    replayed,
    schedule,
    text,
)
from host.support import base, cfg_guider, comfy, comfy_extras, core, draw, encode
from likeness.models.common.errors import LikenessError
from likeness.models.hosting.fingerprint import model_hash
from likeness.models.hosting.inversions import judge, samples_of
from likeness.models.hosting.recorder import Settings, record
from likeness.models.inversion.records import Flows
from likeness.models.inversion.storage import load_inversion, save_inversion

TIGHT = {"eps": 1e-3, "v": 1e-3, "flow": 1e-5}


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


# -- the picture comes back ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [10, 20])
def test_a_picture_comes_back_with_every_step_evaluated(kind, steps):
    latent, who = picture(kind), guider(net(kind))
    inversion = recorded(who, steps, latent)
    assert torch.isfinite(inversion.anchors).all() and torch.isfinite(inversion.residuals).all()
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < TIGHT[kind]
    assert torch.equal(inversion.anchors[0], net(kind).model.process_latent_in(latent))
    assert torch.allclose(inversion.as_latent(0), latent, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "mini"])
def test_real_layouts(kind):
    """The tiny checkpoints, through the host's own loader, with text encoders and pooled vectors."""
    model = base(kind)[0]
    form = model.get_model_object("latent_format")
    latent = form.process_out(draw(5, 1, form.latent_channels, 8, 8))
    prompts = [encode(kind, words) for words in ("a cat in a room", "a room", "blurry")]
    who = guider(model, 3.0, *prompts)
    with counted(model) as seen:
        inversion = recorded(who, 2, latent)
    assert seen.rows == inversion.evaluations == 5
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 2e-3
    same, _ = replayed(who, inversion, latent, Flows(start=2))
    other, _ = replayed(who, inversion, latent, Flows(start=1))
    assert torch.equal(same, model.model.process_latent_out(model.model.process_latent_in(latent)))
    assert torch.isfinite(other).all() and error(other, latent) > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_loop_is_bit_exact(kind, cfg):
    latent, who = picture(kind), guider(net(kind), cfg)
    inversion = recorded(who, 6, latent, closed=True)
    _, kept = replayed(who, inversion, latent, Flows(forward=0.0), evaluate_all=True)
    for n in range(5):
        assert torch.equal(kept.steps[n], inversion.anchors[5 - n]), f"step {n + 1}"
    assert error(kept.x, inversion.anchors[0]) == inversion.drift < 1e-4
    assert torch.equal(inversion.anchors[0], net(kind).model.process_latent_in(latent))
    open_loop = recorded(who, 6, latent)
    assert error(kept.x, inversion.anchors[0]) <= error(rebuilt(who, open_loop, latent), open_loop.anchors[0])


# -- what it costs -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "batch", "cfg"), [("eps", 1, 1.0), ("eps", 3, 4.0), ("flow", 1, 4.0), ("v", 2, 1.0)])
def test_evaluations(kind, batch, cfg):
    """N + 1 without guidance, 2 N + 1 with it, whatever the batch; the counter knows nothing of the recorder."""
    n, latent, who, branches = 7, picture(kind, batch), guider(net(kind), cfg), 2 if cfg > 1 else 1
    with counted(net(kind)) as seen:
        inversion = recorded(who, n, latent)
    assert seen.rows == batch * (branches * n + 1)
    assert inversion.evaluations == branches * n + 1 and inversion.calls == seen.calls
    with counted(net(kind)) as seen:
        cut = recorded(who, n, latent, start=3)
        replayed(who, cut, latent, Flows(start=3))
    assert seen.rows == batch * (branches * 4 + 1 + branches * 4)
    with counted(net(kind)) as seen:
        replayed(who, inversion, latent, Flows(start=3))
    assert seen.rows == batch * branches * 4, "what stays on the anchors is not evaluated"
    assert torch.equal(cut.anchors, inversion.anchors[:5])


@pytest.mark.parametrize(("settings", "evaluations"), [
    ({"estimate": "target"}, 5 + 5), ({"estimate": "midpoint"}, 10 + 1), ({"refine": 2}, 15 + 1), ({"closed": True}, 5 + 5),
    ({"residuals": False}, 5), ({"start": 5}, 0)])
def test_evaluations_of_the_other_ways(settings, evaluations):
    with counted(net("eps")) as seen:
        inversion = recorded(guider(net("eps")), 5, picture("eps"), **settings)
    assert seen.rows == inversion.evaluations == evaluations


def test_stock_guiders_are_recorded():
    """Core's CFG guider with its positive as the free prompt; a guider with a mix of its own as a whole."""
    model, latent = net("eps"), picture("eps")
    ours = recorded(guider(model, 4.0, FREE, FREE, NEG), 5, latent)
    with counted(model) as seen:
        stock = recorded(cfg_guider(model, FREE, NEG, 4.0), 5, latent)
    assert seen.rows == 11 and error(stock.residuals, ours.residuals) < 1e-4
    assert stock.conditioning_hash == ours.conditioning_hash
    dual = comfy_extras.nodes_custom_sampler.DualCFGGuider.execute(model, ID, OTHER, NEG, 3.0, 2.0, "regular")[0]
    inversion = recorded(dual, 5, latent)
    assert error(rebuilt(dual, inversion, latent), inversion.anchors[0]) < 1e-3


# -- where the estimate is made ------------------------------------------------------------------------
def test_target_is_plain_ddim_inversion():
    """In the variance-preserving space of the papers, from the network itself: z' = a' (z - b eps) / a + b' eps."""
    model, latent, steps = net("eps"), picture("eps"), 12
    inversion = recorded(guider(model), steps, latent, estimate="target", residuals=False)
    sampling, unet = model.model.model_sampling, model.model.diffusion_model
    z = model.model.process_latent_in(latent)
    for k in range(steps):
        low, high = float(inversion.levels[k]), float(inversion.levels[k + 1])
        a, a2 = 1 / math.sqrt(1 + low ** 2), 1 / math.sqrt(1 + high ** 2)
        t = sampling.timestep(torch.tensor([high])).float()
        eps = unet(z, t, context=FREE[0][0], transformer_options={})
        z = a2 * (z - low * a * eps) / a + high * a2 * eps
        assert error(inversion.anchors[k + 1] * a2, z) < 2e-5, f"level {k + 1}"


# -- many levels in one call ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimate", ["source", "target"])
def test_batched_residuals_are_the_sequential_ones(kind, estimate):
    latent, who = picture(kind, 2), guider(net(kind), 4.0)
    one, many, auto = (recorded(who, 7, latent, chunk=chunk, estimate=estimate) for chunk in (1, 3, 0))
    assert torch.equal(one.anchors, many.anchors)
    for other in (many, auto):
        assert other.calls < one.calls and other.evaluations == one.evaluations
        assert error(one.residuals, other.residuals) < 1e-4


def ranged(conditioning):
    return core.ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.4)[0] \
        + core.ConditioningSetTimestepRange().set_range(OTHER, 0.4, 1.0)[0]


def masked(conditioning):
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6] = 1.0
    return core.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0] + OTHER


def with_wrapper(model):
    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "foreign",
                               lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return model


def with_function(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    return model


@pytest.mark.parametrize("why", ["ranges", "negative ranges", "masks", "wrapper", "unet function", "attention patch"])
def test_what_looks_at_one_sigma_is_never_batched(why):
    model, free, negative = net("eps"), FREE, NEG
    if "ranges" in why:
        free, negative = (free, ranged(negative)) if "negative" in why else (ranged(free), negative)
    elif why == "masks":
        free = masked(free)
    elif why == "attention patch":
        model = TwoSlots().on(model)
    else:
        model = with_wrapper(model) if why == "wrapper" else with_function(model)
    who, latent = guider(model, 4.0, free=free, negative=negative), picture("eps")
    one = recorded(who, 6, latent, chunk=1)
    with counted(model) as seen:
        inversion = recorded(who, 6, latent, chunk=8)
    assert max(seen.sizes) <= 4, "a prompt of two parts and its negative are four rows of one level"
    assert inversion.calls == one.calls and torch.equal(inversion.residuals, one.residuals)
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 5e-3


def test_the_chunk_fits_into_memory(monkeypatch):
    from likeness.models.hosting import recorder
    who, latent = guider(net("eps"), 4.0), picture("eps")
    free = recorded(who, 8, latent)
    monkeypatch.setattr(type(net("eps").model), "memory_required", lambda self, shape, cond_shapes=None: shape[0] * 1e6)
    monkeypatch.setattr(recorder.management, "get_free_memory", lambda device, both=False: (6.1e6,) * 2 if both else 6.1e6)
    with counted(net("eps")) as seen:
        small = recorded(who, 8, latent)
    assert max(seen.sizes) <= 2 and small.calls > free.calls
    assert error(small.residuals, free.residuals) < 1e-4


# -- batches -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_pictures(kind):
    latent, who = picture(kind, 3), guider(net(kind), 2.0)
    together = recorded(who, 4, latent)
    flows = Flows(start=1, forward=0.7)
    out, _ = replayed(who, together, latent, flows)
    for n in (0, 2):
        alone = recorded(who, 4, latent[n:n + 1])
        assert error(alone.anchors, together.anchors[:, n:n + 1]) < 5e-4
        single, _ = replayed(who, alone, latent[n:n + 1], flows)
        assert error(single, out[n:n + 1]) < 1e-3
    spread, _ = replayed(who, alone, latent, flows)
    assert spread.shape == latent.shape and error(spread, single.expand_as(spread)) < 1e-3


# -- other packs and nodes -----------------------------------------------------------------------------
def uncond_reader(model):
    """As SAG or Perp-Neg do it: needs the negative also at cfg 1."""
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 0.1 * torch.tanh(args["uncond_denoised"]),
                                              disable_cfg1_optimization=True)
    return model


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("name", ["rescale", "post", "pre", "pag"])
def test_guidance_functions_are_recorded_as_they_are_replayed(name, cfg):
    model = net("eps")
    if name == "rescale":
        model = core.NODE_CLASS_MAPPINGS["RescaleCFG"]().patch(model, 0.7)[0] if "RescaleCFG" in core.NODE_CLASS_MAPPINGS else \
            __import__("comfy_extras.nodes_model_advanced", fromlist=["RescaleCFG"]).RescaleCFG().patch(model, 0.7)[0]
    elif name == "post":
        model = uncond_reader(model)
    elif name == "pre":
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0], 0.9 * args["conds_out"][1]])
    else:
        model = comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]
    latent, who = picture("eps"), guider(model, cfg)
    inversion = recorded(who, 6, latent)
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 5e-3
    if name != "rescale" or cfg > 1:
        without = recorded(guider(net("eps"), cfg), 6, latent)
        assert error(without.residuals, inversion.residuals) > 1e-3 or (name == "pre" and cfg == 1.0)


@pytest.mark.parametrize("apart", [False, True])
def test_patches_with_two_slots(apart):
    """A third slot would be out of range of their pair; with a free_model the free rows never see them."""
    spy = TwoSlots()
    model, latent = spy.on(net("eps")), picture("eps")
    who = guider(model, 4.0, free_model=net("eps") if apart else None)
    inversion = recorded(who, 5, latent)
    plain = recorded(guider(net("eps"), 4.0), 5, latent)
    if apart:
        assert not spy.calls and torch.equal(inversion.anchors, plain.anchors)
    else:
        assert spy.calls and error(inversion.residuals, plain.residuals) > 1e-3
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 5e-3
    spy.calls.clear()
    replayed(who, inversion, latent, Flows(forward=0.5))
    assert spy.calls and all(slot < 2 for call in spy.calls for slot in call)
    assert any(0 in call for call in spy.calls), "the identity's own rows have the patch"


def test_middle_blocks_fire():
    spy = TwoSlots()
    model = net("eps").clone()
    model.set_model_attn2_replace(spy, "middle", 0, 0)
    recorded(guider(model), 3, picture("eps"))
    assert len(spy.calls) == 6  # beside patches of others nothing that was evaluated on the way up is used again
    other = net("eps").clone()
    other.set_model_attn2_replace(spy, "middle", 1, 0)
    recorded(guider(other), 3, picture("eps"))
    assert len(spy.calls) == 6


@pytest.mark.parametrize("where", ["free", "identity"])
def test_a_lora_as_a_hook(where):
    """Weights that only some prompts have: in calls of their own, and the fingerprint is the plain model's."""
    model, latent = net("eps"), picture("eps")
    names = [name for name in model.model.state_dict() if ".attn2.to_k.weight" in name]
    patches = {name: (draw(4, *model.model.state_dict()[name].shape) * 0.5,) for name in names}
    group = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights, hook.need_weight_init = patches, False
    group.add(hook)
    hooked = comfy.hooks.set_hooks_for_conditioning(FREE if where == "free" else ID, group)
    who = guider(model, 3.0, **({"free": hooked} if where == "free" else {"positive": hooked}))
    before = model_hash(model)
    inversion = recorded(who, 5, latent, chunk=8)
    assert inversion.model_hash == before == model_hash(model)
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 5e-3
    out, _ = replayed(who, inversion, latent, Flows(start=2))
    plain = guider(model, 3.0)
    other = recorded(plain, 5, latent)
    without, _ = replayed(plain, other, latent, Flows(start=2))
    assert error(out, without) > 1e-3
    assert model_hash(model) == before
    if where == "identity":
        assert error(inversion.residuals, other.residuals) < 1e-4, "the hook acted on the free rows"
    else:
        assert error(inversion.residuals, other.residuals) > 1e-3


def test_a_controlnet_with_a_range():
    """On the free prompt too, over a part of the sampling: recorded as it will be replayed."""
    model = base("sd15")[0]
    control = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    prompts = [encode("sd15", words) for words in ("a cat", "a room", "blurry")]
    apply = core.ControlNetApplyAdvanced().apply_controlnet
    free, negative = apply(prompts[1], prompts[2], control, hint, 0.8, 0.0, 0.5)
    latent = model.model.latent_format.process_out(draw(5, 1, 4, 8, 8))
    who = guider(model, 3.0, apply(prompts[0], negative, control, hint, 0.8, 0.0, 0.5)[0], free, negative)
    inversion = recorded(who, 3, latent, chunk=8)
    assert inversion.calls > 4, "levels were batched"
    assert error(rebuilt(who, inversion, latent), inversion.anchors[0]) < 2e-3
    plain = recorded(guider(model, 3.0, *prompts), 3, latent)
    assert error(plain.residuals[-1], inversion.residuals[-1]) > 1e-3


# -- hosts and precisions -----------------------------------------------------------------------------
def test_recording_and_replay_see_the_same_schedule():
    model, seen = net("eps").clone(), []

    def look(executor, *args, **kwargs):
        seen.append(tuple(args[4]["transformer_options"]["sample_sigmas"].tolist()))
        return executor(*args, **kwargs)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "test", look)
    inversion = recorded(guider(model), 5, picture("eps"), start=2)
    rebuilt(guider(model), inversion, picture("eps"))
    assert set(seen) == {tuple(inversion.sigmas.tolist())}


@pytest.mark.parametrize("kind", KINDS)
def test_closed_loop_in_half_precision(kind):
    """bf16 weights and activations: the path is exact, only the last addition rounds (to float32)."""
    model, latent = make(kind, dtype=torch.bfloat16), picture(kind)
    who = guider(model, 4.0)
    inversion = recorded(who, 8, latent, closed=True)
    x = rebuilt(who, inversion, latent)
    assert error(x, inversion.anchors[0]) == inversion.drift < 1e-5
    for level in range(1, 9):  # each anchor is bit for bit where the replay stands
        steps = replayed(who, inversion, latent, Flows(forward=0.0), evaluate_all=True)[1].steps
        assert torch.equal(steps[8 - level], inversion.anchors[level - 1]) or level == 1


def test_weights_that_stay_outside_of_the_device(monkeypatch):
    """The host's --lowvram: LoRAs are added while the layers run, and nothing else changes."""
    load = comfy.model_patcher.ModelPatcher.load
    model, latent = lora(make("eps", seed=4)), picture("eps")
    who = guider(model, 3.0)
    inversion = recorded(who, 4, latent)
    expected = replayed(who, inversion, latent, Flows(1))[0]
    comfy.model_management.unload_all_models()
    outside = []

    def partly(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, 1024, force_patch_weights, False)
        outside.append(self.model.model_lowvram and self.model.lowvram_patch_counter > 0)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", partly)
    low = recorded(who, 4, latent)
    assert any(outside) and low.model_hash == inversion.model_hash
    assert error(low.anchors, inversion.anchors) < 1e-5 and error(low.residuals, inversion.residuals) < 1e-4
    assert error(replayed(who, inversion, latent, Flows(1))[0], expected) < 1e-4
    monkeypatch.undo()
    comfy.model_management.unload_all_models()


def test_the_guider_stays_as_it_was():
    model = lora(net("eps"))
    who = guider(model, 3.0)

    def state():
        return (dict(vars(who)), {slot: [dict(entry) for entry in entries] for slot, entries in who.original_conds.items()},
                sorted(model.patches), repr(sorted(model.model_options)), len(model.wrappers), model.patches_uuid,
                dict(model.model_options["transformer_options"]))

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a is b or a == b
    before = state()
    inversion = recorded(who, 4, picture("eps"))
    recorded(who, 4, picture("eps"), closed=True, start=1)
    judge_text = rebuilt(who, inversion, picture("eps"))
    assert torch.isfinite(judge_text).all()
    assert same({key: value for key, value in before[0].items() if key != "conds"},
                {key: value for key, value in state()[0].items() if key != "conds"})
    assert same(before[1:], state()[1:])
    stock = cfg_guider(net("eps"), ID, NEG)
    held = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(stock).items()}
    recorded(stock, 3, picture("eps"))
    assert vars(stock).keys() == held.keys() and set(stock.original_conds) == {"positive", "negative"}


# -- cancel --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["record", "record closed", "replay"])
def test_cancel_leaves_all_usable(where):
    latent, who = picture("eps"), guider(net("eps"), 3.0)
    inversion = recorded(who, 6, latent)
    expected, _ = replayed(who, inversion, latent)

    def at(call):
        if call == 4:
            comfy.model_management.interrupt_current_processing(True)
    before = set(vars(who))
    with counted(net("eps")) as seen:
        seen.at = at
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            if where == "replay":
                replayed(who, inversion, latent)
            else:
                recorded(who, 6, latent, closed="closed" in where)
    assert seen.calls == 4, "the next call of the network looks at the flag"
    assert not comfy.model_management.processing_interrupted()
    assert before <= set(vars(who)) and who.free_options is None
    again = recorded(who, 6, latent)
    assert torch.equal(again.anchors, inversion.anchors) and torch.equal(again.residuals, inversion.residuals)
    assert torch.equal(replayed(who, again, latent)[0], expected)


# -- bad input -----------------------------------------------------------------------------------------
def test_latents_that_are_refused():
    model, who = net("eps"), guider(net("eps"))
    sigmas = schedule(model, 4)
    bad = picture("eps").clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(LikenessError, match="The latent holds values that are no numbers"):
        record(who, sigmas, bad)
    with pytest.raises(LikenessError, match="16 channels, this model works with 4"):
        record(who, sigmas, samples_of(who, {"samples": picture("flow")}), Settings())
    assert samples_of(who, {"samples": torch.zeros(1, 16, 8, 8)}).shape[1] == 4
    with pytest.raises(LikenessError, match="several parts"):
        record(who, sigmas, comfy.nested_tensor.NestedTensor((picture("eps"), picture("eps"))))
    with pytest.raises(LikenessError, match="rise"):
        record(who, sigmas.flip(0), picture("eps"))
    with pytest.raises(LikenessError, match="step 5, but the schedule has 4"):
        record(who, sigmas, picture("eps"), Settings(start=5))


def test_a_model_that_breaks_names_the_step():
    model = net("eps").clone()

    def breaks(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        return out * math.nan if float(args["timestep"].max()) > 5 else out
    model.set_model_unet_function_wrapper(breaks)
    latent, sigmas = picture("eps"), torch.tensor([14.0, 6.0, 3.0, 1.0, 0.0])
    with pytest.raises(LikenessError, match=r"step 3 of 4 of the inversion, sigma 6"):
        record(guider(model), sigmas, latent, Settings(estimate="target"))


# -- files and the report ------------------------------------------------------------------------------
def test_a_recording_survives_a_file(tmp_path):
    latent, who = picture("flow"), guider(net("flow"), 3.0)
    inversion = recorded(who, 5, latent, closed=True)
    save_inversion(inversion, tmp_path / "a.safetensors")
    loaded = load_inversion(tmp_path / "a.safetensors")
    assert torch.equal(replayed(who, loaded, latent)[0], replayed(who, inversion, latent)[0])
    with pytest.raises(LikenessError, match="sigmas of 4 steps"):
        replayed(who, loaded, latent, sigmas=schedule(net("flow"), 4))


def test_the_report_replays():
    class Vae:
        @staticmethod
        def decode(samples):
            return samples[:, :3].movedim(1, -1).sigmoid()
    who, latent = guider(net("eps"), 3.0), picture("eps")
    inversion = recorded(who, 5, latent)
    words, plot, strip = judge(inversion, Vae(), 4, who)
    assert " dB" in words and plot.shape[-1] == 3 and strip.shape == (1, 8, 32, 3)
    decibels = psnr(rebuilt(who, inversion, latent), inversion.anchors[0])
    assert f"{decibels:.0f}" == f"{float(words.split('evaluated: ')[1].split(' dB')[0]):.0f}"
    assert torch.allclose(strip[:, :, 24:], Vae.decode(latent), atol=1e-4), "the last picture is the picture"
    assert judge(recorded(who, 5, latent, start=5), Vae(), 4, who)[2].shape == (1, 8, 8, 3)
    assert text(1)[0][0].shape == (1, 4, 32)
