"""The shipped workflows on the real server, with the miniature world."""
from __future__ import annotations

import io
import json
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from harness import build_workflows, canvas, canvas_inputs, demo, paths, workflows
from workflows.shipped import (
    EVERY,
    NAMES,
    OURS,
    OWN_FILES,
    blueprints,
    golden,
    group_box,
    light,
    node_box,
    nodes,
    of_type,
    prompt,
    same,
    saved,
)


def strip(parts: int) -> tuple[int, int, int]:
    """Size of so many pictures side by side."""
    return 256, (parts * 64 + (parts - 1) * 2) * 4, 3


# number and size of the pictures that each one saves
PICTURES = dict.fromkeys(NAMES, (4, (256, 256, 3))) | {
    "5 Story strip": (1, strip(4)), "8 Identity fusion": (1, (256, 5 * 256, 3)),
    "10 Turntable": (8, (256, 256, 3)),
    "12 Swap a face, keep the scene": (1, strip(4)),
    **dict.fromkeys(("7 Change the subject, keep the scene", "9 Identity on a drawing", "17 Round after round"), (1, strip(3))),
    **dict.fromkeys(("13 A mask you can see", "16 Predict the mask, edit it, use it"), (3, strip(3))),
    **dict.fromkeys(("14 Two words, two subjects", "15 Many words of one picture (One2Many)"), (3, strip(4)))}


@pytest.fixture(scope="module")
def info(server):
    workflows.copy_inputs(server.input)
    return server.object_info(fresh=True)


def test_the_files_are_what_the_generator_writes(info):
    if paths.host_version() != canvas.CORE_VERSION:
        pytest.skip("another host has other core nodes")
    made = {**build_workflows.build(info), **build_workflows.blueprints(info)}
    for path in [*EVERY, *blueprints()]:
        assert workflows.load(path) == json.loads(json.dumps(made[path.stem])), f"{path.name}: run build_workflows again"


def test_this_version_still_opens_what_was_frozen(info):
    """Widgets are stored by position and sockets by name: new widgets may only come last."""
    for name, frozen in golden().items():
        for number, node in frozen.items():
            if node["type"] not in info:
                assert node["type"] == "sub-graph" or node["type"] in workflows.NOTE_NODES, (name, number, node["type"])
                continue
            items = canvas_inputs.inputs_of(info[node["type"]])
            widgets, sockets = ([i.name for i in items if i.widget == kind] for kind in (True, False))
            assert widgets[:len(node["widgets"])] == node["widgets"], (name, number)
            assert set(node["sockets"]) <= {*sockets, *widgets}, (name, number)
            outputs = info[node["type"]]["output_name"]
            assert outputs[:len(node["outputs"])] == node["outputs"], (name, number)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(server, info, name):
    workflow = workflows.load(paths.WORKFLOWS / f"{name}.json")
    job = workflows.to_prompt(workflow, info)
    assert not workflows.missing_models(job, info)
    assert {node["class_type"] for node in job.values()} <= set(info)
    living = [n for n in nodes(workflow) if n["type"].startswith(OURS) and n["mode"] == 0]
    assert {n["type"] for n in living} == {node["class_type"] for node in job.values() if node["class_type"].startswith(OURS)}
    result = server.run(job, workflow=workflow)
    assert result.ok, result.error
    pictures = saved(result, job)
    count, shape = PICTURES[name]
    shapes = [(256, 256, 3), (256, 8 * 256, 3)] if name == "6 Exact inversion" else [shape] * count
    assert [p.shape for p in pictures] == shapes
    for picture in pictures:
        assert picture.std() > 20 and 10 < picture.mean() < 245, "grey, black or white"
    assert not any(np.array_equal(a, b) for k, a in enumerate(pictures) for b in pictures[:k])
    for key in set(of_type(job, "Likeness_ExtractID")) & set(result.executed):  # the same picture may be in the host's cache
        assert len(result.images[key]) == 1, "no preview of what the encoders saw"
    for key in of_type(job, "PreviewAny"):
        (text,) = result.outputs[key]["text"]
        assert all(word in text for word in (("reconstruction", "dB") if name == "6 Exact inversion" else ("local", "global")))


@pytest.mark.parametrize(("name", "count"), [(name, count) for name in NAMES for count in (1, 4)
                                             if name.split()[0] in ("13", "14", "16", "17")])
def test_masks_follow_number_and_size_of_the_pictures(server, info, name, count):
    """Each picture stands beside its own mask, and an edit of a mask is as large as the picture."""
    job = light(prompt(name, info))
    wide = ("width", "height", "batch_size"), (96, 64, count)
    for key in of_type(job, "EmptyLatentImage"):
        job[key]["inputs"].update(zip(*wide, strict=True))
    result = server.run(job)
    assert result.ok, result.error
    parts = {"14": 4}.get(name.split()[0], 3)
    pictures = saved(result, job)
    assert [p.shape for p in pictures] == [(256, (parts * 96 + (parts - 1) * 2) * 4, 3)] * count
    for picture in pictures if name.split()[0] in ("13", "14") else []:
        mask = picture[:, 98 * 4:(98 + 96) * 4]  # the second part of the strip
        assert set(np.unique(mask)) == {0, 255} and 0.15 < (mask > 0).mean() < 0.25
    for key in of_type(job, "MaskPreview"):
        for data in result.images[key]:
            mask = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
            assert mask.shape == (64, 96) and mask[:40].max() == 255 and mask[40:].max() == 0


def test_the_saved_mask_comes_back_from_the_picture(server, info):
    """Paint it by hand: Load Image of the saved picture gives the very mask that was predicted."""
    name = next(name for name in NAMES if name.startswith("16 "))
    workflow = workflows.load(paths.WORKFLOWS / f"{name}.json")
    (group,) = (g for g in workflow["groups"] if g["title"].startswith("Paint it by hand"))
    for node in workflow["nodes"]:
        if node_box(node).inside(group_box(group)):
            node["mode"] = 0
    job = light(workflows.to_prompt(workflow, info))
    (join,) = of_type(job, "JoinImageWithAlpha")
    (save,) = (key for key in of_type(job, "SaveImage") if job[key]["inputs"]["images"] == [join, 0])
    job["mask"] = {"class_type": "MaskPreview", "inputs": {"mask": job[join]["inputs"]["alpha"]}}
    first = server.run(job)
    assert first.ok, first.error
    (server.input / "painted.png").write_bytes(first.images[save][0])
    second = server.run({"load": {"class_type": "LoadImage", "inputs": {"image": "painted.png"}},
                         "mask": {"class_type": "MaskPreview", "inputs": {"mask": ["load", 1]}}})
    assert second.ok, second.error
    want, got = (np.asarray(Image.open(io.BytesIO(run.images["mask"][0])).convert("L"), np.int16) for run in (first, second))
    assert np.abs(want - got).max() <= 1 and 0.1 < (want > 127).mean() < 0.4


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.stem)
def test_without_the_artists_files_the_demo_leaves_it_out(server, info, path, tmp_path):
    row, section = demo.run_one(server, path, tmp_path, 60)
    needed = workflows.own_files(workflows.load(path))
    assert row["status"] == "models not present" and row["missing"] == sorted(needed) and not list(tmp_path.iterdir())
    assert section.error.startswith("Not run, it needs files of your own: ") and "\n" not in section.error
    assert all(f"{name} in {folder}" in section.error for name, folder in needed.items())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "6 Exact inversion"])
def test_the_reference_counts(server, info, name):
    """Without the subject (all strengths 0) other pictures come out."""
    job = light(prompt(name, info))
    off = light(prompt(name, info))
    for key in of_type(off, "Likeness_DualLevelInjector"):
        # at 0 nothing asks for a mask, so there would be none to preview
        off[key]["inputs"].update(global_strength=0.0, local_strength=0.01 if of_type(off, "Likeness_PreviewGuidance") else 0.0)
    for key in of_type(off, "Likeness_ViewConditioner"):
        off[key]["inputs"]["object_strength"] = 0.0
    first, second = (server.run(j) for j in (job, off))
    assert first.ok and second.ok, first.error + second.error
    assert not same(saved(first, job), saved(second, off))


def test_each_of_two_masks_holds_its_own_subject(server, info):
    """Swapping the pictures changes both halves; the local level of each reaches its own half only."""
    name = "2 Two subjects"
    job = light(prompt(name, info), steps=1)
    into = of_type(job, "Likeness_DualLevelInjector")
    assert len(into) == 2
    pictures = {}
    for row, strengths in {"none": (0.0, 0.0), "first": (1.0, 0.0), "second": (0.0, 1.0)}.items():
        for key, strength in zip(into, strengths, strict=True):
            job[key]["inputs"].update(global_strength=0.0, local_strength=strength)
        result = server.run(job)
        assert result.ok, result.error
        pictures[row] = saved(result, job)[0].astype(float)
    left = {row: np.abs(pictures[row] - pictures["none"])[:, :96].mean() for row in ("first", "second")}
    right = {row: np.abs(pictures[row] - pictures["none"])[:, 160:].mean() for row in ("first", "second")}
    assert left["first"] > 2 * left["second"] and right["second"] > 2 * right["first"], (left, right)


def test_cancel_and_run_again(server, info):
    job = light(prompt(NAMES[0], info), seed=31)
    expected = saved(server.run(job), job)
    long = light(prompt(NAMES[0], info), steps=1000, seed=32)
    (sampler,) = of_type(long, "KSampler")

    def cancel(kind, data):
        if kind == "progress" and data.get("node") == sampler:
            server.interrupt()

    result = server.run(long, on_event=cancel, timeout=120)
    assert result.status == "interrupted" and not saved(result, long)
    server.free()
    again = server.run(job)
    assert again.ok and sampler in again.executed
    assert same(saved(again, job), expected)


@pytest.mark.parametrize("where", ["Likeness_ResInversion", "SamplerCustomAdvanced"])
def test_cancel_while_recording_and_while_replaying(server, info, where):
    """Neither leaves anything in the guider, the model or the cache: the next run gives the same picture."""
    job = prompt(next(name for name in NAMES if name.startswith("6 ")), info)
    for key in of_type(job, "BasicScheduler"):
        job[key]["inputs"]["steps"] = 40
    server.free()
    expected = saved(server.run(job), job)
    server.free()
    nodes = of_type(job, where)
    cancelled = []

    def cancel(kind, data):
        if kind == "progress" and data.get("node") in nodes and data.get("value", 0) >= 2 and not cancelled:
            cancelled.append(data["node"])
            server.interrupt()

    result = server.run(job, on_event=cancel, timeout=120)
    assert cancelled and result.status == "interrupted"
    again = server.run(job)
    assert again.ok and cancelled[0] in again.executed
    assert same(saved(again, job), expected)


def test_the_page_gets_them(server):
    """Listed under our pack, each with its file and its thumbnail; the blueprint among the sub-graphs."""
    pack = paths.PACK_FOLDER
    assert sorted(server.get("/workflow_templates")[pack]) == sorted(path.stem for path in EVERY)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in EVERY:
        address = f"/api/workflow_templates/{pack}/{urllib.parse.quote(path.stem)}"
        assert server.get(address + ".json") == workflows.load(path)
        with opener.open(server.url + address + ".jpg", timeout=30) as answer:
            assert answer.status == 200 and answer.headers["Content-Type"] == "image/jpeg"
            assert answer.read() == path.with_suffix(".jpg").read_bytes()
    listed = {entry["name"]: key for key, entry in server.get("/global_subgraphs").items()
              if entry["source"] == "custom_node"}
    for path in blueprints():
        data = json.loads(server.get(f"/global_subgraphs/{listed[path.stem]}")["data"])
        assert data == json.loads(path.read_text(encoding="utf-8"))


def test_help_is_served_for_each_node_of_ours(server, info):
    used = {node["type"] for frozen in golden().values() for node in frozen.values() if node["type"].startswith(OURS)}
    assert len(used) >= 4
    for kind in sorted(used):
        text = server.get_bytes(f"/extensions/{paths.PACK_FOLDER}/docs/{kind}.md").decode()
        assert info[kind]["display_name"] in text
