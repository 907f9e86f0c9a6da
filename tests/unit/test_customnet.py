"""CustomNet without the host: camera, canvas, object, image tower's pixels and schedule against the authors' numbers."""
from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from likeness.models.common import images
from likeness.models.common.errors import LikenessError
from likeness.models.customnet import config, pixels, placement, reference, schedule, view
from likeness.models.customnet.layers import ObjectToken
from likeness.models.customnet.location import hole, location_canvas, location_canvases
from unit.recipe import byte_stream, golden, manifest, stream

GOLDEN = Path(__file__).parents[1] / "golden" / "customnet"
RECIPE = json.loads((GOLDEN / "recipe.json").read_text(encoding="utf-8"))
CLOSE = {"atol": 1e-5, "rtol": 0}


def checked(array: np.ndarray, name: str) -> Tensor:
    assert hashlib.sha256(array.tobytes()).hexdigest() == RECIPE["inputs"][name]["sha256"]
    return torch.from_numpy(array.copy())


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:height, 0:width]
    return x, y


def picture() -> Tensor:
    """(1, 3, 256, 256) in -1..1: the golden reference."""
    x, y = grid(256, 256)
    inside = (4900 * (x - 128) ** 2 + 8100 * (y - 120) ** 2 < 39690000)[..., None]
    rgb = np.where(inside, np.stack([x, y, 3 * x + 5 * y], -1) % 256, 255).astype("u1")
    return checked(rgb, "location reference_uint8").permute(2, 0, 1)[None].float() / 255 * 2 - 1


def check_parts(got: Tensor, want: dict[str, Tensor], name: str, atol: float = 1e-5) -> None:
    """The stored parts of one golden picture (b, c, h, w): every fourth pixel, whole rows and columns, the mean."""
    found = 0
    for key in (key for key in want if key.startswith(f"{name}_")):
        part = key[len(name) + 1:]
        if part == "s4":
            mine = got[..., ::4, ::4]
        elif part == "mean":
            mine = got.double().mean((-1, -2))
        elif part[:3] in ("row", "col"):
            mine = got[..., int(part[3:]), :] if part[:3] == "row" else got[..., int(part[3:])]
        else:
            continue
        assert mine.shape == want[key].shape and bool(((mine - want[key]).abs() <= atol).all()), key
        found += 1
    assert found >= 4


# -- camera ------------------------------------------------------------------------------------------------
def test_camera_and_object_token():
    want = golden("viewpoint", GOLDEN)
    polar, azimuth = want["polar_azimuth_deg"].T
    camera = view.view_vector(polar, azimuth, 0.0)
    torch.testing.assert_close(camera, want["T"][:, 0], **CLOSE)
    module = ObjectToken(768, 768)
    values = stream(RECIPE["weights"]["viewpoint cc_projection"]["seed"], 768 + 768 * 772)
    weight = np.eye(768, 772) + 0.02 * values[768:].reshape(768, 772)
    module.load_state_dict({"cc_projection.bias": torch.from_numpy((0.02 * values[:768]).astype("f2")).float(),
                            "cc_projection.weight": torch.from_numpy(weight.astype("f2")).float()})
    torch.testing.assert_close(module(want["clip_image_embed"], camera), want["object_token"], **CLOSE)


def test_up_is_up_and_one_number_serves_all_rows():
    rows = view.View((0.0, 90.0), (30.0, -30.0), (0.0, 0.5)).vector()
    assert rows[:, 0].tolist() == pytest.approx([-math.pi / 6, math.pi / 6])
    assert rows[1].tolist() == pytest.approx([math.pi / 6, 1.0, 0.0, 0.5], abs=1e-6)
    assert view.view_vector(0.0, [1.0, 2.0, 3.0], 0.5).shape == (3, 4)


@pytest.mark.parametrize("start, end, count, want", (
    (-60, 60, 5, [-60, -30, 0, 30, 60]), (0, 360, 4, [0, 90, 180, 270]), (20, 60, 1, [20]), (60, -60, 3, [60, 0, -60]),
    (-360, 360, 4, [-360, -180, 0, 180]), (5, 5, 2, [5, 5])))
def test_turntable(start, end, count, want):
    views = view.View(tuple(map(float, want)), (5.0,) * count, (0.1,) * count, True)
    assert view.turntable(start, end, count, 5.0, 0.1, True) == views


def test_camera_of_the_host():
    def camera(x, y, z, target=(1.0, 1.0, 1.0)):
        return {"position": dict(zip("xyz", (x + 1, y + 1, z + 1), strict=True)), "target": dict(zip("xyz", target, strict=True)),
                "zoom": 1, "cameraType": "perspective"}
    assert view.from_camera(camera(0, 0, 4), 0.0) == pytest.approx((0, 0, 0))
    assert view.from_camera(camera(4, 0, 0), 2.0) == pytest.approx((90, 0, 1))
    assert view.from_camera(camera(0, 1, 1), 0.0) == pytest.approx((0, 45, 0))
    near = camera(4, 0, 0) | {"zoom": 2}
    assert view.from_camera(near, 2.0) == pytest.approx((90, 0, 0)) and view.from_camera(near, 0.0) == pytest.approx((90, 0, 0))
    assert view.from_camera(near | {"cameraType": "orthographic"}, 1.0) == pytest.approx((90, 0, 0))
    assert view.from_camera({**camera(4, 0, 0), "zoom": None}, 2.0) == pytest.approx((90, 0, 1))
    with pytest.raises(LikenessError, match="zoom is -1, it must be above 0"):
        view.from_camera(near | {"zoom": -1}, 1.0)
    with pytest.raises(LikenessError, match="its own target"):
        view.from_camera(camera(0, 0, 0), 1.0)
    with pytest.raises(LikenessError, match="no position"):
        view.from_camera({"position": None}, 1.0)


# -- canvas ------------------------------------------------------------------------------------------------
def test_location_canvas():
    want = golden("location", GOLDEN)
    image = picture()
    check_parts(image, want, "image_cond")
    for number, box in enumerate(want["boxes_x0y0x1y1"]):
        name = f"location_{number}" + ("_swapped_corners" if number == 5 else "")
        check_parts(location_canvas(image, box), want, name)
        check_parts(location_canvas(image, box.tolist()), want, name)
    levels = checked(byte_stream(3001, (256, 256, 3)), "location background_uint8")
    background = levels.permute(2, 0, 1)[None].float() / 255 * 2 - 1
    before = background.clone()
    check_parts(hole(background, want["boxes_x0y0x1y1"][3]), want, "background_box3_out")
    assert torch.equal(background, before)


def test_a_reference_of_another_size_is_squashed_as_pillow_does():
    odd = checked(byte_stream(3000, (180, 300, 3)), "location odd_size_uint8").float()[None] / 255
    got = pixels.squashed(odd)
    # its golden numbers allow 2 of 255 levels, since versions of Pillow differ
    check_parts(images.to_chw(got) * 2 - 1, golden("location", GOLDEN), "odd_size_image_cond", 4 / 255)
    assert pixels.squashed(got) is got


def test_what_leaves_the_canvas_is_cropped_as_in_training():
    image = picture()
    got = location_canvas(image, (-128, 0, 128, 256))
    assert torch.equal(got[..., :128], image[..., 128:])
    assert (got[..., 128:] == 1).all()
    wide = location_canvas(image, (0, 0, 512, 384), (384, 512))
    assert wide.shape == (1, 3, 384, 512)
    rows = location_canvases(torch.cat([image, -image]), [(0, 0, 128, 128), (64, 64, 200, 200)])
    assert torch.equal(rows[1:], location_canvas(-image, (64, 64, 200, 200)))


@pytest.mark.parametrize("box, word", (
    ((10, 10, 10, 90), "no area"), ((300, 0, 400, 100), "outside"), ((0, -90, 50, 0), "outside")))
def test_boxes_that_show_nothing(box, word):
    with pytest.raises(LikenessError, match=word):
        location_canvas(picture(), box)


# -- object and image tower --------------------------------------------------------------------------------
def cut_out() -> tuple[Tensor, Tensor]:
    """(330, 420, 3) and mask (330, 420) of the golden object; two strips of it are just below and just above one half."""
    x, y = grid(330, 420)
    rgb = (np.stack([x, y, x + y], -1) % 256).astype("u1")
    alpha = np.where(3600 * (x - 250) ** 2 + 12100 * (y - 140) ** 2 < 43560000, 255, 0)
    alpha[200:203, 200:300], alpha[203:206, 200:300] = 127, 128
    rgba = np.concatenate([rgb, alpha[..., None].astype("u1")], -1)
    checked(rgba, "object_canvas cutout_rgba_uint8")
    return torch.from_numpy(rgb).float() / 255, torch.from_numpy(alpha).float() / 255


def test_object_canvas():
    want = golden("object_canvas", GOLDEN)
    canvas, mask = pixels.object_canvas(*cut_out())
    levels = (canvas * 255).permute(2, 0, 1)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(levels[:, ::4, ::4].permute(1, 2, 0), want["canvas_uint8_s4"].float(), **close)
    torch.testing.assert_close(levels[:, 128].T, want["canvas_uint8_row128"].float(), **close)
    torch.testing.assert_close(levels[:, :, 128].T, want["canvas_uint8_col128"].float(), **close)
    torch.testing.assert_close(levels.double().mean((1, 2)).float(), want["canvas_uint8_mean"], **close)
    assert mask.shape == (256, 256)
    near = torch.nn.functional.max_pool2d(mask[None], 7, 1, 3)[0]  # Lanczos reaches three pixels beyond the outline
    assert (canvas[near == 0] == 1).all() and (canvas[mask == 1] != 1).any()


def test_small_objects_stay_small_and_pictures_come_in_batches():
    image, mask = torch.rand(2, 90, 60, 3), torch.zeros(2, 90, 60)
    mask[0, 10:50, 20:30], mask[1, 40:, :] = 1, 1
    done = reference.prepare(image, mask)
    assert done.image.shape == (2, 256, 256, 3)
    assert done.found == (True, True)
    assert done.mask.sum((1, 2)).tolist() == [400, 3000]
    torch.testing.assert_close(done.image[0, 108:148, 123:133], (image[0, 10:50, 20:30] * 255).round() / 255)
    alpha = reference.prepare(torch.cat([image, mask[..., None]], -1), None)
    assert torch.equal(alpha.image, done.image)


def test_a_picture_without_an_object():
    with pytest.raises(LikenessError, match="neither a mask nor an alpha"):
        reference.prepare(torch.rand(1, 9, 9, 3), None)
    with pytest.raises(LikenessError, match="empty"):
        reference.prepare(torch.rand(1, 9, 9, 3), torch.full((1, 9, 9), 0.4))
    done = reference.prepare(torch.rand(1, 9, 9, 3), torch.zeros(1, 9, 9), "pass through")
    assert done.found == (False,)


def test_pixels_of_the_image_tower():
    want = golden("clip_preprocess", GOLDEN)
    check_parts(pixels.pixel_values(picture()), want, "pixel_values")
    noise = checked(byte_stream(3002, (1, 3, 256, 256)), "clip_preprocess random_image_uint8").float() / 127.5 - 1
    check_parts(pixels.pixel_values(noise), want, "random_pixel_values")


# -- schedule ----------------------------------------------------------------------------------------------
def test_release_schedule():
    steps = schedule.timesteps(50)
    assert (len(steps), steps[0], steps[1], steps[-1]) == (49, 961, 941, 1)
    alphas = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    levels = schedule.sigmas(((1 - alphas) / alphas).sqrt(), 50)
    assert len(levels) == 50
    assert levels[[0, -2, -1]].tolist() == pytest.approx([11.67605, 0.041314, 0.029167], rel=1e-4)
    assert (levels.diff() < 0).all()
    for count in (1, 2, 30, 999, 1000):
        assert max(schedule.timesteps(count)) < 1000


# -- placement ---------------------------------------------------------------------------------------------
SQUARE, STRETCHED = placement.FITS


def test_boxes_of_objects_grow_to_the_reference():
    box = placement.place([(78, 78, 100, 50)], 256, 256, SQUARE, "object")
    assert box.pixels(256, 256) == [(64, 39, 192, 167)]
    assert placement.place([(78, 78, 100, 50)], 256, 256, STRETCHED, "whole reference").pixels(256, 256) == [(78, 78, 178, 128)]
    # square in the new picture's pixels, whatever frame the box was drawn in
    tall = placement.place([(128, 192, 256, 384)], 512, 768, SQUARE, "whole reference")
    assert tall.pixels(512, 768) == [(64, 192, 448, 576)] and tall.pixels(256, 256) == [(64, 64, 192, 192)]
    # square in pixels, not in shares
    assert placement.place([(100, 10, 50, 50)], 512, 128, SQUARE, "whole reference").pixels(512, 128) == [(100, 10, 150, 60)]


DICT = {"x": 10.4, "y": 20.0, "width": 30.0, "height": 40.0}


@pytest.mark.parametrize("value, want", (
    (DICT, [(10.4, 20, 30, 40)]),
    ([DICT], [(10.4, 20, 30, 40)]),
    ([[DICT], [DICT | {"x": 1}]], [(10.4, 20, 30, 40), (1, 20, 30, 40)]),
    ([[DICT | {"score": 0.4, "label": "cat"}, {"x": 0, "y": 0, "width": 9, "height": 9, "score": 0.9}]], [(0, 0, 9, 9)]),
    ([{"x": 0, "y": 0, "width": 9, "height": 9}, DICT], [(10.4, 20, 30, 40)]),
))
def test_boxes_in_every_form(value, want):
    assert placement.detected_boxes(value) == [pytest.approx(box) for box in want]


@pytest.mark.parametrize("value, word", (
    ([], "empty list"), (None, "NoneType"), ([[]], "found nothing in picture 1"), ([[DICT], []], "picture 2"),
    ({"x": 1}, "numbers"),
    ("box", "str"), ([1, 2, 3, 4], "list")))
def test_what_is_no_box(value, word):
    with pytest.raises(LikenessError, match=word):
        placement.detected_boxes(value)


@pytest.mark.parametrize("box", ((0, 0, 0, 10), (50, 50, -20, 10), (0, 0, math.nan, 10), (0, 0, 3, 3), (300, 0, 50, 50)))
def test_boxes_without_area_or_outside(box):
    with pytest.raises(LikenessError, match=r"no area|at least 8|outside"):
        placement.place([box], 256, 256, STRETCHED, "whole reference")


def test_the_object_itself_has_to_be_in_the_picture_not_only_its_white_margin():
    assert placement.place([(-100, 50, 100.6, 100)], 256, 256, placement.FITS[0], "object").pixels(256, 256)[0][2] > 1
    with pytest.raises(LikenessError, match="outside"):
        placement.place([(-110, 50, 100, 100)], 256, 256, placement.FITS[0], "object")


@pytest.mark.parametrize("size, want", [((208, 169), (200, 163)), ((169, 208), (162, 200)), ((330, 898), (73, 200)),
                                        ((150, 90), (150, 90)), ((4, 900), (1, 200))])
def test_the_cut_out_is_as_large_as_pillows_thumbnail(size, want):
    width, height = size
    assert tuple(pixels.shrunk(torch.zeros(height, width, 3)).shape[1::-1]) == want


def test_masks_give_boxes():
    mask = torch.zeros(2, 40, 80)
    mask[0, 10:20, 30:50], mask[1, 0:40, 0:8] = 1, 1
    assert placement.mask_boxes(mask) == ([(30, 10, 20, 10), (0, 0, 8, 40)], 80, 40)
    with pytest.raises(LikenessError, match="Mask 2 of 2"):
        placement.mask_boxes(mask * torch.tensor([1.0, 0.0])[:, None, None])


def test_preview_shows_every_row():
    two = placement.Placement(((0.1, 0.1, 0.5, 0.5), (0.5, 0.5, 0.9, 0.9)))
    picture_ = torch.rand(2, 64, 96, 3)
    got = placement.preview(two, 96, 64, picture_)
    assert got.shape == picture_.shape
    assert not torch.equal(got, picture_)
    assert torch.equal(got[1, :30], picture_[1, :30])


# -- telling a file -----------------------------------------------------------------------------------------
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(entry["shape"]) for key, entry in manifest(f"keys_{name}", GOLDEN).items()}


@pytest.mark.parametrize("name, variant", (("customnet", "normal"), ("customnet_inpaint", "inpaint")))
def test_both_files_are_told_by_their_keys(name, variant):
    found = shapes(name)
    assert config.identify(found, "whatever.bin") == config.Layout(variant, 768, 768)
    used = [key for key in found if config.wanted(key)]
    assert len(used) == 718 + 248 + 296 + 196 + 2  # without schedules, CLIP's text half and position ids
    assert config.identify({key: found[key] for key in used}, "half").variant == variant


def without(found: dict, prefix: str) -> dict:
    return {key: shape for key, shape in found.items() if prefix not in key}


@pytest.mark.parametrize("change, word", (
    (lambda s: without(s, "_text.weight"), "Zero-1-to-3"),
    (lambda s: without(without(s, "cc_projection"), "_text.weight"), "SD1.5"),
    (lambda s: {"conditioner.embedders.1.model.x": (1,)}, "SDXL"),
    (lambda s: {"lora_unet_x.lora_up.weight": (1,)}, "LoRA"),
    (lambda s: {"control_model.x": (1,)}, "ControlNet"),
    (lambda s: {}, "another kind"),
    (lambda s: without(s, "first_stage_model"), "without its VAE"),
    (lambda s: without(s, "text_encoder"), "without its text encoder"),
    (lambda s: s | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "takes 9 channels"),
    (lambda s: s | {"cc_projection.weight": (1024, 772)}, "object tokens"),
))
def test_other_files_are_refused_with_what_they_are(change, word):
    with pytest.raises(LikenessError, match=word):
        config.identify(change(shapes("customnet")), "a file")
