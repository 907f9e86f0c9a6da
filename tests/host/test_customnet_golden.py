"""The dual-attention network against the authors' numbers, and what another pack's attention patches do to it."""
from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from host import customnet_files as cf
from host.support import comfy
from likeness.models.common.errors import LikenessError
from likeness.models.customnet import schedule
from likeness.models.hosting.customnet import build_unet
from likeness.models.hosting.customnet_unet import OBJECT_KEY, Carrier, DualAttention, _Scaled, renamed, restored
from likeness.models.hosting.exact import release_sigmas
from unit import recipe
from unit.test_customnet import GOLDEN

CLOSE = {"atol": 1e-5, "rtol": 0}
SMALL = {"in_channels": 8, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2], "num_res_blocks": 1,
         "channel_mult": [1, 2], "num_heads": 8, "transformer_depth": 1, "context_dim": 32}  # as the authors' settings say it
BLOCKS = [("input", 1), ("input", 3), ("middle", 0), *(("output", k) for k in range(4))]


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


@cache
def weights() -> dict[str, Tensor]:
    return recipe.weights("unet_small_8ch", GOLDEN)


@cache
def unet():
    return build_unet(SMALL, weights())


@cache
def io() -> dict[str, Tensor]:
    return recipe.golden("unet_small_8ch", GOLDEN)


def run(network=None, tokens: Tensor | None = None, **options) -> Tensor:
    x = torch.cat([io()["x_noisy"], io()["c_concat_location"]], 1)
    tokens = io()["object_context"] if tokens is None else tokens
    return (network or unet())(x, io()["timesteps"], context=io()["text_context"], object_context=tokens, **options)


def test_network():
    torch.testing.assert_close(run(), io()["out"], **CLOSE)
    x = torch.cat([io()["x_noisy"], torch.zeros_like(io()["c_concat_location"])], 1)
    null = unet()(x, io()["timesteps"], context=io()["text_context"], object_context=torch.zeros(2, 1, 32))
    torch.testing.assert_close(null, io()["out_object_zero_concat_zero"], **CLOSE)
    bare = unet()(x, io()["timesteps"], context=io()["text_context"])
    torch.testing.assert_close(bare, null, **CLOSE)


HOSTS = {**{key: value for key, value in SMALL.items() if key != "attention_resolutions"}, "num_res_blocks": [1, 1],
         "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}


@pytest.mark.parametrize("change", (
    {}, {"transformer_depth_output": None}, {"transformer_depth": 1}, {"transformer_depth_middle": None},
    {"num_res_blocks": 1, "channel_mult": (1, 2)}))
def test_the_settings_in_the_hosts_words(change):
    settings = {key: value for key, value in (HOSTS | change).items() if value is not None}
    assert torch.equal(run(build_unet(settings, weights())), run())


@pytest.mark.parametrize("part, moves", (
    ("to_k.", False), ("to_q.", True), ("to_v.", True), ("to_k_text.", True), ("to_v_text.", True), ("to_out.", True)))
def test_every_branch_is_alive(part, moves):
    """With one object token its keys cannot matter; every other part does."""
    state = {name: value * 1.1 if f"attn2.{part}" in name else value for name, value in weights().items()}
    distance = float((run(build_unet(SMALL, state)) - io()["out"]).abs().max())
    assert distance > 0.05 if moves else distance < 1e-5


def test_names_go_both_ways():
    assert restored(renamed(weights())) == weights()
    assert sum("_text." in name for name in weights()) > 0
    assert not any("_text." in name for name in renamed(weights()))


def test_a_file_with_a_lost_tensor_is_refused():
    lost = "output_blocks.1.1.transformer_blocks.0.attn2.to_v_text"
    state = {name: value for name, value in weights().items() if lost not in name}
    with pytest.raises(LikenessError, match="missing"):
        build_unet(SMALL, state)
    with pytest.raises(LikenessError, match="no part of it"):
        build_unet(SMALL, weights() | {"model.diffusion_model.extra.weight": torch.zeros(1)})


# -- one attention by itself ---------------------------------------------------------------------------------
@cache
def block() -> dict[str, Tensor]:
    return recipe.golden("block", GOLDEN)


@cache
def attention() -> DualAttention:
    module = DualAttention(32, 48, 8, 4)
    state = renamed({key: value for key, value in block().items() if key.startswith("weights.attn2.")})
    module.load_state_dict({key.removeprefix("weights.attn2."): value for key, value in state.items()})
    return module


def test_attention():
    found = block()
    n = torch.nn.functional.layer_norm(found["x"], (32,), found["weights.norm2.weight"], found["weights.norm2.bias"])
    options = {OBJECT_KEY: Carrier(found["object_context"])}
    got = attention()(n, found["text_context"], transformer_options=options)
    torch.testing.assert_close(got, found["out_attn2_of_norm2_x"], **CLOSE)
    obj = attention().object_values(found["object_context"], n)
    torch.testing.assert_close(obj.expand(-1, 64, -1), found["obj_branch_before_to_out"], **CLOSE)


@pytest.mark.parametrize("scale, name", ((1.0, "out_block"), (0.0, "out_block_text_scale_0"), (0.5, "out_block_text_scale_0p5")))
def test_block_with_less_text(scale, name):
    found = block()
    module = comfy.ldm.modules.attention.BasicTransformerBlock(32, 8, 4, context_dim=48)
    module.attn2 = attention()
    names = {key.removeprefix("weights."): value for key, value in found.items() if key.startswith("weights.")}
    missing, _ = module.load_state_dict({key: value for key, value in names.items() if "attn2" not in key}, strict=False)
    assert all("attn2" in key for key in missing)
    options = {OBJECT_KEY: Carrier(found["object_context"]), "patches": {"attn2_patch": [_Scaled(torch.full((2, 1), scale))]}}
    torch.testing.assert_close(module(found["x"], found["text_context"], options), found[name], **CLOSE)


def test_spatial_transformer():
    """GroupNorm of 1e-6, 1x1 convolutions in and out, the residual, and the block with both contexts between them."""
    found = block()
    weights_ = {key.removeprefix("st_weights."): value for key, value in found.items() if key.startswith("st_weights.")}
    module = comfy.ldm.modules.attention.SpatialTransformer(32, 8, 4, depth=1, context_dim=48, use_linear=False)
    module.transformer_blocks[0].attn2 = DualAttention(32, 48, 8, 4)
    module.load_state_dict(renamed(weights_))
    options = {OBJECT_KEY: Carrier(found["object_context"])}
    torch.testing.assert_close(module(found["st_x"], found["text_context"], options), found["st_out"], **CLOSE)


def test_several_object_tokens_have_their_own_softmax():
    found = block()
    tokens = found["object_context"].repeat(1, 2, 1) * torch.tensor([1.0, -0.5])[None, :, None]
    n = found["x"]
    q, k, v = (layer(t) for layer, t in ((attention().to_q, n), (attention().to_k_obj, tokens), (attention().to_v_obj, tokens)))
    q, k, v = (t.unflatten(-1, (8, 4)).transpose(1, 2).double() for t in (q, k, v))
    want = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    got = attention().object_values(tokens, attention().to_q(n))
    torch.testing.assert_close(got.double(), want, **CLOSE)


# -- other packs ---------------------------------------------------------------------------------------------
def plain(q, k, v, extra):
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])


def replaced(blocks=BLOCKS, function=plain) -> dict:
    return {"patches_replace": {"attn2": {key: function for key in blocks}}}


@pytest.mark.parametrize("blocks", (BLOCKS, BLOCKS[1:3]))
def test_a_replaced_text_attention_keeps_the_object(blocks):
    torch.testing.assert_close(run(transformer_options=replaced(blocks)), io()["out"], **CLOSE)


def test_without_our_patch_a_replacement_loses_the_object(monkeypatch):
    """The control of the test before: the host passes our attention by."""
    monkeypatch.setattr(type(unet()), "_add_late", lambda self, out, extra: out)
    assert float((run(transformer_options=replaced()) - io()["out"]).abs().max()) > 0.5


def test_rows_that_are_multiplied_and_joined_again_keep_the_object():
    """As attention couple does it: rows for each region, and their mean."""
    def multiply(n, context, value, extra):
        return n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)

    def join(out, extra):
        return out.unflatten(0, (2, -1)).mean(0)
    options = {"patches": {"attn2_patch": [multiply], "attn2_output_patch": [join]}}
    torch.testing.assert_close(run(transformer_options=options), io()["out"], **CLOSE)
    options["patches"]["attn2_output_patch"] = []
    with pytest.raises((LikenessError, RuntimeError)):
        run(transformer_options=options)


def test_less_text_also_where_it_is_replaced():
    half = torch.full((2, 1), 0.5)
    torch.testing.assert_close(run(text_scale=half, transformer_options=replaced()), run(text_scale=half), **CLOSE)
    assert float((run(text_scale=half) - run()).abs().max()) > 0.05
    torch.testing.assert_close(run(text_scale=torch.ones(2, 1)), run(), atol=0, rtol=0)


def test_options_that_came_in_stay_as_they_were():
    options = replaced()
    options["patches"] = {"attn2_output_patch": []}
    run(transformer_options=options)
    assert options["patches"] == {"attn2_output_patch": []}
    assert OBJECT_KEY not in options


# -- the release's sampler -----------------------------------------------------------------------------------
@pytest.mark.parametrize("steps, evaluations, begin", ((50, 49, 961), (60, 62, 977), (150, 166, 991), (3, 2, 334)))
def test_the_releases_schedule_begins_at_noise_for_any_count(steps, evaluations, begin):
    """Steps that do not divide 1000 give a few more; none of them is cut off unless denoise asks for it."""
    model = cf.loaded().model
    table = model.get_model_object("model_sampling").sigmas
    levels = release_sigmas(model, steps, release="CustomNet")
    assert len(levels) == evaluations + 1 and levels[0] == table[begin]
    half = release_sigmas(model, 20, 0.5, "CustomNet")
    assert torch.equal(half, release_sigmas(model, 40, release="CustomNet")[-21:])
    with pytest.raises(LikenessError, match="at least 3"):
        release_sigmas(model, 2, release="CustomNet")


def test_release_sigmas_with_euler_are_the_release_sampler():
    """DDIM, eta 0, guidance 3, written out in float64 in the authors' variables, on a tiny file."""

    loaded, done = cf.loaded(), cf.conditioned()
    steps = 10
    levels = release_sigmas(loaded.model, steps, release="CustomNet")
    assert len(levels) == steps
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    guider = cf.support.cfg_guider(loaded.model, done.positive, done.negative, 3.0)
    start = noise * float((1 + levels[0] ** 2) ** 0.5)  # the release starts from noise of variance 1
    zero = torch.zeros_like(noise)
    got = guider.sample(start / levels[0], zero, comfy.samplers.ksampler("euler"), levels, disable_pbar=True, seed=0)
    got = got * 0.18215 / float((1 + levels[-1] ** 2) ** 0.5)

    sampling = loaded.model.get_model_object("model_sampling")
    alphas = 1 / (1 + sampling.sigmas.double() ** 2)
    shown = [entry[0][1][cf.KEY] for entry in (done.positive, done.negative)]
    model = loaded.model.model
    x = noise.double()
    times = [*schedule.timesteps(steps), 0]
    for now, after in zip(times, times[1:], strict=False):
        eps = []
        for entry, row in zip((done.positive, done.negative), shown, strict=True):
            location = torch.zeros(1, 4, 8, 8) if row.location is None else row.location
            tokens = torch.zeros(1, 1, cf.WIDTH) if row.embed is None else model.object_token(row.embed, row.camera)
            inputs = torch.cat([x.float(), location], 1)
            eps.append(model.diffusion_model(inputs, torch.tensor([float(now)]), context=entry[0][0].float(),
                                             object_context=tokens).double())
        e = eps[1] + 3.0 * (eps[0] - eps[1])
        clean = (x - (1 - alphas[now]).sqrt() * e) / alphas[now].sqrt()
        x = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * e
    torch.testing.assert_close(got.double() / x.abs().max(), x / x.abs().max(), atol=1e-4, rtol=0)
