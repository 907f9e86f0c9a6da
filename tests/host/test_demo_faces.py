"""The miniature's face pack: what its pictures teach, and that its files keep the contracts of the public ones."""
from __future__ import annotations

import pytest
import torch

from .support import comfy, draw  # noqa: F401

# isort: split
from bench import _face_miniature

from likeness.models.demo import face_training, heads
from likeness.models.demo.face_nets import HeadDetector, HeadRecogniser, HeadSwapper
from likeness.models.face.contract import DETECTOR, RECOGNISER, SWAPPER, read_graph
from likeness.models.face.pack import look
from likeness.models.face.swap import Paste
from likeness.models.hosting import demo_faces, face
from likeness.models.hosting.face_batch import Job, analyse, swap


def rendered(n=24, seed=3, training=True):
    generator = torch.Generator().manual_seed(seed)
    identity = heads.draw_faces(n, generator, training)
    return (*heads.render(identity, generator), identity)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The pack with random weights."""
    folder = tmp_path_factory.mktemp("faces")
    torch.manual_seed(0)
    demo_faces.export(folder, HeadDetector(), HeadRecogniser(), HeadSwapper(), "test")
    return folder


def test_the_points_lie_on_the_eyes():
    shown, _, _ = rendered()
    for picture, points in zip(shown.picture, shown.keypoints, strict=True):
        for x, y in points[:2].round().long().tolist():
            eye = picture[:, y - 1:y + 2, x - 1:x + 2]
            assert eye.min() < 0.25 and (eye.amax(0) - eye.amin(0)).max() < 0.5  # black and white, no colour
        assert points[0, 0] < points[1, 0] and points[3, 0] < points[4, 0]


def test_another_face_changes_colours_and_nothing_else():
    shown, draws, identity = rendered()
    other = heads.draw_faces(24, torch.Generator().manual_seed(9), True)
    changed = heads.again(heads.with_face(identity, other), draws)
    assert torch.equal(changed.keypoints, shown.keypoints)
    assert torch.equal(changed.picture[:, :, 0], shown.picture[:, :, 0])  # the sky
    differ = heads.look_of(identity) != heads.look_of(other)
    assert ((changed.picture != shown.picture).any(1).flatten(1).float().mean(1) > 0.01)[differ].all() and differ.sum() > 16
    assert torch.equal(heads.look_of(changed.identity), heads.look_of(other))


def test_no_training_sees_the_faces_of_the_test():
    def looks(training):
        generator = torch.Generator().manual_seed(1)
        return set(heads.look_of(heads.draw_faces(2000, generator, training)).tolist())

    assert not looks(True) & looks(False) and len(looks(False)) >= 10


def test_files_keep_the_contracts(untrained):
    kinds = {item.kind: item.contract for item in look(untrained)}
    assert set(kinds) == {DETECTOR, RECOGNISER, SWAPPER}
    assert [shape for _, shape in kinds[DETECTOR].inputs] == [(1, 3, 0, 0)] and len(kinds[DETECTOR].outputs) == 9
    assert [shape for _, shape in kinds[RECOGNISER].inputs + kinds[RECOGNISER].outputs] == [(1, 3, 112, 112), (1, 512)]
    assert [shape for _, shape in kinds[SWAPPER].inputs] == [(1, 3, 128, 128), (1, 512)]
    assert {contract.space for contract in kinds.values()} == {"miniature"} and "GPL" in kinds[SWAPPER].licence
    assert sum(path.stat().st_size for path in untrained.glob("*.onnx")) <= 1_000_000


def test_both_back_ends_run_them(untrained):
    shown, _, _ = rendered(2)
    image = shown.picture.movedim(1, -1)
    found = []
    with torch.inference_mode():
        for backend in ("torch", "onnxruntime"):
            models = face.load_models(untrained, backend)[0]
            sides = [out.shape for out in models.detector(torch.zeros(1, 3, 64, 96))]
            assert sides == [(96 * 64 // stride ** 2 * 2, side) for side in (1, 4, 10) for stride in (8, 16, 32)]
            swapper = face.load_swapper(untrained / demo_faces.SWAPPER, backend)[0]
            assert swapper.space == models.space == "miniature"
            x = draw(1, 1, 3, 128, 160)
            crop, z = draw(2, 1, 3, 128, 128).sigmoid(), torch.nn.functional.normalize(draw(3, 1, 512))
            found.append([*models.detector(x), *models.recogniser(x[..., :112, :112]), *swapper.network(crop, z)])
            analyse(models, image, (192,))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_levels_learn_their_own_sizes():
    """A head of 48 pixels is the first level's, one of 96 nobody's at this level; what is beside may not fire."""
    points = torch.zeros(1, 1, 5, 2)
    fire, reach, where = face_training._targets(torch.tensor([[[40.0, 40, 88, 88]]]), points + 64, 16)
    assert fire[0, 8, 8] == 1 and fire[0, 0, 0] == 0 and (fire == -1).any()
    assert reach[0, 8, 8].tolist() == [3, 3, 3, 3] and not where[0, 8, 8].any()
    fire, _, _ = face_training._targets(torch.tensor([[[0.0, 0, 120, 120]]]), points, 16)
    assert not fire.any()


def test_windows_move_pictures_and_points_alike():
    """What a view shows at the points of a head is what the picture shows there."""
    scenes = face_training.draw_scenes(32, 5)
    views = face_training._windows(scenes, torch.arange(32), torch.Generator().manual_seed(8))
    side = face_training.WINDOW

    def colours(pictures, points, size):
        grid = (points.flatten(1, 2) + 0.5) / size * 2 - 1
        found = torch.nn.functional.grid_sample(pictures, grid[:, None], mode="bilinear", align_corners=False)
        return found[:, :, 0].movedim(1, 2)

    there, here = colours(scenes.picture.float() / 255, scenes.keypoints, 64), colours(views.picture, views.keypoints, side)
    seen = ((views.keypoints > 2) & (views.keypoints < side - 3)).all(-1).flatten(1)
    enlarged = (views.box[:, 0, 2] - views.box[:, 0, 0] > 1.2 * (scenes.box[:, 0, 2] - scenes.box[:, 0, 0]))[:, None]
    gap = (there - here).abs().amax(-1)[seen & enlarged]
    assert gap.numel() > 30 and gap.max() < 0.12  # twice bilinear is a little softer
    sizes = (views.box[..., 2:] - views.box[..., :2]).amax(-1)
    heads_ = sizes[~sizes.isnan()]
    fit = ((heads_ > face_training.NEAR) & (heads_ < face_training.FAR)).float().mean()
    assert 0.3 < fit < 0.9 and heads_.max() > 2 * face_training.FAR


def test_the_swapper_mixes_the_picture_with_two_paints():
    picture, paints = draw(1, 1, 3, 2, 2).sigmoid(), torch.tensor([[1.0, 0, 0, 0, 0, 1]])
    logits = torch.full((1, 3, 2, 2), -50.0)
    logits[0, 0, 0, 0] = logits[0, 1, 0, 1] = logits[0, 2, 1, 0] = logits[0, 0, 1, 1] = logits[0, 1, 1, 1] = 50.0
    out = HeadSwapper.paint(picture, logits, paints)[0]
    assert torch.equal(out[:, 0, 0], picture[0, :, 0, 0])
    torch.testing.assert_close(out[:, [0, 1], [1, 0]].T, torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    torch.testing.assert_close(out[:, 1, 1], (picture[0, :, 1, 1] + torch.tensor([1.0, 0, 0])) / 2)


def test_the_step_at_an_edge_is_measured_across_it():
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    mask = ((20 - down) / 4).clamp(0, 1)[None]  # the upper part, with a soft lower side
    flat = (across / 32).expand(1, 3, 32, 32)  # changes along the edge only
    hard = torch.where(down < 18, flat + 0.5, flat)
    sloped = hard - down / 16  # and a slope of its own everywhere
    steps = _face_miniature.excess(torch.cat([flat, hard, sloped]), mask.expand(3, -1, -1))
    want = 0.5 * 3 ** 0.5
    torch.testing.assert_close(steps[:2], torch.tensor([0.0, want]), atol=1e-5, rtol=0)
    assert abs(float(steps[2]) - want) < 1e-4, "what is usual beside the edge does not count"


def test_the_recogniser_learns_from_what_it_will_see():
    """Its own alignment at 112 pixels, cut out of the swapper's at 128."""
    shown, _, _ = rendered(4)
    wide, narrow = (demo_faces.crops(shown.picture, shown.keypoints, size) for size in (128, 112))
    torch.testing.assert_close(face_training._to_recognise(wide), narrow, atol=1e-4, rtol=0)


def test_the_recipe_runs_through(tmp_path):
    said = []
    demo_faces.train(tmp_path, "a command", said.append, share=0.002)
    assert len(list(tmp_path.glob("*.onnx"))) == 3 and any("pairs" in line for line in said)


@pytest.fixture(scope="module")
def shipped():
    with torch.inference_mode():
        return face.load_models(demo_faces.FOLDER)[0], face.load_swapper(demo_faces.FOLDER / demo_faces.SWAPPER)[0]


def test_the_shipped_files_are_small_and_say_what_made_them():
    files = sorted(demo_faces.FOLDER.glob("*.onnx"))
    assert len(files) == 3 and sum(path.stat().st_size for path in files) <= 1_000_000
    for path in files:
        (command,) = (entry.value for entry in read_graph(path).metadata_props if entry.key == "likeness.command")
        assert command.startswith("python dev.py train demo faces")


@pytest.mark.parametrize("size", [640, 320, 192])
def test_the_shipped_pack_finds_every_head_and_little_else(shipped, size):
    scenes = face_training.draw_scenes(24, 41)
    with torch.inference_mode():
        found = analyse(shipped[0], scenes.picture.movedim(1, -1).float() / 255, (size,)).frames
    true = [points[~points[:, 0, 0].isnan()] for points in scenes.keypoints]
    right = sum(any((face.keypoints - points).norm(dim=1).mean() < 3 for face in frame)
                for frame, heads_ in zip(found, true, strict=True) for points in heads_)
    count, wanted = sum(map(len, found)), sum(map(len, true))
    assert right >= 0.9 * wanted and count <= 1.3 * wanted, (right, count, wanted)


def test_the_shipped_swapper_brings_the_face(shipped):
    """Faces that no training saw: the swapped head is like the source, as the pack's own recogniser sees it."""
    models, swapper = shipped
    drawn = face_training.draw_swaps(16, torch.Generator().manual_seed(42), training=False)
    with torch.inference_mode():
        image = drawn.head.movedim(1, -1)
        there, given = (analyse(models, pictures.movedim(1, -1), (192,)) for pictures in (drawn.head, drawn.source))
        before, after = [], []
        for number in range(16):
            if not there.frames[number] or not given.frames[number]:
                continue
            source = given._replace(frames=(given.frames[number][:1],), sizes=given.sizes[:1])
            target = there._replace(frames=(there.frames[number][:1],), sizes=there.sizes[:1])
            done = swap(swapper, image[number:number + 1], source, Job(Paste(1, "box")), target=target)
            assert done.found and torch.equal(done.image[done.mask == 0], image[number:number + 1][done.mask == 0])
            pictures = torch.stack([drawn.head[number], done.image[0].movedim(-1, 0), drawn.source[number]])
            points = torch.stack([drawn.points[number], drawn.points[number], drawn.source_points[number]])
            crops = demo_faces.crops(pictures, points, 112) * 2 - 1
            rows = torch.nn.functional.normalize(torch.cat([models.recogniser(crop[None])[0] for crop in crops]), dim=1)
            before.append(float(rows[0] @ rows[2]))
            after.append(float(rows[1] @ rows[2]))
    assert len(after) >= 14 and sum(after) / len(after) > sum(before) / len(before) + 0.25
