"""Where and when the subject acts: masks, areas, guidance; start, end, curve and layers."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host.support import (
    CURVES,
    CurveInput,
    adapter,
    base,
    blind,
    by_hand,
    call,
    cfg_guider,
    comfy_extras,
    core,
    draw,
    encode,
    guidance,
    inject_into,
    injected,
    latent_of,
    patch_for,
    plain,
    prompt,
    run,
    run_guider,
    sample,
    subject,
)
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import stamps
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.injector import LocalInjection, Timing, progress
from likeness.models.hosting.row_masks import area_of, checked_mask, grid_of


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


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


@pytest.mark.parametrize(("batch", "chunks"), [(2, 1), (2, 2), (1, 3)])
def test_more_masks_or_references_than_latents_are_refused(batch, chunks):
    """What counts is the batch of latents, not the rows of all prompts together."""
    x, ids = draw(1, batch * chunks, 16, 128), [(5,)] * (batch * chunks)
    for patch, what in ((patch_for(mask=torch.ones(batch + 1, 4, 4))[0], "masks"),
                        (patch_for(n=batch + 1, pairing="per latent")[0], "references")):
        with pytest.raises(LikenessError, match=f"{batch + 1} {what}.*holds {batch} latent"):
            call(patch, x, ids, chunks=chunks)
        call(patch, x, ids, chunks=chunks, context_window=object())
    for patch in (patch_for(mask=torch.ones(batch, 4, 4))[0], patch_for(n=batch, pairing="per latent")[0],
                  patch_for(n=batch + 1)[0]):
        call(patch, x, ids, chunks=chunks)


def test_three_masks_on_two_latents_stop_the_sampler():
    areas = core.ConditioningSetArea()
    done = injected(mask=torch.ones(3, 8, 8))
    placed = areas.append(done.positive, 32, 32, 8, 8, 1.0)[0]
    for positive in (done.positive, placed):
        with pytest.raises(LikenessError, match="3 masks and the batch holds 2 latents"):
            sample(done.model, positive, done.negative, latent=latent_of("sd15", 2))
        sample(done.model, positive, done.negative, latent=latent_of("sd15", 3))


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


def test_a_mask_one_pixel_wide_is_a_column():
    column = torch.zeros(1, 1, 8, 1)
    column[:, :, :3] = 1.0
    assert torch.equal(checked_mask(column), column[0]) and checked_mask(torch.ones(2, 8, 4, 1)).shape == (2, 8, 4)


def test_a_mask_is_read_as_everywhere_in_the_pack():
    """Bytes count to 255, and a picture is no mask: three channels are not three rows of pixels."""
    assert float(checked_mask(torch.full((1, 4, 4), 51, dtype=torch.uint8)).max()) == pytest.approx(0.2)
    with pytest.raises(LikenessError, match="connect a MASK"):
        checked_mask(torch.ones(1, 8, 8, 3))


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


def test_a_mask_without_the_local_level_is_told_to_have_no_effect():
    mask = torch.ones(1, 8, 8)
    assert "mask has no effect" in injected(mask=mask, strengths=Strengths(1.0, 0.0)).report
    assert "no effect" not in injected(mask=mask).report + injected(strengths=Strengths(1.0, 0.0)).report


def test_guidance_without_a_mask_stops_the_sampler():
    done = inject_into(base("sd15")[0], guidance=guidance())
    with pytest.raises(LikenessError, match="the sampler made none"):
        run(done._replace(model=blind(done.model)))


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


def test_progress_over_a_schedule():
    levels = torch.tensor([10.0, 6.0, 2.0, 0.0])
    assert [progress(float(s), levels) for s in levels[:-1]] == [0.0, 0.5, 1.0]
    assert progress(8.0, levels) == pytest.approx(0.25) and progress(4.0, levels) == pytest.approx(0.75)
    assert progress(99.0, levels) == 0.0 and progress(0.5, levels) == 1.0 and progress(0.0, levels) == 1.0
    assert progress(3.0, None) == 0.0 and progress(3.0, torch.tensor([3.0, 0.0])) == 0.0
    flat = torch.tensor([4.0, 4.0, 1.0, 0.0])
    assert progress(4.0, flat) == 0.0 and progress(1.0, flat) == 1.0


def test_timing_is_closed_at_both_ends():
    timing, level = Timing(0.2, 0.8), {0.2: 5.0, 0.8: 2.0}.__getitem__
    assert [timing.factor(s, None, level) for s in (5.1, 5.0, 3.0, 2.0, 1.9)] == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert Timing().factor(1e9, None, level) == 1.0 and Timing().factor(0.0, None, level) == 1.0


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


@pytest.mark.parametrize(("levels", "more"), [((0.0, 1.0), {}), ((1.0, 0.0), {}), ((0.0, 1.0), {"guidance": guidance()})])
def test_start_and_end_are_of_the_noise_that_the_model_runs_with(levels, more):
    """A node of noise levels stands before the injector or behind it: both levels and the live mask act at the same steps."""
    other = comfy_extras.nodes_model_advanced.ModelSamplingContinuousEDM()
    model, (_, word) = base("sd15")[0], prompt("sd15")
    strengths = Strengths(*levels, 0.3, 0.7)

    def edm(one: Any) -> Any:
        return other.patch(one, "v_prediction", 120.0, 0.002)[0]
    before = inject(edm(model), prompt("sd15")[0], encode("sd15", "blurry"), subject("sd15"), word, strengths, **more)
    after = injected(strengths=strengths, **more)
    out = sample(before.model, before.positive, before.negative, steps=6)
    assert torch.equal(sample(edm(after.model), after.positive, after.negative, steps=6), out)
    assert not torch.equal(sample(edm(model), prompt("sd15")[0], encode("sd15", "blurry"), steps=6), out)


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


@CURVES
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


@CURVES
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
    assert list(plan.store.model.pairs) == ["output_6_0"] and plan.strength == (("output.6.0", 1.0),)
    with pytest.raises(LikenessError, match="output.99.0"):
        inject_into(base("sd15")[0], layers=(("output.99.0", 1.0),))
