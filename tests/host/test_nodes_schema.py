"""The nodes' contract: what artists' saved graphs rely on, and what every node owes its reader."""
from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import os
import re
import subprocess
import sys

import pytest

from harness import pack, paths, schemas

UPDATE = bool(os.environ.get("LIKENESS_UPDATE"))
NAMES = {  # HOUSE section 4, the nodes of this far
    "Likeness_LoadAdapter": ("Load Subject Adapter", "likeness/1 load"),
    "Likeness_LoadEncoders": ("Load Vision Encoders", "likeness/1 load"),
    "Likeness_LoadDemo": ("Load Miniature World", "likeness/1 load"),
    "Likeness_LoadCustomNet": ("Load CustomNet", "likeness/1 load"),
    "Likeness_PrepareReference": ("Prepare Reference", "likeness/2 subject"),
    "Likeness_ExtractID": ("ID Extractor", "likeness/2 subject"),
    "Likeness_EncodePrompt": ("Subject Prompt", "likeness/2 subject"),
    "Likeness_DualLevelInjector": ("Dual-Level Injector", "likeness/2 subject"),
    "Likeness_LayerWeights": ("Layer Weights", "likeness/2 subject"),
    "Likeness_BlendSubjects": ("Blend Subjects", "likeness/2 subject"),
    "Likeness_SaveSubject": ("Save Subject", "likeness/2 subject"),
    "Likeness_LoadSubject": ("Load Subject", "likeness/2 subject"),
    "Likeness_GuidanceMask": ("Guidance Mask Generator", "likeness/3 place and mask"),
    "Likeness_PredictMask": ("Predict Guidance Mask", "likeness/3 place and mask"),
    "Likeness_PreviewGuidance": ("Preview Guidance", "likeness/3 place and mask"),
    "Likeness_Viewpoint": ("Viewpoint", "likeness/3 place and mask"),
    "Likeness_Turntable": ("Turntable", "likeness/3 place and mask"),
    "Likeness_Placement": ("Placement", "likeness/3 place and mask"),
    "Likeness_ViewConditioner": ("View Conditioner", "likeness/3 place and mask"),
    "Likeness_EnhancerGuider": ("CustomEnhancer Guider", "likeness/4 invert"),
    "Likeness_ResInversion": ("ResInversion Sampler", "likeness/4 invert"),
    "Likeness_BiMDSampler": ("BiMD Sampler", "likeness/4 invert"),
    "Likeness_IdentityFusion": ("Identity Fusion", "likeness/4 invert"),
    "Likeness_BaselineInversion": ("Baseline Inversion", "likeness/4 invert"),
    "Likeness_SaveInversion": ("Save Inversion", "likeness/4 invert"),
    "Likeness_LoadInversion": ("Load Inversion", "likeness/4 invert"),
    "Likeness_InversionReport": ("Inversion Report", "likeness/4 invert"),
    "Likeness_LoadPhotoMaker": ("Load PhotoMaker", "likeness/1 load"),
    "Likeness_LoadInstantID": ("Load InstantID", "likeness/1 load"),
    "Likeness_PhotoMakerEncode": ("PhotoMaker Encode", "likeness/5 face"),
    "Likeness_InstantIDApply": ("InstantID Apply", "likeness/5 face"),
    "Likeness_LoadFaceModels": ("Load Face Models", "likeness/1 load"),
    "Likeness_LoadFaceSwapper": ("Load Face Swapper", "likeness/1 load"),
    "Likeness_AnalyzeFaces": ("Analyze Faces", "likeness/5 face"),
    "Likeness_SelectFaces": ("Select Faces", "likeness/5 face"),
    "Likeness_BlendFaces": ("Blend Faces", "likeness/5 face"),
    "Likeness_SaveFaces": ("Save Faces", "likeness/5 face"),
    "Likeness_LoadFaces": ("Load Faces", "likeness/5 face"),
    "Likeness_FaceKeypoints": ("Face Keypoints", "likeness/5 face"),
    "Likeness_SwapFaces": ("Face Swap", "likeness/5 face"),
    "Likeness_CheckFiles": ("Check Files", "likeness/6 measure"),
    "Likeness_ReleaseSigmas": ("Release Sigmas", "likeness/exact"),
    "Likeness_RealCustomSampler": ("RealCustom Sampler", "likeness/exact"),
}


@pytest.fixture(autouse=True)
def _no_files(nodes, monkeypatch):
    """Schemas as on a fresh machine, whatever lies in its folders."""
    from likeness.nodes import _paths
    monkeypatch.setattr(_paths, "_names", lambda folder: [])
    monkeypatch.setattr(_paths, "saved_files", lambda kind: {})


@pytest.fixture
def all_schemas(nodes):
    return {node_id: cls.define_schema() for node_id, cls in nodes.items()}


def everything(all_schemas):
    for node_id, schema in all_schemas.items():
        for item in schema.inputs:
            yield f"{node_id} input {item.id}", item
        for item in schema.outputs:
            yield f"{node_id} output {item.display_name}", item


def test_generated_files_are_current(nodes):
    """Golden schemas and the English locale; LIKENESS_UPDATE=1 writes them anew."""
    if UPDATE:
        schemas.write(nodes)
    for path, content in schemas.generated(nodes).items():
        assert path.is_file(), f"{path.name} is missing: run this test with LIKENESS_UPDATE=1"
        assert json.loads(path.read_text(encoding="utf-8")) == content, f"{path.name} is not current"


def test_names_and_categories(all_schemas):
    assert {node_id: (s.display_name, s.category) for node_id, s in all_schemas.items()} == NAMES


def test_every_input_and_output_is_explained(all_schemas):
    for name, item in everything(all_schemas):
        tip = item.tooltip
        assert tip and tip == tip.strip() and tip.endswith("."), name
        # the page's translation library gives these a meaning of its own
        assert not set(tip) & set("{}@|") and tip.isascii(), name
    for node_id, schema in all_schemas.items():
        assert schema.description and schema.description.endswith("."), node_id
        assert len(schema.search_aliases) >= 3, node_id
        assert not schema.is_experimental, f"{node_id}: the miniature ships with weights"


def test_defaults_are_possible(all_schemas):
    for name, item in everything(all_schemas):
        default, options = getattr(item, "default", None), getattr(item, "options", None)
        if options:
            assert len(set(options)) == len(options), name
            assert default is None or default in options, name
        if getattr(item, "min", None) is not None:
            assert item.min <= default <= item.max, name


def test_outputs_have_names(all_schemas):
    for node_id, schema in all_schemas.items():
        names = [item.display_name for item in schema.outputs]
        assert all(names) and len(set(names)) == len(names), node_id


def test_optional_inputs_have_defaults_in_execute(nodes, all_schemas):
    """The host leaves out what is not connected."""
    for node_id, schema in all_schemas.items():
        parameters = inspect.signature(nodes[node_id].execute).parameters
        assert set(parameters) == {item.id for item in schema.inputs}, node_id
        for item in schema.inputs:
            has = parameters[item.id].default is not inspect.Parameter.empty
            assert has == bool(item.optional), f"{node_id} {item.id}"
            if item.optional and getattr(item, "default", None) is not None:
                assert parameters[item.id].default == item.default, f"{node_id} {item.id}"


def test_validation_names_what_it_checks(nodes):
    """A validate_inputs with **kwargs would switch the host's own checks off."""
    for node_id, cls in nodes.items():
        if "validate_inputs" in vars(cls):
            spec = inspect.getfullargspec(cls.validate_inputs)
            assert spec.varkw is None and spec.varargs is None, node_id
            # a value that comes by a link is not known when the host asks
            assert cls.validate_inputs() is True, node_id


def test_every_node_has_a_help_page(all_schemas):
    pages = {path.stem for path in schemas.DOCS.glob("Likeness_*.md")}
    assert pages == set(all_schemas), "a page too many or too few"
    for node_id, schema in all_schemas.items():
        text = (schemas.DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {schema.display_name}\n") and text.isascii(), node_id
        for heading in ("## Inputs", "## Outputs", "## Errors you may meet"):
            assert heading in text, f"{node_id}: no {heading}"
        told = {part: body for part, body in re.findall(r"## (Inputs|Outputs)\n(.*?)(?=\n## |\Z)", text, re.S)}
        for part, items in (("Inputs", schema.inputs), ("Outputs", schema.outputs)):
            for item in items:
                name = item.id if part == "Inputs" else item.display_name
                assert f"**{name}**" in told[part], f"{node_id}: {part} of its page lacks {name}"
            for bold in re.findall(r"^- ((?:\*\*\w+\*\*(?:, )?)+)", told[part], re.M):
                for name in re.findall(r"\*\*(\w+)\*\*", bold):
                    known = [i.id if part == "Inputs" else i.display_name for i in items]
                    assert name in known, f"{node_id}: {part} of its page tells of {name}, which is not there"


def test_the_root_stays_light():
    """Standard library only at the top of the root, and nothing that hides the entry point from the host."""
    tree = ast.parse((paths.ROOT / "__init__.py").read_text(encoding="utf-8"))
    for item in tree.body:
        if isinstance(item, ast.Import):
            assert {alias.name.split(".")[0] for alias in item.names} <= set(sys.stdlib_module_names)
        if isinstance(item, ast.ImportFrom):
            assert item.level == 0 and (item.module or "").split(".")[0] in sys.stdlib_module_names
    root = pack.load_pack()
    assert not hasattr(root, "NODE_CLASS_MAPPINGS") and root.WEB_DIRECTORY == "./js"
    assert {f"{name}.py" for name in root.FAMILIES} <= {p.name for p in (paths.ROOT / "nodes").glob("*.py")}


def test_a_broken_family_does_not_remove_the_others(nodes, monkeypatch, caplog):
    root = pack.load_pack()
    with caplog.at_level(logging.ERROR, "likeness"):
        found = root.load_nodes((*root.FAMILIES, "no_such_family"))
    assert len(found) == len(nodes)
    assert "no_such_family" in caplog.text and "ModuleNotFoundError" in caplog.text

    from likeness.nodes import subject

    class Broken(subject.BlendSubjects):
        @classmethod
        def define_schema(cls):
            raise RuntimeError("a schema that cannot be made")

    caplog.clear()
    monkeypatch.setattr(subject, "NODES", [*subject.NODES, Broken])
    with caplog.at_level(logging.ERROR, "likeness"):
        left = {cls.GET_SCHEMA().node_id for cls in root.load_nodes()}
    assert left == set(nodes) - {cls.GET_SCHEMA().node_id for cls in subject.NODES[:-1]}
    assert "a schema that cannot be made" in caplog.text


def test_loading_the_nodes_loads_no_heavy_library(host):
    """In a process of its own: the face libraries and diffusers stay out until a node needs them."""
    code = (
        "import sys; from harness import host, pack; from pathlib import Path;"
        "host.enter(cpu=True, base=host.private_base()); import comfy.sd, comfy_api.latest;"
        "before = set(sys.modules); nodes = pack.pack_nodes(); new = set(sys.modules) - before;"
        "heavy = ('insightface', 'onnx', 'onnxruntime', 'onnx2torch', 'diffusers', 'cv2', 'matplotlib', 'timm');"
        "print(len(nodes), sorted({m.split('.')[0] for m in new} & set(heavy)),"
        "      sorted(m for m in new if m.startswith('transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=paths.ROOT / "tests", env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == str(len(NAMES))
    assert done.stdout.strip().endswith("[] []"), done.stdout


def test_the_model_folder_extends_what_is_there(nodes, monkeypatch, tmp_path):
    import folder_paths

    from likeness.nodes import _paths

    own = (["/elsewhere/likeness"], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "likeness", own)
    asyncio.run(asyncio.run(pack.load_pack().comfy_entrypoint()).get_node_list())
    _paths.register()
    folders, endings = folder_paths.folder_names_and_paths["likeness"]
    assert folders == ["/elsewhere/likeness", os.path.join(folder_paths.models_dir, "likeness")]
    assert endings == folder_paths.supported_pt_extensions
