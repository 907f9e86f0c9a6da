"""Preprocessing, phrases, schedule and solver of the RealCustom release against its numbers."""
from __future__ import annotations

import hashlib

import pytest
import torch

from likeness.models.realcustom import preprocess, schedule
from likeness.models.realcustom.phrase import substring_columns, substring_ranges
from unit.recipe import RECIPE, byte_stream, golden

CLOSE = {"atol": 1e-5, "rtol": 0}


# -- preprocessing ---------------------------------------------------------------------------------------
def picture() -> torch.Tensor:
    rule = RECIPE["inputs"]["preprocess in.image_u8"]
    raw = byte_stream(rule["bytes_seed"], tuple(rule["shape"]))
    assert hashlib.sha256(raw.tobytes()).hexdigest() == rule["sha256"]
    return torch.from_numpy(raw.copy()).permute(0, 2, 3, 1).float() / 255


def patch_means(pixels: torch.Tensor) -> torch.Tensor:
    """The fake encoder: (b, 3, 384, 384) -> (b, 729, 3)."""
    return pixels[..., :378, :378].unflatten(-1, (27, 14)).unflatten(-3, (27, 14)).mean((-1, -3)).flatten(2).mT


@pytest.mark.parametrize("name, dtype", (("fp32", torch.float32), ("bf16", torch.bfloat16)))
def test_pixels_and_features_equal_the_release(name, dtype):
    want = golden(f"preprocess_{name}")
    got = preprocess.views(picture(), dtype=dtype)
    for pixels, key in ((got.whole, "global"), (got.quarters, "local")):
        level = (pixels * 255).round()
        parts = {"s4": level[..., ::4, ::4], "row383": level[..., 383, :], "col383": level[..., 383]}
        for part, mine in parts.items():
            distance = (mine - want[f"out.{key}_u8_{part}"].float()).abs()
            assert distance.max() <= 1
            assert (distance > 0).float().mean() <= 0.002, (key, part)
    fake = [[patch_means(one), -2 * patch_means(one)] for one in got]
    torch.testing.assert_close(preprocess.beside(fake[0]), want["out.deep_fake"], atol=2e-4, rtol=0)
    torch.testing.assert_close(preprocess.quarters_beside(fake[1]), want["out.local_fake"], atol=2e-4, rtol=0)


def test_quarters_are_phases_not_tiles():
    image = torch.zeros(2, 8, 8, 3)
    image[1, 1::2, 0::2] = 1.0  # odd rows, even columns of the second picture
    got = preprocess.views(image, side=4)
    assert got.quarters.shape == (8, 3, 4, 4)
    assert got.quarters.amax((1, 2, 3)).tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


# -- phrases: the tokens of the release's examples are checked in the host tier, where a tokenizer is -----
def test_columns_count_tokens_before_and_within():
    def words(text: str) -> int:  # stands for the BPE: one token a word
        return len(text.split())

    assert substring_ranges("a cat in a category", "cat", words) == [(2, 3), (5, 6)]
    assert substring_columns("red red cat", "red cat", words) == (2, 3)
    assert substring_columns("a Cat", "cat", words) == ()
    assert substring_columns(" ".join(["x"] * 80) + " cat", "cat", words) == ()
    assert substring_columns("a cat", "", words) == ()
    assert substring_columns("aaaa", "aa", len) == (1, 2, 3, 4)  # overlapping


# -- schedule --------------------------------------------------------------------------------------------
STEPS = (4, 8, 10, 12, 15, 20, 25, 28, 30, 35, 40, 50)


def test_betas_and_timesteps():
    want = golden("schedulers")
    torch.testing.assert_close(schedule.alphas_cumprod(), want["alphas_cumprod"], atol=1e-6, rtol=0)
    for steps in STEPS:
        assert schedule.timesteps(steps) == want[f"timesteps.trailing.{steps}"].tolist()


def release_sigmas(steps: int) -> torch.Tensor:
    alphas = golden("schedulers")["alphas_cumprod"].double()
    return schedule.sigmas(((1 - alphas) / alphas).sqrt(), steps)


def test_sigmas_end_with_zero():
    levels = release_sigmas(25)
    assert levels.shape == (26,) and levels[-1] == 0 and (levels[:-1] > levels[1:]).all()


@pytest.mark.parametrize("steps", (8, 25))
def test_solver_equals_the_release(steps):
    """The toy noise model of the golden run; its latents are ours times alpha."""
    want, levels = golden("schedulers"), release_sigmas(steps)
    times = schedule.timesteps(steps)
    x, seen = want[f"run.dpm_s.{steps}.x"], []

    def alpha(sigma):
        return 1 / (1 + float(sigma) ** 2) ** 0.5

    def denoise(k, sigma):
        v = k * alpha(sigma)
        t = times[[float(level) for level in levels].index(float(sigma))]
        eps = torch.tanh(0.8 * v) + 0.2 * torch.sin(torch.tensor(t / 100)) + 0.1 * v.roll(1, -1)
        return k - sigma * eps

    def note(step, k, x0):
        seen.append((k * alpha(levels[step]), x0))

    out = schedule.single_step(denoise, x[0] / alpha(levels[0]), levels, note)
    assert len(seen) == steps
    for step, (v, x0) in enumerate(seen):
        torch.testing.assert_close(v, x[step], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x0, want[f"run.dpm_s.{steps}.x0"][step], atol=1e-4, rtol=1e-4)
    assert torch.equal(out, seen[-1][1])


def test_a_schedule_that_is_cut_returns_its_sample():
    levels = release_sigmas(8)[:3]
    x = torch.ones(1, 1, 2, 2)
    out = schedule.single_step(lambda k, sigma: 0 * k, x, levels)
    torch.testing.assert_close(out, x * levels[2] / levels[0])  # straight towards x0 = 0


def test_sizes_are_width_first_and_agree_on_squares():
    assert schedule.size_rows(1024, 768) == {
        "height": 1024, "width": 768, "crop_h": 0, "crop_w": 0, "target_height": 1024, "target_width": 768}
    square = schedule.size_rows(512, 512)
    assert square["height"] == square["width"] == square["target_height"] == square["target_width"] == 512
