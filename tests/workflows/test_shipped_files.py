"""The shipped workflow files by themselves: complete, tidy, and as an artist expects them. No server."""
from __future__ import annotations

import io
import json
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from harness import (
    build_workflows,
    canvas,
    paths,
    workflow_guidance,
    workflow_inversion,
    workflow_parts,
    workflow_pictures,
    workflow_swap,
    workflow_views,
    workflows,
)
from workflows.shipped import (
    EVERY,
    FILES,
    NAMES,
    OURS,
    OWN_FILES,
    blueprints,
    golden,
    graphs,
    group_box,
    is_note,
    node_box,
    nodes,
    subgraphs,
)

INPUTS = paths.WORKFLOWS / "inputs"
ALL = pytest.mark.parametrize("path", [*EVERY, *blueprints()], ids=lambda p: p.stem)
EACH = pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)


def test_the_folder_is_flat_and_complete():
    names = {p.name for p in paths.WORKFLOWS.iterdir()}
    recipes = {**build_workflows.RECIPES, **build_workflows.OWN_FILES}
    assert names == {f"{name}.{ending}" for name in recipes for ending in ("json", "jpg")} | {"inputs"}
    assert NAMES == list(build_workflows.RECIPES) and [p.stem for p in OWN_FILES] == list(build_workflows.OWN_FILES)
    assert [p.stem for p in blueprints()] == sorted(
        [workflow_parts.BLUEPRINT, workflow_inversion.KEEP, workflow_inversion.BACK, workflow_inversion.FUSE,
         workflow_views.TURN, workflow_guidance.WHERE])


@EACH
def test_thumbnail(path):
    data = path.with_suffix(".jpg").read_bytes()
    assert data.startswith(b"\xff\xd8\xff") and len(data) < 200_000
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape[0] == pixels.shape[1] >= 512
    tile, gap = workflow_pictures.TILE, workflow_pictures.GAP
    corners = [pixels[y:y + tile // 4, x:x + tile] for x in (gap, tile + 2 * gap) for y in (gap, 2 * tile + gap - tile // 4)]
    assert all(corner.std() > 5 for corner in corners), "a picture in it is empty"


def test_reference_pictures():
    used = {name for path in FILES for node in nodes(workflows.load(path)) if node["type"].startswith("LoadImage")
            for name in node["widgets_values"][:1]}
    assert used == {p.name for p in INPUTS.iterdir()}
    for name in used:
        picture = Image.open(INPUTS / name)
        assert picture.size == (256, 256)
        if picture.mode == "RGBA":  # cut out: the subject is opaque, a small part of the picture
            assert 0.05 < (np.asarray(picture.getchannel("A")) > 127).mean() < 0.5
    for name in workflow_pictures.CREATURES:
        workflow_pictures.identity(name)  # raises for a look that the training has seen
    for name in workflow_pictures.BUILDINGS:
        workflow_pictures.building(name)


def test_reference_pictures_are_what_the_table_draws(tmp_path):
    for path in workflow_pictures.write_inputs(tmp_path):
        drawn, shipped = (np.asarray(Image.open(folder / path.name).convert("RGBA"), np.int16) for folder in (tmp_path, INPUTS))
        assert np.abs(drawn - shipped).max() <= 2, f"{path.name}: run build_workflows inputs"


@EACH
def test_the_thumbnail_was_made_from_this_file(path):
    said = Image.open(path.with_suffix(".jpg")).info.get("comment")
    assert said == workflow_pictures.mark(path), f"{path.stem}: run build_workflows thumbnails"


@ALL
def test_nothing_overlaps(path):
    for graph in graphs(workflows.load(path)):
        boxes, frames = [node_box(n) for n in graph["nodes"]], [group_box(g) for g in graph["groups"]]
        for a, b in [*combinations(boxes, 2), *combinations(frames, 2)]:
            assert not a.overlaps(b), f"{a.name} lies on {b.name}"
        for box in boxes if frames else []:
            assert sum(box.inside(frame) for frame in frames) == 1, f"{box.name} is in no group"


@EACH
def test_links_run_from_left_to_right(path):
    """No link goes back to a group further left."""
    workflow = workflows.load(path)
    frames = [group_box(g) for g in workflow["groups"]]
    place = {n["id"]: next(f.x for f in frames if node_box(n).inside(f)) for n in workflow["nodes"]}
    for _, origin, _, target, _, kind in workflow["links"]:
        assert place[origin] <= place[target], (kind, origin, target)


@ALL
def test_links_agree_with_the_nodes(path):
    workflow = workflows.load(path)
    for graph in graphs(workflow):
        by_id = {n["id"]: n for n in graph["nodes"]}
        seen = set()
        for link in graph["links"]:
            row = list(link.values()) if isinstance(link, dict) else link
            number, origin, slot, target, place, kind = row
            seen.add(number)
            source = graph["inputs"][slot] if origin == -10 else by_id[origin]["outputs"][slot]
            assert number in (source["linkIds"] if origin == -10 else source["links"])
            sink = graph["outputs"][place] if target == -20 else by_id[target]["inputs"][place]
            assert number in sink["linkIds"] if target == -20 else sink["link"] == number
            assert "*" in (source["type"], sink["type"]) or source["type"] == sink["type"] == kind
        for node in graph["nodes"]:
            assert {i["link"] for i in node["inputs"]} - {None} <= seen
            assert {n for o in node["outputs"] for n in o["links"]} <= seen
        assert sorted(n["order"] for n in graph["nodes"]) == list(range(len(graph["nodes"])))
    ids = [n["id"] for n in nodes(workflow)]
    assert len(ids) == len(set(ids)), "the page gives new ids to nodes whose id stands twice"


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda p: p.stem)
def test_the_note_names_every_file_that_the_artist_must_have(path):
    workflow = workflows.load(path)
    (text,) = workflows.notes(workflow)
    for words in ("## What to change", "## Files that you need", "consent", "non-commercial"):
        assert words in text
    needed = workflows.own_files(workflow)
    for name, folder in needed.items():
        assert f"**{name}** into *{folder}*" in text
    chosen = {v for n in nodes(workflow) if not is_note(n) for v in n["widgets_values"] if isinstance(v, str)}
    assert set(needed) <= chosen
    loaded = {v for v in chosen if v.endswith((*workflows.MODEL_ENDINGS, ".png"))}
    assert loaded <= set(needed), "a file that the note does not name"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_note_tells_what_an_artist_asks(path):
    workflow = workflows.load(path)
    notes = workflows.notes(workflow)
    assert len(notes) == 1 and notes[0].startswith("# ")
    own = ("## Your own picture", "SD1.5", "SDXL", "Load Checkpoint", "Load Subject Adapter")
    if any(n["type"] == "Likeness_LoadCustomNet" for n in workflow["nodes"]):
        own = ("## Your own object", "customnet_v1", "models/checkpoints")
    for words in ("## What to change", "workflows/inputs", *own):
        assert words in notes[0]
    titles = {n.get("title") for n in workflow["nodes"]}
    for title in ("Enlarge the tiny pictures", "White on the subject"):
        assert title not in notes[0] or title in titles


@EACH
def test_the_note_stands_first(path):
    workflow = workflows.load(path)
    note = next(n for n in workflow["nodes"] if is_note(n))
    assert node_box(note).x == min(node_box(n).x for n in workflow["nodes"])


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "6 Exact inversion"], ids=lambda p: p.stem)  # it has no subject
def test_a_muted_group_cuts_out_with_core_nodes(path):
    workflow = workflows.load(path)
    muted = [n for n in nodes(workflow) if n["mode"] != 0]
    assert muted and {n["mode"] for n in muted} == {canvas.MUTED}
    said = [g for g in workflow["groups"] if "(muted" in g["title"]]
    assert sum("core nodes" in g["title"] for g in said) == 1
    assert {n["id"] for n in muted} == {n["id"] for n in workflow["nodes"] for g in said if node_box(n).inside(group_box(g))}
    assert all(n["properties"]["cnr_id"] == "comfy-core" for n in muted)
    assert {n["type"] for n in muted} & {"RemoveBackground", "SAM3_Detect"}
    ids = {n["id"] for n in muted}
    # a muted node that fed a living one would make the prompt invalid
    assert not [link for link in workflow["links"] if link[1] in ids and link[3] not in ids]
    assert [link for link in workflow["links"] if link[1] not in ids and link[3] in ids], "it gets no picture"


@ALL
def test_seeds_are_fixed(path):
    seeds = [n for n in nodes(workflows.load(path)) if n["type"] in ("KSampler", "PrimitiveInt")]
    still = any(n["type"] == "DisableNoise" for n in nodes(workflows.load(path)))  # a replay takes no noise
    assert seeds or still or path.parent.name == "subgraphs"
    assert all(n["widgets_values"][1] == "fixed" for n in seeds)


@ALL
def test_nodes_name_their_pack_and_their_models(path):
    workflow = workflows.load(path)
    inner = {s["id"] for s in subgraphs(workflow)}
    for node in nodes(workflow):
        if is_note(node):
            continue
        about = node["properties"]
        ours = node["type"].startswith(OURS) or node["type"] in inner
        assert about["cnr_id"] == ("likeness" if ours else "comfy-core") and about["ver"]
        assert not ours or about["ver"] == canvas.pack_version()
        files = [v for v in node["widgets_values"] if isinstance(v, str) and v.endswith(workflows.MODEL_ENDINGS)]
        with_us = [*workflows.own_files(workflow), workflow_swap.SWAPPER]
        assert [v for v in files if v not in with_us] == [m["name"] for m in about.get("models", [])]
        for model in about.get("models", []):  # the page offers nothing else for download
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith("/" + model["name"])
            assert model["directory"] in model["url"]


@ALL
def test_titles_tell_nodes_of_one_kind_apart(path):
    for graph in graphs(workflows.load(path)):
        names = [(n["type"], n.get("title", "")) for n in graph["nodes"]]
        assert len(names) == len(set(names)), names


@pytest.mark.parametrize("path", blueprints(), ids=lambda path: path.stem)
def test_each_block_is_at_work_in_a_workflow(path):
    (definition,) = subgraphs(workflows.load(path))
    assert definition["name"] == path.stem and definition["description"]
    used = [sub for file in FILES for sub in subgraphs(workflows.load(file))]
    if path.stem == workflow_guidance.WHERE:  # new from the library it has the release's values, in the workflows the miniature's
        (block,) = workflows.load(path)["nodes"]
        assert block["widgets_values"][-4:] == [0.25, 12, "soft", "all"]
        definition, *used = ({**sub, "nodes": [{**node, "widgets_values": []} for node in sub["nodes"]]}
                             for sub in (definition, *used))
    assert definition in used


def test_one_subgraph_for_keeping_the_scene():
    """The blueprint is the very block of the workflows that use it, with the dial first."""
    data = workflows.load(next(path for path in blueprints() if path.stem == workflow_inversion.KEEP))
    (definition,) = subgraphs(data)
    users = [path for path in FILES if definition in subgraphs(workflows.load(path))]
    assert len(users) == 3
    (node,) = data["nodes"]
    assert [i["name"] for i in node["inputs"] if "widget" not in i] == ["model", "positive", "free", "negative", "vae", "image",
                                                                       "mask"]
    assert next(i["name"] for i in node["inputs"] if "widget" in i) == "manipulation_start"
    assert [o["name"] for o in node["outputs"]] == ["image", "inversion"]


def test_one_subgraph_for_the_method():
    """The blueprint in the node library is the very block of the first workflow."""
    first = workflows.load(FILES[0])
    (definition,) = subgraphs(first)
    blueprint = next(path for path in blueprints() if path.stem == workflow_parts.BLUEPRINT)
    data = json.loads(blueprint.read_text(encoding="utf-8"))
    assert subgraphs(data) == [definition] and definition["name"] == blueprint.stem
    (node,) = data["nodes"]
    assert node["type"] == definition["id"] and data["links"] == []
    assert [i["name"] for i in node["inputs"] if "widget" not in i] == ["model", "clip", "adapter", "encoders", "image", "mask"]
    assert [i["name"] for i in node["inputs"] if "widget" in i][:2] == ["text", "word"]
    assert [o["name"] for o in node["outputs"]] == ["model", "positive", "negative"]
    assert any(n["type"] == definition["id"] for n in first["nodes"])


@ALL
def test_frozen(path):
    """Node ids, the order of widgets and the sockets in use are what was shipped. On purpose only: a new file comes from
    `build_workflows golden`."""
    assert build_workflows.signature(workflows.load(path)) == golden()[path.stem]


def test_nothing_frozen_was_lost():
    assert set(golden()) == {path.stem for path in [*EVERY, *blueprints()]}
