"""Choosing, blending, steadying, drawing and saving faces; boxes and landmarks of core's detectors."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from harness import face_pack
from likeness.models.common import files
from likeness.models.common.errors import LikenessError
from likeness.models.common.records import Subject
from likeness.models.face import choose, drawing, foreign, report, smooth, storage
from likeness.models.face.contract import MINIATURE
from likeness.models.face.faces import Face, Faces
from likeness.models.face.geometry import pixel_points

SPACE = "w600k_r50"


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def face(x=0.0, y=0.0, side=40.0, seed=1, score=0.9, **more):
    points = torch.tensor([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]) * side + torch.tensor([x, y])
    return Face(torch.tensor([x, y, x + side, y + side]), points, score, draw(seed, 512), **more)


def faces(*frames, space=SPACE, size=(200, 300)):
    return Faces(tuple(tuple(frame) for frame in frames), (size,) * len(frames), space)


A, B, C = face(10, 90, 30, 1, 0.8), face(150, 10, 50, 2, 0.7), face(80, 50, 20, 3, 0.95)


def test_faces_print_no_embedding():
    """As the host does with the inputs of a node that fails, in its messages and its history."""
    found = faces((A, B._replace(embedding=None)), ())
    told = str(found)
    assert "Face(box 10 90 40 120, score 0.80, embedding of 512 numbers" in told and "no embedding" in told
    assert "tensor" not in told and f"{float(A.embedding[0]):.3f}" not in told and told == repr(found)


def test_records_print_shapes_and_no_numbers():
    subject = Subject("custany", (("global", draw(1, 1, 2, 300)),), "all", "sd15", 64, "", "", "", None)
    told = str(subject)
    assert "tokens=(('global', 1 x 2 x 300 numbers))" in told and "method='custany'" in told and "tensor" not in told


# -- choice --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("order", "wanted"), [
    ("large to small", (B, A, C)), ("small to large", (C, A, B)), ("left to right", (A, C, B)), ("right to left", (B, C, A)),
    ("top to bottom", (B, C, A)), ("bottom to top", (A, C, B)), ("best to worst", (C, A, B))])
def test_orders(order, wanted):
    chosen, text = choose.select(faces((A, B, C)), order)
    assert [id(x) for x in chosen.frames[0]] == [id(x) for x in wanted]
    assert text.count("chosen") == 4


def test_the_table_has_the_numbers_of_the_drawing_and_no_choice():
    text = choose.table(faces((B, A), (), (C,))).splitlines()
    assert text[0] == "3 faces in 3 pictures"
    assert [line.split(":")[0] for line in text[1:]] == ["picture 1, face 0", "picture 1, face 1", "picture 3, face 0"]
    assert not any("chosen" in line for line in text)
    _, told = choose.select(faces((B, A)), "left to right", (0,))
    assert "face 1: 30 x 30 at 10, 90, score 0.80, chosen" in told and "face 0: 50 x 50 at 150, 10, score 0.70\n" in told


def test_numbers_count_in_each_picture():
    assert choose.parse_numbers("2,0, 2;0") == (2, 0) and choose.parse_numbers(" All ") is None
    chosen, _ = choose.select(faces((A, B, C), (A,), ()), "large to small", choose.parse_numbers("0, 2, 0"))
    assert [len(frame) for frame in chosen.frames] == [2, 1, 0]
    assert [id(x) for x in chosen.frames[0]] == [id(B), id(C)]


@pytest.mark.parametrize("text", ["zero", "1;x", "-1", ",", "0.5"])
def test_numbers_that_are_none(text):
    with pytest.raises(LikenessError, match="write all, or numbers"):
        choose.parse_numbers(text)


def test_a_reference_keeps_who_looks_like_it():
    same = A._replace(embedding=A.embedding * 3 + 0.1 * draw(9, 512))
    chosen, text = choose.select(faces((B, same, C)), "large to small", None, faces((A,)), 0.35)
    assert [id(x) for x in chosen.frames[0]] == [id(same)]
    rate = float(torch.nn.functional.cosine_similarity(A.embedding, same.embedding, dim=0))
    assert f"similarity {rate:.3f}, chosen" in text
    chosen, _ = choose.select(faces((B, same, C)), "most similar first", (0,), faces((A,)), -1.0)
    assert [id(x) for x in chosen.frames[0]] == [id(same)]


def test_spaces_never_mix():
    other = faces((A,), space="glintr100")
    with pytest.raises(LikenessError, match="the pack antelopev2"):
        choose.select(faces((A,)), "large to small", None, other)
    with pytest.raises(LikenessError, match="the pack buffalo_l"):
        choose.select(other, "large to small", None, faces((A,)))
    with pytest.raises(LikenessError, match="the recogniser own"):
        choose.check_space(SPACE, "own", "It")
    with pytest.raises(LikenessError, match="heads of its own creatures.*buffalo_l.*inswapper_128.onnx"):
        choose.check_space(SPACE, MINIATURE, "The swapper head_swapper.onnx")
    with pytest.raises(LikenessError, match="The blend needs"):
        choose.blend([faces((A,)), other])


def test_a_reference_without_a_face_is_refused():
    with pytest.raises(LikenessError, match="reference holds no face"):
        choose.select(faces((A,)), "large to small", None, faces(()))
    with pytest.raises(LikenessError, match="needs a reference"):
        choose.select(faces((A,)), "most similar first")


def test_gender_and_size():
    she, he = A._replace(gender="female", age=30.0), B._replace(gender="male", age=41.0)
    chosen, text = choose.select(faces((she, he, C)), "large to small", gender="female")
    assert [id(x) for x in chosen.frames[0]] == [id(she)] and "male, about 41" in text
    chosen, _ = choose.select(faces((she, he, C)), "large to small", min_size=31)
    assert [id(x) for x in chosen.frames[0]] == [id(he)]


# -- blend ---------------------------------------------------------------------------------------------
def test_the_blend_is_the_weighted_mean_of_directions():
    long = B._replace(embedding=B.embedding * 10)
    done, text = choose.blend([faces((A,)), faces((long,))], "3, 1")
    a, b = A.embedding.double(), long.embedding.double()
    mean = 0.75 * a / a.norm() + 0.25 * b / b.norm()
    got = done.frames[0][0].embedding.double()
    torch.testing.assert_close(got / got.norm(), mean / mean.norm(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.norm(), 0.75 * a.norm() + 0.25 * b.norm(), rtol=1e-5, atol=0)
    assert torch.equal(done.frames[0][0].box, A.box) and "75 %" in text
    raw, _ = choose.blend([faces((A, long))], "", "raw")
    torch.testing.assert_close(raw.frames[0][0].embedding, (A.embedding + long.embedding) / 2)


def test_one_face_blends_to_itself():
    done, _ = choose.blend([faces((A,))])
    torch.testing.assert_close(done.frames[0][0].embedding, A.embedding)


@pytest.mark.parametrize("weights", ["1", "1, 2, 3", "0, 0", "-1, 2", "a, b", "nan, 1", "1, inf"])
def test_wrong_weights(weights):
    with pytest.raises(LikenessError, match="weights"):
        choose.blend([faces((A, B))], weights)


def test_nothing_to_blend():
    with pytest.raises(LikenessError, match="no recognised face"):
        choose.blend([faces((), ())])


# -- time ----------------------------------------------------------------------------------------------
def moving(count, step=2.0, noise=0.0, seed=5):
    shake = draw(seed, count, 5, 2) * noise
    return [(face(10 + step * i, 20)._replace(keypoints=face(10 + step * i, 20).keypoints + shake[i]),) for i in range(count)]


def test_smoothing_stills_and_does_not_lag():
    plain, shaken = moving(30), moving(30, noise=1.0)
    points = lambda frames: torch.stack([frame[0].keypoints for frame in frames])  # noqa: E731
    torch.testing.assert_close(points(smooth.smooth(plain, 4)), points(plain), atol=1e-3, rtol=0)
    before = (points(shaken) - points(plain)).std()
    after = (points(smooth.smooth(shaken, 4)) - points(plain))[4:-4].std()
    assert after < 0.6 * before
    assert smooth.smooth(shaken, 0) is shaken


def test_the_outline_is_steadied_with_the_points():
    """The hull is made of the landmarks; where one face of the window has none, all keep their own."""
    shake = draw(8, 9, 106, 2)
    shaken = [(frame[0]._replace(landmarks=20 + shake[i]),) for i, frame in enumerate(moving(9, noise=1.0))]
    marks = [frame[0].landmarks for frame in smooth.smooth(shaken, 2)]
    weights = torch.exp(-0.5 * torch.arange(-2.0, 3.0) ** 2)
    want = (torch.stack([shaken[i][0].landmarks for i in range(2, 7)]) * weights[:, None, None]).sum(0) / weights.sum()
    torch.testing.assert_close(marks[4], want)
    shaken[3] = (shaken[3][0]._replace(landmarks=None),)
    marks = [frame[0].landmarks for frame in smooth.smooth(shaken, 2)]
    assert marks[3] is None and torch.equal(marks[4], shaken[4][0].landmarks)
    assert not torch.equal(marks[6], shaken[6][0].landmarks)


def test_faces_keep_their_seats():
    """Two that pass from picture to picture in any order, one of them away for a while, a third who comes later."""
    left, right, third = (tuple(face(x, 20, 40, seed) for _ in range(5)) for x, seed in ((10, 11), (100, 12), (200, 13)))
    video = [(left[0], right[0]), (right[1], left[1]), (right[2],), (right[3], third[3], left[3]), (third[4], right[4])]
    assert smooth.seats(video) == [[0, 1], [1, 0], [1], [1, 2, 0], [2, 1]]
    gone = [(left[0], right[0]), (right[1],), (), (right[2],), (right[3], left[3])]
    assert smooth.seats(gone) == [[0, 1], [1], [], [1], [1, 0]], "who was missed for a picture takes nobody's seat"
    walks_in = [(left[0], right[0]), (right[1], third[1]), (left[2], right[2], third[2])]
    assert smooth.seats(walks_in) == [[0, 1], [1, 2], [0, 1, 2]], "a newcomer takes nobody's seat while the shot goes on"
    strangers = [(A, B), (face(200, 120, 30, 21), face(20, 20, 30, 22)), ()]
    assert smooth.seats(strangers) == [[0, 1], [0, 1], []]


def test_chains_end_at_cuts_and_gaps():
    same = moving(3)
    cut = [(frame[0]._replace(embedding=draw(77, 512)),) for frame in moving(3, seed=6)]
    assert sorted(map(len, smooth.tracks([*same, *cut]))) == [3, 3]
    assert sorted(map(len, smooth.tracks([*same, (), *moving(2)]))) == [2, 3]
    below = torch.tensor([0.0, 100, 0, 100])
    two = [(a[0], b[0]._replace(box=b[0].box + below)) for a, b in zip(moving(4), moving(4), strict=True)]
    mixed = [frame if i % 2 else frame[::-1] for i, frame in enumerate(two)]
    assert sorted(map(len, smooth.tracks(mixed))) == [4, 4]


# -- files ---------------------------------------------------------------------------------------------
def same(a: Face, b: Face):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == pytest.approx(y) if isinstance(x, float) else x == y


@pytest.mark.parametrize("frames", [((A,),), ((A._replace(landmarks=draw(4, 106, 2), gender="male", age=33.0), B), (), (C,))])
def test_saving_and_loading(tmp_path, frames):
    path = tmp_path / "faces.safetensors"
    storage.save_faces(path, faces(*frames))
    back, text = storage.load_faces(path)
    assert back.sizes == ((200, 300),) * len(frames) and back.space == SPACE and "Save Faces" in text
    for a, b in zip(frames, back.frames, strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)


def test_one_face_has_the_names_of_reactor(tmp_path):
    storage.save_faces(tmp_path / "a.safetensors", faces((A._replace(gender="female", age=20.0, landmarks=draw(1, 106, 2)),)))
    assert set(files.load(tmp_path / "a.safetensors")[0]) == {"bbox", "kps", "det_score", "embedding", "gender", "age",
                                                             "landmark_2d_106"}


def test_a_face_model_of_reactor(tmp_path):
    tensors = {"bbox": torch.tensor([5.0, 6, 70, 80]), "kps": A.keypoints, "det_score": torch.tensor(0.8),
               "landmark_3d_68": draw(1, 68, 3), "pose": draw(2, 3), "landmark_2d_106": draw(3, 106, 2),
               "embedding": A.embedding, "gender": torch.tensor(0), "age": torch.tensor(25)}
    files.save(tmp_path / "r.safetensors", tensors)
    back, text = storage.load_faces(tmp_path / "r.safetensors")
    got = back.frames[0][0]
    assert torch.equal(got.embedding, A.embedding) and (got.gender, got.age) == ("female", 25.0)
    assert back.space == SPACE and back.sizes == ((81, 71),) and "ReActor" in text


def test_files_that_hold_no_faces(tmp_path):
    files.save(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(LikenessError, match="holds no faces"):
        storage.load_faces(tmp_path / "x.safetensors")
    files.save(tmp_path / "s.safetensors", {"a": torch.zeros(1)}, {"format": "likeness.subject", "format_version": "1"})
    with pytest.raises(LikenessError, match="Save Faces"):
        storage.load_faces(tmp_path / "s.safetensors")
    said = {"format": "likeness.faces", "format_version": "1", "space": SPACE, "frames": json.dumps([2]), "sizes": "[[1, 1]]"}
    files.save(tmp_path / "d.safetensors", {"0.bbox": torch.zeros(4), "1.bbox": torch.zeros(3)}, said)
    with pytest.raises(LikenessError, match="holds no faces"):
        storage.load_faces(tmp_path / "d.safetensors")
    with pytest.raises(LikenessError, match="no face to save"):
        storage.save_faces(tmp_path / "n.safetensors", faces(()))
    assert not (tmp_path / "n.safetensors").exists()


# -- drawings ------------------------------------------------------------------------------------------
def test_the_keypoint_picture_is_instantids():
    cv2 = pytest.importorskip("cv2")
    points = np.array([[120.7, 100.2], [210.4, 108.9], [160.5, 160.1], [130.3, 210.8], [200.2, 214.6]])
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    want = np.zeros((300, 320, 3))
    for first, last in ((0, 2), (1, 2), (3, 2), (4, 2)):
        (xa, ya), (xb, yb) = points[first], points[last]
        angle = int(np.degrees(np.arctan2(ya - yb, xa - xb)))
        outline = cv2.ellipse2Poly((int((xa + xb) / 2), int((ya + yb) / 2)), (int(np.hypot(xa - xb, ya - yb) / 2), 4), angle, 0,
                                   360, 1)
        cv2.fillConvexPoly(want, outline, colours[first])
    want = (want * 0.6).astype(np.uint8)
    for (x, y), shade in zip(points, colours, strict=True):
        cv2.circle(want, (int(x), int(y)), 10, shade, -1)
    got = drawing.draw_keypoints([face()._replace(keypoints=torch.tensor(points, dtype=torch.float32))], 300, 320)
    other = (got * 255 - torch.from_numpy(want).float()).abs().amax(-1) > 2
    assert other.float().mean() < 0.0015 * (want.any(-1).mean() / 0.02)  # the outlines of polygons alone


def test_points_move_with_the_picture_and_dots_do_not_grow():
    small = drawing.draw_keypoints([face(20, 20, 60)], 100, 100)
    large = drawing.draw_keypoints([face(20, 20, 60)], 400, 400, scale=(4.0, 4.0))
    x, y = (face(20, 20, 60).keypoints[0] * 4).long().tolist()
    assert large[y, x].tolist() == [1, 0, 0] and large[y, x - 14].tolist() == [0, 0, 0] and small.shape == (100, 100, 3)
    assert not drawing.draw_keypoints([], 8, 9).any()
    plain = drawing.draw_keypoints([face(20, 20, 60)], 100, 100, "plain")
    assert set(plain.unique().tolist()) == {0.0, 1.0}


def on_the_whole_canvas(faces, height, width, style):
    """The drawing with every pixel asked for every dot and limb."""
    canvas, grid = torch.zeros(height, width, 3), pixel_points((0, 0, width, height))
    for points in (face.keypoints for face in faces) if style == drawing.STYLES[0] else ():
        for a, b in drawing.LIMBS:
            dx, dy = (points[a] - points[b]).tolist()
            angle = math.radians(int(math.degrees(math.atan2(dy, dx))))
            x, y = (grid - ((points[a] + points[b]) / 2).trunc()).unbind(-1)
            along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
            half = max(int(math.hypot(dx, dy) / 2), 1)
            canvas[(along / (half + 0.5)) ** 2 + (across / (drawing.HALF_WIDTH + 0.5)) ** 2 <= 1] = drawing.COLOURS[a]
    canvas = (canvas * drawing.DIM * 255).floor() / 255
    plain = style != drawing.STYLES[0]
    radius = max(min(height, width) // 200, 2) if plain else drawing.RADIUS
    for points in (face.keypoints for face in faces):
        for point, colour in zip(points, torch.ones(5, 3) if plain else drawing.COLOURS, strict=True):
            canvas[((grid - point.trunc()) ** 2).sum(-1) <= radius ** 2] = colour
    return canvas


@pytest.mark.parametrize("style", drawing.STYLES)
def test_a_drawing_in_small_windows_is_the_same_to_the_bit(style):
    spots = (  # tiny and wide, cut off, beyond
        (20, 20, 60), (-30, 5, 80), (120, 70, 150), (400, 10, 30), (90, 90, 3), (-20, -40, 220))
    for number, spot in enumerate(spots):
        crowd = [face(*spot), face(60 + number, 40, 50)]
        crowd[0] = crowd[0]._replace(keypoints=crowd[0].keypoints + 4 * draw(number, 5, 2))
        got = drawing.draw_keypoints(crowd, 130, 170, style)
        assert torch.equal(got, on_the_whole_canvas(crowd, 130, 170, style)), spot


@pytest.mark.parametrize(("given", "wanted"), [((0, 0), (301, 203)), ((1024, 0), (1024, 688)), ((0, 1024), (1520, 1024)),
                                               ((640, 640), (640, 640)), ((8, 0), (8, 8))])
def test_one_side_keeps_the_shape(given, wanted):
    assert drawing.keypoint_size(*given, 301, 203) == wanted


@pytest.mark.parametrize("style", drawing.STYLES)
def test_a_face_without_points_is_not_drawn(style):
    with pytest.raises(LikenessError, match="no five points.*connect faces of Analyze Faces"):
        drawing.draw_keypoints([face(), face()._replace(keypoints=torch.zeros(5, 2))], 64, 64, style)


def test_marks_are_drawn_on_a_copy():
    picture = torch.zeros(100, 120, 3)
    marked = drawing.annotate(picture, [face(20, 20, 60)])
    assert marked.shape == picture.shape and marked.any() and not picture.any()
    assert drawing.annotate(picture, []) is picture


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_marked_pictures_are_where_and_what_the_others_are(kind):
    """Pictures with and without a face are one batch; the kind stands for the device too, which a CPU has but one of."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    picture = torch.zeros(100, 120, 3, dtype=kind, device=device)
    marked, bare = drawing.annotate(picture, [face(20, 20, 60)]), drawing.annotate(picture, [])
    assert (marked.dtype, marked.device) == (bare.dtype, bare.device) == (kind, picture.device)


# -- core's detectors ----------------------------------------------------------------------------------
BOX = {"x": 1, "y": 2.5, "width": 10, "height": 20, "label": "face", "score": 0.5}


def test_boxes_in_all_their_forms():
    one = (1.0, 2.5, 11.0, 22.5)
    assert foreign.boxes_of(BOX, 2) == [[one], [one]]
    assert foreign.boxes_of([BOX, BOX], 1) == [[one, one]]
    assert foreign.boxes_of([[BOX], []], 2) == [[one], []]
    assert foreign.boxes_of([[BOX]], 3) == [[one]] * 3
    with pytest.raises(LikenessError, match="boxes for 2"):
        foreign.boxes_of([[BOX], []], 3)
    for wrong in (5, "box", [{"x": 1}]):
        with pytest.raises(LikenessError, match="expected"):
            foreign.boxes_of(wrong, 1)


def test_points_of_the_mesh():
    mesh = np.arange(478 * 2, dtype=np.float32).reshape(478, 2)
    value = {"frames": [[{"bbox_xyxy": (1, 2, 30, 40), "landmarks_xy": mesh, "score": 0.7}]], "image_size": (50, 60)}
    got = foreign.faces_of(value, 1, (50, 60))[0][0]
    assert got.keypoints.tolist() == [((mesh[33] + mesh[133]) / 2).tolist(), ((mesh[362] + mesh[263]) / 2).tolist(),
                                      mesh[1].tolist(), mesh[61].tolist(), mesh[291].tolist()]
    assert got.box.tolist() == [1, 2, 30, 40] and got.score == 0.7
    with pytest.raises(LikenessError, match="FACE_LANDMARKS were expected"):
        foreign.faces_of([], 1, (50, 60))
    with pytest.raises(LikenessError, match="landmarks are of pictures of 60 x 50, but image has 50 x 60: connect the very same"):
        foreign.faces_of(value, 1, (60, 50))
    assert foreign.faces_of({"frames": [[{"bbox_xyxy": (1, 2, 30, 40), "landmarks_xy": mesh[:468]}]]}, 1, (50, 60))
    for points, shape in ((mesh[:68], "68 x 2"), (mesh[:100].reshape(-1), "200"), (np.zeros((478, 3)), "478 x 3"),
                          (5.0, "a single number")):
        with pytest.raises(LikenessError, match=f"are {shape}, but the 478 x 2 of the MediaPipe mesh .* connect Detect Face"):
            foreign.faces_of({"frames": [[{"bbox_xyxy": (1, 2, 30, 40), "landmarks_xy": points}]]}, 1, (50, 60))
    for item in ({"landmarks_xy": mesh}, {"bbox_xyxy": (1, 2, 3, 4)}, {"bbox_xyxy": 3, "landmarks_xy": mesh}, "face"):
        with pytest.raises(LikenessError, match="landmarks_xy and bbox_xyxy was expected: connect Detect Face Landmarks"):
            foreign.faces_of({"frames": [[item]]}, 1, (50, 60))


# -- Check Files ---------------------------------------------------------------------------------------
def test_packages_that_overwrite_each_other_are_named(monkeypatch):
    owners = {"cv2": ["opencv-python", "opencv-python-headless", "opencv-python"], "onnxruntime": ["onnxruntime"]}
    monkeypatch.setattr(report.metadata, "packages_distributions", lambda: owners)
    monkeypatch.setattr(report.metadata, "version", lambda name: f"1.{len(name)}")
    told = {line.split(" ")[0]: line for line in report.packages() if " comes from " in line}
    assert told["cv2"] == ("cv2 comes from opencv-python 1.13, opencv-python-headless 1.22. WARNING: they overwrite each other's "
                           "files, keep one")
    assert told["onnxruntime"] == "onnxruntime comes from onnxruntime 1.11"
    owners.clear()
    assert "cv2 comes from no package" in report.packages()


def test_published_files_are_known_by_their_sum(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    path = face_pack.recogniser(tmp_path / "w600k_r50.onnx")
    digest = files.sha256(path)
    assert f"sha256 {digest[:16]}..., not the published w600k_r50: download it again" in report.describe(path, True).line
    monkeypatch.setitem(report.KNOWN, digest, "w600k_r50")
    assert report.describe(path, True).line.endswith(f"sha256 {digest[:16]}..., the published w600k_r50")
    monkeypatch.undo()
    other = path.rename(tmp_path / "mine.onnx")
    assert report.describe(other, True).line.endswith("no published sum is known for this file")
