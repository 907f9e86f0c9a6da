"""Masks of any shape, their boxes, and the cut-out of a subject."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.models.common.errors import LikenessError
from likeness.models.common.masks import as_mask, bounding_box, cut_out, in_rows


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


def boxed(height: int, width: int, x0: int, y0: int, x1: int, y1: int, value: float = 1.0) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[y0:y1, x0:x1] = value
    return mask


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 1, 4, 6), (2, 4, 6, 1)])
def test_shapes_that_are_taken(shape):
    mask = random(*shape)
    assert torch.equal(as_mask(mask, 2, 4, 6), mask.reshape(2, 4, 6))
    assert torch.equal(as_mask(mask[0].reshape(4, 6), 1, 4, 6), mask[:1].reshape(1, 4, 6))


def test_one_column_and_one_row_are_told_by_the_picture():
    mask = random(1, 1, 5, 1)
    assert torch.equal(as_mask(mask, 1, 1, 5)[0, 0], mask.flatten())
    assert torch.equal(as_mask(mask, 1, 5, 1)[0, :, 0], mask.flatten())
    assert torch.equal(in_rows(mask), mask[0])  # without a picture it stands as (b, 1, h, w) does


@pytest.mark.parametrize("shape", [(5,), (1, 4, 6, 3), (1, 3, 4, 6), (0, 4, 6), (1, 2, 3, 4, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(LikenessError, match="connect a MASK"):
        as_mask(torch.zeros(shape), 1, 4, 6)


def test_one_mask_serves_all_and_other_counts_are_refused():
    mask = random(1, 4, 6)
    out = as_mask(mask, 3, 4, 6)
    assert out.shape == (3, 4, 6) and torch.equal(out[2], mask[0])
    out[0] = 9  # rows of their own, and the input stays
    assert out[1].max() <= 1 and mask.max() <= 1
    with pytest.raises(LikenessError, match="3 pictures but 2 masks"):
        as_mask(random(2, 4, 6), 3, 4, 6)
    with pytest.raises(LikenessError, match="1 pictures but 2 masks"):
        cut_out(random(1, 4, 6, 3), random(2, 4, 6))


def test_types_range_and_broken_numbers():
    assert as_mask(torch.ones(2, 2, dtype=torch.bool), 1, 2, 2).tolist() == [[[1, 1], [1, 1]]]
    assert as_mask(torch.tensor([[0, 51], [255, 255]], dtype=torch.uint8), 1, 2, 2)[0, 0, 1] == pytest.approx(
        0.2
    )
    assert as_mask(torch.ones(2, 2, dtype=torch.uint8), 1, 2, 2).min() == 1
    odd = torch.tensor([[float("nan"), -3.0], [7.0, 0.5]])
    assert as_mask(odd, 1, 2, 2).tolist() == [[[0, 0], [1, 0.5]]]


def test_another_size_is_resized_by_area():
    mask = torch.zeros(4, 8)
    mask[:2, 1::2] = 1
    assert as_mask(mask, 1, 2, 4).tolist() == [[[0.5] * 4, [0.0] * 4]]  # nearest would give 0 or 1
    assert as_mask(torch.tensor([[0.0, 1.0]]), 1, 1, 4).tolist() == [[[0, 0, 1, 1]]]


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    to_height=st.integers(1, 9),
    to_width=st.integers(1, 9),
    batch=st.integers(1, 3),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bool, torch.uint8)),
)
def test_any_mask_fits_any_picture(height, width, to_height, to_width, batch, dtype):
    mask = (random(1, height, width) > 0.5).to(dtype)
    out = as_mask(mask, batch, to_height, to_width)
    assert out.shape == (batch, to_height, to_width) and out.dtype == torch.float32
    assert 0 <= out.min() and out.max() <= 1
    assert as_mask(torch.ones_like(mask), batch, to_height, to_width).min() == 1


def test_box_is_x_then_y_with_an_open_end():
    assert bounding_box(boxed(6, 9, 2, 1, 7, 4)) == (2, 1, 7, 4)
    assert bounding_box(boxed(6, 9, 8, 5, 9, 6)[None]) == (8, 5, 9, 6)
    assert bounding_box(torch.ones(1, 1)) == (0, 0, 1, 1)
    assert bounding_box(torch.zeros(3, 3)) is None
    assert bounding_box(torch.full((3, 3), 1 / 255)) is None  # the darkest grey of a file


def test_box_of_a_soft_mask_leaves_the_haze_out():
    mask = boxed(8, 8, 2, 2, 5, 6) + 0.03
    assert bounding_box(mask.clamp(0, 1)) == (2, 2, 5, 6)
    assert bounding_box(boxed(8, 8, 2, 2, 5, 6, 0.02)) == (2, 2, 5, 6)  # thin subject, scaled down
    soft = boxed(8, 8, 1, 1, 7, 7, 0.3) + boxed(8, 8, 3, 3, 5, 5, 0.7)
    assert bounding_box(soft) == (1, 1, 7, 7)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_box_holds_the_mask_and_no_more(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    points = data.draw(
        st.lists(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)), min_size=1, max_size=4)
    )
    mask = torch.zeros(height, width)
    for x, y in points:
        mask[y, x] = 1
    xs, ys = zip(*points, strict=True)
    assert bounding_box(mask) == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def test_cut_out_crops_adds_the_margin_and_centres():
    image = random(1, 30, 40, 3) * 0.5
    out = cut_out(image, boxed(30, 40, 10, 5, 30, 15), margin=0.1)
    assert out.found == [True]
    assert out.image.shape == (1, 24, 24, 3) and out.mask.shape == (1, 24, 24)  # 20 + 2 * 0.1 * 20
    assert torch.equal(out.image[0, 7:17, 2:22], image[0, 5:15, 10:30])
    assert torch.equal(out.mask[0, 7:17, 2:22], torch.ones(10, 20)) and out.mask.sum() == 200
    assert (
        (out.image[0, :7] == 1).all() and (out.image[0, 17:] == 1).all() and (out.image[0, :, :2] == 1).all()
    )


def test_cut_out_at_the_border_keeps_the_subject_whole_and_centred():
    image = random(1, 20, 20, 3) * 0.5
    out = cut_out(image, boxed(20, 20, 0, 12, 8, 20), margin=0.25, background="grey")
    assert out.image.shape == (1, 12, 12, 3)
    assert torch.equal(out.image[0, 2:10, 2:10], image[0, 12:20, 0:8])
    assert (out.image[0, 10:] == 0.5).all() and (out.image[0, :, :2] == 0.5).all()


def test_soft_mask_blends_with_the_background():
    image = torch.full((1, 4, 4, 3), 0.2)
    out = cut_out(image, torch.full((4, 4), 0.25), margin=0)
    torch.testing.assert_close(out.image, torch.full((1, 4, 4, 3), 0.2 * 0.25 + 0.75))
    torch.testing.assert_close(out.mask, torch.full((1, 4, 4), 0.25))


def test_size_and_batches_of_other_boxes():
    image = random(2, 16, 16, 3)
    masks = torch.stack([boxed(16, 16, 0, 0, 4, 4), boxed(16, 16, 4, 4, 14, 14)])
    native = cut_out(image, masks, margin=0)
    assert native.image.shape == (2, 10, 10, 3)  # the largest square of the batch
    assert torch.equal(native.image[1], image[1, 4:14, 4:14])
    fixed = cut_out(image, masks, margin=0, size=7)
    assert fixed.image.shape == (2, 7, 7, 3) and fixed.mask.shape == (2, 7, 7)
    torch.testing.assert_close(fixed.image[0], cut_out(image[:1], masks[:1], margin=0, size=7).image[0])
    assert fixed.mask.min() == 1  # each subject fills its own square


def test_empty_masks_are_found_false_and_give_plain_background():
    image = random(2, 6, 8, 3)
    masks = torch.stack([torch.zeros(6, 8), boxed(6, 8, 2, 2, 6, 6)])
    out = cut_out(image, masks, margin=0)
    assert out.found == [False, True] and out.image.shape == (2, 4, 4, 3)
    assert (
        (out.image[0] == 1).all() and out.mask[0].max() == 0 and torch.equal(out.image[1], image[1, 2:6, 2:6])
    )
    nothing = cut_out(image, torch.zeros(64, 64))  # what the host gives for a picture without alpha
    assert nothing.found == [False, False] and nothing.image.shape == (2, 8, 8, 3)


def test_alpha_serves_without_a_mask_and_a_mask_comes_first():
    image = torch.cat([random(1, 8, 8, 3), boxed(8, 8, 1, 2, 5, 6)[None, :, :, None]], dim=-1)
    by_alpha = cut_out(image, margin=0)
    by_mask = cut_out(image[..., :3], boxed(8, 8, 1, 2, 5, 6), margin=0)
    assert torch.equal(by_alpha.image, by_mask.image) and by_alpha.found == [True]
    other = cut_out(image, boxed(8, 8, 4, 4, 8, 8), margin=0)
    assert torch.equal(other.image[0, :2, :1], image[0, 4:6, 4:5, :3])
    assert (other.image[0, 2:] == 1).all()  # transparent there: never the hidden colours
    whole = cut_out(image[..., :3], margin=0)
    assert torch.equal(whole.image, image[..., :3]) and whole.mask.min() == 1


def test_inputs_stay_as_they_are():
    image, mask = random(1, 8, 8, 3), boxed(8, 8, 1, 2, 5, 6)[None]
    copies = image.clone(), mask.clone()
    out = cut_out(image, mask)
    out.image.zero_(), out.mask.zero_()
    whole = cut_out(image)
    whole.image.zero_()
    assert torch.equal(image, copies[0]) and torch.equal(mask, copies[1])


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from((1, 3, 4)),
    batch=st.integers(1, 2),
    mask_height=st.integers(1, 9),
    mask_width=st.integers(1, 9),
    margin=st.floats(0, 0.6),
    size=st.sampled_from((None, 1, 5)),
)
def test_any_picture_with_any_mask(height, width, channels, batch, mask_height, mask_width, margin, size):
    image = random(batch, height, width, channels)
    mask = (random(1, mask_height, mask_width) > 0.3).float()
    out = cut_out(image, mask, margin=margin, size=size)
    side = out.image.shape[1]
    assert out.image.shape == (batch, side, side, 3) and out.mask.shape == (batch, side, side)
    assert size in (None, side) and len(out.found) == batch
    assert 0 <= out.image.min() and out.image.max() <= 1 and 0 <= out.mask.min() and out.mask.max() <= 1
    assert out.found == [bool(mask.any())] * batch
