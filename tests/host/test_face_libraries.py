"""A host without insightface, onnx and onnx2torch: everything but the face networks works."""
from __future__ import annotations

import subprocess
import sys

from harness.paths import ROOT

SCRIPT = """
import sys
for name in ("insightface", "onnx", "onnx2torch"):
    sys.modules[name] = None  # importing it raises ImportError
sys.path.insert(0, "tests")
from harness import host, pack
host.enter(cpu=True, base=host.private_base())
import importlib, pkgutil, torch
nodes = pack.pack_nodes()
likeness = sys.modules["likeness"]
for part in ("models", "nodes"):
    package = importlib.import_module(f"likeness.{part}")
    for found in pkgutil.walk_packages(package.__path__, f"likeness.{part}."):
        importlib.import_module(found.name)
with torch.inference_mode():
    model, clip, vae, adapter, encoders = nodes["Likeness_LoadDemo"].execute(method="CustAny").result
    assert model.model.diffusion_model is not None and adapter.method == "custany"
    pack_name = next(item.options for item in nodes["Likeness_LoadFaceModels"].define_schema().inputs if item.id == "pack")[-1]
    try:
        nodes["Likeness_LoadFaceModels"].execute(pack=pack_name, backend="auto")
    except likeness.models.common.errors.LikenessError as error:
        print("SAYS", error)
    print(nodes["Likeness_CheckFiles"].execute(hashes=False).result[0])
print("NODES", len(nodes))
"""


def test_the_pack_works_without_the_libraries_of_the_face_nodes(nodes):
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"NODES {len(nodes)}" in done.stdout
    assert "SAYS The face nodes need the package onnx, which is missing" in done.stdout and "pip install" in done.stdout
    assert "insightface: MISSING or broken" in done.stdout
