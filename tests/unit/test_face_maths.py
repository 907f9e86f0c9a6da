"""Alignment, detection, masks and the swap's arithmetic, each against an independent formula."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.models.face import colour, detect, geometry, masks, swap
from likeness.models.face.contract import Contract
from likeness.models.face.faces import Face


def draw(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Net:
    """A network that is a function."""
    name, backend, batches, device = "net", "test", True, torch.device("cpu")

    def __init__(self, function, contract):
        self.function, self.contract, self.shapes = function, contract, []

    def __call__(self, *inputs):
        self.shapes.append(tuple(inputs[0].shape))
        return self.function(*inputs)


# -- alignment -----------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.floats(-math.pi, math.pi), st.floats(0.2, 8), st.integers(0, 10 ** 6))
def test_the_similarity_is_the_least_squares_one(angle, scale, seed):
    """Against the normal equations of the four unknowns, solved in float64."""
    noise = draw(seed, 5, 2).double() * 4
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    source = geometry.TEMPLATE @ turn.T * scale + noise + 100
    rows = np.zeros((10, 4))
    rows[0::2] = [[x, -y, 1, 0] for x, y in source.tolist()]
    rows[1::2] = [[y, x, 0, 1] for x, y in source.tolist()]
    a, b, tx, ty = np.linalg.lstsq(rows, geometry.TEMPLATE.reshape(-1).numpy(), rcond=None)[0]
    found = geometry.similarity(source, geometry.TEMPLATE)
    torch.testing.assert_close(found, torch.tensor([[a, -b, tx], [b, a, ty]]), rtol=1e-7, atol=1e-7)


def test_templates():
    """FaceFusion's arcface_128 points are these: 8 pixels to the right and not lower."""
    torch.testing.assert_close(geometry.template(112), geometry.TEMPLATE)
    shifted = geometry.TEMPLATE + torch.tensor([8.0, 0.0])
    torch.testing.assert_close(geometry.template(128), shifted)
    torch.testing.assert_close(geometry.template(256), 2 * shifted)
    torch.testing.assert_close(geometry.template(224), 2 * geometry.TEMPLATE)


def test_points_in_one_place_give_a_shift():
    matrix = geometry.similarity(torch.full((5, 2), 7.0), geometry.TEMPLATE)
    assert torch.isfinite(matrix).all() and torch.equal(matrix[:, :2], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("angle", [0, 37, 90, 180, -121])
def test_a_crop_is_bilinear_and_black_outside(angle):
    picture, size = draw(angle + 200, 40, 55, 3), 24
    turn = math.radians(angle)
    points = geometry.template(112) / 112 * 20
    points = points @ torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    matrix = geometry.similarity(points + torch.tensor([30.0, 8.0]), geometry.template(112) / 112 * size)
    got = geometry.crop(picture, matrix, size)
    back = geometry.invert(matrix).numpy()
    image, want = picture.double().numpy(), np.zeros((3, size, size))
    for v in range(size):
        for u in range(size):
            x, y = back[:, :2] @ [u, v] + back[:, 2]
            x0, y0 = math.floor(x), math.floor(y)
            for dy in (0, 1):
                for dx in (0, 1):
                    if 0 <= x0 + dx < 55 and 0 <= y0 + dy < 40:
                        share = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
                        want[:, v, u] += share * image[y0 + dy, x0 + dx]
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (300, 2)])
def test_tiny_pictures_can_be_cropped(shape):
    crop = geometry.crop(torch.ones(*shape, 3), geometry.align(geometry.TEMPLATE, 112), 112)
    assert crop.shape == (3, 112, 112) and torch.isfinite(crop).all()


def test_a_face_outside_of_the_picture_is_black():
    matrix = geometry.align(geometry.TEMPLATE + 5000, 112)
    assert not geometry.crop(torch.ones(64, 64, 3), matrix, 112).any()


# -- detection -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (100, 1000), (1000, 100), (1, 1), (2160, 3840)])
def test_the_letterbox_lies_top_left_on_black(shape):
    tensor, scale = detect.letterbox(torch.ones(*shape, 3), 320, 320, 127.5, 128.0)
    height, width = shape
    tall, wide = (320, max(int(320 / (height / width)), 1)) if height > width else (max(int(320 * (height / width)), 1), 320)
    assert tensor.shape == (1, 3, 320, 320) and scale == tall / height
    assert (tensor[:, :, :tall, :wide] - 127.5 / 128).abs().max() < 1e-5
    rest = tensor.clone()
    rest[:, :, :tall, :wide] = -127.5 / 128
    assert torch.all(rest == -127.5 / 128)


def test_decoding_by_hand():
    """One cell at stride 16: row 2, column 3 of a 64 x 96 input, its second anchor."""
    outputs = [torch.zeros((64 // s) * (96 // s) * 2, width) for width in (1, 4, 10) for s in (8, 16, 32)]
    row = (2 * 6 + 3) * 2 + 1
    outputs[1][row], outputs[4][row] = 0.75, torch.tensor([1.0, 0.5, 2.0, 1.5])
    outputs[7][row] = torch.arange(10) / 4
    found = detect.decode(outputs, 64, 96)
    assert found.scores.tolist() == [0.75]
    assert found.boxes.tolist() == [[48 - 16, 32 - 8, 48 + 32, 32 + 24]]
    assert found.keypoints[0].tolist() == [[48 + 16 * i / 2, 32 + 16 * (i / 2 + 0.25)] for i in range(5)]


def test_suppression_counts_both_edge_pixels():
    """Two boxes of 9 x 9 with distances, 10 x 10 with pixels, 4 apart: 60 / 140 with them, 45 / 117 without."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [4.0, 0, 13, 9], [100.0, 0, 109, 9]])
    assert detect.suppress(boxes, torch.tensor([0.6, 0.9, 0.7])) == [1, 2]
    assert detect.suppress(boxes, torch.tensor([0.6, 0.9, 0.7]), overlap=0.45) == [1, 2, 0]


@pytest.mark.parametrize(("wishes", "dealt"), [
    ([[1, 2], [1]], [2, 1]), ([[1, 2], [1, 3]], [1, 3]), ([[1], [1], []], [1, None, None]), ([[1], [1, 2], [2, 3]], [1, 2, 3]),
    ([[1, 2], [2, 3], [1], [2]], [2, 3, 1, None]), ([], [])])
def test_dealing_serves_as_many_as_can_be(wishes, dealt):
    assert detect.deal(wishes) == dealt


def test_overlapping_boxes_take_one_face_each(monkeypatch):
    """Two people side by side, the left one surer; the picture's values say where a crop of it lies."""
    people = [Face(torch.tensor([x, 10.0, x + 20, 30]), torch.full((5, 2), x), score) for x, score in ((10.0, 0.9), (50.0, 0.8))]
    picture = geometry.pixel_points((0, 0, 80, 40))

    def found(network, crop, *_):
        shift = crop[0, 0].repeat(2)
        jitter = 0.0 if crop.shape == picture.shape else 0.5  # another crop gives other numbers
        return [face._replace(box=face.box - shift + jitter) for face in people]

    monkeypatch.setattr(detect, "detect", found)
    whole, left, right, nothing = (0.0, 0.0, 80.0, 40.0), (5.0, 5.0, 35.0, 35.0), (45.0, 5.0, 75.0, 35.0), (36.0, 0.0, 44.0, 40.0)
    for boxes, scores in (([whole, whole], [0.8, 0.9]), ([whole, left], [0.8, 0.9]), ([left, whole], [0.8, 0.9]),
                          ([whole, right], [0.8, 0.9]), ([whole] * 3, [0.8, 0.9]), ([left, left], [0.9]),
                          ([right, nothing, left], [0.8, 0.9]), ([nothing], []), ([], [])):
        got = detect.inside(None, picture, boxes)
        assert sorted(face.score for face in got) == scores, boxes
        for face in got:
            assert (face.box - next(one.box for one in people if one.score == face.score)).abs().max() <= 0.5


def _answers(size_with_face):
    def function(tensor):
        height, width = tensor.shape[2:]
        outputs = [torch.zeros((height // s) * (width // s) * 2, n) for n in (1, 4, 10) for s in (8, 16, 32)]
        if height == size_with_face:
            outputs[2][0] = 0.9
        return outputs
    return function


NINE = tuple((str(i), (0, n)) for n in (1, 4, 10) for i in range(3))


def test_the_ladder_really_changes_the_size():
    net = Net(_answers(192), Contract("detector", (("x", (1, 3, 0, 0)),), NINE, 127.5, 128.0, ()))
    assert len(detect.detect(net, torch.zeros(50, 50, 3))) == 1
    assert [shape[2:] for shape in net.shapes] == [(640, 640), (320, 320), (192, 192)]


def test_a_file_with_one_size_is_asked_once():
    net = Net(_answers(0), Contract("detector", (("x", (1, 3, 320, 640)),), NINE, 127.5, 128.0, ()))
    assert detect.detect(net, torch.zeros(50, 50, 3)) == []
    assert [shape[2:] for shape in net.shapes] == [(320, 640)]


# -- masks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("corner", "scale", "angle"), [((60, 40), 0.7, 0), ((90, 120), 0.9, 33), ((-40, 60), 1.2, 10),
                                                        ((150, -60), 2.1, -70), ((20, 20), 0.12, 5), ((-200, 30), 5.5, -20),
                                                        ((10, -300), 4.4, 3), ((60, 45), 3.2, 0)])
def test_the_paste_mask_is_that_of_insightface(corner, scale, angle):
    """Erosion and blur by OpenCV on the whole picture, mirrored borders included."""
    cv2 = pytest.importorskip("cv2")
    height, width, size, turn = 500, 520, 128, math.radians(angle)
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    matrix = torch.tensor([[cos, -sin, 0], [sin, cos, 0]], dtype=torch.float64)
    matrix[:, 2] = -matrix[:, :2] @ torch.tensor(corner, dtype=torch.float64)
    rect = geometry.paste_rect(matrix, size, height, width)
    x0, y0, x1, y1 = rect
    points = geometry.pixel_points(rect) @ matrix[:, :2].float().T + matrix[:, 2].float()
    got = torch.zeros(height, width)
    got[y0:y1, x0:x1] = masks.insightface_mask(points, size)

    grid = geometry.pixel_points((0, 0, width, height)) @ matrix[:, :2].float().T + matrix[:, 2].float()
    white = torch.minimum(grid + 1, size - grid).clamp(0, 1).prod(-1).numpy() * 255
    white[white > 20] = 255
    white[white <= 20] = 0
    rows, columns = np.where(white == 255)
    side = int(math.sqrt((rows.max() - rows.min()) * (columns.max() - columns.min())))
    k = max(side // 10, 10)
    white = cv2.erode(white, np.ones((k, k), np.uint8), iterations=1)
    k = max(side // 20, 5)
    want = cv2.GaussianBlur(white, (2 * k + 1, 2 * k + 1), 0) / 255
    np.testing.assert_allclose(got.numpy(), want, atol=2e-3)


def test_the_hull_is_convex_and_holds_the_landmarks():
    points = draw(3, 106, 2) * 80 + 20
    grid = geometry.pixel_points((0, 0, 128, 128))
    mask = masks.hull_mask(grid, 128, 0.001, points)
    inside = points.mean(0).round().long()
    assert mask[inside[1], inside[0]] == 1 and mask[0, 0] == 0
    hull = masks.hull_points(points)
    edges = hull.roll(-1, 0) - hull
    turns = edges[:, 0] * edges.roll(-1, 0)[:, 1] - edges[:, 1] * edges.roll(-1, 0)[:, 0]
    assert (turns > 0).all()
    for corner in hull:
        assert any(torch.equal(corner, point) for point in points)
    to = points[None] - hull[:, None]  # every landmark lies on the inner side of every edge
    assert (edges[:, None, 0] * to[..., 1] - edges[:, None, 1] * to[..., 0] >= -1e-4 * edges.norm(dim=1)[:, None]).all()


@pytest.mark.parametrize("marked", [False, True])
def test_the_hull_changes_eyes_and_mouth_whole(marked):
    """With the node's own feather, and brows that lie on the hull's edge when the landmarks are known."""
    points = geometry.template(128)
    brows = points[:2] - torch.tensor([0.0, 14.0])
    jaw = torch.tensor([[20.0, 60.0], [28.0, 95.0], [64.0, 122.0], [100.0, 95.0], [108.0, 60.0]])
    landmarks = torch.cat([points, brows, jaw]) if marked else None
    grid = geometry.pixel_points((0, 0, 128, 128))
    face = Face(torch.zeros(4), geometry.TEMPLATE.float(), 1.0, landmarks=landmarks)
    mask = masks.face_mask("hull", grid, 128, 0.15, face, torch.eye(2, 3).double())
    for x, y in torch.cat([points, brows] if marked else [points]).round().long().tolist():
        assert mask[y, x] > 0.95
    assert mask[0].max() < 0.01 and mask[:, 0].max() < 0.01, "the crop's own edge is soft"
    if marked:
        assert 0 < mask[int(brows[0, 1]) - 8, int(brows[0, 0])] < 1, "the feather lies round it"


def test_the_box_is_soft_at_its_edge_only():
    mask = masks.box_mask(geometry.pixel_points((-4, -4, 132, 132)), 128, 0.1)
    assert mask[:4].max() == 0 and mask[68, 68] == 1 and 0 < mask[68, 6] < 1
    torch.testing.assert_close(mask, mask.flip(0))


# -- swap ----------------------------------------------------------------------------------------------
SWAP = Contract("swapper", (("target", (1, 3, 16, 16)), ("source", (1, 4))), (("out", (1, 3, 16, 16)),), 0.0, 255.0, ())


@pytest.mark.parametrize("boost", [1, 2, 3, 4])
def test_boost_deals_out_whole_faces_and_puts_them_back(boost):
    square = draw(boost, 3, 16 * boost, 16 * boost)
    seen = []

    def function(target, source):
        seen.extend(target)
        return [target]

    out = swap.swap_crop(Net(function, SWAP), square, torch.ones(1, 4), boost)
    assert torch.equal(out, square) and len(seen) == boost * boost
    for number, part in enumerate(seen):
        assert torch.equal(part, square[:, number // boost::boost, number % boost::boost])


def test_the_identity_goes_through_the_map():
    e, t, emap = draw(1, 512) - 0.5, draw(2, 512) - 0.5, draw(3, 512, 512) - 0.5
    z = (e.double() / e.double().norm()) @ emap.double()
    torch.testing.assert_close(swap.identity(e, emap)[0].double(), z / z.norm(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(swap.identity(e * 20, emap), swap.identity(e, emap))
    torch.testing.assert_close(swap.identity(e, emap, t, 0.0), swap.identity(t, emap))
    half = swap.identity(e, emap, t, 0.5)
    mixed = e / e.norm() + t / t.norm()
    torch.testing.assert_close(half, swap.identity(mixed, emap))


def test_a_swap_touches_its_mask_and_nothing_else():
    picture = draw(9, 90, 120, 3)
    before, covered = picture.clone(), torch.zeros(90, 120)
    face = Face(torch.tensor([40.0, 20, 80, 60]), geometry.TEMPLATE.float() / 112 * 40 + torch.tensor([40.0, 20]), 0.9)
    net = Net(lambda target, source: [1 - target], SWAP._replace(inputs=(("target", (1, 3, 128, 128)), ("source", (1, 4)))))
    limit = torch.zeros(90, 120)
    limit[:, :60] = 1
    for kind in masks.KINDS:
        picture, covered = before.clone(), torch.zeros(90, 120)
        swap.swap_face(net, picture, covered, face, torch.ones(1, 4), swap.Paste(1, kind), limit)
        assert torch.equal(picture[covered == 0], before[covered == 0]), kind
        assert covered[:, 60:].max() == 0 and covered[:, :60].max() == 1, kind
        assert (picture != before).any(-1)[covered > 0.5].float().mean() > 0.95, kind


SWAP_128 = SWAP._replace(inputs=(("target", (1, 3, 128, 128)), ("source", (1, 4))))


def test_colours_are_those_of_the_face_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(swap, "match", lambda fake, real, flat, share: seen.append(flat) or fake)
    face = Face(torch.zeros(4), geometry.TEMPLATE.float() + 30, 0.9)
    swap.swap_face(Net(lambda target, source: [target], SWAP_128), torch.zeros(200, 200, 3), torch.zeros(200, 200), face,
                   torch.ones(1, 4), swap.Paste(1, "box", colour=1.0), None)
    oval = masks.hull_mask(geometry.pixel_points((0, 0, 128, 128)), 128, 0.0, None)
    torch.testing.assert_close(seen[0], oval, atol=1e-3, rtol=0)
    assert 0.3 < oval.mean() < 0.45


@pytest.mark.parametrize("larger", [1, 3])
def test_restoring_by_nothing_changes_nothing(larger):
    """An enlarger that is exact bilinear arithmetic keeps the pasted place to the pixel: pixels of the crop as large as those of
    the picture, and larger ones."""
    picture = torch.zeros(400, 400, 3)
    picture[..., 0] = torch.arange(400) / 400
    face = Face(torch.zeros(4), geometry.TEMPLATE.float() * larger + 30, 0.9)
    net = Net(lambda target, source: [target], SWAP_128)

    def twice(square):
        return torch.nn.functional.interpolate(square[None], scale_factor=2, mode="bilinear", align_corners=False)[0]

    done, covered = picture.clone(), torch.zeros(400, 400)
    swap.swap_face(net, done, covered, face, torch.ones(1, 4), swap.Paste(1, "box"), None, twice)
    assert (done - picture)[covered == 1].abs().max() < 1e-3 and (covered == 1).sum() > 5000  # its border repeats a pixel


def small_face(scale, detail, kind="box", boost=1):
    """What is pasted where the mask is 1 at a face of 128 / scale pixels, its corner at pixel (20, 20)."""
    picture, covered = torch.zeros(200, 200, 3), torch.zeros(200, 200)
    # laid so that the crop's own edge is the edge of pixel 20
    face = Face(torch.zeros(4), (geometry.template(128).float() + 0.5) / scale + 19.5, 0.9)
    net = Net(lambda target, source: [torch.full_like(target, 0.5)], SWAP_128)
    swap.swap_face(net, picture, covered, face, torch.ones(1, 4), swap.Paste(boost, kind, 0.1), None, detail)
    return picture, covered == 1


def test_a_small_face_is_the_mean_of_what_each_pixel_covers():
    detail = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(1))
    got, whole = small_face(2.0, lambda square: detail)  # 64 pixels: each covers 8 x 8 of the restored crop
    want = detail.double().reshape(3, 64, 8, 64, 8).mean((2, 4)).movedim(0, -1).float()
    inside = whole[20:84, 20:84]
    assert inside.sum() > 1500
    torch.testing.assert_close(got[20:84, 20:84][inside], want[inside], atol=2e-3, rtol=0)  # corners are known in float32


@pytest.mark.parametrize(("side", "grain"), [(40, 0.03), (100, 0.075), (128 / 0.3, 0.3)])
def test_noise_of_the_crop_fades_with_the_face(side, grain):
    """White noise of 512 pixels, whose mean over the pixels of a small face is the weaker the smaller the face."""
    detail = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(2))
    got, whole = small_face(128 / side, lambda square: detail)
    assert whole.sum() > 300 and grain / 3 < got[whole].std() < grain


def test_the_swappers_own_crop_is_pasted_as_insightface_does():
    """Points of the crop, without a mean; with a boosted or restored crop, which that library does not have, there is one."""
    fine = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(3))
    calls, real = [], geometry.spread_sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "spread_sample", lambda *words: calls.append(words[-1]) or real(*words))
        for kind, detail, boost in (("insightface", None, 1), ("box", None, 1), ("insightface", None, 2),
                                    ("insightface", lambda square: fine, 1)):
            small_face(4.0, detail, kind, boost)
    assert calls == [1, 1, 8, 16]
    points = geometry.pixel_points((0, 0, 9, 9)) + 0.3
    assert torch.equal(geometry.spread_sample(fine.movedim(0, -1), points, torch.eye(2), 1),
                       geometry.sample(fine.movedim(0, -1), points))


# -- colour --------------------------------------------------------------------------------------------
def test_oklab_goes_there_and_back():
    rgb = draw(4, 50, 3)
    torch.testing.assert_close(colour.to_rgb(colour.to_oklab(rgb)), rgb, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(colour.to_oklab(torch.ones(1, 3)), torch.tensor([[1.0, 0, 0]]), atol=1e-3, rtol=0)


def test_matching_brings_mean_and_spread():
    fake, real = draw(5, 3, 32, 32) * 0.3 + 0.5, draw(6, 3, 32, 32) * 0.4 + 0.2
    mask = torch.ones(32, 32)
    done = colour.match(fake, real, mask, 1.0)
    for statistic in (lambda x: x.mean((0, 1)), lambda x: x.std((0, 1))):
        a, b = (statistic(colour.to_oklab(x.movedim(0, -1))) for x in (done, real))
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.1)
    assert torch.equal(colour.match(fake, real, mask, 0.0), fake)
    assert torch.equal(colour.match(fake, real, torch.zeros(32, 32), 1.0), fake)
