"""The face nodes: batches, masks, what is missing, files, and what the artist is told."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import face_pack

from . import face_support as support
from .face_support import TWO, analysed, models, only, picture, swapper
from .support import comfy

# isort: split
from likeness.models.common.errors import LikenessError
from likeness.models.face import drawing
from likeness.models.face.contract import MINIATURE
from likeness.models.face.faces import Faces, area
from likeness.models.face.masks import KINDS
from likeness.models.face.swap import Paste
from likeness.models.hosting import face_batch, face_restore
from likeness.models.hosting.face_batch import Job, analyse, swap


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def folder(nodes, monkeypatch, tmp_path):
    """The host's folders of insightface and output at a private place, filled with packs."""
    import folder_paths

    place = tmp_path / "insightface"
    shutil.copytree(support.root(), place)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(place)], {".onnx"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return place


def values(node, **inputs):
    return node.execute(**inputs).result


def plain(**more):
    return {"boost": 1, "mask_kind": "box", "identity_weight": 1.0, "colour_match": 0.0, "restore_visibility": 1.0,
            "on_missing": "error", "assign": "in turn", "feather": 0.15, "smoothing": 0, "detection_size": "640",
            "threshold": 0.5, **more}


# -- the swap on batches -------------------------------------------------------------------------------
FRAMES = torch.cat([picture(faces=TWO), picture(faces=()), picture(faces=((304, 208, 48),)), picture(faces=TWO)])


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_the_mask_every_bit_stays(kind):
    before = FRAMES.clone()
    source = only(analysed(picture(faces=((104, 104, 24),))))
    job = Job(Paste(2, kind, colour=0.5), sizes=(640,), on_missing="pass through", reach=1)
    done = swap(swapper(), FRAMES, source, job, models())
    assert torch.equal(FRAMES, before) and done.image.shape == FRAMES.shape and done.mask.shape == FRAMES.shape[:3]
    assert torch.equal(done.image[done.mask == 0], before[done.mask == 0])
    assert done.found and "5 faces swapped in 3 of 4 pictures" in done.report
    assert torch.equal(done.image[1], before[1]) and not done.mask[1].any()
    assert all((done.image[i] != before[i]).any() for i in (0, 2, 3))


def test_a_mask_of_nothing_changes_nothing():
    source = only(analysed(picture(faces=TWO)))
    job = Job(Paste(1), sizes=(640,), on_missing="pass through")
    done = swap(swapper(), FRAMES, source, job, models(), mask=torch.zeros(1, 60, 80))
    assert torch.equal(done.image, FRAMES) and not done.mask.any() and not done.found
    assert "no face lies inside of the mask" in done.report
    with pytest.raises(LikenessError, match="Nothing was swapped.*paint the mask over a face"):
        swap(swapper(), FRAMES[:1], source, job._replace(on_missing="error"), models(), mask=torch.zeros(1, 60, 80))
    half = torch.zeros(4, 480, 640)
    half[0, :, :320] = 1
    done = swap(swapper(), FRAMES, source, job, models(), mask=half)
    assert done.mask[0].any() and not done.mask[1:].any() and not done.mask[0, :, 320:].any()
    assert "1 face swapped in 1 of 4 pictures" in done.report
    with pytest.raises(LikenessError, match="4 pictures but 3 masks"):
        swap(swapper(), FRAMES, source, job, models(), mask=torch.ones(3, 480, 640))


def test_a_target_limits_the_swap():
    faces = analysed(FRAMES[:1])
    job = Job(Paste(1, "box"))
    done = swap(swapper(), FRAMES[:1], only(faces), job, target=Faces(((faces.frames[0][1],),), faces.sizes, faces.space))
    whole = swap(swapper(), FRAMES[:1], only(faces), job, target=faces)
    assert 0 < done.mask.sum() < whole.mask.sum() and "1 face swapped" in done.report
    with pytest.raises(LikenessError, match="the very same batch"):
        swap(swapper(), FRAMES, only(faces), job, target=faces)
    with pytest.raises(LikenessError, match="connect face_models"):
        swap(swapper(), FRAMES, only(faces), job)


def test_several_sources_are_dealt_out():
    faces = analysed(FRAMES[:1])
    a, b = faces.frames[0]
    three = Faces(((a, b, a),), faces.sizes, faces.space)
    one_source = swap(swapper(), FRAMES[:1], three, Job(Paste(1, "box")), target=faces)
    first = swap(swapper(), FRAMES[:1], only(faces, 0), Job(Paste(1, "box")), target=faces)
    x, y = 200, 175  # in the second face, which gets source b
    assert not torch.equal(one_source.image[0, y, x], first.image[0, y, x])
    alone = swap(swapper(), FRAMES[:1], only(faces, 0), Job(Paste(1, "box"), assign="one each"), target=faces)
    assert torch.equal(alone.image[0, y, x], FRAMES[0, y, x]) and "1 face swapped" in alone.report


def test_several_sources_stay_with_their_faces_in_a_video():
    """Two people whose order by size turns round from picture to picture; each keeps the source of the first one."""
    video = FRAMES[:1].repeat(3, 1, 1, 1)
    faces = analysed(video)
    large, small = faces.frames[0]
    turned = faces._replace(frames=((large, small), (small, large), (large, small)))
    sources = Faces(((large, small),), faces.sizes[:1], faces.space)
    done = swap(swapper(), video, sources, Job(Paste(1, "box")), target=turned)
    assert torch.equal(done.image[1], done.image[0]) and torch.equal(done.image[2], done.image[0])
    alone = swap(swapper(), video, only(faces), Job(Paste(1, "box"), assign="one each"), target=turned)
    assert all(mask[300, 450] > 0 and not mask[160, 200] for mask in alone.mask)


def test_who_was_missed_for_a_picture_is_not_taken_for_another():
    """One source for the large face; the small one, found again after a picture without faces, stays as it is."""
    frames = [TWO, (), TWO[:1]]
    video = torch.cat([picture(faces=faces) for faces in frames])
    job = Job(Paste(1, "box"), assign="one each", on_missing="pass through")
    done = swap(swapper(), video, only(analysed(FRAMES[:1])), job, models=models())
    assert done.mask[0, 300, 450] > 0 and not done.mask[0, 160, 200]
    assert torch.equal(done.image[2], video[2]) and "1 face swapped" in done.report


def test_identity_weight_leads_from_the_old_face_to_the_new():
    faces = analysed(FRAMES[:1])
    target = Faces(((faces.frames[0][1],),), faces.sizes, faces.space)
    done = {w: swap(swapper(), FRAMES[:1], only(faces), Job(Paste(1, "box"), w), target=target).image for w in (0, 0.5, 1)}
    own = swap(swapper(), FRAMES[:1], only(faces, 1), Job(Paste(1, "box")), target=target).image
    torch.testing.assert_close(done[0], own, atol=1e-4, rtol=0)
    assert not torch.allclose(done[0.5], done[0], atol=1e-3) and not torch.allclose(done[0.5], done[1], atol=1e-3)
    bare = Faces(((faces.frames[0][1]._replace(embedding=None),),), faces.sizes, faces.space)
    with pytest.raises(LikenessError, match="needs recognised target faces"):
        swap(swapper(), FRAMES[:1], only(faces), Job(Paste(1), 0.5), target=bare)


def test_wrong_wiring_is_refused_with_the_pack_that_is_needed():
    other = analysed(picture(faces=TWO), name="antelopev2")
    with pytest.raises(LikenessError, match="needs embeddings of w600k_r50.*those of glintr100.*the pack buffalo_l"):
        swap(swapper(), FRAMES, other, Job(), models())


def test_a_source_without_a_face():
    nobody = analysed(picture(faces=()))
    with pytest.raises(LikenessError, match="source holds no recognised face"):
        swap(swapper(), FRAMES, nobody, Job(), models())
    done = swap(swapper(), FRAMES, nobody, Job(on_missing="pass through"), models())
    assert torch.equal(done.image, FRAMES) and not done.found and not done.mask.any()


@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (1, 1), (1, 640), (640, 1), (33, 47)])
def test_all_orientations_and_single_pixels(shape):
    height, width = shape
    spots = ((width // 2, height // 2, 24),) if min(shape) > 200 else ()
    image = picture(width, height, spots)
    source = only(analysed(picture(faces=TWO)))
    done = swap(swapper(), image, source, Job(Paste(1), sizes=(640,), on_missing="pass through"), models())
    assert done.image.shape == image.shape and done.found == bool(spots)
    assert torch.equal(done.image[done.mask == 0], image[done.mask == 0])


def test_alpha_grey_and_half_precision_pass():
    source = only(analysed(picture(faces=TWO)))
    rgba = torch.cat([FRAMES[:1], torch.linspace(0, 1, 640).expand(1, 480, 640)[..., None]], -1)
    done = swap(swapper(), rgba, source, Job(Paste(1), sizes=(640,)), models())
    rgb = swap(swapper(), FRAMES[:1], source, Job(Paste(1), sizes=(640,)), models())
    assert torch.equal(done.image[..., 3], rgba[..., 3]) and torch.equal(done.image[..., :3], rgb.image)
    grey = swap(swapper(), FRAMES[:1, ..., :1], source, Job(on_missing="pass through"), models())
    assert not grey.found
    target = analysed(FRAMES[:1])
    alpha = torch.cat([FRAMES[:1, ..., :1], rgba[..., 3:]], -1)  # grey with alpha, as some loaders give it
    for picture_, channels in ((FRAMES[:1, ..., :1], 3), (alpha, 4)):
        before = picture_.clone()
        done = swap(swapper(), picture_, source, Job(Paste(1)), target=target)
        assert done.found and done.image.shape[-1] == channels and torch.equal(picture_, before)
        assert torch.equal(done.image[..., 3:], picture_[..., 1:])
        assert torch.equal(done.image[done.mask == 0][:, :3], picture_[..., :1].expand(-1, -1, -1, 3)[done.mask == 0])
    half = swap(swapper(), FRAMES[:1].half(), source, Job(Paste(1), sizes=(640,)), models())
    assert half.image.dtype == torch.float16 and (half.image.float() - rgb.image).abs().max() < 0.01


def test_a_face_cut_by_the_border_is_swapped():
    image = picture(faces=((20, 240, 24), (632, 24, 24)))
    faces = analysed(image)
    done = swap(swapper(), image, only(analysed(picture(faces=TWO))), Job(Paste(1, "insightface")), target=faces)
    assert len(faces.frames[0]) == 2 and done.mask[0, :, 0].any() and done.mask[0, 0].any()


def test_4k_reads_and_writes_the_face_alone():
    image = picture(3840, 2160, ((1900, 1000, 144),))
    faces = analysed(image, sizes=(640,))
    assert len(faces.frames[0]) == 1
    done = swap(swapper(), image, only(faces), Job(Paste(1)), target=faces)
    assert torch.equal(done.image[done.mask == 0], image[done.mask == 0]) and done.found


def test_the_same_picture_is_looked_at_once(monkeypatch):
    count = []
    real = face_batch.detect
    monkeypatch.setattr(face_batch, "detect", lambda *words: count.append(1) or real(*words))
    still = torch.cat([FRAMES[:1]] * 3 + [FRAMES[2:3]])
    faces = analyse(models(), still, (640,))
    assert len(count) == 2 and len(faces.frames) == 4 and faces.frames[0] is faces.frames[2]
    analyse(models(), still, (640,))
    assert len(count) == 4  # nothing outlives a run


def test_cancel_leaves_no_trace(monkeypatch):
    source = only(analysed(picture(faces=TWO)))
    job = Job(Paste(1), sizes=(640,), on_missing="pass through")
    want = swap(swapper(), FRAMES, source, job, models())
    before = FRAMES.clone()
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 6:
            raise comfy.model_management.InterruptProcessingException()

    with monkeypatch.context() as patch:
        patch.setattr(face_batch, "stop_if_asked", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            swap(swapper(), FRAMES, source, job, models())
    assert torch.equal(FRAMES, before)
    again = swap(swapper(), FRAMES, source, job, models())
    assert torch.equal(again.image, want.image) and torch.equal(again.mask, want.mask)


class Upscaler:
    """Stands for core's UPSCALE_MODEL: doubles, or keeps the size and darkens."""

    def __init__(self, scale):
        self.scale, self.model, self.seen = scale, torch.nn.Conv2d(3, 3, 1), []

    def __call__(self, picture):
        self.seen.append(picture.shape)
        if self.scale == 1:
            return picture * 0.5
        return torch.nn.functional.interpolate(picture, scale_factor=self.scale)


@pytest.mark.parametrize(("scale", "side"), [(1, 512), (2, 128), (4, 128)])
def test_the_upscale_model_works_on_the_crop(scale, side):
    faces = analysed(FRAMES[:1])
    model = Upscaler(scale)
    job = Job(Paste(1, "box"))
    done = swap(swapper(), FRAMES[:1], only(faces), job, target=faces, upscale_model=model)
    assert model.seen == [(1, 3, side, side)] * 2
    without = swap(swapper(), FRAMES[:1], only(faces), job, target=faces)
    if scale == 1:
        half = swap(swapper(), FRAMES[:1], only(faces), Job(Paste(1, "box", visibility=0.5)), target=faces, upscale_model=model)
        inside = without.mask[0] == 1
        torch.testing.assert_close(done.image[0][inside], without.image[0][inside] * 0.5, atol=0.03, rtol=0)
        torch.testing.assert_close(half.image[0][inside], without.image[0][inside] * 0.75, atol=0.04, rtol=0)
    off = swap(swapper(), FRAMES[:1], only(faces), Job(Paste(1, "box", visibility=0.0)), target=faces, upscale_model=model)
    assert torch.equal(off.image, without.image)


def test_the_first_face_is_the_largest_to_all_nodes(nodes, monkeypatch):
    """The detector is surer of the small face; what is drawn, chosen and swapped first is the large one."""
    real = face_batch.detect
    monkeypatch.setattr(face_batch, "detect", lambda *words: sorted(real(*words), key=area))
    faces, _, _, _, text = values(nodes["Likeness_AnalyzeFaces"], face_models=models(), image=FRAMES[:1], detection_size="640",
                                  threshold=0.5, on_missing="error")
    small, large = sorted(faces.frames[0], key=area)
    assert faces.frames[0][0] is large and "chosen" not in text and "face 0: " in text
    chosen, _, _, _ = values(nodes["Likeness_SelectFaces"], faces=faces, order="large to small", numbers="0", similarity=0.3,
                             gender="any", min_size=0, on_missing="error")
    assert chosen.frames[0] == (large,)
    job = Job(Paste(1, "box"), assign="one each")
    done = swap(swapper(), FRAMES[:1], faces._replace(frames=((large,),)), job, target=faces)
    assert done.mask[0, 300, 450] > 0 and not done.mask[0, 160, 200]


def test_restorer_and_swapper_are_loaded_together(monkeypatch):
    """One after the other the host may drive out the one that is not asked for, in the middle of a run."""
    from likeness.models.hosting import face as hosting
    model, network, asked = Upscaler(2), swapper("torch").network, []
    real = hosting.ready
    monkeypatch.setattr(hosting, "ready", lambda patchers, memory: asked.append(patchers) or real(patchers, memory))
    faces = analysed(FRAMES[:1])
    swap(swapper("torch"), FRAMES[:1], only(faces), Job(Paste(1, "box")), target=faces, upscale_model=model)
    together = [patchers for patchers in asked if len(patchers) == 2]
    assert len(together) == 2 and all(patchers[1] is network.patcher for patchers in together)
    assert all(patchers == [network.patcher] for patchers in asked if len(patchers) == 1)


def test_a_bare_upscale_model_is_brought_back_to_the_device():
    """Hosts without a patcher of their own: core's node takes the model off the device, and the host still counts it as there."""
    class Moved(torch.nn.Conv2d):
        place = None

        def to(self, device=None, *words, **named):
            self.place = device
            return self

    class Bare(Upscaler):
        def __call__(self, picture):
            assert self.model.place == comfy.model_management.get_torch_device()
            return super().__call__(picture)

    model, faces = Bare(2), analysed(FRAMES[:1])
    model.model = Moved(3, 3, 1)
    for _ in range(2):
        swap(swapper(), FRAMES[:1], only(faces), Job(Paste(1, "box")), target=faces, upscale_model=model)
        assert len(model.seen) % 2 == 0 and model.seen
        model.model.place = "another"


@pytest.fixture
def gfpgan(monkeypatch):
    """spandrel's own object and network, with few channels: what its architecture makes of a file."""
    from spandrel.architectures import GFPGAN as place

    def thin(**words):
        return real(**{**words, "narrow": 0.125, "num_style_feat": 8, "num_mlp": 2})

    real = place.GFPGAN
    monkeypatch.setattr(place, "GFPGAN", thin)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        network = thin(out_size=512, channel_multiplier=2, input_is_latent=True, different_w=True, sft_half=True)
        for name, value in network.named_parameters():
            if name.endswith("style_conv1.weight") or ".style_convs." in name and value.numel() == 1:
                value.data.fill_(0.5)  # how much noise acts; trained files have it
        return place.GFPGANArch().load(network.state_dict()).eval()


@pytest.mark.parametrize("boost", [1, 4])
def test_gfpgan_gets_the_range_and_size_that_it_was_trained_on(gfpgan, boost):
    """-1..1 at 512 pixels, and noise of the file in place of the global generator's."""
    faces, seen = analysed(FRAMES[:1]), []
    gfpgan.model.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    job = Job(Paste(boost, "box"))
    target = faces._replace(frames=(faces.frames[0][:1],))
    before = torch.get_rng_state()
    first, again = (swap(swapper(), FRAMES[:1], only(faces), job, target=target, upscale_model=gfpgan) for _ in range(2))
    assert torch.equal(first.image, again.image) and torch.equal(before, torch.get_rng_state())
    assert len(seen) == 2 and {tuple(given.shape) for given in seen} == {(1, 3, 512, 512)}
    crop = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(5))
    want = ((gfpgan.model(crop[None] * 2 - 1, randomize_noise=False)[0] + 1) / 2).clamp(0, 1)[0]
    restore = face_restore.restorer(gfpgan, swapper().network)
    torch.testing.assert_close(restore(crop), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[-1][0], crop * 2 - 1)
    assert want.std() > 0.01 and restore(crop.repeat(1, 2, 2)).shape == (3, 1024, 1024) and seen[-1].shape[-1] == 512


def test_codeformer_gets_the_same_range():
    """Its architecture comes with a package of its own; what core calls is model(picture)[0] without a change of range."""
    class Codes(Upscaler):
        architecture = type("CodeFormerArch", (), {"id": "CodeFormer"})

        def model(self, picture, weight=0.5, **words):
            self.seen.append(picture)
            return picture * 0.5, None

    class Host:
        load_device = torch.device("cpu")

    codes = Codes(1)
    codes.model, codes.patcher = Codes.model.__get__(codes), Host()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(face_restore, "prepare", lambda *words: None)
        done = face_restore.restorer(codes, swapper().network)(torch.full((3, 128, 128), 0.25))
    assert codes.seen[0].shape[-1] == 512
    torch.testing.assert_close(codes.seen[0], torch.full((1, 3, 512, 512), -0.5))
    torch.testing.assert_close(done, torch.full((3, 512, 512), 0.375))


# -- finding -------------------------------------------------------------------------------------------
def test_boxes_say_where_to_look():
    box = {"x": 352.0, "y": 208.0, "width": 192.0, "height": 192.0}
    empty, beyond = {"x": 0, "y": 300, "width": 60, "height": 60}, {"x": 900, "y": 0, "width": 9, "height": 9}
    # with its margin the box is 290 pixels wide, so the marker of 48 is 96 at a size of 580
    faces = analysed(FRAMES[:1], boxes=[box, empty, beyond], sizes=(576,), threshold=0.3)
    assert len(faces.frames[0]) == 1
    assert (faces.frames[0][0].box.reshape(2, 2).mean(0) - torch.tensor([450.0, 300.0])).abs().max() < 12


def test_landmarks_stand_in_for_the_detector(monkeypatch):
    want = analysed(FRAMES[:1])
    mesh = torch.zeros(478, 2)
    points = want.frames[0][0].keypoints
    for places, point in zip(((33, 133), (362, 263), (1,), (61,), (291,)), points, strict=True):
        mesh[list(places)] = point
    given = {"frames": [[{"bbox_xyxy": tuple(want.frames[0][0].box.tolist()), "landmarks_xy": mesh.numpy(), "score": 1.0}]],
             "image_size": (480, 640)}
    asked = []
    real = face_batch.prepare
    monkeypatch.setattr(face_batch, "prepare", lambda networks, *more: asked.extend(networks) or real(networks, *more))
    got = analysed(FRAMES[:1], landmarks=given)
    assert models().recogniser in asked and models().detector not in asked  # which has nothing to do
    with pytest.raises(LikenessError, match="pictures of 640 x 480, but image has 320 x 240"):
        analysed(FRAMES[:1, ::2, ::2], landmarks=given)
    torch.testing.assert_close(got.frames[0][0].embedding, want.frames[0][0].embedding, atol=1e-4, rtol=1e-5)


def test_boxes_and_landmarks_at_once_are_refused():
    with pytest.raises(LikenessError, match="both connected.*disconnect one"):
        analysed(FRAMES[:1], boxes=[{"x": 0, "y": 0, "width": 9, "height": 9}], landmarks={"frames": [[]], "image_size": (9, 9)})


@pytest.mark.parametrize("name", ["astronaut", "camera", "coffee", "chelsea"])
def test_photographs_pass(name):
    """The synthetic detector sees no magenta in them: nothing is found, nothing changes, nothing falls over."""
    data = pytest.importorskip("skimage.data")
    raw = getattr(data, name)()
    image = torch.from_numpy(np.atleast_3d(raw)[None].copy()).float() / 255
    faces = analysed(image)
    assert faces.frames == ((),)
    done = swap(swapper(), image, only(analysed(picture(faces=TWO))), Job(on_missing="pass through"), models())
    assert torch.equal(done.image, image)


def test_an_aligned_photograph_keeps_its_face():
    """Keypoints of the astronaut as read by eye; a swapper that changes nothing shows what resolution alone costs."""
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()[None].copy()).float() / 255
    points = torch.tensor([[203.0, 110], [245, 108], [226, 132], [206, 151], [243, 150]])
    from likeness.models.face.faces import Face
    face = Face(torch.tensor([180.0, 60, 270, 180]), points, 1.0, torch.ones(512))
    faces = Faces(((face,),), ((512, 512),), "w600k_r50")

    class Same:
        name, backend, batches, device = "same", "test", True, torch.device("cpu")
        contract = swapper().network.contract

        def __call__(self, target, source):
            return [target]

    errors = []
    for boost in (1, 2, 4):
        done = swap(swapper()._replace(network=Same()), image, faces, Job(Paste(boost, "box")), target=faces)
        inside = done.mask[0] == 1
        errors.append(float((done.image - image)[0][inside].abs().mean()))
    assert errors[0] < 0.02 and errors[0] > errors[1] > errors[2]


# -- the nodes -----------------------------------------------------------------------------------------
def test_the_chain_of_nodes(nodes, folder):
    face_models, told = values(nodes["Likeness_LoadFaceModels"], pack="buffalo_l", backend="onnxruntime")
    loaded, also = values(nodes["Likeness_LoadFaceSwapper"], file=face_pack.SWAPPER, backend="onnxruntime")
    assert "w600k_r50" in told and "non-commercial" in also
    faces, marked, count, found, text = values(nodes["Likeness_AnalyzeFaces"], face_models=face_models, image=FRAMES[:1],
                                               detection_size="640", threshold=0.5, on_missing="error")
    assert (count, found) == (2, True) and marked.shape == FRAMES[:1].shape and "picture 1" in text
    chosen, table, number, found = values(nodes["Likeness_SelectFaces"], faces=faces, order="left to right", numbers="0",
                                          similarity=0.3, gender="any", min_size=0, on_missing="error", reference=faces)
    assert number == 1 and "similarity 1.000" in table
    blended, text = values(nodes["Likeness_BlendFaces"], faces=faces, weights="1, 3")
    assert "75 %" in text
    image, mask, text, found = values(nodes["Likeness_SwapFaces"], swapper=loaded, image=FRAMES[:1], source=blended,
                                      target=chosen, **plain())
    assert found and mask.any() and torch.equal(image[mask == 0], FRAMES[:1][mask == 0])
    drawn, = values(nodes["Likeness_FaceKeypoints"], faces=chosen, style="InstantID", width=1280, height=0)
    assert drawn.shape == (1, 960, 1280, 3) and drawn.any()


def test_saving_and_loading_through_the_nodes(nodes, folder):
    faces = analysed(FRAMES[:1])
    path, = values(nodes["Likeness_SaveFaces"], faces=faces, filename_prefix="people/two")
    from likeness.nodes import _paths
    assert list(_paths.saved_files(_paths.FACES)) == ["people/two_00001_.safetensors [output]"]
    back, text = values(nodes["Likeness_LoadFaces"], file="people/two_00001_.safetensors [output]")
    assert "2 faces" in text and torch.equal(back.frames[0][1].embedding, faces.frames[0][1].embedding)
    for name in ("gone [output]", _paths.nothing_saved(_paths.FACES)):  # every folder that is searched
        sentence = nodes["Likeness_LoadFaces"].validate_inputs(file=name)
        assert "Save Faces" in sentence
        assert str(Path("reactor", "faces")) in sentence and str(Path("likeness", "faces")) in sentence
    assert "reactor" not in _paths.missing_saved(_paths.SUBJECTS, "gone")


def test_reactors_folder_is_read(nodes, folder, monkeypatch, tmp_path):
    import folder_paths

    from likeness.models.face.storage import save_faces
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    save_faces(tmp_path / "reactor" / "faces" / "anna.safetensors", only(analysed(FRAMES[:1])))
    _, text = values(nodes["Likeness_LoadFaces"], file="anna.safetensors [reactor]")
    assert "1 face in the space w600k_r50" in text


@pytest.mark.parametrize("on_missing", ["error", "pass through"])
def test_no_face(nodes, on_missing):
    words = {"face_models": models(), "image": FRAMES[1:2], "detection_size": "640", "threshold": 0.5}
    if on_missing == "error":
        with pytest.raises(LikenessError, match="No face was found in picture 1 of 1: lower .*larger one for small"):
            nodes["Likeness_AnalyzeFaces"].execute(**words, on_missing=on_missing)
        with pytest.raises(LikenessError, match="No face to swap was found in picture 2 of 4"):
            swap(swapper(), FRAMES, only(analysed(FRAMES[:1])), Job(sizes=(640,)), models())
        mesh = {"frames": [[]], "image_size": (480, 640)}
        with pytest.raises(LikenessError, match="picture 1 of 1: lower min_confidence .* Detect Face Landmarks") as caught:
            nodes["Likeness_AnalyzeFaces"].execute(**words, on_missing=on_missing, face_landmarks=mesh)
        assert "threshold" not in str(caught.value) and "detection_size" not in str(caught.value)  # which do not act
        nobody = analysed(FRAMES[1:2])
        with pytest.raises(LikenessError, match="choose other faces as target") as caught:  # it does not look for itself
            swap(swapper(), FRAMES[1:2], only(analysed(FRAMES[:1])), Job(), target=nobody)
        assert "threshold" not in str(caught.value)
        with pytest.raises(LikenessError, match="No such face.*choose other numbers") as caught:
            nodes["Likeness_SelectFaces"].execute(faces=nobody, order="large to small", numbers="all", similarity=0.3,
                                                  gender="any", min_size=0, on_missing="error")
        assert "threshold" not in str(caught.value) and "detection" not in str(caught.value)
    else:
        faces, image, count, found, _ = values(nodes["Likeness_AnalyzeFaces"], **words, on_missing=on_missing)
        assert (count, found, faces.frames) == (0, False, ((),)) and torch.equal(image, FRAMES[1:2])


def test_the_miniatures_pack_says_what_it_cannot_find(nodes):
    """On a fresh install it is the only one in the menu, and artists come with portraits."""
    none = Faces(((),), ((64, 64),), MINIATURE)
    with pytest.raises(LikenessError, match="heads of the miniature's creatures; for people put buffalo_l into") as caught:
        face_batch.check_faces(none, "error")
    assert "threshold" not in str(caught.value)
    with pytest.raises(LikenessError, match="choose other numbers"):
        face_batch.check_faces(none, "error", "such face", "choose other numbers")
    with pytest.raises(LikenessError, match="lower the threshold"):
        face_batch.check_faces(none._replace(space="w600k_r50"), "error")


def test_pictures_of_faces_can_be_cancelled_and_show_their_way(nodes, monkeypatch):
    from likeness.models.hosting import face_pictures, memory
    faces, moved = analysed(FRAMES), []
    marked, drawn = face_pictures.marked(FRAMES, faces), face_pictures.keypoints(faces, "plain", 0, 0)
    for row, one, frame, before in zip(marked, drawn, faces.frames, FRAMES, strict=True):
        assert torch.equal(row, drawing.annotate(before, frame))
        assert torch.equal(one, drawing.draw_keypoints(frame, 480, 640, "plain"))
    with pytest.raises(LikenessError, match="several sizes.*give width and height"):
        face_pictures.keypoints(faces._replace(sizes=((480, 640),) * 3 + ((64, 64),)), "plain", 0, 0)

    def stop():
        moved.append(1)
        if len(moved) == 3:
            raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(memory, "stop_if_asked", stop)
    for make in (lambda: face_pictures.marked(FRAMES, faces), lambda: face_pictures.keypoints(faces, "plain", 0, 0)):
        moved.clear()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            make()


def test_menus_and_missing_files(nodes, folder):
    load, swap_node = nodes["Likeness_LoadFaceModels"], nodes["Likeness_LoadFaceSwapper"]
    menu = {item.id: item.options for item in load.define_schema().inputs}["pack"]
    assert menu[:2] == ["buffalo_l", "antelopev2"] and load.validate_inputs(pack="antelopev2") is True
    files = {item.id: item.options for item in swap_node.define_schema().inputs}["file"]
    assert files[:2] == ["inswapper_128.onnx", "inswapper_128_fp16.onnx"]
    assert "Check Files says" in load.validate_inputs(pack="gone") and "press R" in swap_node.validate_inputs(file="gone")
    with pytest.raises(LikenessError, match="is not there; put a folder such as buffalo_l"):
        load.execute(pack="gone", backend="auto")
    with pytest.raises(LikenessError, match="put inswapper_128.onnx into"):
        swap_node.execute(file="gone", backend="auto")


def test_check_files_tells_all(nodes, folder):
    broken = folder / "models" / "buffalo_l" / "det_10g.onnx"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "models" / "antelopev2" / "antelopev2" / "glintr100.onnx").unlink()
    for name in ("2d106det", "1k3d68"):
        (folder / "models" / "buffalo_l" / f"{name}.onnx").unlink()
    text, = values(nodes["Likeness_CheckFiles"], hashes=True)
    for words in ("git-LFS pointer", "missing for InstantID: glintr100.onnx", "identity map buff2fs found", "swapper, ",
                  "in 1x3x128x128, 1x512, out 1x3x128x128", "not the published inswapper_128", "no published sum is known",
                  "cv2 comes from",
                  "onnxruntime comes from", "non-commercial", "operators Add"):
        assert words in text, words
    assert "not in buffalo_l, and wanted for the hull of Face Swap alone: 2d106det.onnx" in text
    assert not any("1k3d68" in line for line in text.splitlines() if not line.startswith("- "))  # no node reads it
    quick, = values(nodes["Likeness_CheckFiles"], hashes=False)
    assert "sha256" not in quick
    swappers = sorted(folder.glob("inswapper*.onnx"))
    swappers[1].unlink()
    (folder / "swap").mkdir()
    swappers[0].rename(folder / "swap" / "mine.onnx")  # whatever its name and folder, it is there
    assert "missing for Face Swap" not in values(nodes["Likeness_CheckFiles"], hashes=False)[0]
    (folder / "inswapper_128.onnx").write_bytes(b"cut off")
    (folder / "swap" / "mine.onnx").rename(folder / "mine.txt")
    assert "missing for Face Swap" not in values(nodes["Likeness_CheckFiles"], hashes=False)[0], "its line tells the fault"
    (folder / "inswapper_128.onnx").unlink()
    assert "missing for Face Swap: inswapper_128.onnx" in values(nodes["Likeness_CheckFiles"], hashes=False)[0]


def test_a_pack_in_two_places_is_one(nodes, folder):
    """As archives and other packs leave it: a part beside the whole, or the parts apart."""
    whole, part = folder / "models" / "buffalo_l", folder / "buffalo_l"
    part.mkdir()
    shutil.copy(whole / "det_10g.onnx", part)
    models, text = values(nodes["Likeness_LoadFaceModels"], pack="buffalo_l", backend="onnxruntime")
    assert models.space == "w600k_r50" and text.count("det_10g.onnx") == 1
    assert text.splitlines()[0].endswith(f"from {whole} and {part}")
    (part / "det_10g.onnx").write_bytes(b"cut off")  # beside the whole one it does no harm
    assert values(nodes["Likeness_LoadFaceModels"], pack="buffalo_l", backend="onnxruntime")[0].space == "w600k_r50"
    shutil.move(whole / "det_10g.onnx", part / "det_10g.onnx")
    assert values(nodes["Likeness_LoadFaceModels"], pack="buffalo_l", backend="onnxruntime")[0].space == "w600k_r50"


def test_check_files_shows_its_way_and_can_be_cancelled(nodes, folder, monkeypatch):
    from likeness.models.hosting import memory
    size = sum(path.stat().st_size for path in folder.rglob("*.onnx"))
    moved = []

    class Bar:
        def __init__(self, total):
            moved.append(-total)

        def update(self, amount):
            moved.append(amount)

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    nodes["Likeness_CheckFiles"].execute(hashes=True)
    assert -moved[0] >= size and sum(moved) == 0 and len(moved) > 10  # the miniature's pack is there too

    def stop():
        raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(memory, "stop_if_asked", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        nodes["Likeness_CheckFiles"].execute(hashes=True)


def test_the_folder_of_insightface_extends_what_is_there(nodes, monkeypatch):
    import folder_paths

    from likeness.nodes import _paths
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", (["/elsewhere"], set()))
    _paths.register()
    folders, endings = folder_paths.folder_names_and_paths["insightface"]
    assert folders[0] == "/elsewhere" and len(folders) == 2 and endings == set()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", (["/elsewhere"], {".pth"}))
    _paths.register()
    assert folder_paths.folder_names_and_paths["insightface"][1] == {".pth", ".onnx"}


def told_by(result, shown):
    """Every text that a node gives: outputs, whatever lies in them, and what it shows."""
    return "\n".join([*map(repr, result), *(item for item in result if isinstance(item, str)), repr(shown), str(shown)])


def test_embeddings_are_never_logged_or_told(nodes, caplog, capfd, tmp_path, monkeypatch):
    """Analysis, choice, blend, swap: no number of an embedding stands in logs, texts or printed records, in any usual format,
    and no run of its bytes in a file that was written."""
    import folder_paths

    for kind in ("temp", "output"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    caplog.set_level(0)
    told = []

    def run(name, **inputs):
        done = nodes[f"Likeness_{name}"].execute(**inputs)
        shown = getattr(done, "ui", None)
        told.append(told_by(done.result, shown.as_dict() if hasattr(shown, "as_dict") else shown))
        return done.result

    faces = run("AnalyzeFaces", face_models=models(), image=FRAMES[:1], detection_size="640", threshold=0.5,
                on_missing="error")[0]
    chosen = run("SelectFaces", faces=faces, order="most similar first", numbers="all", similarity=-1.0, gender="any",
                 min_size=0, on_missing="error", reference=only(faces, 1))[0]
    blended = run("BlendFaces", faces=chosen, weights="1, 3")[0]
    run("SwapFaces", swapper=swapper(), image=FRAMES[:1], source=blended, target=faces, **plain(identity_weight=0.7))
    told += [caplog.text, *capfd.readouterr()]

    secret = [face.embedding for found in (faces, blended) for face in found.each()]
    secret += [row / row.norm() for row in secret]
    text = "\n".join(told)
    numbers = [float(value) for row in secret for value in row[[0, 1, 100, 255, 511]]]
    for number in numbers:
        for form in (repr(number), f"{number:.4f}", f"{number:.6f}", f"{number:.5g}", f"{number:.3e}", str(np.float32(number))):
            assert form not in text, form
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written, "the preview is written"
    for row in secret:
        for block in (row[:4], row[254:258], row[-4:]):
            for kind in (np.float32, np.float16, np.float64):
                assert not any(block.numpy().astype(kind).tobytes() in content for content in written)
    assert "picture 1, face 0" in text and "75 %" in text, "the texts were looked at"


def test_fingerprints_take_every_input(nodes):
    """The host calls them with all inputs; one that it does not know makes the node run anew every time."""
    for name in ("LoadFaceModels", "LoadFaceSwapper", "LoadFaces", "CheckFiles"):
        cls = nodes[f"Likeness_{name}"]
        words = {item.id: None for item in cls.define_schema().inputs}
        assert cls.fingerprint_inputs(**words) == cls.fingerprint_inputs(**words)
