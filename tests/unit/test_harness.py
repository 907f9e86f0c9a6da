"""Parts of the harness that need no server."""
from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from harness import bench, client, demo, gallery, mutate, pack, paths, workflows
from harness.client import RunResult, refusal
from harness.server import model_paths_yaml

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301"
    "0100c9fe92ef0000000049454e44ae426082"
)
INFO = {
    "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["a.safetensors"], {}]}}},
    "New": {"input": {"required": {"file": ["COMBO", {"options": ["b.safetensors"]}], "mode": ["COMBO", {}]},
                      "optional": {"kind": ["COMBO", {"options": ["x", "y"]}], "n": ["INT", {"default": 1}]}}},
    "Likeness_LoadDemo": {"input": {"required": {"adapter": ["COMBO", {"options": ["CustAny"]}]}}},
    "LoadImage": {"input": {"required": {"image": [["cat.png"], {"image_upload": True}]}}},
}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def test_the_pack_is_loaded_under_its_alias_only():
    assert sys.modules["likeness"].__path__ == [str(paths.ROOT)]
    assert pack.load_pack() is sys.modules["likeness"]
    for name in ("nodes", "models"):
        found = getattr(sys.modules.get(name), "__file__", None) or ""
        assert not found.startswith(str(paths.ROOT / name)), f"{name} of the pack was imported by its bare name"


def test_mirror_is_exact_and_lazy(tmp_path):
    source, target = tmp_path / "My-Pack", tmp_path / "copy"
    for name in ("__init__.py", "nodes/a.py", "nodes/__pycache__/a.pyc", "models/deep/w.bin", "secret.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    parts = ("__init__.py", "nodes", "models", "not-there")
    pack.mirror(source, target, parts)
    names = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert names == {"__init__.py", "nodes/a.py", "models/deep/w.bin"}
    (target / "nodes" / "a.py").chmod(0o444)
    kept = (target / "models" / "deep" / "w.bin").stat().st_ino
    (source / "__init__.py").write_text("changed and longer")
    (source / "nodes" / "a.py").unlink()
    pack.mirror(source, target, parts)
    assert (target / "__init__.py").read_text() == "changed and longer"
    assert not (target / "nodes").exists() and (target / "models" / "deep" / "w.bin").stat().st_ino == kept


def test_what_is_posted_arrives_as_it_is(monkeypatch):
    """A setting of false was once sent as {}, which the page takes for true."""
    sent = []
    monkeypatch.setattr(client, "_open", lambda request, **_: sent.append(json.loads(request.data)) or io.BytesIO())
    for value in (False, 0, [], None, {"a": 1}):
        client.Client("http://127.0.0.1").post("/settings/a", value)
    assert sent == [False, 0, [], {}, {"a": 1}] and sent[0] is False


def test_model_paths_are_yaml_on_windows_too(tmp_path):
    yaml = pytest.importorskip("yaml")
    for name in ("clip_vision/deep/a.safetensors", "vae/put_vae_here"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    text = model_paths_yaml([tmp_path, tmp_path / "none"], {"loras": Path(r"C:\new\models: mine")})
    read = yaml.safe_load(text)
    assert read["models_0"] == {"clip_vision": str(tmp_path / "clip_vision")}
    assert read["extra"] == {"loras": str(Path(r"C:\new\models: mine"))}
    assert model_paths_yaml([], {}) == ""


def test_a_missing_model_file_is_told_from_a_wrong_choice():
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors"),
        "2": node("New", file="b.safetensors", kind="z", mode="anything", n=["1", 0]),
        "3": node("Likeness_LoadDemo", adapter="gone.safetensors"),
        "4": node("LoadImage", image="dog.png"),
        "5": node("Unknown", a="c.safetensors"),
    }
    assert workflows.missing_models(prompt, INFO) == ["sdxl.safetensors"]
    assert workflows.input_pictures(prompt) == ["dog.png"]
    prompt["1"]["inputs"]["ckpt_name"] = "a.safetensors"
    prompt["2"]["inputs"]["file"] = "other.SAFETENSORS"
    assert workflows.missing_models(prompt, INFO) == ["other.SAFETENSORS"]


def test_own_files_that_are_missing_are_named():
    """Folders and pictures do not end like model files; a workflow says in its `extra` which it needs all the same."""
    prompt = {"1": node("LoadPack", pack="buffalo_l"), "2": node("LoadPack", pack="here")}
    info = {"LoadPack": {"input": {"required": {"pack": [["here"]]}}}}
    own = workflows.own_files({"extra": {"own_files": {"buffalo_l": "models/insightface/models", "here": "somewhere"}}})
    assert workflows.missing_models(prompt, info) == [] and workflows.own_files({"extra": {}}) == {}
    assert workflows.missing_models(prompt, info, own) == ["buffalo_l"]


def test_workflows_stand_in_the_order_of_their_numbers(tmp_path):
    for name in ("10 b", "2 a", "own", "20 c", "1 z"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [path.stem for path in workflows.shipped(tmp_path)] == ["own", "1 z", "2 a", "10 b", "20 c"]


def test_notes_are_read_from_left_to_right(tmp_path):
    graph = {"nodes": [
        {"type": "Note", "pos": [500, 0], "widgets_values": ["second"]},
        {"type": "MarkdownNote", "pos": {"0": 10, "1": 0}, "widgets_values": ["first"]},
        {"type": "KSampler", "pos": [0, 0], "widgets_values": ["no"]},
    ]}
    assert workflows.notes(graph) == ["first", "second"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"1": node("LoadImage")}))
    with pytest.raises(paths.HarnessError, match="UI format"):
        workflows.load(path)
    path.write_text("{")
    with pytest.raises(paths.HarnessError, match="not JSON"):
        workflows.load(path)


def test_ui_graph_becomes_a_prompt():
    pytest.importorskip("comfy_cli")
    info = {"LoadImage": {"input": {"required": {"image": [["cat.png"], {}]}}, "input_order": {"required": ["image"]},
                          "output": ["IMAGE"], "output_name": ["IMAGE"], "name": "LoadImage"},
            "PreviewImage": {"input": {"required": {"images": ["IMAGE", {}]}}, "output": [], "output_node": True,
                             "input_order": {"required": ["images"]}, "output_name": [], "name": "PreviewImage"}}
    graph = {"nodes": [
        {"id": 1, "type": "LoadImage", "mode": 0, "inputs": [], "widgets_values": ["cat.png"],
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1, 2]}]},
        {"id": 2, "type": "PreviewImage", "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
         "outputs": [], "widgets_values": []},
        {"id": 3, "type": "PreviewImage", "mode": 2, "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
         "outputs": [], "widgets_values": []},
    ], "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 1, 0, 3, 0, "IMAGE"]], "version": 0.4}
    prompt = workflows.to_prompt(graph, info)
    assert prompt["1"]["inputs"]["image"] == "cat.png" and prompt["2"]["inputs"]["images"] == ["1", 0]
    assert "3" not in prompt, "a muted node was queued"


def test_a_half_accepted_prompt_is_no_success():
    assert RunResult("success").ok and not RunResult("success", node_errors={"1": {}}).ok
    assert not RunResult("interrupted").ok
    reply = {"error": {"message": "Prompt outputs failed validation", "details": ""}, "node_errors": {
        "4": {"class_type": "KSampler", "errors": [{"message": "Value too big", "details": "cfg"}]}}}
    assert refusal(reply) == "KSampler (node 4): Value too big: cfg"
    assert refusal({"error": {"message": "No prompt", "details": "none"}}) == "No prompt: none"


def test_gallery_is_one_safe_file(tmp_path):
    section = gallery.Section("cats & <dogs>", notes=["a <b> note"], inputs=[gallery.Picture(PNG, "in.png")],
                              results=[gallery.Picture(PNG, '"x"')], texts=["<script>"], seconds=1.2, error="")
    bad = gallery.Section("other", error="KSampler: <boom>")
    report = {"host": "0.30.0", "device": "cpu", "system": "test", "seconds": 2.0}
    gallery.write_gallery(tmp_path / "index.html", [section, bad], report)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "cats &amp; &lt;dogs&gt;" in page and "<dogs>" not in page and "<script>" not in page
    assert page.count("data:image/png;base64,") == 2 and "image-rendering: pixelated" in page
    assert "prefers-color-scheme: dark" in page and "&lt;boom&gt;" in page
    assert "http://" not in page and "https://" not in page, "the page asks for something outside of itself"


def test_notes_are_shown_as_text_not_as_markup():
    text = "# Title\n**One** picture in *two* words,\nnext `line`.\n\n## List\n- **a**: b <c>\n  more\n- d\n\nEnd a_b_c."
    assert gallery.blocks(text) == [
        "<h3>Title</h3>", "<p><strong>One</strong> picture in <em>two</em> words, next <code>line</code>.</p>",
        "<h3>List</h3>", "<ul><li><strong>a</strong>: b &lt;c&gt; more</li><li>d</li></ul>", "<p>End a_b_c.</p>",
    ]


def test_small_pictures_grow_by_whole_steps():
    width, pixels = gallery.shown_size(PNG)
    assert pixels and width == 224
    assert gallery.shown_size(b"nothing") == (256, False)


def test_a_demo_removes_only_its_own_pictures(tmp_path):
    for name in ("a-01.png", "mine.png", "index.html"):
        (tmp_path / name).write_text("")
    (tmp_path / "report.json").write_text(json.dumps({"workflows": [{"images": ["a-01.png", "../outside.png"]}]}))
    (tmp_path.parent / "outside.png").write_text("")
    demo.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.png"] and (tmp_path.parent / "outside.png").exists()
    demo.clear(tmp_path)


def test_endings_are_told_from_the_bytes():
    assert demo.ending(PNG) == "png" and demo.ending(b"\0\0\0\x20ftypisom") == "mp4" and demo.ending(b"??") == "bin"


def test_every_mutation_finds_its_place():
    """Code moves; a list that no longer fits would end the whole run at its first lost text."""
    for one in mutate.load():
        mutate.mutated((paths.ROOT / one.file).read_text(encoding="utf-8"), one)


def test_a_mutation_must_find_its_place_once():
    one = mutate.Mutation("swap", "a.py", "a + b", "a - b")
    assert mutate.mutated("return a + b\n", one) == "return a - b\n"
    for text in ("return a\n", "a + b + (a + b)"):
        with pytest.raises(paths.HarnessError, match="not once"):
            mutate.mutated(text, one)
    with pytest.raises(paths.HarnessError):
        mutate.mutated("x", mutate.Mutation("none", "a.py", "x", "x"))


def test_benches_are_listed_and_write_flat_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.py").write_text(
        '"""Measures nothing.\n\nMore."""\ndef main(argv):\n    return {"rows": len(argv), "ratio": 1.25}\n')
    (tmp_path / "_helper.py").write_text("raise RuntimeError\n")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench.host, "enter", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert bench.available() == {"small": "Measures nothing."}
    assert bench.main([]) == 0 and "Measures nothing." in capsys.readouterr().out
    with pytest.raises(paths.HarnessError, match="small"):
        bench.main(["large"])
    assert bench.main(["small", "--json", str(tmp_path / "o.json"), "--rows", "8"]) == 0
    numbers = json.loads((tmp_path / "o.json").read_text())
    assert numbers["rows"] == 2 and numbers["ratio"] == 1.25 and numbers["seconds"] >= 0
