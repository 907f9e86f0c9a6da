"""Face packs, both back ends and insightface itself on the same files."""
from __future__ import annotations

import gc
import shutil
import sys
import weakref

import numpy as np
import onnx
import pytest
import torch

from harness import face_pack

from . import face_support as support
from .face_support import BACKENDS, TWO, analysed, as_bgr, models, nearest, only, picture, swapper

# isort: split
from likeness.models.common.errors import LikenessError
from likeness.models.face import contract, libraries, networks
from likeness.models.face.pack import look
from likeness.models.face.swap import Paste
from likeness.models.hosting import face as hosting
from likeness.models.hosting import face_batch
from likeness.models.hosting.face_batch import Job, swap

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def oracle():
    """insightface's own analysis and swapper, on the same files, at one detection size as face nodes use it."""
    from insightface.app import FaceAnalysis
    from insightface.model_zoo import get_model

    app = FaceAnalysis(name=str(support.root() / "models" / "buffalo_l"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))
    return app, get_model(str(support.root() / face_pack.SWAPPER), providers=["CPUExecutionProvider"])


# -- packs ---------------------------------------------------------------------------------------------
def test_kinds_are_told_from_shapes(tmp_path):
    place = face_pack.pack(tmp_path)
    for number, path in enumerate(sorted(place.iterdir())):
        path.rename(place / f"{9 - number}.onnx")
    face_pack.swapper(place / "0.onnx")
    kinds = sorted(item.kind for item in look(place))
    assert kinds == ["106 landmarks", "3D landmarks", "detector", "gender and age", "recogniser", "swapper"]
    loaded, text = hosting.load_models(place, "onnxruntime")
    assert loaded.space == next(item.path.stem for item in look(place) if item.kind == "recogniser") and "named after" in text


def test_nested_packs_are_found():
    loaded, text = hosting.load_models(support.root() / "models" / "antelopev2", "onnxruntime")
    assert loaded.space == "glintr100" and "non-commercial" in text


@pytest.mark.parametrize("lost", [0, 1])
def test_a_pack_without_a_part_is_refused(tmp_path, lost):
    place = face_pack.pack(tmp_path)
    (place / face_pack.NAMES["buffalo_l"][lost]).unlink()
    with pytest.raises(LikenessError, match=("no detector", "no recogniser")[lost] + r".*genderage.onnx \(gender and age\)"):
        hosting.load_models(place)


def test_a_detector_without_points_is_refused(tmp_path):
    place = face_pack.pack(tmp_path)
    face_pack.detector(place / "det_10g.onnx", keypoints=False)
    with pytest.raises(LikenessError, match="no eyes, nose and mouth"):
        hosting.load_models(place)


BAD = {"empty": (b"", "is empty"), "page": (b"<!DOCTYPE html><html>", "web page"),
       "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS pointer"),
       "text": (b"not a network at all", "damaged, cut off or no ONNX file|holds no network"),
       "cut": (None, "damaged, cut off")}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_say_one_sentence(tmp_path, name):
    content, words = BAD[name]
    path = face_pack.swapper(tmp_path / "s.onnx")
    path.write_bytes(path.read_bytes()[:20000] if content is None else content)
    with pytest.raises(LikenessError, match=words) as caught:
        hosting.load_swapper(path)
    assert "\n" not in str(caught.value)
    place = face_pack.pack(tmp_path)
    shutil.copy(path, place / "det_10g.onnx")
    with pytest.raises(LikenessError, match="no detector"):
        hosting.load_models(place)


@pytest.mark.parametrize(("file", "kind"), [("w600k_r50", "recogniser"), ("2d106det", "106 landmarks"),
                                            ("genderage", "gender and age")])
def test_the_wrong_kind_of_file(file, kind):
    with pytest.raises(LikenessError, match=f"{file}.onnx is no face swapper, it holds the network: {kind}; choose inswapper"):
        hosting.load_swapper(support.root() / "models" / "buffalo_l" / f"{file}.onnx")


def test_the_identity_map_is_found_by_name(tmp_path):
    first = hosting.load_swapper(face_pack.swapper(tmp_path / "a.onnx", name_first=True))[0]
    assert torch.equal(first.emap, swapper().emap)
    other = hosting.load_swapper(face_pack.swapper(tmp_path / "b.onnx", emap="unnamed"))[0]
    assert torch.equal(other.emap, swapper().emap)
    with pytest.raises(LikenessError, match="no identity map"):
        hosting.load_swapper(face_pack.swapper(tmp_path / "c.onnx", emap=""))


# -- the two back ends ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["detector", "recogniser", "landmarks", "attributes"])
def test_back_ends_agree_on_the_networks(kind):
    nets = [getattr(models(backend), kind) for backend in BACKENDS]
    size = nets[0].contract.size or 320
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for a, b in zip(nets[0](x), nets[1](x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", [face_pack.SWAPPER, "inswapper_128_fp16.onnx"])
@pytest.mark.parametrize("boost", [1, 2])
def test_back_ends_agree_on_the_picture(file, boost):
    image = picture(faces=TWO)
    results = []
    for backend in BACKENDS:
        faces = analysed(image, backend)
        job = Job(Paste(boost, "insightface"))
        results.append(swap(swapper(backend, file), image, only(faces, 1), job, target=faces).image)
    assert (results[0] - results[1]).abs().max() <= 2 / 255
    assert (results[0] - image).abs().max() > 0.2


def test_half_files_keep_half_weights_and_compute_in_full(tmp_path):
    """A convolution stored as float16: its tensor stays so, what it gives is that of float32 arithmetic, in both back ends."""
    graph = face_pack.Graph()
    weight = np.random.default_rng(3).standard_normal((3, 3, 3, 3))
    graph.tensor("w", weight, np.float16)
    graph.tensor("m", np.zeros((3, 512)), np.float16)
    graph.node("Cast", ["target"], "t", to=10)
    graph.node("Cast", ["source"], "s", to=10)
    graph.node("Conv", ["t", "w"], "c", pads=[1] * 4)
    graph.node("Gemm", ["s", "m"], "g", transB=1)
    graph.node("Unsqueeze", ["g"], "g4", axes=[2, 3])
    graph.node("Add", ["c", "g4"], "sum")
    graph.node("Cast", ["sum"], "output", to=1)
    graph.tensor("buff2fs", np.eye(512))
    path = graph.save(tmp_path / "h.onnx", {"target": [1, 3, 128, 128], "source": [1, 512]}, {"output": [1, 3, 128, 128]})
    net = hosting.load_swapper(path, "torch")[0].network
    kinds = {p.dtype for layer in net.patcher.model.modules() if isinstance(layer, torch.nn.Conv2d) for p in layer.parameters()}
    assert kinds == {torch.float16}
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    want = torch.nn.functional.conv2d(x, torch.from_numpy(weight.astype(np.float16)).float(), padding=1)
    # on a CPU onnxruntime takes such casts out by itself, so look at what it is given
    given = onnx.load_from_string(networks._source(path, net.contract))
    assert net.contract.half and not contract.contract_of(given).half
    for same in (net, hosting.load_swapper(path, "onnxruntime")[0].network):
        torch.testing.assert_close(same(x, torch.zeros(1, 512))[0], want, atol=1e-5, rtol=1e-5)


def test_torch_swaps_in_batches_and_onnxruntime_one_by_one():
    squares = torch.rand(5, 3, 128, 128, generator=torch.Generator().manual_seed(4))
    source = torch.ones(1, 512)
    a, b = swapper("torch").network, swapper("onnxruntime").network
    assert a.batches and not b.batches
    torch.testing.assert_close(networks.run_all(a, squares, source), networks.run_all(b, squares, source), atol=1e-5, rtol=0)


def test_torch_networks_sit_under_the_hosts_patcher():
    import comfy.model_management as management

    faces = analysed(picture(faces=TWO), "torch")
    assert len(faces.frames[0]) == 2
    loaded = [item.model for item in management.current_loaded_models]
    assert any(models("torch").detector.patcher is patcher for patcher in loaded)


def test_what_the_host_cannot_cast_goes_to_the_device(tmp_path, monkeypatch):
    """Where not all of a network fits, the host moves layers that it cannot cast not at all: slopes of PReLU, constants of the
    file. Pretended devices: meta stands for the card."""
    graph = face_pack.Graph()
    rng = np.random.default_rng(3)
    graph.tensor("w", rng.standard_normal((8, 3, 3, 3)))
    graph.tensor("slope", np.full((8, 1, 1), 0.25))
    graph.tensor("shift", rng.standard_normal((1, 8, 1, 1)))
    graph.tensor("mix", rng.standard_normal((512, 8)))
    graph.node("Conv", ["input.1", "w"], "c", pads=[1] * 4)
    graph.node("PRelu", ["c", "slope"], "p")
    graph.node("Add", ["p", "shift"], "s")
    graph.node("GlobalAveragePool", ["s"], "mean")
    graph.node("Flatten", ["mean"], "row", axis=1)
    graph.node("Gemm", ["row", "mix"], "embedding", transB=1)
    path = graph.save(tmp_path / "r.onnx", {"input.1": ["n", 3, 112, 112]}, {"embedding": [1, 512]})
    net = hosting.TorchNetwork(path, contract.contract_of(contract.read_graph(path)), contract.read_graph(path))
    tensors = dict([*net.patcher.model.named_parameters(), *net.patcher.model.named_buffers()])
    net.patcher.load_device = torch.device("meta")
    monkeypatch.setattr(hosting, "ready", lambda *words: None)  # loads nothing, as where nothing fits
    hosting.prepare([net])
    moved = dict([*net.patcher.model.named_parameters(), *net.patcher.model.named_buffers()])
    away = {name for name, tensor in moved.items() if not tensor.is_meta}
    large = {name for name, layer in net.patcher.model.named_modules() if hasattr(layer, "comfy_cast_weights")}
    assert len(large) == 2 and away == {name for name in tensors if name.rpartition(".")[0] in large}
    assert len(moved) - len(away) >= 2, "neither slope nor constant"


def test_networks_that_take_no_part_are_not_loaded(monkeypatch):
    seen = []
    monkeypatch.setattr(face_batch, "prepare", seen.append)
    pack = models("torch")
    face_batch.Look(pack, parts=face_batch.Parts(False, True, False))
    assert seen == [[pack.detector, pack.landmarks]]


def test_a_loaded_swapper_is_not_parsed_again(tmp_path, monkeypatch):
    path = face_pack.swapper(tmp_path / "s.onnx")
    first, told = hosting.load_swapper(path, "torch")
    with monkeypatch.context() as patch:
        patch.setattr(hosting, "read_graph", lambda path: pytest.fail("it was parsed again"))
        again, also = hosting.load_swapper(path, "torch")
    assert again.network is first.network and again.emap is first.emap and told == also
    face_pack.swapper(path, seed=9)
    changed, _ = hosting.load_swapper(path, "torch")
    assert changed.network is not first.network


def test_a_file_is_converted_once_and_let_go(tmp_path, monkeypatch):
    place = face_pack.pack(tmp_path)
    count = []
    real = hosting.convert
    monkeypatch.setattr(hosting, "convert", lambda *words: count.append(words[0]) or real(*words))
    first = hosting.load_models(place, "torch")[0]
    again = hosting.load_models(place, "torch")[0]
    assert len(count) == 4 and again.detector is first.detector
    face_pack.recogniser(place / "w600k_r50.onnx", seed=5)
    changed = hosting.load_models(place, "torch")[0]
    assert len(count) == 5 and changed.recogniser is not first.recogniser and changed.detector is first.detector
    del first, again, changed
    gc.collect()
    assert not [key for key in hosting._loaded if str(place) in key[0]]


def test_an_operator_that_cannot_be_converted_goes_to_onnxruntime(tmp_path, monkeypatch):
    place = face_pack.pack(tmp_path)
    graph = face_pack.Graph()
    graph.tensor("mix", np.ones((512, 3)))
    graph.node("Mish", ["input.1"], "odd")
    graph.node("GlobalAveragePool", ["odd"], "mean")
    graph.node("Flatten", ["mean"], "row", axis=1)
    graph.node("Gemm", ["row", "mix"], "embedding", transB=1)
    monkeypatch.setattr(face_pack, "OPSET", 18)
    graph.save(place / "w600k_r50.onnx", {"input.1": ["n", 3, 112, 112]}, {"embedding": [1, 512]})
    with pytest.raises(LikenessError, match="Mish.*choose onnxruntime"):
        hosting.load_models(place, "torch")
    monkeypatch.setattr(hosting, "choose_backend", lambda wish: "torch" if wish == "auto" else wish)
    loaded, text = hosting.load_models(place, "auto")
    assert (loaded.detector.backend, loaded.recogniser.backend) == ("torch", "onnxruntime") and "Mish" in text
    again, text = hosting.load_models(place, "auto")
    assert again.recogniser is loaded.recogniser and "Mish" in text, "the second load forgets why"
    with pytest.raises(LikenessError, match="Mish.*choose onnxruntime"):
        hosting.load_models(place, "torch")


def resizing(path, mode, way):
    """A swapper that makes its picture smaller and larger again, in a way of resizing of which onnx2torch warns."""
    graph = face_pack.Graph()
    graph.tensor("scales", [1, 1, 2, 2])
    graph.tensor("roi", [])
    graph.tensor("mix", np.zeros((3, 512)))
    graph.node("AveragePool", ["target"], "small", kernel_shape=[2, 2], strides=[2, 2])
    graph.node("Resize", ["small", "roi", "scales"], "large", mode=mode, coordinate_transformation_mode=way)
    graph.node("Gemm", ["source", "mix"], "g", transB=1)
    graph.node("Unsqueeze", ["g"], "g4", axes=[2, 3])
    graph.node("Add", ["large", "g4"], "output")
    graph.tensor("buff2fs", np.eye(512))
    return graph.save(path, {"target": [1, 3, 128, 128], "source": [1, 512]}, {"output": [1, 3, 128, 128]})


@pytest.mark.parametrize(("mode", "way", "same"), [("linear", "asymmetric", False), ("linear", "half_pixel", True),
                                                   ("nearest", "half_pixel", True)])
def test_a_conversion_with_other_numbers_is_refused(tmp_path, mode, way, same):
    """onnx2torch only warns of ways of resizing that torch does not have."""
    path = resizing(tmp_path / "r.onnx", mode, way)
    if same:
        loaded, text = hosting.load_swapper(path, "torch")
        assert loaded.network.backend == "torch" and "unchecked" not in text
        return
    with pytest.raises(LikenessError, match="without another result.*choose onnxruntime"):
        hosting.load_swapper(path, "torch")


def test_a_conversion_is_compared_without_insightface_too(tmp_path, monkeypatch):
    """onnxruntime alone is enough; without it the artist is told, on every load."""
    path = resizing(tmp_path / "r.onnx", "linear", "asymmetric")
    for name in ("insightface", "insightface.model_zoo.model_zoo"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LikenessError, match="without another result.*choose onnxruntime"):
        hosting.load_swapper(path, "torch")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    loaded, text = hosting.load_swapper(path, "torch")
    assert loaded.network.backend == "torch" and "r.onnx runs in torch unchecked" in text
    assert "r.onnx runs in torch unchecked" in hosting.load_swapper(path, "torch")[1], "the second load forgets it"
    again, note = hosting.load_network(path, loaded.network.contract, "torch")
    assert again is loaded.network and "unchecked" in note
    make, words = loaded.network.patcher.cached_patcher_init
    assert make(*words, disable_dynamic=True).model is not loaded.network.patcher.model


@pytest.mark.parametrize(("wish", "device", "hidden", "chosen"), [
    ("auto", "cuda", "", "torch"), ("auto", "cpu", "", "onnxruntime"), ("auto", "cpu", "insightface", "torch"),
    ("auto", "cuda", "onnx2torch", "onnxruntime"), ("torch", "cpu", "onnx2torch", "torch"),
    ("onnxruntime", "cuda", "insightface", "onnxruntime")])
def test_auto_takes_torch_on_a_card(monkeypatch, wish, device, hidden, chosen):
    monkeypatch.setattr(hosting.management, "get_torch_device", lambda: torch.device(device))
    monkeypatch.setattr(hosting, "there", lambda name: name != hidden)
    assert hosting.choose_backend(wish) == chosen


# -- equal to insightface ------------------------------------------------------------------------------
# Markers are 24, 48 or 96 pixels wide after the letterbox to 640.
SCENES = {"two": picture(faces=TWO), "large": picture(800, 640, ((400, 300, 120),)), "wide": picture(960, 240, ((450, 120, 36),)),
          "tall": picture(240, 960, ((120, 600, 36), (120, 240, 36))), "cut": picture(640, 480, ((20, 240, 24), (600, 30, 24)))}


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_face_analysis(oracle, name, backend):
    image = SCENES[name]
    theirs = oracle[0].get(as_bgr(image))
    ours = face_batch.analyse(models(backend), image, sizes=(640,))
    assert len(theirs) == len(ours.frames[0]) > 0
    for face in ours.each():
        other = nearest(face, theirs)
        np.testing.assert_allclose(face.box, other.bbox, atol=0.02)
        np.testing.assert_allclose(face.keypoints, other.kps, atol=0.02)
        assert abs(face.score - other.det_score) < 0.005
        embedding = face.embedding.numpy()
        assert np.abs(embedding - other.embedding).max() <= 0.01 * np.abs(other.embedding).max()
        assert float(embedding @ other.embedding) / np.linalg.norm(embedding) / np.linalg.norm(other.embedding) > 0.9999
        np.testing.assert_allclose(face.landmarks, other.landmark_2d_106, atol=0.5)
        assert (("female", "male")[other.gender], other.age) == (face.gender, face.age)


@pytest.mark.parametrize("name", SCENES)
def test_equal_to_inswapper(oracle, name):
    image = SCENES[name]
    theirs = oracle[0].get(as_bgr(image))
    ours = face_batch.analyse(models(), image, sizes=(640,))
    source = only(ours)
    frame = as_bgr(image)
    for face in ours.frames[0]:
        frame = oracle[1].get(frame, nearest(face, theirs), nearest(ours.frames[0][0], theirs))
    done = swap(swapper(), image, source, Job(Paste(1, "insightface"), sizes=(640,)), models())
    want = torch.from_numpy(frame[..., ::-1].copy()).float()
    got = done.image[0] * 255
    changed = (want - image[0] * 255).abs().amax(-1) > 1
    assert changed.float().mean() > 0.005
    # It cuts digits off twice and rounds once: up to two and a half grey levels are its own.
    assert (got - want).abs().max() <= 2.6


# -- without the libraries -----------------------------------------------------------------------------
def test_without_insightface_the_nodes_say_how_to_install(monkeypatch):
    monkeypatch.setattr(hosting, "_loaded", weakref.WeakValueDictionary())  # another test's networks may still live
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.model_zoo.model_zoo", None)
    place = support.root() / "models" / "buffalo_l"
    with pytest.raises(LikenessError, match="insightface.*pip install"):
        networks.Session(place / "w600k_r50.onnx", contract.contract_of(contract.read_graph(place / "w600k_r50.onnx")))
    loaded, text = hosting.load_models(place, "auto")
    assert loaded.detector.backend == "torch" and "insightface is not installed" in text and "pip install" in text
    for name in ("onnx", "onnx2torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: hosting.load_models(place, "auto"), lambda: hosting.load_swapper(support.root() / face_pack.SWAPPER)):
        with pytest.raises(LikenessError, match="The face nodes need the package onnx.*pip install"):
            call()
    assert not any(map(libraries.there, libraries.LIBRARIES))
