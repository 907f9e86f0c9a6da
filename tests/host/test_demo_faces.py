"""The miniature's face pack: what its pictures teach, and that its files keep the contracts of the public ones."""
from __future__ import annotations

import pytest
import torch

from .support import comfy, draw  # noqa: F401

# isort: split
from likeness.models.demo import face_training, heads
from likeness.models.demo.face_nets import HeadDetector, HeadRecogniser, HeadSwapper
from likeness.models.face.contract import DETECTOR, RECOGNISER, SWAPPER
from likeness.models.face.faces import Faces
from likeness.models.face.pack import look
from likeness.models.face.swap import Paste
from likeness.models.hosting import demo_faces, face
from likeness.models.hosting.face_batch import Job, analyse, swap

SHIPPED = pytest.mark.skipif(not list(demo_faces.FOLDER.glob("*.onnx")), reason="the weights are not made yet")


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
    for a, b in zip(found[0][:-1], found[1][:-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert (found[0][-1] - found[1][-1]).abs().max() <= 2 / 255  # one of them may compute in half precision


def test_levels_learn_their_own_sizes():
    """A head of 48 pixels is the first level's, one of 96 nobody's at this level; what is beside may not fire."""
    points = torch.zeros(1, 1, 5, 2)
    fire, reach, where = face_training._targets(torch.tensor([[[40.0, 40, 88, 88]]]), points + 64, 16)
    assert fire[0, 8, 8] == 1 and fire[0, 0, 0] == 0 and (fire == -1).any()
    assert reach[0, 8, 8].tolist() == [3, 3, 3, 3] and not where[0, 8, 8].any()
    fire, _, _ = face_training._targets(torch.tensor([[[0.0, 0, 120, 120]]]), points, 16)
    assert not fire.any()


def test_the_recipe_runs_through(tmp_path):
    said = []
    numbers = demo_faces.train(tmp_path, "a command", said.append, share=0.002)
    assert set(numbers) == {"swap_retrieval", "before_retrieval", "truth_retrieval", "source_retrieval", "faces", "chance"}
    assert len(list(tmp_path.glob("*.onnx"))) == 3 and any("pairs" in line for line in said)


@SHIPPED
def test_the_shipped_pack_finds_heads_and_swaps_them():
    shown, _, _ = rendered(16, 40, training=False)
    image = torch.nn.functional.interpolate(shown.picture, scale_factor=4, mode="bilinear").movedim(1, -1)
    with torch.inference_mode():
        models, swapper = face.load_models(demo_faces.FOLDER)[0], face.load_swapper(demo_faces.FOLDER / demo_faces.SWAPPER)[0]
        faces = analyse(models, image)
        right = [len(frame) == 1 and float((frame[0].keypoints - points).norm(dim=1).mean()) < 8
                 for frame, points in zip(faces.frames, (shown.keypoints + 0.5) * 4 - 0.5, strict=True)]
        assert sum(right) >= 13
        first = next(face for face in faces.each())
        source = Faces(((first,),), faces.sizes[:1], faces.space)
        done = swap(swapper, image, source, Job(Paste(1), on_missing="pass through"), target=faces)
    assert done.found and torch.equal(done.image[done.mask == 0], image[done.mask == 0])
