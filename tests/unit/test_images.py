"""Pictures of any kind become (b, h, w, 3) in 0..1 and keep what they show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.models.common.errors import LikenessError
from likeness.models.common.images import (
    as_image,
    background_color,
    composite,
    pad_to_square,
    resize,
    split_alpha,
    to_chw,
    to_rgb,
)


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    "shape, becomes",
    [
        ((2, 5, 7, 3), (2, 5, 7, 3)),
        ((5, 7, 3), (1, 5, 7, 3)),
        ((5, 7, 4), (1, 5, 7, 4)),
        ((2, 5, 7), (2, 5, 7, 1)),
        ((5, 7), (1, 5, 7, 1)),
        ((2, 5, 7, 1), (2, 5, 7, 1)),
        ((1, 1, 1, 2), (1, 1, 1, 2)),
    ],
)
def test_shapes_that_are_taken(shape, becomes):
    image = picture(*shape)
    assert torch.equal(as_image(image), image.reshape(becomes))


@pytest.mark.parametrize("shape", [(7,), (1, 2, 3, 4, 5), (2, 5, 7, 5), (2, 3, 64, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(LikenessError, match="came: connect an IMAGE"):
        as_image(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 0, 4, 3), (1, 4, 0, 3)])
def test_pictures_without_pixels_are_refused(shape):
    with pytest.raises(LikenessError, match="no pixels"):
        as_image(torch.zeros(shape))


def test_types_and_range():
    assert torch.equal(
        as_image(torch.tensor([[0, 51, 255]], dtype=torch.uint8))[0, 0, :, 0], torch.tensor([0.0, 0.2, 1.0])
    )
    assert torch.equal(as_image(torch.tensor([[-1.0, 0.5, 2.0]]))[0, 0, :, 0], torch.tensor([0.0, 0.5, 1.0]))
    assert as_image(picture(1, 2, 2, 3).half()).dtype == torch.float32


def test_grey_becomes_three_equal_channels():
    image = picture(2, 4, 5, 1)
    rgb = to_rgb(image)
    assert rgb.shape == (2, 4, 5, 3) and all(torch.equal(rgb[..., c], image[..., 0]) for c in range(3))


def test_alpha_becomes_a_mask_and_colours_stay():
    image = picture(2, 4, 5, 4)
    rgb, mask = split_alpha(image)
    assert torch.equal(rgb, image[..., :3]) and torch.equal(mask, image[..., 3])
    rgb, mask = split_alpha(image[..., 2:])  # grey with alpha
    assert torch.equal(rgb[..., 1], image[..., 2]) and torch.equal(mask, image[..., 3])
    assert split_alpha(image[..., :3])[1] is None and split_alpha(image[..., :1])[1] is None


@pytest.mark.parametrize("background, value", [("white", 1.0), ("grey", 0.5), ("black", 0.0)])
def test_alpha_is_laid_over_the_background(background, value):
    image = torch.tensor([[0.2, 0.4, 0.6, 0.0], [0.2, 0.4, 0.6, 0.25], [0.2, 0.4, 0.6, 1.0]]).view(1, 1, 3, 4)
    rgb = to_rgb(image, background)[0, 0]
    assert rgb[0].tolist() == [value] * 3
    torch.testing.assert_close(rgb[1], torch.tensor([0.2, 0.4, 0.6]) * 0.25 + value * 0.75)
    assert torch.equal(rgb[2], image[0, 0, 2, :3])


def test_background_names():
    assert background_color((0.1, 0.2, 0.3)) == (0.1, 0.2, 0.3)
    with pytest.raises(LikenessError, match="'pink' is not known: choose white, grey, black"):
        background_color("pink")
    red = composite(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1), (1.0, 0.0, 0.0))
    assert red.flatten().tolist() == [1.0, 0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.uint8)),
)
def test_any_picture_becomes_rgb(batch, height, width, channels, dtype):
    image = picture(batch, height, width, channels)
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype)
    before = image.clone()
    rgb = to_rgb(image)
    assert rgb.shape == (batch, height, width, 3) and rgb.dtype == torch.float32
    assert 0 <= rgb.min() and rgb.max() <= 1 and torch.equal(image, before)


def test_layout():
    image = picture(2, 4, 5, 3)
    assert to_chw(image).shape == (2, 3, 4, 5) and to_chw(image).is_contiguous()
    assert to_chw(image)[1, 2, 3, 4] == image[1, 3, 4, 2]


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    to_height=st.integers(1, 12),
    to_width=st.integers(1, 12),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
def test_resize_keeps_range_type_and_plain_colours(height, width, to_height, to_width, dtype):
    out = resize(picture(2, height, width, 3).to(dtype), to_height, to_width)
    assert out.shape == (2, to_height, to_width, 3) and out.dtype == dtype
    assert 0 <= out.min() and out.max() <= 1
    plain = resize(torch.full((1, height, width, 3), 0.3), to_height, to_width)
    torch.testing.assert_close(plain, torch.full_like(plain, 0.3), atol=1e-4, rtol=0)


def test_resize_is_clamped_antialiased_and_exact_at_its_own_size():
    step = torch.zeros(1, 8, 8, 3)
    step[:, :, 4:] = 1
    assert resize(step, 32, 32).aminmax() == (0.0, 1.0)
    dot = torch.zeros(1, 32, 32, 3)
    dot[:, 9, 9] = 1  # between the samples: only an antialiased kernel sees it
    assert resize(dot, 4, 4)[0, 1, 1, 0] > 0.005
    image = picture(1, 6, 7, 3)
    assert resize(image, 6, 7) is image
    ramp = torch.linspace(0, 1, 16).view(1, 1, 16, 1).expand(1, 4, 16, 3)
    wide = resize(ramp, 4, 32)
    assert wide.shape == (1, 4, 32, 3) and (wide.diff(dim=2) >= 0).all()  # width is the width


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 2))
def test_square_holds_the_picture_in_its_middle(height, width, batch):
    image = picture(batch, height, width, 3) * 0.5
    square = pad_to_square(image)
    side = max(height, width)
    assert square.shape == (batch, side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    assert torch.equal(square[:, top : top + height, left : left + width], image)
    assert (square == 1).all(-1).sum() == batch * (side * side - height * width)
    assert pad_to_square(image, "grey").max() <= 0.5
