"""Random networks of the true sizes on both back ends; opt in with LIKENESS_FULL_FACES=1 (5 GB of memory, some minutes)."""
from __future__ import annotations

import os

import pytest
import torch

from harness import face_full

from .support import comfy  # noqa: F401

# isort: split
from likeness.models.face.faces import Face, Faces
from likeness.models.face.geometry import TEMPLATE
from likeness.models.face.swap import Paste
from likeness.models.hosting import face as hosting
from likeness.models.hosting.face_batch import Job, swap

pytestmark = pytest.mark.skipif(not os.environ.get("LIKENESS_FULL_FACES"), reason="set LIKENESS_FULL_FACES=1 to run it")


@pytest.mark.parametrize("name", ["detector", "recogniser", "swapper"])
def test_back_ends_agree_at_full_size(tmp_path, name):
    path = getattr(face_full, name)(tmp_path / f"{name}.onnx")
    megabytes = {"detector": (10, 25), "recogniser": (170, 178), "swapper": (545, 565)}[name]
    assert megabytes[0] < path.stat().st_size / 1e6 < megabytes[1]
    generator = torch.Generator().manual_seed(1)
    size = {"detector": 320, "recogniser": 112, "swapper": 128}[name]
    inputs = [torch.rand(1, 3, size, size, generator=generator)]
    if name == "swapper":
        inputs.append(torch.nn.functional.normalize(torch.randn(1, 512, generator=generator)))
    with torch.inference_mode():
        model = hosting.read_graph(path)
        contract = hosting.contract_of(model)
        assert contract.kind == name
        if name == "swapper":
            assert hosting.emap_of(path, model).shape == (512, 512)
        outputs = [hosting.load_network(path, contract, backend)[0](*inputs) for backend in ("torch", "onnxruntime")]
    for a, b in zip(*outputs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name
        assert a.std() > 0


def test_the_swapped_picture_is_the_same_on_both_back_ends(tmp_path):
    """To two steps of eight bits, after crop, network and paste."""
    path = face_full.swapper(tmp_path / "swapper.onnx")
    generator = torch.Generator().manual_seed(2)
    picture = torch.rand(1, 400, 500, 3, generator=generator)
    face = Face(torch.tensor([100.0, 80, 380, 360]), TEMPLATE.float() * 2.5 + torch.tensor([100.0, 80]), 1.0,
                torch.randn(512, generator=generator))
    faces = Faces(((face,),), ((400, 500),), "w600k_r50")
    with torch.inference_mode():
        done = [swap(hosting.load_swapper(path, backend)[0], picture, faces, Job(Paste(2, "box")), target=faces)
                for backend in ("torch", "onnxruntime")]
    assert (done[0].image - done[1].image).abs().max() <= 2 / 255
    assert torch.equal(done[0].mask, done[1].mask) and (done[0].image != picture).any()
