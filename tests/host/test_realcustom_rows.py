"""RealCustom++'s image attention: which rows get it, beside which neighbours, and what it leaves alone."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from host import release
from host.inversion_nets import counted, recorded
from host.inversion_nets import guider as enhancer
from host.release import IO
from host.support import comfy, comfy_extras, draw
from host.test_bimd import asked
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import image_attention, row_masks, stamps
from likeness.models.hosting.image_attention import ImageInjection, ImagePlan, Layer
from likeness.models.hosting.inject import STORAGE, Strengths, inject
from likeness.models.hosting.injector import Timing
from likeness.models.hosting.memory import patcher_of
from likeness.models.hosting.stores import Pair, Store
from unit import recipe

CLOSE = {"atol": 1e-5, "rtol": 0}
GOLD = recipe.golden("cross_attention")
KEY = "output.3.0"


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


# -- one layer against the golden numbers of the release ---------------------------------------------------
def linear(x: torch.Tensor, name: str) -> torch.Tensor:
    return x @ GOLD[f"w.{name}.weight"].T


def store(tokens: torch.Tensor) -> Any:
    return patcher_of(Store({KEY: Pair(linear(tokens, "to_k_vision"), linear(tokens, "to_v_vision"))}))


def plan(number: int, tokens: torch.Tensor, mask: torch.Tensor | None = None, pairing: str = "per latent") -> ImageInjection:
    stores = store(tokens), store(0.1 * tokens)
    return ImageInjection(ImagePlan(number, number ^ 1, *stores, pairing, ((KEY, 1.0),), Timing(), mask))


def layer(size: int, injections: list[ImageInjection], ids: list[tuple[int, ...]], **more: Any) -> torch.Tensor:
    """One attn2 after to_out: hidden and text of the golden file, rows stamped with ids."""
    rows = stamps.RowStamps(tuple(ids), (None,) * len(ids), (16, 16), 1.0)
    options = {stamps.KEY: rows, "n_heads": 2, "cond_or_uncond": [0], "activations_shape": [2, 128, size, size], **more}
    q = linear(GOLD[f"in.hidden.{size}x{size}"], "to_q")
    out = Layer(KEY, injections, None)(q, linear(GOLD["in.text"], "to_k"), linear(GOLD["in.text"], "to_v"), options)
    return linear(out, "to_out.0") + GOLD["w.to_out.0.bias"]


@pytest.mark.parametrize("size", (8, 4))
def test_one_layer_equals_the_release(size):
    end, image = f"{size}x{size}", GOLD["in.image"]
    stamped = [(5,), (5,)]
    mask = GOLD["in.mask"][:, 0]
    for injections, name in (([], "text_only"), ([plan(5, image)], "image_nomask"), ([plan(5, image, mask)], "image_mask")):
        torch.testing.assert_close(layer(size, injections, stamped), GOLD[f"out.{name}.{end}"], **CLOSE)
    per_layer = plan(5, image, GOLD["in.mask_per_layer"][:, 0, 3])  # the release's layer of this test is number 3
    torch.testing.assert_close(layer(size, [per_layer], stamped), GOLD[f"out.image_mask_per_layer.{end}"], **CLOSE)


@pytest.mark.parametrize("size", (8, 4))
def test_several_references_each_have_their_own_softmax_and_masks_add_up(size):
    images, masks = GOLD["in.image_multi"], GOLD["in.mask_multi"]
    for name, use in (("multi_mask", True), ("multi_nomask", False)):
        chain = [plan(5 + 2 * r, images[:, r], masks[:, r] if use else None) for r in range(2)]
        torch.testing.assert_close(layer(size, chain, [(5, 7)] * 2), GOLD[f"out.{name}.{size}x{size}"], **CLOSE)


def test_a_live_mask_is_resized_as_the_release_does_it():
    plain = plan(5, GOLD["in.image"])
    live = ImageInjection(plain.plan._replace(guidance="live"))
    for size in (8, 4):
        out = layer(size, [live], [(5,)] * 2, likeness_guidance={"live": GOLD["in.mask"]})
        torch.testing.assert_close(out, GOLD[f"out.image_mask.{size}x{size}"], **CLOSE)
    with pytest.raises(LikenessError, match="the sampler made none"):
        layer(8, [live], [(5,)] * 2)


def halved(line: np.ndarray) -> np.ndarray:
    """n numbers at n places -> ceil(n / 2), straight between neighbours, cell centres on cell centres; float64."""
    n, short = len(line), -(-len(line) // 2)
    return np.interp((np.arange(short) + 0.5) * n / short - 0.5, np.arange(n), line)


@pytest.mark.parametrize("side, size, times", ((65, 33, 1), (33, 9, 2), (64, 16, 2)))
def test_a_live_mask_at_sizes_that_do_not_halve(side, size, times):
    """1040 x 1040 has layers of 65 and of 33 places a side; where a side is a quarter, every place counts."""
    mask = draw(6, 1, 1, side, side).abs()
    x = torch.zeros(1, size * size, 4)
    rows = stamps.RowStamps(((5,),), (None,), (2 * side, 2 * side), 1.0)
    options = {"activations_shape": [1, 4, size, size], row_masks.GUIDANCE_KEY: {"live": mask}}
    got = row_masks.row_masks(None, "live", rows, [0], 1, x, options)[0, :, 0].reshape(size, size)
    want = mask[0, 0].double().numpy()
    for _ in range(times):
        want = np.apply_along_axis(halved, 1, np.apply_along_axis(halved, 0, want))
    torch.testing.assert_close(got.double(), torch.from_numpy(want), atol=2e-5, rtol=0)
    area = torch.nn.functional.interpolate(mask, (size, size), mode="area")[0, 0]
    assert ((got - area).abs().max() < 1e-6) == (side == 64), "only exact halves are the mean of the cells"


def test_each_row_gets_what_its_stamp_says():
    one = plan(5, GOLD["in.image"])
    text, full = GOLD["out.text_only.8x8"], GOLD["out.image_nomask.8x8"]
    assert torch.equal(layer(8, [one], [(), ()]), layer(8, [], [(), ()]))
    out = layer(8, [one], [(), (5,)])
    torch.testing.assert_close(out[0], text[0], **CLOSE)
    torch.testing.assert_close(out[1], full[1], **CLOSE)
    black = layer(8, [one], [(4,), (5,)])
    torch.testing.assert_close(black[1], full[1], **CLOSE)
    nothing = layer(8, [plan(5, 0.1 * GOLD["in.image"])], [(5,), (5,)])
    torch.testing.assert_close(black[0], nothing[0], **CLOSE)
    twice = layer(8, [one], [(5, 5), ()])
    torch.testing.assert_close(twice[0] - text[0], 2 * (full[0] - text[0]), atol=1e-5, rtol=1e-5)
    with pytest.raises(LikenessError, match="attention couple"):
        layer(8, [one], [(5,)])


def test_one_row_of_tokens_serves_all_latents_and_rows_follow_their_own():
    """Two latents, two prompts: rows 0 and 2 belong to latent 0."""
    image, q = GOLD["in.image"], draw(1, 4, 64, 128)
    options = {stamps.KEY: stamps.RowStamps(((5,),) * 4, (None,) * 4, (16, 16), 1.0), "n_heads": 2, "cond_or_uncond": [0, 1],
               "activations_shape": [4, 128, 8, 8]}
    zero = torch.zeros_like(q)
    each = plan(5, image).add(zero, q, KEY, options)
    for row in range(4):
        alone = plan(5, image[row % 2][None], pairing="all").add(zero, q, KEY, options)
        torch.testing.assert_close(each[row], alone[row], **CLOSE)


def test_more_masks_or_references_than_latents_are_refused():
    """Two latents, two prompts; fewer masks go round, and a window of a video holds a part of the batch."""
    image, q = GOLD["in.image"], draw(1, 4, 64, 128)
    zero = torch.zeros_like(q)
    options = {stamps.KEY: stamps.RowStamps(((5,),) * 4, (None,) * 4, (16, 16), 1.0), "n_heads": 2, "cond_or_uncond": [0, 1],
               "activations_shape": [4, 128, 8, 8]}
    three = plan(5, torch.cat([image, image[:1]]))
    for injection, said in ((plan(5, image, torch.ones(3, 8, 8)), "3 masks and the batch holds 2 latents"),
                            (three, "3 references, one per latent, and the batch holds 2 latents")):
        with pytest.raises(LikenessError, match=said):
            injection.add(zero, q, KEY, options)
        injection.add(zero, q, KEY, {**options, "context_window": object()})
    plan(5, image, torch.ones(1, 8, 8)).add(zero, q, KEY, options)
    ImageInjection(three.plan._replace(pairing="all")).add(zero, q, KEY, options)


# -- the whole model ---------------------------------------------------------------------------------------
class Foreign:
    """The kind of object that IPAdapter-style packs put into the slot."""

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, q, k, v, extra_options):
        out = comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])
        return out + self.weight * out.flip(1)


def foreign(model: Any, whole_blocks: bool = False) -> Any:
    model = model.clone()
    for key, _ in release.adapter().config.layers:
        part, number, depth = key.split(".")
        model.set_model_attn2_replace(Foreign(0.3), part, int(number), None if whole_blocks else int(depth))
    return model


def output_patch(model: Any) -> Any:
    model = model.clone()
    model.set_model_attn2_output_patch(lambda n, extra: n * 1.1 + 0.05 * n.flip(-1))
    return model


@pytest.mark.parametrize("other", (foreign, lambda model: foreign(model, True), output_patch))
def test_neighbours_in_either_order_give_one_picture(other):
    positive, *_ = release.prompts()
    after = other(release.injected().model)
    before = release.injected(other(release.model()))
    both = [release.noise_of(model, before.positive) for model in (before.model, after)]
    assert torch.equal(*both)
    ours, theirs = release.noise_of(release.injected().model, before.positive), release.noise_of(other(release.model()), positive)
    assert all((both[0] - alone).abs().max() > 1e-3 for alone in (ours, theirs))


def test_a_clone_changes_no_parent_and_a_second_run_changes_nothing():
    model = release.model()
    before = release.noise_of(model, release.prompts()[0])
    done = release.injected()
    first = release.noise_of(done.model, done.positive)
    child = release.injected(done.model.clone(), mask=torch.ones(1, 4, 4))
    assert torch.equal(first, release.noise_of(done.model, done.positive))
    assert torch.equal(before, release.noise_of(model, release.prompts()[0]))
    lists = [m.model_options["transformer_options"].get("patches", {}).get(image_attention.LIST, [])
             for m in (model, done.model, child.model)]
    assert [len(one) for one in lists] == [0, 1, 2]
    again = release.injected(done.model)  # the same subject over another branch
    assert len(again.model.model_options["transformer_options"]["patches"][image_attention.LIST]) == 1


def test_two_subjects_in_two_halves_are_the_sum_of_their_masks():
    """Chained under two masks that fill the picture, one subject twice is one subject without a mask."""
    left = torch.zeros(1, 8, 12)
    left[:, :, :6] = 1
    positive, negative, word = release.prompts()
    first = release.injected(mask=left)
    both = inject(first.model, first.positive, first.negative, release.subject(), word, Strengths(0, 1), mask=1 - left)
    torch.testing.assert_close(release.noise_of(both.model, both.positive), IO["single.t599.cond_eps.nomask"], **CLOSE)


def test_nothing_is_projected_while_sampling_and_the_host_counts_the_stores(monkeypatch):
    done = release.injected()
    module = release.adapter().patcher.model
    calls = []
    monkeypatch.setattr(module, "keys_values", lambda *a: calls.append(a))
    monkeypatch.setattr(module, "encode", lambda *a: calls.append(a))
    release.noise_of(done.model, done.positive)
    assert not calls
    stores = done.model.model_patches_models()
    assert [len(list(one.model.parameters())) for one in stores] == [44, 44]
    assert all(one.model_size() == 4 * 9 * 2 * sum(c for _, c in release.adapter().config.layers) for one in stores)


def test_a_mask_is_shrunk_once_for_all_layers_of_a_size(monkeypatch):
    """22 layers of two sizes; and the picture is that of every layer for itself."""
    done = release.injected(mask=torch.rand(1, 128, 192, generator=torch.Generator().manual_seed(4)))
    calls, real = [], row_masks.area_of
    monkeypatch.setattr(row_masks, "area_of", lambda *a: calls.append(a[-1]) or real(*a))
    shared = release.noise_of(done.model, done.positive)
    assert len(calls) == len(set(calls)) == 2

    class Never(dict):
        def __contains__(self, key):
            return False
    read = stamps._read

    def alone(executor, *args, **kwargs):
        def run(*inner, **more):
            inner[5][stamps.MADE] = Never()
            return executor(*inner, **more)
        run.class_obj = executor.class_obj
        return read(run, *args, **kwargs)
    wrappers = done.model.clone()
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    wrappers.remove_wrappers_with_key(kind, stamps.KEY)
    wrappers.add_wrapper_with_key(kind, stamps.KEY, alone)
    assert torch.equal(shared, release.noise_of(wrappers, done.positive)) and len(calls) == 2 + 22


def test_one_row_of_keys_is_not_copied_for_every_row(monkeypatch):
    seen, real = [], comfy.ldm.modules.attention.optimized_attention
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention",
                        lambda q, k, v, heads, **more: seen.append(k) or real(q, k, v, heads, **more))
    q = draw(1, 4, 64, 128)
    options = {stamps.KEY: stamps.RowStamps(((5,),) * 4, (None,) * 4, (16, 16), 1.0), "n_heads": 2, "cond_or_uncond": [0, 1],
               "activations_shape": [4, 128, 8, 8]}
    plan(5, GOLD["in.image"][:1]).add(torch.zeros_like(q), q, KEY, options)
    assert seen[0].shape[0] == 4 and seen[0].stride(0) == 0


def test_an_attention_override_acts_on_text_and_picture():
    """A node that puts its own attention into the model's options reaches both."""
    lengths = []

    def override(function, q, k, v, *args, **kwargs):
        lengths.append(k.shape[1])
        return 2 * function(q, k, v, *args, **kwargs)
    image, bias = GOLD["in.image"], GOLD["w.to_out.0.bias"]
    plain = layer(8, [plan(5, image)], [(5,), (5,)])
    out = layer(8, [plan(5, image)], [(5,), (5,)], optimized_attention_override=override)
    torch.testing.assert_close(out - bias, 2 * (plain - bias), atol=1e-5, rtol=1e-5)
    assert lengths == [GOLD["in.text"].shape[1], image.shape[1]]


def test_strengths_curve_and_an_adapter_for_another_model():
    off = inject(release.model(), *release.prompts()[:2], release.subject(), release.prompts()[2], Strengths(1.0, 0.0))
    assert off.model is release.model() and "passed through" in off.report
    half = inject(release.model(), *release.prompts()[:2], release.subject(), release.prompts()[2], Strengths(0.0, 0.5))
    text, full = IO["single.t599.guidance_eps"], IO["single.t599.cond_eps.nomask"]
    mine = release.noise_of(half.model, half.positive)
    assert 0 < (mine - text).abs().mean() < (full - text).abs().mean()
    with pytest.raises(LikenessError, match="trained for"):
        positive, negative, word = release.prompts()
        who = release.subject()._replace(width=2048)
        inject(release.model(), positive, negative, who, word._replace(raw=None), Strengths(0.0, 1.0))


def test_the_lean_storage_gives_the_same_picture():
    full, lean = release.injected(), release.injected(storage=STORAGE[1])
    for rows in ("positive", "negative"):
        a, b = (release.noise_of(done.model, getattr(done, rows)) for done in (full, lean))
        torch.testing.assert_close(a, b, **CLOSE)
    assert lean.model.model_patches_models() == []


# -- guiders -----------------------------------------------------------------------------------------------
def predictions(guider: Any, batch: int = 1) -> torch.Tensor:
    """What a guider makes of the golden latent in one call at timestep 599."""
    sigma = release.model().get_model_object("model_sampling").sigmas[599]
    x, kept = (IO["in.latent"] * (1 + sigma ** 2) ** 0.5).repeat(batch, 1, 1, 1), []

    def once(network, _, sigmas, extra_args=None, callback=None, disable=None, **options):
        out = network(x, sigma.repeat(batch), **(extra_args or {}))
        kept.append((x - out) / sigma)
        return out
    guider.sample(torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.stack([sigma, 0 * sigma]),
                  disable_pbar=True, seed=0)
    return kept[0]


def cfg(model: Any, positive: Any, negative: Any, scale: float) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


@pytest.mark.parametrize("batch", (1, 3))
def test_guidance_in_one_call_is_that_of_single_calls(batch):
    done = release.injected(mask=IO["single.t599.mask.max_norm"][:, 0])
    cond, uncond = (IO[f"single.t599.{name}_eps.max_norm"] for name in ("cond", "neg"))
    for scale in (1.0, 3.5):
        out = predictions(cfg(done.model, done.positive, done.negative, scale), batch)
        for row in out:
            torch.testing.assert_close(row[None], uncond + scale * (cond - uncond), atol=5e-5, rtol=0)


@pytest.mark.parametrize("style", ("regular", "nested"))
def test_dual_guidance_keeps_the_rows_apart(style):
    """The middle prompt carries no stamp and stays text alone."""
    done = release.injected()
    guider = comfy_extras.nodes_custom_sampler.Guider_DualCFG(done.model)
    guider.set_conds(done.positive, release.prompts()[0], done.negative)
    guider.set_cfg(3.0, 2.0, nested=style == "nested")
    out = predictions(guider)
    cond, text = IO["single.t599.cond_eps.nomask"], IO["single.t599.guidance_eps"]
    black = release.noise_of(done.model, done.negative)
    if style == "nested":
        want = black + 2.0 * ((text + 3.0 * (cond - text)) - black)
    else:
        want = black + 2.0 * (text - black) + 3.0 * (cond - text)
    torch.testing.assert_close(out, want, atol=5e-5, rtol=0)


def test_a_combined_prompt_without_the_word_stays_plain():
    """Two positives: the host averages what both give; only one of them carries the subject."""
    positive, plain, word = release.prompts()
    done = inject(release.model(), positive + plain, plain, release.subject(), word, Strengths(0.0, 1.0))
    assert "1 of 2 prompts do not hold the word" in done.report
    alone = release.noise_of(release.model(), plain) + IO["single.t599.cond_eps.nomask"]
    torch.testing.assert_close(predictions(cfg(done.model, done.positive, done.negative, 1.0)), alone / 2, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", ((24, 16), (17, 13), (8, 31)))
def test_any_size_runs_and_a_white_mask_is_no_mask(size):
    """Odd sides too, where the release's own resizing fails."""
    x = draw(3, 2, 4, *size)
    results = []
    for mask in (None, torch.ones(1, 64, 64), torch.zeros(1, 5, 7).index_fill(2, torch.tensor([0, 1]), 1.0)):
        done = release.injected(mask=mask)
        guider = cfg(done.model, done.positive, done.negative, 3.5)
        results.append(guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("heun"), release.levels(4)[2:],
                                     disable_pbar=True, seed=0))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    assert (results[0] - results[2]).abs().max() > 1e-3


# -- the guider and the recorder of the inversion ----------------------------------------------------------
def test_the_enhancer_guider_tells_our_patch_from_another_packs():
    """Identity, free and negative in one call, as a stock guider gives them; beside a foreign patch every branch has its own."""
    done, free = release.injected(), release.prompts()[0]
    x = draw(5, *IO["in.latent"].shape)
    level = torch.full((x.shape[0],), 3.0)
    for model, calls in ((done.model, 1), (foreign(done.model), 2)):
        who = enhancer(model, 3.0, done.positive, free, done.negative)
        with counted(release.model()) as seen:
            out = asked(who, x, 3.0, lambda wrap, options: wrap.denoised(x, level, ["positive", "free"], options))
        assert seen.calls == calls
        for slot, entries in (("positive", done.positive), ("free", free)):
            torch.testing.assert_close(out[slot], asked(cfg(model, entries, done.negative, 3.0), x, 3.0), atol=1e-4, rtol=1e-4)
        assert (out["positive"] - out["free"]).abs().max() > 1e-3


def test_a_recording_through_our_patch_is_the_plain_models():
    """Rows without a stamp: many levels go through the network in one call, and nothing of the subject is recorded."""
    done, (free, negative, _) = release.injected(), release.prompts()
    who = enhancer(done.model, 3.0, done.positive, free, negative)
    bare = enhancer(release.model(), 3.0, free, free, negative)
    many, one, plain = (recorded(guider, 5, IO["in.latent"], chunk=chunk) for guider, chunk in ((who, 4), (who, 1), (bare, 4)))
    assert many.calls == plain.calls < one.calls and many.model_hash == plain.model_hash
    assert (many.residuals - plain.residuals).abs().max() < 1e-4 and (many.residuals - one.residuals).abs().max() < 1e-4
    # with the injector's own negative, which attends to the black picture, a level has a call of its own
    assert recorded(enhancer(done.model, 3.0, done.positive, free, done.negative), 5, IO["in.latent"], chunk=4).calls == one.calls
