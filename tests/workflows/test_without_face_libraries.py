"""A host without insightface, onnx, onnx2torch and onnxruntime: the miniature's methods run, the faces say how to install."""
from __future__ import annotations

import pytest

from harness import workflows
from workflows.shipped import NAMES, light, prompt, saved

HIDDEN = "import sys\nfor name in ('insightface', 'onnx', 'onnx2torch', 'onnxruntime'):\n    sys.modules[name] = None\n"
FACES = "12 Swap a face, keep the scene"
METHODS = ("1 Subject in a new scene", "6 Exact inversion", "10 Turntable", "13 A mask you can see")


@pytest.fixture(scope="module")
def bare(make_server, tmp_path_factory):
    place = tmp_path_factory.mktemp("hidden")
    (place / "sitecustomize.py").write_text(HIDDEN, encoding="utf-8")  # Python reads it before anything else
    made = make_server(env={"PYTHONPATH": str(place)})
    workflows.copy_inputs(made.input)
    yield made
    made.stop()


@pytest.mark.parametrize("name", METHODS)
def test_a_workflow_of_each_method_runs(bare, name):
    assert name in NAMES
    job = light(prompt(name, bare.object_info()), steps=2)
    result = bare.run(job)
    assert result.ok, result.error
    assert saved(result, job)


def test_the_face_workflow_says_how_to_install(bare):
    result = bare.run(prompt(FACES, bare.object_info()))
    assert not result.ok and "The face nodes need the package onnx, which is missing" in str(result.error)
    assert "pip install" in str(result.error)
