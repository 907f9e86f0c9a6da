"""Random networks of the true sizes on both back ends; opt in with LIKENESS_FULL_FACES=1 (5 GB of memory, some minutes)."""
from __future__ import annotations

import os

import pytest
import torch

from harness import face_full

from .support import comfy  # noqa: F401

# isort: split
from likeness.models.hosting import face as hosting

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
