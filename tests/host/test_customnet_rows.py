"""A row shows the object if, and only if, its own conditioning says so: every guider, batches, sizes, texts, ControlNet."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import tiny
from host import customnet_files as cf
from host.support import cfg_guider, comfy, comfy_extras, core, run_guider
from likeness.models.common.errors import LikenessError
from likeness.models.customnet.placement import Placement
from likeness.models.customnet.view import View
from likeness.models.hosting.customnet_model import CustomNetConfig, MiniatureConfig
from likeness.models.hosting.view import Strengths


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


class Watch:
    """Stands round every call of the network and checks each row by its text: what it shows, and that it is what the row
    alone would give."""

    def __init__(self, model: Any, *texts: tuple[Any, bool]):
        self.model = model.clone()
        self.model.set_model_unet_function_wrapper(self)
        self.texts = [(entry[0][0], entry[1].get(cf.KEY) if shows else None) for conditioning, shows in texts
                      for entry in conditioning]
        self.seen: list[tuple[int, bool]] = []
        self.calls = 0

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], dict(args["c"])
        out = apply_model(x, t, **c)
        for row in range(x.shape[0]):
            text, shown = next((known, shown) for known, shown in self.texts if torch.equal(
                c["c_crossattn"][row, :known.shape[0]], known.to(x)))
            tokens, concat = c["object_context"][row], c["c_concat"][row]
            assert bool(tokens.any()) == (shown is not None)
            assert bool(concat.any()) == (shown is not None)
            if shown is not None and concat.shape == shown.location.shape[1:]:
                assert any(torch.equal(concat, one) for one in shown.location)
            alone = {name: value[row:row + 1] for name, value in c.items() if torch.is_tensor(value)}
            alone["c_crossattn"] = text[None].to(x)
            options = {**c["transformer_options"], "cond_or_uncond": [7]}
            own = apply_model(x[row:row + 1], t[row:row + 1], transformer_options=options, **alone)
            assert float((own - out[row:row + 1]).abs().max()) < 1e-4 * float(own.abs().max())
            self.seen.append((self.calls, shown is not None))
        self.calls += 1
        return out

    def check(self) -> None:
        assert {shows for _, shows in self.seen} == {True, False}


def watched(model: Any = None, **more: Any):
    done = cf.conditioned(negative="blurry", **more)
    return done, Watch(model or cf.loaded().model, (done.positive, True), (done.negative, False))


def latent(side: int = 8) -> Tensor:
    return torch.zeros(1, 4, side, side)


def test_cfg():
    done, watch = watched()
    run_guider(cfg_guider(watch.model, done.positive, done.negative), latent())
    watch.check()
    assert watch.calls == 1, "positive and negative no longer share a call"


def test_cfg_of_one():
    """The negative is never called; the rows that are still show the object."""
    done, watch = watched()
    run_guider(cfg_guider(watch.model, done.positive, done.negative, 1.0), latent())
    assert watch.seen == [(0, True)]


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg(style):
    done, watch = watched()
    other = cf.encode("a drawing")
    watch.texts.append((other[0][0][0], None))
    guider = comfy_extras.nodes_custom_sampler.DualCFGGuider.execute(watch.model, done.positive, other, done.negative, 3.0, 2.0,
                                                                     style)[0]
    run_guider(guider, latent())
    watch.check()


@pytest.mark.parametrize("as_patch", [False, True])
def test_perp_neg(as_patch):
    done, watch = watched()
    empty = cf.encode("")
    watch.texts.append((empty[0][0][0], None))
    nodes = comfy_extras.nodes_perpneg
    if as_patch:
        guider = cfg_guider(nodes.PerpNeg.execute(watch.model, empty, 1.0)[0], done.positive, done.negative)
    else:
        guider = nodes.PerpNegGuider.execute(watch.model, done.positive, done.negative, empty, 4.0, 1.0)[0]
    run_guider(guider, latent())
    watch.check()


@pytest.mark.parametrize("guidance", ["sag", "pag", "slg"])
def test_guidance_patches(guidance):
    side = 16 if guidance == "sag" else 8
    done, watch = watched(width=8 * side, height=8 * side)
    if guidance == "sag":
        model = comfy_extras.nodes_sag.SelfAttentionGuidance.execute(watch.model, 0.5, 2.0)[0]
    elif guidance == "pag":
        model = comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(watch.model, 3.0)[0]
    else:
        model = comfy_extras.nodes_slg.SkipLayerGuidanceDiT.execute(watch.model, scale=3.0, start_percent=0.0, end_percent=1.0,
                                                                    double_layers="1")[0]
    run_guider(cfg_guider(model, done.positive, done.negative), latent(side))
    watch.check()
    assert watch.calls > 1


@pytest.mark.parametrize("how", ["area", "mask", "mask bounds"])
def test_areas_and_masks(how):
    done, watch = watched()
    plain = cf.encode("a wide beach")
    watch.texts.append((plain[0][0][0], None))
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:40, 16:56] = 1.0
    if how == "area":
        placed = core.ConditioningSetArea().append(done.positive, 48, 64, 16, 0, 1.0)[0]
    else:
        placed = core.ConditioningSetMask().append(done.positive, mask, how if "bounds" in how else "default", 1.0)[0]
    run_guider(cfg_guider(watch.model, placed + plain, done.negative), latent())
    watch.check()


def test_an_area_sees_its_own_part_of_the_location():
    done = cf.conditioned()
    where = done.positive[0][1][cf.KEY].location
    seen: list[Tensor] = []
    model = cf.loaded().model.clone()
    model.set_model_unet_function_wrapper(lambda call, args: seen.append(args["c"]["c_concat"]) or call(
        args["input"], args["timestep"], **args["c"]))
    placed = core.ConditioningSetArea().append(done.positive, 48, 40, 16, 8, 1.0)[0]
    run_guider(cfg_guider(model, placed, done.negative, 1.0), latent())
    assert torch.equal(seen[0], where[:, :, 1:6, 2:8])


def test_combine_with_a_plain_prompt_and_timestep_ranges():
    done, watch = watched()
    plain = cf.encode("a dog")
    watch.texts.append((plain[0][0][0], None))
    run_guider(cfg_guider(watch.model, done.positive + plain, done.negative), latent())
    watch.check()
    ranged = core.ConditioningSetTimestepRange()
    positive = ranged.set_range(plain, 0.0, 0.5)[0] + ranged.set_range(done.positive, 0.5, 1.0)[0]
    first = watch.calls
    run_guider(cfg_guider(watch.model, positive, done.negative), latent(), sigmas=(14.0, 1.0, 0.0))
    assert {shows for call, shows in watch.seen if call == first} == {False}
    assert {shows for call, shows in watch.seen if call == watch.calls - 1} == {True, False}


def test_long_and_negative_prompts():
    done = cf.conditioned(text="a beach with many shells and birds, " * 30, negative="blurry, dark, " * 5)
    assert done.positive[0][0].shape[1] >= 3 * 77
    watch = Watch(cf.loaded().model, (done.positive, True), (done.negative, False))
    first = run_guider(cfg_guider(watch.model, done.positive, done.negative), latent())
    watch.check()
    other = cf.conditioned(text="a beach with many shells and birds, " * 30, negative="")
    assert not torch.equal(first, run_guider(cfg_guider(cf.loaded().model, other.positive, other.negative), latent()))


class FakeControl(comfy.controlnet.ControlBase):
    """Writes down what a ControlNet is given as text."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[Tensor] = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.texts.append(cond["c_crossattn"])
        assert x_noisy.shape[1] == 4

    def copy(self):
        return self


@pytest.mark.parametrize("before", [False, True])
def test_a_controlnet_receives_only_text_tokens(before):
    control = FakeControl()

    def controlled(conditioning):
        return [[entry[0], {**entry[1], "control": control, "control_apply_to_uncond": False}] for entry in conditioning]
    if before:
        model = cf.loaded()
        pair = [controlled(cf.encode(text)) for text in ("on the beach", "blurry")]
        done = cf.view.condition(*pair, model.vision, model.vae, cf.reference(), View((30.0,), (0.0,), (0.0,)), cf.BOXES, 64, 64)
        pair = [done.positive, done.negative]
    else:
        done = cf.conditioned(negative="blurry")
        pair = [controlled(done.positive), controlled(done.negative)]
    run_guider(cfg_guider(cf.loaded().model, *pair), latent())
    assert control.texts
    known = [entry[0][0].float() for conditioning in pair for entry in conditioning]
    for text in control.texts:
        assert text.shape[1:] == (77, cf.WIDTH)
        assert all(any(torch.equal(row.float(), one) for one in known) for row in text)


def test_a_real_controlnet_of_sd15_moves_the_picture_and_the_object_stays():
    """Its residuals have the sizes of SD1.5's blocks; under them the camera still counts, and only through the object."""
    model = cf.loaded(levels="sd15").model
    control = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def painted(azimuth: float, controlled: bool = True, strength: float = 1.0) -> Tensor:
        done = cf.conditioned(azimuth=(azimuth,), negative="blurry", strengths=Strengths(strength, 1.0))
        pair = done.positive, done.negative
        if controlled:
            pair = core.ControlNetApplyAdvanced().apply_controlnet(*pair, control, hint, 0.8, 0.0, 1.0)
        return run_guider(cfg_guider(model, *pair), _noise(6), sigmas=(8.0, 2.0, 0.0))
    right, left, alone = painted(30.0), painted(-50.0), painted(30.0, False)
    for other in (left, alone):
        assert float((right - other).abs().max()) > 1e-3 * float(right.abs().max())
    assert torch.equal(painted(30.0, strength=0.0), painted(-50.0, strength=0.0))


def test_another_packs_text_attention_keeps_the_object():
    """IPAdapter's way in, through MODEL and a sampler."""
    model, calls = cf.loaded().model.clone(), []

    def plain(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        calls.append(extra["block"])
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])
    for block in (("input", 1), ("input", 3), ("middle", 0), *(("output", k) for k in range(4))):
        model.set_model_attn2_replace(plain, *block)

    def painted(model: Any, azimuth: float) -> Tensor:
        done = cf.conditioned(azimuth=(azimuth,), negative="blurry")
        return run_guider(cfg_guider(model, done.positive, done.negative), _noise(6), sigmas=(8.0, 2.0, 0.0))
    want = painted(cf.loaded().model, 30.0)
    near = 1e-4 * float(want.abs().max())
    assert float((painted(model, 30.0) - want).abs().max()) < near
    assert len(set(calls)) == 7
    assert float((painted(model, -50.0) - want).abs().max()) > 10 * near


# -- batches and sizes -----------------------------------------------------------------------------------------
def _noise(seed: int, width: int = 8, height: int = 8) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def _sample(done: Any, noise: Tensor, variant: str = "normal", **more: Any) -> Tensor:
    guider = cfg_guider(cf.loaded(variant).model, done.positive, done.negative, 3.0)
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor([8.0, 2.0, 0.0]),
                         disable_pbar=True, seed=0, **more)


@pytest.mark.parametrize("variant", ["normal", "inpaint"])
def test_views_in_one_batch_are_the_single_runs(variant):
    angles, boxes = (-40.0, 0.0, 50.0), ((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5))
    noise = torch.cat([_noise(k) for k in range(3)])
    many = cf.conditioned(variant, azimuth=angles, placement=Placement(boxes))
    assert many.latent["samples"].shape == (3, 4, 8, 8)
    got = _sample(many, noise, variant)
    for k in range(3):
        one = cf.conditioned(variant, azimuth=angles[k:k + 1], placement=Placement(boxes[k:k + 1]))
        want = _sample(one, noise[k:k + 1], variant)
        assert float((got[k:k + 1] - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert float((got[0] - got[1]).abs().max()) > 1e-3


def test_one_noise_for_all_views():
    view = View((-40.0, 50.0), (0.0, 0.0), (0.0, 0.0), True)
    done = cf.conditioned(view=view)
    assert done.latent["batch_index"] == [0, 0]
    assert "batch_index" not in cf.conditioned(view=view._replace(one_noise=False)).latent
    noise = comfy.sample.prepare_noise(done.latent["samples"], 5, done.latent["batch_index"])
    assert torch.equal(noise[0], noise[1])


def test_the_inpaint_variant_sees_place_and_background_and_its_negative_the_background_alone():
    """Twelve channels: noise, location, background with a white hole where the object will be, as the release lays them."""
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))
    done, seen = cf.conditioned("inpaint", background=picture, negative="blurry"), {}

    def watch(apply_model: Any, args: dict[str, Any]) -> Tensor:
        for row, kind in enumerate(args["cond_or_uncond"]):
            seen[kind] = args["c"]["c_concat"][row]
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = cf.loaded("inpaint").model.clone()
    model.set_model_unet_function_wrapper(watch)
    cf.run(done, model, "inpaint")
    x0, y0, x1, y1 = cf.BOXES.pixels(64, 64)[0]
    cut = picture.clone()
    cut[:, y0:y1, x0:x1] = 1.0
    behind = cf.loaded("inpaint").vae.encode(cut)[0]
    place = done.positive[0][1][cf.KEY].location[0]
    assert bool(place.any()) and not torch.allclose(place, behind)
    torch.testing.assert_close(seen[0], torch.cat([place, behind]), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[1], torch.cat([torch.zeros_like(place), behind]), atol=1e-3, rtol=0)


def test_a_prompt_that_sees_no_background_is_told(caplog):
    done = cf.conditioned("inpaint")
    caplog.clear()
    cf.run(done, variant="inpaint")
    assert not caplog.records
    cf.run(done._replace(negative=cf.encode("", "inpaint")), variant="inpaint")
    assert "did not go through View Conditioner" in caplog.text


@pytest.mark.parametrize("size", [(96, 64), (64, 128), (256, 256)])
def test_other_sizes(size):
    width, height = size
    done = cf.conditioned(width=width, height=height)
    shown = done.positive[0][1][cf.KEY]
    assert shown.location.shape == (1, 4, height // 8, width // 8)
    assert done.mask.shape == (1, height, width)
    out = _sample(done, _noise(1, width // 8, height // 8))
    assert out.shape == (1, 4, height // 8, width // 8)


def test_the_location_is_what_the_vae_gives():
    """Not scaled as the latents that are sampled."""
    canvas = cf.view.location_canvases(cf.view.checked_reference(cf.reference()), cf.BOXES.pixels(256, 256), (256, 256))
    want = cf.loaded().vae.encode(((canvas + 1) / 2).movedim(1, -1))
    assert torch.equal(cf.conditioned(width=256, height=256).positive[0][1][cf.KEY].location, want)


def test_strengths():
    noise = _noise(2)
    trained = _sample(cf.conditioned(), noise)
    assert torch.equal(_sample(cf.conditioned(strengths=Strengths(1.0, 1.0)), noise), trained)
    for strengths in (Strengths(0.3, 1.0), Strengths(1.0, 0.3)):
        assert float((_sample(cf.conditioned(strengths=strengths), noise) - trained).abs().max()) > 1e-3
    none = cf.conditioned(strengths=Strengths(0.0, 1.0))
    other = cf.conditioned(strengths=Strengths(0.0, 1.0), azimuth=(-50.0,))
    assert torch.equal(_sample(none, noise), _sample(other, noise)), "without the object's attention the camera has no way in"


def test_nothing_that_came_in_is_changed():
    positive = cf.encode("on the beach")
    before, options = positive[0][0].clone(), dict(positive[0][1])
    model, picture = cf.loaded(), cf.reference()
    kept = picture.clone()
    cf.view.condition(positive, positive, model.vision, model.vae, picture, View((9.0,), (0.0,), (0.0,)), cf.BOXES, 64, 64)
    assert torch.equal(positive[0][0], before) and positive[0][1] == options and torch.equal(picture, kept)


@pytest.mark.parametrize("lora, near", ((0.0, 1e-6), (0.05, 1e-3)))
def test_weights_that_stay_away_give_the_same_picture(lora, near, monkeypatch):
    """As under --novram, from prompt to latent: every layer fetches its weights for its own call; the host lays LoRAs on in other
    roundings."""
    def call() -> Tensor:
        done = cf.conditioned()
        model = cf.loaded().model.clone()
        if lora:
            key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
            model.add_patches({key: ("diff", (torch.ones(32, cf.WIDTH),))}, lora)
        guider = cfg_guider(model, done.positive, done.negative, 3.0)
        try:
            return guider.sample(_noise(4), torch.zeros(1, 4, 8, 8), comfy.samplers.ksampler("euler"),
                                 torch.tensor([8.0, 2.0, 0.0]), disable_pbar=True, seed=0)
        finally:
            comfy.model_management.unload_all_models()
    whole = call()
    load, outside = comfy.model_patcher.ModelPatcher.load, []

    def partly(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, 1, force_patch_weights, False)
        outside.append(self.model.model_lowvram)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", partly)
    assert float((call() - whole).abs().max()) < near * float(whole.abs().max())
    assert outside and all(outside)


def test_latents_come_to_the_noises_device():
    """On a card the noise lies there already while the VAE's latents wait on the CPU; meta stands for the card."""
    for variant in ("normal", "inpaint"):
        done, model = cf.conditioned(variant), cf.loaded(variant).model.model
        channels = 4 if variant == "normal" else 8
        for conditioning in (done.positive, done.negative):
            shown = conditioning[0][1][cf.KEY]
            out = model.extra_conds(noise=torch.empty(1, 4, 8, 8, device="meta"), device="meta", **{
                cf.KEY: shown._replace(embed=None)})
            assert out["c_concat"].cond.shape == (1, channels, 8, 8) and out["c_concat"].cond.device.type == "meta"


def test_one_place_says_which_way_the_public_weights_turn(monkeypatch):
    """The miniature was trained with this pack's own cameras and does not hang on it."""
    noise = _noise(3)
    right, left = (_sample(cf.conditioned(azimuth=(angle,)), noise) for angle in (40.0, -40.0))
    assert not torch.equal(right, left)
    monkeypatch.setattr(CustomNetConfig, "azimuth_sign", -1.0)
    assert torch.equal(_sample(cf.conditioned(azimuth=(40.0,)), noise), left)
    assert MiniatureConfig.azimuth_sign == 1.0


def test_a_small_picture_of_the_reference_is_shrunk_with_care():
    """Below the reference's size the canvas is the reference's own mean over each pixel; the plain bilinear step would skip."""
    fine = torch.ones(1, 256, 256, 3)
    fine[:, 28:228, 28:228] = (torch.arange(200) // 3 % 2).float()[None, None, :, None]  # 2 pixels: grey either way
    seen = {}
    for side in (64, 256):
        taken = []

        class Vae:
            def encode(self, pixels: Tensor, taken: list = taken) -> Tensor:
                taken.append(pixels)
                return torch.zeros(1, 4, pixels.shape[1] // 8, pixels.shape[2] // 8)
        cf.view.condition([], [], cf.loaded().vision, Vae(), fine, View((0.0,), (0.0,), (0.0,)),
                          Placement(((0.0, 0.0, 1.0, 1.0),)), side, side)
        seen[side] = taken[0]
    assert torch.allclose(seen[256], fine, atol=1e-6)
    inside = seen[64][0, 12:52, 12:52]
    assert float((inside - 0.5).abs().max()) < 0.1, "grey, not stripes of their own"


@pytest.mark.parametrize("across", (False, True))
def test_a_wide_picture_shrinks_the_reference_as_a_square_one(across):
    """A box of 64 pixels is the same in 512 x 64 and in 64 x 64; a plain bilinear step would make a beat of these stripes."""
    fine = torch.ones(1, 256, 256, 3)
    fine[:, 28:228, 28:228] = (torch.arange(200) // 3 % 2).float()[None, None, :, None]
    taken = []

    class Vae:
        def encode(self, pixels: Tensor) -> Tensor:
            taken.append(pixels)
            return torch.zeros(1, 4, pixels.shape[1] // 8, pixels.shape[2] // 8)
    wide, tall = ((0.125, 0.0, 0.125, 1.0), 512, 64), ((0.0, 0.125, 1.0, 0.125), 64, 512)
    for box, width, height in (tall if across else wide, ((0.0, 0.0, 1.0, 1.0), 64, 64)):
        cf.view.condition([], [], cf.loaded().vision, Vae(), fine, View((0.0,), (0.0,), (0.0,)), Placement((box,)), width, height)
    part = taken[0][:, 64:128] if across else taken[0][:, :, 64:128]
    assert torch.equal(part, taken[1])
    assert float(fine.std()) > 0.3 > float(taken[1][0, 12:52, 12:52].std())


def test_a_wide_box_keeps_the_references_width():
    """Stretched over 512 pixels it has all its 256 columns, though the picture is only 64 high."""
    pixels = cf.view.checked_reference(cf.reference())
    assert cf.view._no_finer(pixels, [(0, 0, 512, 64)], 64).shape == (1, 3, 64, 256)
    assert cf.view._no_finer(pixels, [(0, 0, 40, 40), (-64, 8, 96, 40)], 64).shape == (1, 3, 64, 160)
    assert cf.view._no_finer(pixels, [(0, 0, 40, 40)], 256) is pixels


def test_sizes_lose_what_core_would_cut_off():
    """Through the API any number may come; core's VAE drops the rest of a division by 8, at both sides."""
    even, odd = cf.conditioned(width=64, height=96), cf.conditioned(width=71, height=101)
    for done in (even, odd):
        assert done.mask.shape == (1, 96, 64) and done.latent["samples"].shape == (1, 4, 12, 8)
        assert done.background.shape == (1, 96, 64, 3)
    assert torch.equal(even.mask, odd.mask)
    assert torch.equal(*(done.positive[0][1][cf.KEY].location for done in (even, odd)))
    picture = torch.rand(1, 101, 71, 3)
    assert cf.conditioned("inpaint", width=71, height=101, background=picture).background.shape == (1, 96, 64, 3)


# -- bad input ---------------------------------------------------------------------------------------------------
def test_rows_that_do_not_fit():
    with pytest.raises(LikenessError, match=r"3 view\(s\) and 2 place\(s\)"):
        cf.conditioned(azimuth=(0.0, 1.0, 2.0), placement=Placement(cf.BOXES.boxes * 2))
    done = cf.conditioned(azimuth=(0.0, 20.0, 40.0))
    with pytest.raises(LikenessError, match=r"3 views, places, references or backgrounds, but the latent holds 2"):
        _sample(done, torch.cat([_noise(1), _noise(2)]))
    with pytest.raises(LikenessError, match=r"64 x 64, the latent is 96 x 64"):
        _sample(cf.conditioned(), _noise(1, 12, 8))
    other = cf.conditioned()
    other.positive[0][1][cf.KEY] = other.positive[0][1][cf.KEY]._replace(location=torch.zeros(1, 16, 8, 8))
    with pytest.raises(LikenessError, match="VAE of 16 channels, this model wants 4"):
        _sample(other, _noise(1))


def test_backgrounds_that_do_not_fit():
    with pytest.raises(LikenessError, match="inpaint variant, which continues a background"):
        _sample(cf.conditioned("inpaint", background=None), _noise(1), "inpaint")
    with pytest.raises(LikenessError, match="normal variant, which cannot see"):
        _sample(cf.conditioned(background=torch.rand(1, 64, 64, 3)), _noise(1))
    with pytest.raises(LikenessError, match="would squash it"):
        cf.conditioned("inpaint", background=torch.rand(1, 64, 128, 3))
    with pytest.raises(LikenessError, match="a MASK came"):
        cf.conditioned("inpaint", background=torch.rand(1, 64, 64))


@pytest.mark.parametrize("picture, word", (
    (torch.zeros(1, 90, 90), "a MASK came"), (torch.zeros(1, 90, 90, 4), "alpha channel"),
    (torch.zeros(1, 256, 256, 3), "no white background")))
def test_references_that_are_none(picture, word):
    with pytest.raises(LikenessError, match=word):
        cf.conditioned(reference=picture)


def test_each_reference_of_a_batch_is_checked():
    good = cf.reference()
    with pytest.raises(LikenessError, match="Reference 2 of 3 has no white background"):
        cf.conditioned(reference=torch.cat([good, torch.full_like(good, 0.5), good]))


def test_a_text_encoder_of_another_model():
    done = cf.conditioned()
    other = [[torch.zeros(1, 77, 2 * cf.WIDTH), done.positive[0][1]]]
    with pytest.raises(LikenessError, match="width 128, this model was trained with 64; connect the CLIP of Load CustomNet"):
        _sample(done._replace(positive=other), _noise(1))


def test_an_image_tower_of_another_model():
    done = cf.conditioned()
    shown = done.positive[0][1][cf.KEY]
    done.positive[0][1][cf.KEY] = shown._replace(embed=torch.zeros(1, 9))
    with pytest.raises(LikenessError, match="width 9"):
        _sample(done, _noise(1))


def test_background_pixels_come_back_exactly():
    """Core's own node with what View Conditioner gives it."""
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(8))
    done = cf.conditioned("inpaint", background=picture)
    painted = torch.rand(1, 64, 64, 3)
    import comfy_extras.nodes_mask as masks
    node = masks.ImageCompositeMasked
    result = node.execute(destination=done.background, source=painted, x=0, y=0, resize_source=False, mask=done.mask)[0]
    x0, y0, x1, y1 = cf.BOXES.pixels(64, 64)[0]
    assert torch.equal(result[:, y0:y1, x0:x1], painted[:, y0:y1, x0:x1])
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[y0:y1, x0:x1] = False
    assert torch.equal(result[:, outside], picture[:, outside])
