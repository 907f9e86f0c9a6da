"""Pictures reach each encoder at its size, whole, and normalised as its family wants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.models.vision.preprocess import common_size, default_size, preprocess
from likeness.models.vision.vit import VitConfig

DINO = VitConfig("dinov2", "timm", 1024, 24, 16, 4096, patch=14, grid=37)
MAE = VitConfig("mae", "timm", 1024, 24, 16, 4096, patch=16, grid=14)
SIGLIP = VitConfig("siglip", "timm", 1152, 27, 16, 4304, patch=14, grid=27)
CLIP = VitConfig("clip", "timm", 1024, 24, 16, 4096, patch=14, grid=16)
SMALL = VitConfig("dinov2", "transformers", 96, 4, 3, 384, patch=8, grid=8)


def test_sizes_of_the_families():
    assert [
        default_size(c)
        for c in (DINO, MAE, SIGLIP, SIGLIP._replace(grid=16), CLIP, CLIP._replace(grid=24), SMALL)
    ] == [224, 224, 384, 224, 224, 336, 64]
    assert common_size([DINO, MAE]) == (224, 256)
    assert common_size([MAE, DINO]) == (224, 196)
    assert common_size([SIGLIP, DINO]) == (384, 378)
    assert common_size([DINO, MAE], first=518) == (518, 592)
    assert common_size([SMALL, SMALL._replace(family="mae")]) == (64, 64)
    assert common_size([]) == ()


@settings(max_examples=20, deadline=None)
@given(patches=st.lists(st.integers(1, 20), min_size=1, max_size=3), grid=st.integers(1, 40))
def test_common_size_gives_equal_grids(patches, grid):
    configs = [MAE._replace(patch=patch, grid=grid + index) for index, patch in enumerate(patches)]
    assert {size // c.patch for size, c in zip(common_size(configs), configs, strict=True)} == {grid}


@pytest.mark.parametrize(
    "config, mean, std",
    [
        (DINO, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (MAE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (SIGLIP, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (CLIP, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_preprocess_normalises_like_the_family(config, mean, std):
    image = torch.tensor([0.2, 0.5, 0.9]).expand(2, 30, 50, 3)
    out = preprocess(image, config)
    side = default_size(config)
    assert out.shape == (2, 3, side, side) and out.dtype == torch.float32
    for channel, value in enumerate((0.2, 0.5, 0.9)):
        torch.testing.assert_close(
            out[:, channel],
            torch.full((2, side, side), (value - mean[channel]) / std[channel]),
            atol=2e-5,
            rtol=0,
        )


def test_preprocess_does_not_crop_and_stays_in_range():
    image = torch.zeros(1, 40, 100, 3)
    image[:, :, :5], image[:, :, -5:] = 1, 1  # stripes at both ends of a wide picture
    out = preprocess(image, SIGLIP, 32) * 0.5 + 0.5
    assert out[..., 0].min() > 0.9 and out[..., -1].min() > 0.9  # a centre crop would lose them
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6  # bicubic overshoots at the edges of the stripes
    exact = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(preprocess(exact, SIGLIP, 32), (exact.movedim(-1, 1) - 0.5) / 0.5)


def test_preprocess_is_antialiased():
    stripes = (torch.arange(64) % 2).float().view(1, 1, 64, 1).expand(1, 64, 64, 3)
    out = preprocess(stripes, SIGLIP, 16) * 0.5 + 0.5
    assert (out - 0.5).abs()[..., 2:-2].max() < 0.05
