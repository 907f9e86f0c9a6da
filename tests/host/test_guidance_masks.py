"""Masks that meet: two subjects, the artist's own mask, areas, BiMD; and what the preview and the prediction show of them."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from host import release
from host.inversion_nets import guider as enhancer
from host.inversion_nets import recorded, replayed
from host.support import (
    PROMPT,
    base,
    cfg_guider,
    comfy,
    comfy_extras,
    config_for,
    core,
    draw,
    encode,
    guidance,
    inject_into,
    injected,
    latent_of,
    new_adapter,
    prompt,
    run_guider,
    sample,
    subject,
)
from host.test_bimd import asked
from host.test_guidance import Log, mask_of
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import guidance_runs, predict_mask, stamps
from likeness.models.hosting.guidance import KEEPS, Run, make_guidance
from likeness.models.hosting.guidance import LIST as GUIDES
from likeness.models.hosting.guidance_runs import RUNS
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.masks_of_run import Made, composed, shared
from likeness.models.hosting.prompt import POOLED
from likeness.models.realcustom.overlay import FONT, LINE, labelled, overlay, sheet

TWO = "a cat and a dog on the beach"
SIGMAS = (14.0, 6.0, 2.0, 0.0)


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def two_subjects(refresh: tuple[int, int] = (1, 1), end: float = 1.0, **more: Any) -> Any:
    """(injected, guidance of the cat, guidance of the dog), chained; the dog's injector acts up to `end`."""
    how = [guidance(prompt("sd15", TWO, word)[1], refresh=steps, **more)
           for word, steps in zip(("cat", "dog"), refresh, strict=True)]
    first = injected("sd15", 1, TWO, "cat", strengths=Strengths(0, 1), guidance=how[0])
    both = inject(first.model, first.positive, first.negative, subject("sd15", 2), prompt("sd15", TWO, "dog")[1],
                  Strengths(0, 1, 0.0, end), guidance=how[1])
    return both, *how


def test_two_subjects_share_one_pass_and_each_has_its_own_mask():
    (both, cat, dog), log = two_subjects(), Log()
    out = run_guider(cfg_guider(log.on(both.model), both.positive, both.negative), latent_of("sd15"), sigmas=SIGMAS)
    assert len(log.kind(True)) == 1 and set(RUNS.find(out)) == {cat.name, dog.name}
    masks = [mask_of(out, one.name) for one in (cat, dog)]
    assert not torch.equal(*masks)
    first = injected("sd15", 1, TWO, "cat", strengths=Strengths(0, 1), mask=masks[0])
    fixed = inject(first.model, first.positive, first.negative, subject("sd15", 2), prompt("sd15", TWO, "dog")[1],
                   Strengths(0, 1), mask=masks[1])
    want = run_guider(cfg_guider(fixed.model, fixed.positive, fixed.negative), latent_of("sd15"), sigmas=SIGMAS)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_several_words_of_one_picture():
    """One2Many: one subject, two words and masks; with binary masks that is the subject under their sum."""
    how = [make_guidance(prompt("sd15", TWO, word)[1], 0.3, "max_norm", KEEPS[0], True, 1) for word in ("cat", "dog")]
    first = injected("sd15", 1, TWO, "cat", strengths=Strengths(0, 1), guidance=how[0])
    both = inject(first.model, first.positive, first.negative, subject("sd15", 1), prompt("sd15", TWO, "dog")[1],
                  Strengths(0, 1), guidance=how[1])
    out = run_guider(cfg_guider(both.model, both.positive, both.negative), latent_of("sd15"))
    a, b = (mask_of(out, one.name) for one in how)
    assert set(a.unique().tolist()) == {0.0, 1.0} and float((a * b).sum()) > 0
    only = injected("sd15", 1, TWO, "cat", strengths=Strengths(0, 1), mask=a)
    again = inject(only.model, only.positive, only.negative, subject("sd15", 1), prompt("sd15", TWO, "dog")[1], Strengths(0, 1),
                   mask=b)
    torch.testing.assert_close(out, run_guider(cfg_guider(again.model, again.positive, again.negative), latent_of("sd15")),
                               atol=1e-4, rtol=1e-4)


def test_masks_that_overlap_add_or_share():
    plain, cat, dog = two_subjects()
    out = run_guider(cfg_guider(plain.model, plain.positive, plain.negative), latent_of("sd15"), sigmas=SIGMAS)
    total = mask_of(out, cat.name) + mask_of(out, dog.name)
    assert total.max() > 1
    fair, cat, dog = two_subjects(share=True)
    out = run_guider(cfg_guider(fair.model, fair.positive, fair.negative), latent_of("sd15"), sigmas=SIGMAS)
    torch.testing.assert_close(mask_of(out, cat.name) + mask_of(out, dog.name), total.clamp(max=1), atol=1e-5, rtol=0)


def test_a_word_whose_injector_rests_takes_no_share():
    """The dog ends early: from there on the cat has its whole mask again, and the preview shows both."""
    plain, cat, _ = two_subjects()
    out = run_guider(cfg_guider(plain.model, plain.positive, plain.negative), latent_of("sd15"), sigmas=SIGMAS)
    whole = mask_of(out, cat.name)
    (fair, cat, dog), log = two_subjects(share=True, end=0.4), Log()
    out = run_guider(cfg_guider(log.on(fair.model), fair.positive, fair.negative), latent_of("sd15"), sigmas=SIGMAS)
    kept = RUNS.find(out)
    steps = [step for step, _ in kept[cat.name].masks]
    assert len(steps) == 2 and steps[0] == 0 and [step for step, _ in kept[dog.name].masks] == [0]
    assert (mask_of(out, cat.name, 0) - whole).abs().max() > 0.1 and torch.equal(mask_of(out, cat.name), whole)
    used = [call["masks"] for call in log.kind(False)]
    assert dog.name in used[0] and dog.name not in used[-1] and torch.equal(used[-1][cat.name][:, 0], whole)
    assert len(log.kind(True)) == 1, "nothing is asked again"


def test_shared_masks_of_unlike_refresh_are_noted_when_they_change(nodes):
    """The dog goes on looking after the cat has stopped, and takes from the cat's place; the preview has every mask in use."""
    (fair, cat, dog), log = two_subjects((1, 3), share=True), Log()
    sigmas = (14.0, 9.0, 6.0, 4.0, 0.0)
    out = run_guider(cfg_guider(log.on(fair.model), fair.positive, fair.negative), latent_of("sd15"), sigmas=sigmas)
    kept, calls = RUNS.find(out), log.kind(False)
    assert len(calls) == 4
    for name in (cat.name, dog.name):
        assert [step for step, _ in kept[name].masks] == [0, 1, 2]
        for step, mask in kept[name].masks:
            assert torch.equal(mask, calls[step]["masks"][name])
        assert torch.equal(calls[3]["masks"][name], calls[2]["masks"][name])
    for call in calls:
        assert (call["masks"][cat.name] + call["masks"][dog.name]).max() < 1 + 1e-5


def test_sharing_by_the_formula():
    a, b = torch.full((1, 1, 2, 2), 0.8), torch.full((2, 1, 4, 4), 0.6)
    both = shared({"a": a, "b": b}, {"a"})
    torch.testing.assert_close(both["a"], torch.full((2, 1, 4, 4), 0.8 / 1.4))
    torch.testing.assert_close(both["a"] + both["b"], torch.ones(2, 1, 4, 4))
    assert torch.equal(shared({"a": a}, {"a"})["a"], a) and torch.equal(shared({"a": a, "b": b}, set())["b"], b)


def test_prompts_of_two_areas_make_one_picture_of_masks():
    left, right = Made(torch.full((1, 1, 2, 2), 0.5), (4, 4, 0, 0)), Made(torch.full((1, 1, 2, 1), 0.9), (4, 2, 0, 3))
    whole = composed([left, right], (4, 6), None)
    torch.testing.assert_close(whole[0, 0, 0], torch.tensor([0.5, 0.5, 0.5, 0.9, 0.9, 0.0]))
    assert torch.equal(composed([right, left], (4, 6), None), whole)
    torch.testing.assert_close(composed([left], (4, 6), None)[0, 0, 0], torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 0.0]))
    half = torch.zeros(1, 8, 12)
    half[..., 6:] = 1.0
    torch.testing.assert_close(composed([left, right], (4, 6), half)[0, 0, 0], torch.tensor([0, 0, 0, 0.9, 0.9, 0.0]))


# -- the artist's mask ------------------------------------------------------------------------------------
def half(side: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, side, side)
    mask[..., side // 2:] = 1.0
    return mask


def test_a_mask_multiplies_or_replaces():
    log, outs = Log(), {}
    for name, more in (("alone", {}), ("times", {"mask": half()}), ("replaced", {"mask": half(), "replace": True})):
        how = guidance(refresh=1, **more)
        done = inject_into(base("sd15")[0], guidance=how)
        log.calls.clear()
        out = sample(log.on(done.model), done.positive, done.negative, steps=2)
        outs[name] = mask_of(out, how.name), len(log.kind(True)), out
    right = half(8)
    torch.testing.assert_close(outs["times"][0], outs["alone"][0] * right)
    torch.testing.assert_close(outs["replaced"][0], right)
    assert [outs[name][1] for name in outs] == [1, 1, 0]
    static = inject_into(base("sd15")[0], mask=right)
    torch.testing.assert_close(outs["replaced"][2], sample(static.model, static.positive, static.negative, steps=2), atol=1e-4,
                               rtol=1e-4)


def test_what_cannot_work_is_told():
    word = prompt("sd15")[1]
    with pytest.raises(LikenessError, match="mask is empty"):
        guidance(mask=torch.zeros(1, 8, 8))
    done = inject_into(base("sd15")[0], guidance=guidance(mask=torch.ones(3, 8, 8)))
    with pytest.raises(LikenessError, match="3 masks and the batch holds 1 latent"):
        sample(done.model, done.positive, done.negative)
    done = inject_into(base("sd15")[0], guidance=guidance(scope=0.01))
    small = core.ConditioningSetArea().append(done.positive, 64, 64, 32, 64, 1.0)[0]
    with pytest.raises(LikenessError, match="the area of 64 x 64 pixels at 32, 64"):
        sample(done.model, small, done.negative, latent=latent_of("sd15", 1, 24, 24))
    with pytest.raises(LikenessError, match="\"dog\" was found in"):
        inject_into(base("sd15")[0], guidance=guidance(prompt("sd15", TWO, "dog")[1]))
    missing = prompt("sd15", PROMPT, "horse", on_missing="pass through")[1]
    passed = inject_into(base("sd15")[0], guidance=guidance(missing))
    assert passed.model is base("sd15")[0] and "\"horse\", the word of the guidance, is not in the prompt" in passed.report
    assert word.columns


def test_a_prompt_with_a_mask_is_searched_inside_it_only():
    how = guidance(refresh=1)
    done = inject_into(base("sd15")[0], guidance=how)
    positive = core.ConditioningSetMask().append(done.positive, half(128), "default", 1.0)[0]
    out = sample(done.model, positive + encode("sd15", "a beach"), done.negative, latent=latent_of("sd15", 1, 16, 16))
    mask = mask_of(out, how.name)
    assert mask[..., 8:].max() > 0.99 and mask[..., :8].max() == 0
    assert int((mask > 0).sum()) == 16 * 16 // 4, "the whole share of the scope lies inside"


def test_one_prompt_under_two_masks_is_searched_in_both():
    how = guidance(refresh=1)
    done = inject_into(base("sd15")[0], guidance=how)
    sides = [core.ConditioningSetMask().append(done.positive, mask, "default", 1.0)[0] for mask in (half(128), 1 - half(128))]
    masks = {}
    for name, positive in (("both", sides[0] + sides[1]), ("right", sides[0]), ("left", sides[1])):
        out = sample(done.model, positive + encode("sd15", "a beach"), done.negative, latent=latent_of("sd15", 1, 16, 16))
        masks[name] = mask_of(out, how.name)
    torch.testing.assert_close(masks["both"], torch.maximum(masks["left"], masks["right"]), atol=1e-4, rtol=1e-4)
    assert masks["both"][..., 8:].max() > 0.99 and masks["both"][..., :8].max() > 0.99


def test_columns_follow_rows_that_an_adapter_takes_out():
    """CustAny with drop_rest: the second word moves up, and its mask with it."""
    text = "a big cat and a dog"
    of = new_adapter(config_for("sd15", category_mode="drop_rest"))
    words = [prompt("sd15", text, word) for word in ("big cat", "dog")]
    how = guidance(words[1][1])
    positive = words[0][0]
    model, negative = base("sd15")[0], encode("sd15", "")
    late = inject(inject(model, positive, negative, subject("sd15", 1, of=of), words[0][1], Strengths(1, 0)).model,
                  inject(model, positive, negative, subject("sd15", 1, of=of), words[0][1], Strengths(1, 0)).positive, negative,
                  subject("sd15", 2), words[1][1], Strengths(0, 1), guidance=how)
    early = inject(model, positive, negative, subject("sd15", 2), words[1][1], Strengths(0, 1), guidance=how)
    after = inject(early.model, early.positive, negative, subject("sd15", 1, of=of), words[0][1], Strengths(1, 0))
    (column,) = words[1][1].columns
    for done in (late, after):
        assert stamps.stamp_of(done.positive[0][1]).guides == ((how.name, (column - 1,)),)
    assert stamps.stamp_of(early.positive[0][1]).guides == ((how.name, (column,)),)


# -- BiMD -------------------------------------------------------------------------------------------------
def test_under_bimd():
    """Recording asks for the free prompt, replay for the identity too: its masks are made, and are those of a static mask."""
    how = release.guidance(refresh=1)
    free, negative, _ = release.prompts()
    x = release.IO["in.latent"]

    def replay(done):
        who = enhancer(done.model, 3.0, done.positive, free, negative)
        return replayed(who, recorded(who, 4, x), x)[0]
    live = replay(release.injected(guidance=how))
    torch.testing.assert_close(live, replay(release.injected(mask=mask_of(live, how.name))), atol=1e-4, rtol=1e-4)
    assert (live - replay(release.injected())).abs().max() > 1e-3


def test_the_negative_that_flows_share_waits_for_no_mask():
    """The free flow has none: what is recorded from low noise upwards is what is replayed from the top, with the injector's
    negative as with a plain one. Without a live mask nothing is taken off."""
    done, (free, negative, _), x = release.injected(guidance=release.guidance()), release.prompts(), release.IO["in.latent"]

    def out(rows):
        who = enhancer(done.model, 3.0, done.positive, free, rows)
        record = recorded(who, 3, x)
        return record.residuals, replayed(who, record, x)[0]
    for got, want in zip(out(done.negative), out(negative), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    always = release.injected()
    kept = enhancer(always.model, 3.0, always.positive, free, always.negative).original_conds["negative"]
    assert stamps.numbers(kept[0]) == stamps.numbers(always.negative[0][1]) != []


def test_a_call_of_the_negative_alone_at_another_noise_makes_its_masks():
    """A guider that asks for the negative first, in a call of its own: not the masks of the step before."""
    how, log = release.guidance(refresh=3), Log()
    done = release.injected(guidance=how)

    class Apart(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            low, high = (comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[name]], x, timestep, model_options)[0]
                         for name in ("negative", "positive"))
            return low + 3.5 * (high - low)
    guider = Apart(log.on(done.model))
    guider.set_conds(done.positive, done.negative)
    x = release.IO["in.latent"]
    guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("euler"), release.levels(3), disable_pbar=True, seed=0)
    calls = [call["masks"][how.name] for call in log.kind(False)]
    assert len(calls) == 6 and all(torch.equal(a, b) for a, b in zip(calls[::2], calls[1::2], strict=True))
    assert not torch.equal(calls[0], calls[2])


def test_a_call_of_the_negative_alone_takes_the_masks_of_its_step():
    """As SAG asks again: other latents, no prompt that holds the word, and no guidance pass for them."""
    how, log, asked = release.guidance(refresh=3), Log(), []
    done = release.injected(guidance=how)

    def again(args):
        asked.append(comfy.samplers.calc_cond_batch(args["model"], [args["uncond"]], 0.9 * args["input"], args["sigma"],
                                                    args["model_options"])[0])
        return args["denoised"]
    model = log.on(done.model)
    model.set_model_sampler_post_cfg_function(again, disable_cfg1_optimization=True)
    x = release.IO["in.latent"]
    guider = cfg_guider(model, done.positive, done.negative, 3.5)
    guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("euler"), release.levels(3), disable_pbar=True, seed=0)
    main, second = log.kind(False)[::2], log.kind(False)[1::2]
    assert len(asked) == len(second) == 3 == len(log.kind(True))
    assert all(torch.equal(a["masks"][how.name], b["masks"][how.name]) for a, b in zip(main, second, strict=True))


def test_a_free_model_of_its_own_knows_the_run():
    """The free branch has options of its own; a free prompt that carries the subject waits for the same mask."""
    done, _ = release.injected(guidance=release.guidance()), release.prompts()
    free = done.positive
    x = release.IO["in.latent"]
    level, outs = torch.full((x.shape[0],), 3.0), []
    for more in ({}, {"free_model": done.model.clone()}):
        who = enhancer(done.model, 3.0, done.positive, free, done.negative, **more)
        outs.append(asked(who, x, 3.0, lambda wrap, options: wrap.denoised(x, level, ["positive", "free"], options)))
    for slot in ("positive", "free"):
        torch.testing.assert_close(outs[0][slot], outs[1][slot], atol=1e-3, rtol=1e-3)


def test_keys_and_values_can_be_copied_for_another_device():
    done = release.injected()
    for patcher in done.model.model_patches_models():
        make, words = patcher.cached_patcher_init
        other = make(*words, disable_dynamic=True)
        pairs = list(zip(patcher.model.parameters(), other.model.parameters(), strict=True))
        assert pairs and all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
        assert other.cached_patcher_init[0] is make


# -- the release's own prompt ------------------------------------------------------------------------------
def test_switches_of_the_release_on_the_prompt(nodes):
    """Pooled before the projection, and the size with the width first; both off by default."""
    execute, clip = nodes["Likeness_EncodePrompt"].execute, base("sdxl")[1]
    plain = execute(clip, "a cat", "cat", 0, "error").args[0]
    bare = execute(clip, "a cat", "cat", 0, "error", pooled=POOLED[1]).args[0]
    assert torch.equal(plain[0][0], bare[0][0]) and "width" not in plain[0][1]
    before, after = bare[0][1]["pooled_output"], plain[0][1]["pooled_output"]
    matrix = clip.cond_stage_model.clip_g.transformer.text_projection.weight.to(before)
    torch.testing.assert_close(before @ matrix.T, after, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(before, after, atol=1e-2)
    sized = execute(clip, "a cat", "cat", 0, "error", release_size={"samples": torch.zeros(1, 4, 96, 128)}).args[0]
    assert {name: sized[0][1][name] for name in ("height", "width", "target_height", "target_width", "crop_h")} == {
        "height": 1024, "width": 768, "target_height": 1024, "target_width": 768, "crop_h": 0}
    with pytest.raises(LikenessError, match="pooled vector belongs to the CONDITIONING"):
        execute(clip, "a cat", "cat", 0, "error", plain, pooled=POOLED[1])


# -- the recorder and the preview -------------------------------------------------------------------------
def test_two_samplers_on_one_guidance_each_keep_their_own(nodes):
    how = guidance(refresh=2)
    done = inject_into(base("sd15")[0], guidance=how)
    outs = [sample(done.model, done.positive, done.negative, steps=3, seed=seed) for seed in (1, 2)]
    show = nodes["Likeness_PreviewGuidance"].execute
    shown = [show(how, {"samples": out}).args for out in outs]
    for out, (masks, strip, text) in zip(outs, shown, strict=True):
        assert masks.shape == (2, 8, 8) and strip.shape[-1] == 3 and "mask" in text
        torch.testing.assert_close(masks[-1:], mask_of(out, how.name))
    assert not torch.equal(shown[0][0], shown[1][0]) and "serves all later steps" in shown[0][2]
    image = torch.rand(1, 64, 64, 3)
    assert not torch.equal(show(how, {"samples": outs[0]}, image).args[1], shown[0][1])
    with pytest.raises(LikenessError, match="and not with this GUIDANCE of \"cat\""):
        show(guidance(scope=0.5), {"samples": outs[0]})
    assert show(guidance(scope=0.5), {"samples": outs[0]}, words="every word of the run").args[0].shape == (2, 8, 8)


@pytest.mark.parametrize("count", [1, 4])
def test_the_last_masks_are_one_for_each_word_and_picture(nodes, count):
    """Whatever the number of pictures, also where the artist's own masks are fewer and go round."""
    how = [guidance(prompt("sd15", TWO, "cat")[1], refresh=2),
           guidance(prompt("sd15", TWO, "dog")[1], mask=torch.tensor([1.0, 0.5]).view(2, 1, 1)[:count], replace=True)]
    first = injected("sd15", 1, TWO, "cat", strengths=Strengths(0, 1), guidance=how[0])
    both = inject(first.model, first.positive, first.negative, subject("sd15", 2), prompt("sd15", TWO, "dog")[1],
                  Strengths(0, 1), guidance=how[1])
    out = sample(both.model, both.positive, both.negative, steps=3, latent=latent_of("sd15", count))
    show = nodes["Likeness_PreviewGuidance"].execute
    cat, picture, text = show(how[0], {"samples": out}, steps="last").args
    torch.testing.assert_close(cat, mask_of(out, how[0].name))
    assert cat.shape == (count, 8, 8) and (count == 1 or not torch.equal(cat[0], cat[1]))
    every, all_of_it, said = show(how[0], {"samples": out}).args
    assert torch.equal(every[-count:], cat) and every.shape[0] == 2 * count and said == text
    assert picture.shape[1] <= all_of_it.shape[1] and picture.shape[2] < all_of_it.shape[2]
    words = show(how[0], {"samples": out}, words="every word of the run", steps="last").args[0]
    assert words.shape == (2 * count, 8, 8) and torch.equal(words[:count], cat)
    assert words[count:].amax((1, 2)).tolist() == [1.0, 0.5, 1.0, 0.5][:count]


def test_the_preview_speaks_of_later_steps_and_of_strengths_only_where_there_are_some(nodes):
    how = guidance(refresh=9)
    done = inject_into(base("sd15")[0], guidance=how)
    out = sample(done.model, done.positive, done.negative, steps=2)
    text = nodes["Likeness_PreviewGuidance"].execute(how, {"samples": out}).args[2]
    assert "of step 1, 2" in text and "later" not in text
    off = inject_into(base("sd15")[0], guidance=how, strengths=Strengths(0.0, 0.0))
    with pytest.raises(LikenessError, match="all strengths 0"):
        nodes["Likeness_PreviewGuidance"].execute(how, {"samples": sample(off.model, off.positive, off.negative, seed=78)})


def test_the_preview_says_that_two_masks_do_not_meet(nodes):
    """The word's strongest place, and a mask of everything else."""
    def shown(how):
        done = inject_into(base("sd15")[0], guidance=how)
        out = sample(done.model, done.positive, done.negative, steps=2)
        return mask_of(out, how.name), nodes["Likeness_PreviewGuidance"].execute(how, {"samples": out}).args[2]
    mask, text = shown(guidance(refresh=1, scope=0.02))
    assert "do not meet" not in text
    none, text = shown(guidance(refresh=1, scope=0.02, mask=(mask == 0).float()))
    assert none.max() == 0 and "in 1 of them it is empty" in text and "do not meet" in text


def test_only_the_last_runs_are_kept_and_the_sentence_says_what_to_do(nodes):
    how = guidance(refresh=1)
    done = inject_into(base("sd15")[0], guidance=how)
    first = sample(done.model, done.positive, done.negative, seed=77)
    assert RUNS.find(first) and RUNS.find(first + 1e-6) is None
    for seed in range(guidance_runs.KEPT):
        sample(done.model, done.positive, done.negative, seed=100 + seed)
    with pytest.raises(LikenessError, match="queue the sampler again"):
        nodes["Likeness_PreviewGuidance"].execute(how, {"samples": first})


def test_a_cancelled_run_leaves_nothing():
    how = guidance()
    done = inject_into(base("sd15")[0], guidance=how)
    before, kept = sample(done.model, done.positive, done.negative, steps=3), list(RUNS._runs)

    def cancel(step, *_):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(done.model, done.positive, done.negative, steps=3, seed=5, callback=cancel)
    assert list(RUNS._runs) == kept and "likeness_run" not in done.model.model_options["transformer_options"]
    assert torch.equal(sample(done.model, done.positive, done.negative, steps=3), before)


def test_pictures_of_masks():
    picture, mask = torch.full((2, 8, 8, 3), 0.5), torch.zeros(2, 2, 2)
    mask[0, 0, 0] = 1.0
    out = overlay(picture, mask)
    assert out[0, 0, 0, 0] > 0.8 and out[0, 4, 4, 0] < 0.4 and torch.equal(out[1, 0, 0], out[0, 7, 7])
    assert sheet(out, 6).shape == (1, 8, 18, 3) and sheet(out, 1).shape == (1, 18, 8, 3)


def test_labels_of_masks():
    """A strip above each tile, in the mask's colour; what is too long ends in dots, so that all tiles stay equally wide."""
    tiles = torch.full((2, 8, 192, 3), 0.5)
    out = labelled(tiles, [("cat", "step 12, picture 3"), ("c" * 99, "step 12, picture 4")], 1)
    assert out.shape == (2, 2 * LINE + 8, 192, 3) and torch.equal(out[:, 2 * LINE:], tiles)
    lines = [out[k, LINE * row:LINE * (row + 1)] for k in (0, 1) for row in (0, 1)]
    heights = [int(line.amax((1, 2)).gt(0.3).sum()) for line in lines]
    assert all(FONT // 2 <= height <= LINE for height in heights), heights
    assert not torch.equal(lines[1], lines[3]) and lines[2][:, -3:].max() == 0
    assert lines[0][..., 2].max() > lines[0][..., 0].max(), "not in the colour of the second word"


# -- the prediction ---------------------------------------------------------------------------------------
def predict(nodes: Any, **changes: Any) -> Any:
    text, word = prompt("sd15")
    inputs = {"model": base("sd15")[0], "positive": text, "word": word, "seed": 3, "width": 64, "height": 96, "steps": 3,
              "stop_step": 2, "scheduler": "normal", "scope": 0.25, "strategy": "max_norm", "keep": KEEPS[0], "values": "soft"}
    return nodes["Likeness_PredictMask"].execute(**{**inputs, **changes}).args


def test_the_prediction_is_the_mask_of_that_step(nodes):
    """With the sampler's own prompts, a subject that is off and the same noise: step two of three looks at the same latent."""
    negative = encode("sd15", "blurry")
    mask, image, text = predict(nodes, negative=negative, cfg=4.0)
    assert mask.shape == (1, 96, 64) and image.shape == (1, 96, 64, 3) and "after 2 of 3 steps" in text
    how = guidance(refresh=3)
    off = inject_into(base("sd15")[0], guidance=how, strengths=Strengths(0.0, 1e-6))
    out = sample(off.model, off.positive, off.negative, steps=3, seed=3, latent=torch.zeros(1, 4, 12, 8))
    live = mask_of(out, how.name, 1)
    small = torch.nn.functional.interpolate(mask[:, None], live.shape[-2:], mode="area")[:, 0]
    assert torch.corrcoef(torch.stack([small.flatten(), live.flatten()]))[0, 1] > 0.95
    assert not torch.equal(mask, predict(nodes, stop_step=1, negative=negative)[0])


def test_the_prediction_keeps_what_an_inpaint_mask_keeps(nodes):
    """As the sampler does: beyond the noise mask the network sees the LATENT's picture under noise."""
    free = torch.zeros(1, 1, 8, 8)
    free[..., 4:] = 1.0
    picture, negative, how = 8 * draw(4, 1, 4, 8, 8), encode("sd15", "blurry"), guidance(refresh=3)
    masks = [predict(nodes, negative=negative, cfg=4.0, latent={"samples": picture, **more})[0]
             for more in ({"noise_mask": free}, {})]
    off = inject_into(base("sd15")[0], guidance=how, strengths=Strengths(0.0, 1e-6))
    out = sample(off.model, off.positive, off.negative, steps=3, seed=3, latent=picture, noise_mask=free)
    live = mask_of(out, how.name, 1)
    same, other = (float(torch.corrcoef(torch.stack([torch.nn.functional.avg_pool2d(mask, 8).flatten(), live.flatten()]))[0, 1])
                   for mask in masks)
    assert same > 0.95 and other < same - 0.05


def test_the_prediction_takes_latents_noise_and_any_batch(nodes):
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    mask, image, _ = predict(nodes, latent=latent)
    noise = comfy_extras.nodes_custom_sampler.Noise_RandomNoise(3)
    same, *_ = predict(nodes, latent=latent, noise=noise, seed=9)
    assert mask.shape == (2, 64, 64) and torch.equal(mask, same) and not torch.equal(mask[0], mask[1])
    assert image.shape == (2, 64, 64, 3)


def test_the_prediction_does_not_see_a_subject(nodes):
    done = inject_into(base("sd15")[0], strengths=Strengths(0.0, 1.0))
    plain, *_ = predict(nodes)
    assert torch.equal(predict(nodes, model=done.model, positive=done.positive)[0], plain)


@pytest.mark.parametrize("live", (True, False))
def test_the_prediction_behind_an_injector_asks_its_negative_plainly(live):
    """RealCustom++'s negative carries the black picture: it waits for a mask that nobody makes here, or acts alone."""
    plain, negative, _ = release.prompts()
    how, latent = release.guidance(), {"samples": torch.zeros(1, 4, 16, 16)}
    done = release.injected(guidance=how if live else None)

    def predicted(model, positive, rows):
        return predict_mask.predict_mask(model, positive, how, latent, predict_mask.Plan(4, 3, "normal", 0, cfg=3.5), rows)
    want = predicted(release.model(), plain, negative)
    for got, one in zip(predicted(done.model, done.positive, done.negative)[:2], want[:2], strict=True):
        torch.testing.assert_close(got, one, atol=1e-5, rtol=1e-5)


def test_the_prediction_looks_inside_its_prompts_mask_only(nodes):
    """As the live pass does: nothing of the word beyond the mask, and the whole share of the scope within it."""
    text, latent = prompt("sd15")[0], {"samples": torch.zeros(1, 4, 16, 16)}
    right = core.ConditioningSetMask().append(text, half(200), "default", 1.0)[0] + encode("sd15", "a beach")
    mask, _, report = predict(nodes, positive=right, latent=latent)
    assert mask[..., 72:].max() > 0.9 and mask[..., :56].max() == 0 and "covers 25 %" in report
    whole = predict(nodes, positive=text + encode("sd15", "a beach"), latent=latent)[0]
    assert whole[..., :56].max() > 0, "the word is also elsewhere"


def test_the_prediction_ends_with_the_schedule_and_says_from_where_it_starts(nodes, monkeypatch):
    plain = predict(nodes)[2]
    assert "full noise" in predict(nodes, latent={"samples": torch.ones(1, 4, 8, 8)})[2] and "full noise" not in plain
    real = comfy.samplers.calculate_sigmas
    monkeypatch.setattr(comfy.samplers, "calculate_sigmas", lambda sampling, name, steps: real(sampling, name, steps)[1:])
    mask, _, report = predict(nodes, scheduler="beta", stop_step=3)
    assert "after 2 of 3 steps" in report and mask.isfinite().all()


def test_what_cannot_be_predicted_is_told(nodes):
    with pytest.raises(LikenessError, match="nothing to look for"):
        predict(nodes, word=prompt("sd15", PROMPT, "horse", on_missing="pass through")[1])
    with pytest.raises(LikenessError, match="no text attention of the kind"):
        predict(nodes, model=base("sd3")[0])
    late = core.ConditioningSetTimestepRange().set_range(prompt("sd15")[0], 0.9, 1.0)[0]
    with pytest.raises(LikenessError, match="acts at step 2"):
        predict(nodes, positive=late + encode("sd15", "a beach"))


# -- the node ---------------------------------------------------------------------------------------------
def test_the_generator_says_what_will_be_done(nodes):
    execute, word = nodes["Likeness_GuidanceMask"].execute, prompt("sd15")[1]
    how, text = execute(word, 0.25, "max_norm", KEEPS[0], "soft", 12).args
    assert how.name == guidance().name and "the strongest 25 %" in text and "first 12 steps" in text
    how, text = execute(word, 0.3, "min_max_norm", KEEPS[1], "binary", 3, half(), "multiply", "share", True).args
    assert how.strategy == ("min_max_norm", "threshold", "binary") and how.share and how.early and not how.replace
    assert "all above 0.7" in text and "times your mask" in text
    how, text = execute(word, 0.3, "max_norm", KEEPS[0], "soft", 3, half(), "replace").args
    assert how.replace and "the model is not asked, and scope, strategy, keep, values, refresh_until_step" in text
    how, text = execute(word, 0.3, "max_norm", KEEPS[0], "soft", 3, None, "replace").args
    assert not how.replace and "no mask is connected" in text
    names = {execute(word, scope, norm, KEEPS[0], "soft", 3).args[0].name for scope in (0.2, 0.3) for norm in
             ("max_norm", "min_max_norm")}
    assert len(names) == 4


def test_the_windows_of_a_video_have_one_mask_a_frame():
    """Windows of frames 0, 1 and 1, 2: three masks, of the frame that both saw the later one."""
    how, run = release.guidance(), Run()
    for value, frames in ((1.0, (0, 1)), (2.0, (1, 2))):
        run.note([how], {how.name: torch.full((2, 1, 2, 2), value)}, 0, True, frames)
    assert run.steps[how.name][0][:, 0, 0, 0].tolist() == [1.0, 2.0, 2.0]
    run.note([how], {how.name: torch.full((1, 1, 2, 2), 3.0)}, 0, True, (1, 2))  # frames along another axis than the batch
    assert run.steps[how.name][0].shape[0] == 1


def test_two_runs_that_end_at_one_latent_keep_both_names():
    """GUIDANCEs that differ in what changes nothing (early end): the preview of either finds its own masks."""
    runs, latent = guidance_runs.Runs(), torch.ones(1, 4, 2, 2)
    one, other = (guidance_runs.WordRun(text, ((0, torch.zeros(1, 1, 2, 2)),), 1) for text in ("cat", "dog"))
    runs.keep(latent, {"a": one})
    runs.keep(latent, {"b": other})
    assert runs.find(latent, "a") == {"a": one} and runs.find(latent, "b") == runs.find(latent) == {"b": other}
    runs.keep(latent, {"a": other})
    assert runs.find(latent) == runs.find(latent, "a") == {"a": other} and len(runs._runs) == 2


def test_a_model_with_guidance_does_not_hold_the_text_encoder():
    """The host could not free it while the model samples."""
    done = injected(guidance=guidance())
    (guide,) = done.model.model_options["transformer_options"]["patches"][GUIDES]
    assert prompt("sd15")[1].clip is not None and guide.guidance.word.clip is None and guide.guidance.word.tokens is None
