"""Whole model and whole loop of the RealCustom release, inside the host, against its numbers."""
from __future__ import annotations

import pytest
import torch

from host import release
from host.release import IO
from host.support import base, blind, comfy, draw, encode
from likeness.models.common.errors import LikenessError
from likeness.models.hosting.base_weights import apply_base
from likeness.models.hosting.blocks import attention_blocks
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.row_masks import GUIDANCE_KEY
from likeness.models.realcustom import schedule

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def test_every_layer_has_its_place_in_the_network():
    have = attention_blocks(release.model())
    assert release.adapter().config.layers == tuple(have.items()) and len(have) == 22


def test_tokens():
    module = release.adapter().patcher.model
    for name, end in (("image_tokens", ""), ("image_tokens_zero", "_zero")):
        tokens = module.encode([IO[f"in.deep{end}"], IO[f"in.local{end}"]])
        torch.testing.assert_close(tokens, IO[f"single.{name}"], **CLOSE)


def test_text_alone():
    torch.testing.assert_close(release.noise_of(release.model(), release.prompts()[0]), IO["single.t599.guidance_eps"], **CLOSE)


def test_one_call_without_a_mask():
    done = release.injected()
    torch.testing.assert_close(release.noise_of(done.model, done.positive), IO["single.t599.cond_eps.nomask"], **CLOSE)
    assert "acts in the whole picture" in done.report and "this method has none" in done.report


def test_one_call_under_the_mask():
    done = release.injected(mask=IO["single.t599.mask.max_norm"][:, 0])
    torch.testing.assert_close(release.noise_of(done.model, done.positive), IO["single.t599.cond_eps.max_norm"], **CLOSE)


def test_the_negative_attends_to_the_black_picture_under_the_same_mask():
    done = release.injected(mask=IO["single.t599.mask.max_norm"][:, 0])
    torch.testing.assert_close(release.noise_of(done.model, done.negative), IO["single.t599.neg_eps.max_norm"], **CLOSE)


def test_a_subject_without_a_place_changes_nothing():
    """Unstamped rows of a patched MODEL are the plain model's, bit for bit."""
    positive, *_ = release.prompts()
    done = release.injected()
    assert torch.equal(release.noise_of(done.model, positive), release.noise_of(release.model(), positive))


def loop(base, positive, negative):
    """(latents in the release's variables, x0 of each step) of six steps at guidance 3.5."""
    levels, latents, predictions = release.levels(6), [], []

    def note(step, x, x0):
        latents.append(x / (1 + levels[step] ** 2) ** 0.5)
        predictions.append(x0)

    def sample(network, x, sigmas, extra_args):
        schedule.single_step(lambda k, sigma: network(k, sigma.reshape(1), **extra_args), x, sigmas, note)
    release.run(base, positive, negative, schedule.CFG, sample, levels)
    return torch.cat(latents), torch.cat(predictions)


def check_loop(latents, predictions):
    """The golden latents are those after each step; the one after the last is left out, the release decodes the x0."""
    after, x0 = (IO[f"loop.6steps.reuse3.max_norm.{name}"] for name in ("latents", "x0"))
    for mine, want, name in ((latents[1:], after[:-1], "latents"), (predictions, x0, "x0")):
        assert (mine - want).abs().max() <= 1e-4 * want.abs().max(), name


def with_masks():
    """An injection whose live masks are those of the golden loop."""
    guidance = release.guidance()
    done = release.injected(guidance=guidance)
    done = done._replace(model=blind(done.model))
    levels = release.levels(6).tolist()

    def give(executor, model, conds, x, timestep, model_options):
        step = levels.index(float(timestep[0]))
        live = {guidance.name: IO["loop.6steps.reuse3.max_norm.masks"][step][None]}
        options = {**model_options["transformer_options"], GUIDANCE_KEY: live}
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})
    done.model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "test", give)
    return done


def test_the_loop_with_the_releases_masks():
    done = with_masks()
    check_loop(*loop(done.model, done.positive, done.negative))


def test_the_nodes_repeat_the_loop(nodes):
    """Core's guider with SIGMAS and SAMPLER of the two nodes; the picture is the prediction of the last step."""
    done, want, seen = with_masks(), IO["loop.6steps.reuse3.max_norm.x0"], []
    (sigmas,) = nodes["Likeness_ReleaseSigmas"].execute(done.model, "RealCustom++", 6, 1.0).args
    (sampler,) = nodes["Likeness_RealCustomSampler"].execute().args
    guider = comfy.samplers.CFGGuider(done.model)
    guider.set_conds(done.positive, done.negative)
    guider.set_cfg(schedule.CFG)
    noise = IO["in.latent"]
    out = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0,
                        callback=lambda step, x0, x, total: seen.append((step, total, x0)))
    assert [(step, total) for step, total, _ in seen] == [(step, 6) for step in range(6)]
    for (_, _, x0), golden in zip(seen, want, strict=True):
        assert (x0[0] - golden).abs().max() <= 1e-4 * golden.abs().max()
    torch.testing.assert_close(out, done.model.model.process_latent_out(seen[-1][2]), atol=1e-4, rtol=1e-5)


def test_the_releases_sampler_refuses_a_flow_model(nodes):
    """Its second-order step is one of the noise of Stable Diffusion."""
    (sampler,) = nodes["Likeness_RealCustomSampler"].execute().args
    guider = comfy.samplers.CFGGuider(base("sd3")[0])
    guider.set_conds(encode("sd3", "a cat"), encode("sd3", ""))
    noise = torch.zeros(1, 16, 8, 8)
    with pytest.raises(LikenessError, match="this is a flow model"):
        guider.sample(noise, noise, sampler, torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True, seed=0)


def test_release_sigmas(nodes):
    execute = nodes["Likeness_ReleaseSigmas"].execute
    model = release.model()
    simple = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 25)
    assert torch.equal(execute(model, "RealCustom++", 25, 1.0).args[0], simple)
    half = execute(model, "RealCustom++", 10, 0.5).args[0]
    assert torch.equal(half, execute(model, "RealCustom++", 20, 1.0).args[0][-11:])
    with pytest.raises(LikenessError, match="the last of 5000"):
        execute(model, "RealCustom++", 500, 0.1)
    with pytest.raises(LikenessError, match="1000 noise levels of Stable Diffusion"):
        execute(base("sd3")[0], "RealCustom++", 25, 1.0)


def test_base_weights_of_the_file_take_the_place_of_the_checkpoints():
    of = release.new_adapter(keep_base=True)
    assert of.found_base == len(of.base_weights) > 600 and not release.adapter().base_weights
    other = release.new_model(trained=False)
    done = release.injected(other, of)
    assert f"{of.found_base} tensors in place" in done.report
    torch.testing.assert_close(release.noise_of(done.model, done.positive), IO["single.t599.cond_eps.nomask"], **CLOSE)
    plain = release.noise_of(other, release.prompts()[0])
    assert torch.equal(plain, torch.zeros_like(plain)), "the parent got them too"


def with_lora(model, seed):
    """A clone with a change of the text attentions, as a LoRA loader makes it."""
    model = model.clone()
    state = model.model.state_dict()
    names = [name for name in state if name.endswith(".attn2.to_k.weight")]
    assert model.add_patches({name: ("diff", (draw(seed, *state[name].shape),)) for name in names}, 0.2)
    return model


def test_loras_before_between_and_after_stay_on_top_of_base_weights():
    """Three LoRAs round two injectors over an empty base are the three on the base itself."""
    of = release.new_adapter(keep_base=True)
    positive, negative, word = release.prompts()

    def chain(model, adapter, places):
        model = with_lora(model, 1) if "before" in places else model
        first = release.injected(model, adapter)
        between = with_lora(first.model, 2) if "between" in places else first.model
        second = inject(between, first.positive, first.negative, release.subject(adapter), word, Strengths(0.0, 0.5))
        return first, with_lora(second.model, 3) if "after" in places else second.model, second.positive
    plain = None
    for places in (("before",), ("between",), ("before", "between", "after")):
        empty = release.new_model(trained=False)
        first, model, rows = chain(empty, of, places)
        _, want, want_rows = chain(release.model(), release.adapter(), places)
        done = release.noise_of(model, rows)
        torch.testing.assert_close(done, release.noise_of(want, want_rows), **CLOSE)
        assert plain is None or (done - plain).abs().max() > 1e-4, "the LoRA changes nothing"
        plain = done
        sets = [sum(patch[1][0] == "set" for patch in patches) for patches in model.patches.values()]
        assert set(sets) == {1}, "base weights of one file stand once"
        assert not empty.patches and first.model.patches_uuid != empty.patches_uuid


def test_base_weights_of_another_network_are_refused():
    with pytest.raises(LikenessError, match="Only 0 of the 1 base weights"):
        apply_base(release.model().clone(), (("no.such.weight", torch.zeros(1)),))


def test_plain_guidance_is_the_one_the_release_uses():
    """Mode naive_global_direct, rescale 0: the host's own formula with the image guidance scale."""
    golden = release.recipe.golden("cfg")
    t, ti, u = golden["in.t"], golden["in.ti"], golden["in.u"]
    for scale, cond, name in ((3.5, ti, "naive_global_direct.wt3.5.wi3.5.r0.0"), (7.5, t, "plain.w7.5")):
        x = torch.zeros_like(u)
        mine = comfy.samplers.cfg_function(None, cond, u, scale, x, torch.ones(1), {}, None, None)
        torch.testing.assert_close(mine, golden[f"out.{name}"], **CLOSE)
