"""The patch objects: what leaves no trace, what acts where and when, and who they live beside."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host.support import (
    PROMPT, adapter, adapter_state, base, by_hand, cfg_guider, config_for, core, draw, encode, injected, latent_of,
    new_adapter, prompt, run_guider, sample, subject)
from torch import Tensor

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.utils
from comfy_api.input import CurveInput
from harness import tiny
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import stamps
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.injector import LocalInjection, Plan, Timing, area_of, grid_of, progress

OPTIONS = ("patches", "patches_replace", "wrappers", "callbacks")


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def inject_into(model: Any, seed: int = 1, strengths: Strengths | None = None, kind: str = "sd15", **more: Any):
    positive, word = prompt(kind)
    return inject(model, positive, encode(kind, "blurry"), subject(kind, seed), word,
                  strengths or Strengths(0.0, 1.0), **more)


def run(done: Any, **more: Any) -> Tensor:
    return sample(done.model, done.positive, done.negative, **more)


def plain(kind: str = "sd15", model: Any = None, **more: Any) -> Tensor:
    return sample(model or base(kind)[0], prompt(kind)[0], encode(kind, "blurry"), kind=kind, **more)


def snapshot(model: Any) -> Any:
    """All that a patch could leave on a MODEL; objects by identity, containers by content."""
    def plain_copy(value):
        if isinstance(value, dict):
            return {key: plain_copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain_copy(item) for item in value]
        # The host moves a patch to a device by putting its copy into the list of the MODEL that it runs.
        return value.plan.number if isinstance(value, LocalInjection) else id(value)
    return [plain_copy(part) for part in (
        model.model_options, model.patches, model.object_patches, model.wrappers, model.callbacks, model.injections,
        model.additional_models, model.attachments, model.weight_wrapper_patches)]


def frozen(conditioning: Any) -> Any:
    """A deep copy with every tensor cloned."""
    return [[rows.clone(), copy.deepcopy({k: v for k, v in options.items() if k != "model_conds"}),
             {k: v.cond.clone() for k, v in options.get("model_conds", {}).items()}]
            for rows, options in conditioning]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# -- nothing changes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "mini"])
def test_strength_zero_and_an_untrained_adapter_are_bit_equal(kind):
    before = plain(kind)
    off = injected(kind, strengths=Strengths(0.0, 0.0))
    assert off.model is base(kind)[0] and "passed through" in off.report
    assert torch.equal(run(off, kind=kind), before)
    positive, word = prompt(kind)
    who = subject(kind, trained=False)
    new = inject(base(kind)[0], positive, encode(kind, "blurry"), who, word, Strengths(1.0, 1.0))
    assert new.model is not base(kind)[0]
    assert torch.equal(run(new, kind=kind), before)
    assert not torch.equal(run(injected(kind), kind=kind), before), "the trained one does nothing either"


@pytest.mark.parametrize("level", ["global", "local"])
def test_each_level_acts_alone(level):
    before = plain()
    strengths = Strengths(1.0, 0.0) if level == "global" else Strengths(0.0, 1.0)
    done = injected(strengths=strengths)
    assert (done.model is base("sd15")[0]) == (level == "global")
    assert torch.equal(done.positive[0][0], prompt("sd15")[0][0][0]) == (level == "local")
    assert not torch.equal(run(done), before)


def test_a_clone_never_changes_its_parent():
    model, positive, negative = base("sd15")[0].clone(), prompt("sd15")[0], encode("sd15", "blurry")
    word = prompt("sd15")[1]
    kept = snapshot(model), frozen(positive), frozen(negative), word.rows.clone()
    before = run_guider(cfg_guider(model, positive, negative), latent_of("sd15"))
    first = inject(model, positive, negative, subject("sd15", 1), word, Strengths(1, 1, 0.2, 0.9))
    middle = snapshot(first.model), frozen(first.positive), frozen(first.negative)
    second = inject(first.model, first.positive, first.negative, subject("sd15", 2), word, Strengths(1, 1))
    assert len(second.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 2
    # Applied beside each other on two clones of one parent.
    sister = inject(model.clone(), positive, negative, subject("sd15", 3), word, Strengths(1, 1))
    assert len(sister.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 1
    for done in (first, second, sister):
        run(done)
    assert snapshot(model) == kept[0] and torch.equal(word.rows, kept[3])
    assert same(frozen(positive), kept[1]) and same(frozen(negative), kept[2])
    assert same(frozen(first.positive), middle[1]) and same(frozen(first.negative), middle[2])
    assert len(first.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 1
    assert torch.equal(run_guider(cfg_guider(model, positive, negative), latent_of("sd15")), before)


def test_running_the_node_again_changes_nothing():
    first, again = injected(), injected()
    assert same(frozen(first.positive), frozen(again.positive)) and first.report == again.report
    plans = [done.model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan for done in (first, again)]
    assert plans[0].number == plans[1].number
    assert same([(k, v) for _, k, v in plans[0].keys_values], [(k, v) for _, k, v in plans[1].keys_values])
    result = run(first)
    assert torch.equal(run(again), result) and torch.equal(run(first), result)


def test_twice_the_same_injector_in_a_row_acts_twice():
    """Same number on model and prompt: the row's count of it decides, not the number of patches."""
    once = inject_into(base("sd15")[0])
    _, word = prompt("sd15")
    twice = inject(once.model, once.positive, once.negative, subject("sd15", 1), word, Strengths(0.0, 1.0))
    assert len(twice.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 1
    result = run(twice)
    assert not torch.equal(result, run(once))
    assert torch.equal(sample(twice.model, once.positive, once.negative), run(once))


def test_labels_of_other_settings_differ():
    """Two injectors that differ in anything must not answer to each other's stamp."""
    curve = CurveInput.from_raw([(0.0, 1.0), (1.0, 0.0)])
    half = torch.ones(1, 8, 8)
    half[..., 4:] = 0
    settings = [
        {}, {"strengths": Strengths(0.0, 0.9)}, {"strengths": Strengths(0.0, 1.0, 0.1)}, {"seed": 2}, {"mask": half},
        {"mask": half.flip(-1)}, {"curve": curve}, {"layers": (("output.3.0", 0.5),)}, {"guidance": Named()}]
    numbers = set()
    for more in settings:
        done = inject_into(base("sd15")[0], **more)
        numbers.add(done.model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan.number)
    assert len(numbers) == len(settings)
    assert all(0 < number < 2 ** 48 for number in numbers)


class Named:
    name = "live"


# -- one call of the patch -----------------------------------------------------------------------------
def call(patch: LocalInjection, x: Tensor, ids: list[tuple[int, ...]], *, key=("output", 3, 0), areas=None,
         latent=(16, 16), shape=None, sigma=1.0, sigmas=None, chunks=1, **more: Any) -> Tensor:
    rows = stamps.RowStamps(tuple(ids), tuple(areas or [None] * len(ids)), latent, sigma)
    side = int(x.shape[1] ** 0.5)
    options = {stamps.KEY: rows, "block": key[:2], "block_index": key[2], "cond_or_uncond": [0] * chunks,
               "activations_shape": [x.shape[0], x.shape[2], *(shape or (side, x.shape[1] // side))],
               "sample_sigmas": sigmas, **more}
    return patch(x, options)


def patch_for(mask: Tensor | None = None, n: int = 1, pairing: str = "all", timing: Timing = Timing(), strength=1.0,
              guidance: str | None = None) -> tuple[LocalInjection, Tensor]:
    of = adapter("sd15")
    tokens = draw(3, n, 9, of.config.width)
    module = of.patcher.model
    kv = tuple((key, *module.keys_values(key, tokens)) for key, _ in of.config.layers)
    plan = Plan(5, of.patcher, kv, pairing, tuple((key, strength) for key, _ in of.config.layers), timing, mask, guidance)
    return LocalInjection(plan), tokens


def test_one_call_by_hand():
    patch, tokens = patch_for(n=2, strength=0.7)
    x = draw(1, 4, 4, 128)
    out = call(patch, x, [(), (5,), (4, 5), (4,)], chunks=2)
    hand = by_hand(adapter("sd15"), "output.3.0", x, tokens.flatten(0, 1)[None])
    assert torch.equal(out[0], x[0]) and torch.equal(out[3], x[3])
    assert torch.allclose(out[1:3], (x + 0.7 * hand)[1:3], atol=1e-5)
    assert torch.equal(call(patch, x, [()] * 4), x)
    assert torch.equal(call(patch, x, [(5,)] * 4, key=("output", 4, 1)), x), "a block that the adapter has not"
    assert torch.equal(patch(x, {"block": ("output", 3), "block_index": 0}), x), "no stamps, no action"


def test_references_of_their_own_latents():
    patch, tokens = patch_for(n=2, pairing="per latent")
    x = draw(1, 6, 4, 128)  # two chunks of three latents
    out = call(patch, x, [(5,)] * 6, chunks=2)
    for row in range(6):
        hand = by_hand(adapter("sd15"), "output.3.0", x[row:row + 1], tokens[row % 3 % 2][None])
        assert torch.allclose(out[row:row + 1], x[row:row + 1] + hand, atol=1e-5), row


def test_each_latent_has_the_global_vector_of_its_own_reference():
    """One per latent: the word of picture 2 must not be a mean with picture 1."""
    positive, word = prompt("sd15")
    who = subject("sd15", 4, n=3)._replace(pairing="per latent")
    done = inject(base("sd15")[0], positive, encode("sd15", ""), who, word, Strengths(1.0, 0.0))
    assert done.positive[0][0].shape == (3, 77, 64)
    for k in range(3):
        one = who._replace(pairing="all", tokens=tuple((name, t[k:k + 1]) for name, t in who.tokens))
        alone = inject(base("sd15")[0], positive, encode("sd15", ""), one, word, Strengths(1.0, 0.0))
        assert torch.allclose(done.positive[0][0][k], alone.positive[0][0][0], atol=1e-6)
    latent = latent_of("sd15", 4)
    out = sample(done.model, done.positive, done.negative, latent=latent, cfg=1.0)
    again = sample(done.model, [[done.positive[0][0][[0, 1, 2, 0]], done.positive[0][1]]], done.negative, latent=latent, cfg=1.0)
    assert torch.equal(out, again)


def test_rows_in_another_order_or_number_are_told():
    patch, _ = patch_for()
    with pytest.raises(LikenessError, match="rows"):
        call(patch, draw(1, 4, 4, 128), [(5,), ()], chunks=2)


def test_moving_makes_a_copy():
    patch, _ = patch_for(mask=torch.ones(1, 4, 4))
    moved = patch.to(torch.device("cpu"))
    assert moved is not patch and moved.plan.number == patch.plan.number
    assert patch.to(torch.float16) is patch
    assert patch.models() == [adapter("sd15").patcher]
    x = draw(1, 1, 4, 128)
    assert torch.equal(call(moved, x, [(5,)]), call(patch, x, [(5,)]))


def test_the_host_loads_the_adapter_with_the_model():
    done = injected()
    assert adapter("sd15").patcher in done.model.model_patches_models()
    run(done)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(model is adapter("sd15").patcher or model.is_clone(adapter("sd15").patcher) for model in loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(dtype):
    patch, _ = patch_for(mask=torch.ones(1, 4, 4))
    x = draw(1, 2, 4, 128)
    out = call(patch, x.to(dtype), [(5,), ()], chunks=2)
    assert out.dtype == dtype
    error = (out.float() - call(patch, x, [(5,), ()], chunks=2)).abs().max()
    assert error < (0.02 if dtype == torch.float16 else 0.15)


# -- masks ---------------------------------------------------------------------------------------------
def spread(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None].float(), size, mode="area")[0, 0].reshape(-1, 1)


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (33, 47), (5, 3), (512, 256), (1, 1)])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_outside_of_the_mask_the_layer_is_the_plain_one(size, grid):
    mask = torch.zeros(1, *size)
    mask[:, : max(1, size[0] // 2), : max(1, size[1] // 3)] = 1.0
    patch, tokens = patch_for(mask=mask)
    x = draw(1, 2, grid[0] * grid[1], 128)
    out = call(patch, x, [(5,), ()], chunks=2, shape=grid, latent=(grid[0] * 2, grid[1] * 2))
    share = spread(mask[0], grid)
    outside = share[:, 0] == 0
    assert torch.equal(out[0, outside], x[0, outside]) and torch.equal(out[1], x[1])
    hand = x[0] + share * by_hand(adapter("sd15"), "output.3.0", x[:1], tokens)[0]
    assert torch.allclose(out[0], hand, atol=1e-5)
    assert share.max() > 0


def test_one_mask_a_latent():
    masks = torch.stack([torch.tensor([[1.0, 0.0]]).repeat(2, 1), torch.tensor([[0.0, 1.0]]).repeat(2, 1)])
    patch, _ = patch_for(mask=masks)
    x = draw(1, 6, 16, 128)
    out = call(patch, x, [(5,)] * 6, chunks=2)
    changed = (out != x).any(-1).reshape(6, 4, 4)
    for row in range(6):
        left = row % 3 % 2 == 0  # three latents, two masks: they go round
        assert changed[row, :, :2].all() == left and changed[row, :, 2:].all() == (not left), row


def test_area_and_mask_meet_at_the_right_place():
    """A row with an area sees only that part of the picture; the mask is over the whole of it."""
    mask = torch.zeros(64, 96)
    mask[20:40, 50:90] = 1.0
    latent, area = (8, 12), (4, 6, 2, 5)  # height, width, y, x
    part = area_of(mask, area, latent, (4, 6))
    whole = F.interpolate(mask[None, None], latent, mode="area")[0, 0]
    assert torch.allclose(part, whole[2:6, 5:11])
    assert torch.allclose(area_of(mask, None, latent, (4, 6)), F.interpolate(mask[None, None], (4, 6), mode="area")[0, 0])
    coarse = area_of(mask, area, latent, (2, 3))
    assert torch.allclose(coarse, F.interpolate(whole[2:6, 5:11][None, None], (2, 3), mode="area")[0, 0])
    patch, tokens = patch_for(mask=mask[None])
    x = draw(1, 2, 24, 128)
    out = call(patch, x, [(5,), (5,)], areas=[area, None], latent=latent, shape=(4, 6), chunks=2)
    hand = by_hand(adapter("sd15"), "output.3.0", x, tokens)
    assert torch.allclose(out[0], x[0] + part.reshape(-1, 1) * hand[0], atol=1e-5)
    assert torch.allclose(out[1], x[1] + spread(mask, (4, 6)) * hand[1], atol=1e-5)


@pytest.mark.parametrize("kind", ["area", "mask bounds"])
def test_a_mask_inside_a_sampled_area(kind):
    """In a real run: with the mask wholly outside of the entry's area nothing changes, inside it does."""
    positive, word = prompt("sd15")
    if kind == "area":
        placed = core.ConditioningSetArea().append(positive, 32, 64, 32, 0, 1.0)[0]  # width 32 at x 32
    else:
        bounds = torch.zeros(1, 64, 64)
        bounds[:, :, 32:] = 1.0
        placed = core.ConditioningSetMask().append(positive, bounds, "mask bounds", 1.0)[0]
    placed = placed + encode("sd15", "a wide beach")
    model, negative = base("sd15")[0], encode("sd15", "blurry")
    out = []
    for columns in (slice(0, 24), slice(32, 64)):
        mask = torch.zeros(1, 64, 64)
        mask[:, :, columns] = 1.0
        done = inject(model, placed, negative, subject("sd15", 1), word, Strengths(0.0, 1.0), mask=mask)
        out.append(run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sd15")))
    before = run_guider(cfg_guider(model, placed, negative), latent_of("sd15"))
    assert torch.equal(out[0], before)
    assert not torch.equal(out[1], before)


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (7, 16)])
def test_odd_latents(size):
    mask = torch.zeros(1, 37, 91)
    mask[:, 5:20, 30:80] = 0.5
    done = inject_into(base("sd15")[0], mask=mask)
    out = run(done, latent=latent_of("sd15", 2, *size))
    assert out.shape[-2:] == size and torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (1, 1, 8, 8), (1, 8, 8, 1)])
def test_masks_of_other_shapes(shape):
    mask = torch.zeros(8, 8)
    mask[:3] = 1.0
    out = run(inject_into(base("sd15")[0], mask=mask.reshape(shape)))
    assert torch.equal(out, run(inject_into(base("sd15")[0], mask=mask[None])))


def test_a_mask_of_ones_is_no_mask_and_values_stay_in_range():
    x = draw(1, 1, 16, 128)
    patch, _ = patch_for()
    ones, _ = patch_for(mask=torch.ones(1, 30, 30))
    assert torch.allclose(call(ones, x, [(5,)]), call(patch, x, [(5,)]), atol=1e-6)
    wild = torch.tensor([[[float("nan"), 3.0], [-2.0, 0.5]]])
    done = inject_into(base("sd15")[0], mask=wild)
    kept = done.model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan.mask
    assert kept.tolist() == [[[0.0, 1.0], [0.0, 0.5]]]


def test_an_empty_mask_is_refused():
    for mask in (torch.zeros(1, 8, 8), torch.full((2, 4, 4), float("nan")), torch.full((4, 4), -1.0)):
        with pytest.raises(LikenessError, match="mask is empty"):
            inject_into(base("sd15")[0], mask=mask)


def test_guidance_without_a_mask_stops_the_sampler():
    done = inject_into(base("sd15")[0], guidance=Named())
    with pytest.raises(LikenessError, match="Guidance Mask Generator"):
        run(done)


def test_guidance_masks_are_used_and_meet_the_artists_mask():
    patch, tokens = patch_for(mask=torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), guidance="live")
    x = draw(1, 1, 16, 128)
    live = torch.zeros(1, 1, 4, 4)
    live[..., :2, :] = 0.5
    out = call(patch, x, [(5,)], likeness_guidance={"live": live})
    share = spread(live[0, 0], (4, 4)) * spread(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), (4, 4))
    assert torch.allclose(out, x + share * by_hand(adapter("sd15"), "output.3.0", x, tokens), atol=1e-5)


@pytest.mark.parametrize(("tokens", "latent", "grid"), [
    (64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (20, (8, 10), (4, 5)), (30, (9, 11), (5, 6)), (4096, (128, 128), (64, 64))])
def test_grid_without_the_hosts_shapes(tokens, latent, grid):
    assert grid_of(tokens, latent) == grid


# -- timing --------------------------------------------------------------------------------------------
def test_progress_over_a_schedule():
    levels = torch.tensor([10.0, 6.0, 2.0, 0.0])
    assert [progress(float(s), levels) for s in levels[:-1]] == [0.0, 0.5, 1.0]
    assert progress(8.0, levels) == pytest.approx(0.25) and progress(4.0, levels) == pytest.approx(0.75)
    assert progress(99.0, levels) == 0.0 and progress(0.5, levels) == 1.0 and progress(0.0, levels) == 1.0
    assert progress(3.0, None) == 0.0 and progress(3.0, torch.tensor([3.0, 0.0])) == 0.0
    flat = torch.tensor([4.0, 4.0, 1.0, 0.0])
    assert progress(4.0, flat) == 0.0 and progress(1.0, flat) == 1.0


def test_timing_is_closed_at_both_ends():
    timing = Timing(5.0, 2.0)
    assert [timing.factor(s, None) for s in (5.1, 5.0, 3.0, 2.0, 1.9)] == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert Timing().factor(1e9, None) == 1.0 and Timing().factor(0.0, None) == 1.0


class Notes:
    """Writes down the sigma of every call of the network and whether its rows were changed by the subject."""

    def __init__(self, real: LocalInjection):
        self.real, self.calls = real, []

    def __call__(self, x: Tensor, extra: dict[str, Any]) -> Tensor:
        out = self.real(x, extra)
        if extra["block"] == ("output", 11):
            self.calls.append((extra[stamps.KEY].sigma, (out - x).abs().mean().item()))
        return out


def noted(done: Any) -> tuple[Any, Notes]:
    model = done.model.clone()
    patches = model.model_options["transformer_options"]["patches"]["middle_patch"]
    patches[0] = Notes(patches[0])
    return model, patches[0]


def test_start_and_end_limit_both_levels():
    done = injected(strengths=Strengths(1.0, 1.0, 0.3, 0.7))
    low, high = ([entry[1].get(name) for entry in done.positive] for name in ("start_percent", "end_percent"))
    assert low == [0.0, 0.3, 0.7] and high == [0.3, 0.7, 1.0]
    texts = [torch.equal(entry[0], prompt("sd15")[0][0][0]) for entry in done.positive]
    assert texts == [True, False, True]
    model, notes = noted(done)
    sample(model, done.positive, done.negative, steps=12)
    sampling = base("sd15")[0].get_model_object("model_sampling")
    start, end = (sampling.percent_to_sigma(p) for p in (0.3, 0.7))
    inside = [changed > 0 for sigma, changed in notes.calls if end <= sigma <= start]
    outside = [changed > 0 for sigma, changed in notes.calls if not end <= sigma <= start]
    assert len(inside) >= 3 and all(inside) and len(outside) >= 4 and not any(outside)


def test_ranges_of_the_prompt_are_kept():
    positive, word = prompt("sd15")
    ranged = core.ConditioningSetTimestepRange()
    cases = {(0.5, 1.0): [(0.5, 0.7, True), (0.7, 1.0, False)], (0.3, 0.7): [(0.3, 0.7, True)],
             (0.0, 0.2): [(0.0, 0.2, False)], (0.4, 0.4): [(0.4, 0.4, True)], (0.2, 0.2): [(0.2, 0.2, False)]}
    for (low, high), expected in cases.items():
        entry = ranged.set_range(positive, low, high)[0]
        done = inject(base("sd15")[0], entry, [], subject("sd15", 1), word, Strengths(1.0, 0.0, 0.3, 0.7))
        got = [(e[1]["start_percent"], e[1]["end_percent"], not torch.equal(e[0], positive[0][0])) for e in done.positive]
        assert got == expected, (low, high)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.7, 0.3), (-0.1, 1.0), (0.0, 1.1)])
def test_impossible_ranges_are_refused(start, end):
    with pytest.raises(LikenessError, match="start must be"):
        injected(strengths=Strengths(1.0, 1.0, start, end))


@pytest.mark.parametrize(("sampler", "scheduler"), [
    ("euler", "normal"), ("heun", "karras"), ("dpmpp_sde", "normal"), ("dpmpp_2m", "simple"), ("uni_pc", "normal")])
def test_a_curve_over_the_steps(sampler, scheduler):
    """The curve is asked between 0 and 1 only, rising, also by samplers that look twice a step."""
    asked: list[float] = []

    class Ramp(CurveInput):
        points = [(0.0, 0.0), (1.0, 1.0)]

        def interp(self, x):
            asked.append(x)
            return x
    done = inject_into(base("sd15")[0], curve=Ramp())
    assert "local level only" in done.report
    out = run(done, sampler=sampler, scheduler=scheduler, steps=3)
    assert torch.isfinite(out).all()
    assert asked and min(asked) == 0.0 and max(asked) <= 1.0 and max(asked) > 0.9
    first = {round(x, 4): None for x in asked}
    assert sampler == "heun" or list(first) == sorted(first)


def test_curves_of_core():
    flat = CurveInput.from_raw([(0.0, 1.0), (1.0, 1.0)])
    zero = CurveInput.from_raw([(0.0, 0.0), (1.0, 0.0)])
    step = CurveInput.from_raw({"points": [(0.0, 1.0), (0.4, 1.0), (0.6, 0.0), (1.0, 0.0)], "interpolation": "linear"})
    model = base("sd15")[0]
    assert torch.equal(run(inject_into(model, curve=flat)), run(inject_into(model)))
    assert torch.equal(run(inject_into(model, curve=zero)), plain())
    done = inject_into(model, curve=step)
    model, notes = noted(done)
    sample(model, done.positive, done.negative, steps=5)
    assert [changed > 0 for _, changed in notes.calls] == [True, True, True, False, False]


def test_layer_weights():
    patch_layers = [key for key, _ in adapter("sd15").config.layers]
    none = tuple((key, 0.0) for key in patch_layers)
    assert torch.equal(run(inject_into(base("sd15")[0], layers=none)), plain())
    one = tuple((key, 0.0) for key in patch_layers if key != "output.6.0")
    done = inject_into(base("sd15")[0], layers=one)
    plan = done.model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan
    assert [key for key, _, _ in plan.keys_values] == ["output.6.0"] and plan.strength == (("output.6.0", 1.0),)
    with pytest.raises(LikenessError, match="output.99.0"):
        inject_into(base("sd15")[0], layers=(("output.99.0", 1.0),))


# -- beside other packs --------------------------------------------------------------------------------
class ForeignReplace:
    """The kind of object that IPAdapter-style packs put into the attn2 slot: later packs call `add` on it."""

    def __init__(self, callback, **kwargs):
        self.callbacks, self.kwargs = [callback], [kwargs]

    def add(self, callback, **kwargs):
        self.callbacks.append(callback)
        self.kwargs.append(kwargs)
        return self

    def __call__(self, q, k, v, extra_options):
        heads = extra_options["n_heads"]
        out = comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)
        for callback, kwargs in zip(self.callbacks, self.kwargs, strict=True):
            out = out + callback(q, k, v, extra_options, **kwargs)
        return out


def foreign_attention(q, k, v, extra_options, tokens, weight):
    keys = tokens.repeat(1, 1, -(-q.shape[-1] // tokens.shape[-1]))[..., :q.shape[-1]].expand(q.shape[0], -1, -1)
    return weight * comfy.ldm.modules.attention.optimized_attention(q, keys, keys.flip(-1), extra_options["n_heads"])


def like_ipadapter(model: Any, weight: float = 0.6, seed: int = 21) -> Any:
    """As IPAdapter-style packs do it: into the slot, or onto the object that sits there already."""
    model = model.clone()
    slot = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for number in range(3, 12):
        key = ("output", number, 0)
        arguments = {"tokens": draw(seed, 1, 4, 64), "weight": weight}
        if key in slot:
            slot[key].add(foreign_attention, **arguments)
        else:
            model.set_model_attn2_replace(ForeignReplace(foreign_attention, **arguments), *key)
    return model


def output_patch(model: Any) -> Any:
    model = model.clone()
    model.set_model_attn2_output_patch(lambda n, extra: n * 1.1 + 0.05 * n.flip(-1))
    return model


def middle_patch(model: Any) -> Any:
    """As GLIGEN does it: reads the stream between the attentions and adds to it."""
    model = model.clone()
    model.set_model_patch(lambda x, extra: x + 0.3 * torch.tanh(x.roll(1, -1)), "middle_patch")
    return model


def lora(model: Any) -> Any:
    weights = comfy.utils.load_torch_file(str(tiny.ensure()[tiny.LORA]))
    return comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0.0)[0]


NEIGHBOURS = {"ipadapter": like_ipadapter, "output patch": output_patch, "gligen": middle_patch, "lora": lora}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_in_either_order(name):
    """Both orders of the two nodes give one picture, in which both act."""
    other = NEIGHBOURS[name]
    model = base("sd15")[0]
    after, before = other(inject_into(model).model), inject_into(other(model))
    marked = before.positive, before.negative
    results = [sample(m, *marked) for m in (before.model, after)]
    if name == "gligen":  # the stream goes through both patches in list order
        assert not torch.equal(*results)
    else:
        assert torch.allclose(*results, rtol=1e-4, atol=1e-3)
    for result in results:
        assert not torch.equal(result, plain(model=other(model)))
        assert not torch.equal(result, run(inject_into(model)))
    assert torch.equal(plain(), plain(model=model))


def test_the_foreign_sum_is_exact():
    """One block with both: plain stream + ours, then the text attention + theirs, each as if alone."""
    key = ("output", 3)
    seen: dict[str, Tensor] = {}

    def spy(name):
        def patch(x, extra):
            if extra["block"] == key:
                seen[name] = x.clone()
            return x
        return patch
    model = like_ipadapter(base("sd15")[0]).clone()
    model.set_model_patch(spy("before"), "middle_patch")
    done = inject_into(model)
    done.model.set_model_patch(spy("after"), "middle_patch")
    run_guider(cfg_guider(done.model, done.positive, done.negative, 1.0), latent_of("sd15"))
    hand = seen["before"] + by_hand(adapter("sd15"), "output.3.0", seen["before"], subject("sd15").get("local"))
    assert torch.allclose(seen["after"], hand, atol=1e-4, rtol=1e-4)


def test_two_of_ours_and_an_ipadapter_between_them():
    model = base("sd15")[0]
    first = inject_into(model, 1)
    _, word = prompt("sd15")
    second = inject(like_ipadapter(first.model), first.positive, first.negative, subject("sd15", 2), word, Strengths(0, 1))
    result = sample(second.model, second.positive, second.negative)
    straight = inject(first.model, first.positive, first.negative, subject("sd15", 2), word, Strengths(0, 1))
    again = sample(like_ipadapter(straight.model), straight.positive, straight.negative)
    assert torch.allclose(result, again, rtol=1e-4, atol=1e-3)
    assert not torch.equal(result, sample(straight.model, straight.positive, straight.negative))


def test_gligen_that_comes_with_the_conditioning():
    """Core merges the patches of an entry into the call's; ours must not be lost, nor see it twice."""
    class Gligen(torch.nn.Module):
        def set_position(self, shape, params, device):
            return lambda x, extra: x + 0.2 * torch.tanh(x)

        def set_empty(self, shape, device):
            return lambda x, extra: x
    boxes = comfy.model_patcher.CoreModelPatcher(Gligen(), torch.device("cpu"), torch.device("cpu"))
    model = base("sd15")[0]
    done = inject_into(model)
    with_boxes = [[entry[0], {**entry[1], "gligen": ("position", boxes, [])}] for entry in done.positive]
    calls = [run_guider(cfg_guider(m, c, done.negative), latent_of("sd15")) for m in (model, done.model)
             for c in (done.positive, with_boxes)]
    assert all(not torch.equal(calls[a], calls[b]) for a in range(4) for b in range(a))


@pytest.mark.parametrize("before", [True, False])
def test_beside_a_controlnet(before):
    """ControlNetApply copies the entries: stamp and word survive, and the control net sees no subject of its own."""
    control = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def controlled(positive, negative):
        return core.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, 0.8, 0.0, 1.0)
    positive, word = prompt("sd15")
    negative = encode("sd15", "blurry")
    model, who, strengths = base("sd15")[0], subject("sd15", 1), Strengths(1.0, 1.0)
    if before:
        pair = controlled(positive, negative)
        done = inject(model, *pair, who, word, strengths)
        result = run(done)
    else:
        done = inject(model, positive, negative, who, word, strengths)
        pair = controlled(done.positive, done.negative)
        result = sample(done.model, *pair)
    both = [run(injected()), sample(model, *controlled(positive, negative))]
    assert all(not torch.equal(result, other) for other in both)
    other = controlled(*inject(model, positive, negative, who, word, strengths)[1:3])
    assert torch.allclose(result, sample(done.model, *other), rtol=1e-4, atol=1e-3)


class Couple:
    """Attention couple: the positive's rows are multiplied for the text attention and mixed back by masks.

    form "ppm": the base prompt is the first of the parts; form "prompt control": parts join what the row had. Both
    multiply in `attn2_patch` and reduce in `attn2_output_patch` of the same block call.
    """

    def __init__(self, conds: list[Tensor], form: str):
        self.conds, self.form = conds, form

    def on(self, model: Any) -> Any:
        model = model.clone()
        model.set_model_attn2_patch(self.multiply)
        model.set_model_attn2_output_patch(self.reduce)
        return model

    def multiply(self, q, k, v, extra):
        chunks = extra["cond_or_uncond"]
        batch = q.shape[0] // len(chunks)
        qs, ks = [], []
        for number, kind in enumerate(chunks):
            rows = slice(number * batch, (number + 1) * batch)
            if kind == 1:
                qs.append(q[rows])
                ks.append(k[rows])
            else:
                parts = [k[rows]] if self.form == "prompt control" else []
                parts += [c.expand(batch, -1, -1).to(k) for c in self.conds]
                qs.append(q[rows].repeat(len(parts), 1, 1))
                ks.append(torch.cat([p[:, :k.shape[1]] for p in parts]))
        k = torch.cat(ks)
        return torch.cat(qs), k, k

    def reduce(self, n, extra):
        chunks = extra["cond_or_uncond"]
        parts = len(self.conds) + (self.form == "prompt control")
        batch = n.shape[0] // sum(1 if kind == 1 else parts for kind in chunks)
        out, at = [], 0
        height, width = extra["activations_shape"][-2:]
        for kind in chunks:
            many = 1 if kind == 1 else parts
            rows = n[at:at + many * batch].unflatten(0, (many, batch))
            at += many * batch
            if many > 1:  # the left half belongs to the first part, the right to the last
                mask = torch.zeros(many, height, width, device=n.device)
                mask[0, :, : -(-width // 2)] = 1.0
                mask[-1, :, -(-width // 2):] = 1.0
                rows = rows * mask.reshape(many, 1, -1, 1).to(n)
            out.append(rows.sum(0))
        return torch.cat(out)


@pytest.mark.parametrize("form", ["ppm", "prompt control"])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_couple_in_both_orders(form, batch):
    """The middle of a block lies before its rows are multiplied, so the order of the nodes makes no difference."""
    conds = [encode("sd15", text)[0][0] for text in ("a cat, red", "a dog, blue")]
    model, latent, couple = base("sd15")[0], latent_of("sd15", batch), Couple(conds, form)
    ours_last = inject_into(couple.on(model))
    ours_first = couple.on(inject_into(model).model)
    marked = ours_last.positive, ours_last.negative
    results = [sample(m, *marked, latent=latent) for m in (ours_last.model, ours_first)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(couple.on(model), *marked, latent=latent))
    assert not torch.equal(results[0], sample(inject_into(model).model, *marked, latent=latent))


# -- refusals, cancel, progress ------------------------------------------------------------------------
def test_a_base_of_another_kind_is_refused_by_name():
    positive, word = prompt("sd15")
    for kind, parts in (("sdxl", ("SD1.5", "64", "160")), ("sd3", ("SD1.5", "SD3")), ("mini", ("SD1.5", "the miniature"))):
        with pytest.raises(LikenessError) as caught:
            inject(base(kind)[0], positive, [], subject("sd15", 1), word, Strengths(1, 1))
        assert all(part in str(caught.value) for part in parts), str(caught.value)
    one_more = config_for("sd15")._replace(layers=(*config_for("sd15").layers, ("output.1.0", 128)))
    who = subject("sd15", 1, of=new_adapter(one_more))
    with pytest.raises(LikenessError, match="output.1.0"):
        inject(base("sd15")[0], positive, [], who, word, Strengths(1, 1))


def test_a_prompt_of_another_text_encoder_is_refused():
    _, word = prompt("mini")
    with pytest.raises(LikenessError, match="width 128.* needs 64"):
        inject(base("sd15")[0], prompt("sd15")[0], [], subject("sd15", 1), word, Strengths(1, 1))


def test_a_subject_without_its_adapter_or_without_pictures():
    positive, word = prompt("sd15")
    with pytest.raises(LikenessError, match="without its adapter"):
        inject(base("sd15")[0], positive, [], subject("sd15", 1)._replace(adapter=None), word, Strengths(1, 1))
    empty = subject("sd15", 1)._replace(tokens=(("global", torch.zeros(0, 2, 64)), ("local", torch.zeros(0, 0, 64))))
    done = inject(base("sd15")[0], positive, [], empty, word, Strengths(1, 1))
    assert done.positive is positive and "nothing injected" in done.report


def test_cancel_in_mid_sampling_leaves_no_trace():
    done = injected(mask=torch.ones(1, 8, 8))
    before = run(done, steps=3)
    kept = snapshot(done.model)
    seen = []

    def cancel(step, *_):
        seen.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(done, steps=3, callback=cancel)
    assert seen == [0, 1]
    assert snapshot(done.model) == kept
    assert torch.equal(run(done, steps=3), before)
    assert torch.equal(plain(steps=3), plain(steps=3))


def test_an_error_in_mid_sampling_leaves_no_trace():
    waiting = inject_into(base("sd15")[0], guidance=Named())
    before = run(injected())
    with pytest.raises(LikenessError):
        run(waiting)
    assert torch.equal(run(injected()), before)


def test_keys_and_values_are_projected_once_a_node():
    """The sampler's steps must not pay for the references again."""
    of = new_adapter(config_for("sd15"), seed=77)
    calls = []
    module = of.patcher.model
    real = module.keys_values
    module.keys_values = lambda *a: calls.append(a[0]) or real(*a)
    positive, word = prompt("sd15")
    done = inject(base("sd15")[0], positive, encode("sd15", ""), subject("sd15", 1, of=of), word, Strengths(0, 1))
    made = len(calls)
    run(done, steps=3)
    assert made == len(of.config.layers) == len(calls)


def test_random_adapters_of_other_seeds_differ():
    """Guards the helpers: an adapter that does nothing would make half of these tests empty."""
    assert PROMPT.split()[4] == "cat" and adapter_state(config_for("sd15"))["global_mlp.out.weight"].abs().max() > 0
    assert not torch.equal(run(inject_into(base("sd15")[0], 1)), run(inject_into(base("sd15")[0], 2)))
