"""CustomEnhancer for people, whole: the shipped files for an artist's SDXL models run on tiny models of the same names."""
from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import host, portraits, tiny, workflow_portrait, workflows
from workflows.shipped import OWN_FILES, of_type, saved

SIDE = 256


@pytest.fixture(scope="module")
def studio(make_server, tiny_files, tmp_path_factory):
    """A server whose folders hold small files under the names of the public ones."""
    face_pack = pytest.importorskip("harness.face_pack", reason="the face nodes and their synthetic packs are not here yet")
    host.enter(cpu=True, base=host.private_base())
    place = tmp_path_factory.mktemp("studio")
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / workflow_portrait.CHECKPOINT).symlink_to(tiny_files["tiny_sdxl.safetensors"])
    tiny.register()
    for number, name in enumerate((workflow_portrait.IDENTITY_NET, workflow_portrait.DEPTH_NET)):
        portraits.control_net(place / "controlnet" / name, 40 + number)
    portraits.write(place / "photomaker" / workflow_portrait.PHOTOMAKER,
                    portraits.random(portraits.photomaker(1, portraits.TINY), 2))
    portraits.write(place / "instantid" / workflow_portrait.INSTANTID, portraits.random(portraits.instantid(portraits.TINY), 3))
    for name in (workflow_portrait.FACES, workflow_portrait.INSTANTID_FACES):
        face_pack.pack(place / "insightface", name)
    face_pack.swapper(place / "insightface" / workflow_portrait.SWAPPER)
    folders = {key: place / key for key in ("checkpoints", "controlnet", "photomaker", "instantid", "insightface")}
    server = make_server(model_folders=folders)
    draw_inputs(server.input)
    return server


def draw_inputs(folder: Path) -> None:
    """A picture of the person, a scene with a face and a depth map; the face of the synthetic packs is a magenta square."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, at, tone in ((workflow_portrait.PERSON, (116, 116), 90), ("scene.png", (60, 150), 140)):
        pixels = rng.integers(tone - 40, tone + 40, (SIDE, SIDE, 3), np.uint8)
        pixels[at[0]:at[0] + 24, at[1]:at[1] + 24] = (255, 0, 255)
        Image.fromarray(pixels).save(folder / name)
    Image.fromarray(np.tile(np.arange(SIDE, dtype=np.uint8)[:, None, None], (1, SIDE, 3))).save(folder / workflow_portrait.DEPTH)


def small(job: dict) -> dict:
    """Few steps, small pictures. The random model paints no face, and the synthetic swapper leaves none: what is swapped, and
    where InstantID looks for the place of the face, is a drawn picture."""
    job = copy.deepcopy(job)
    for key in of_type(job, "KSampler"):
        job[key]["inputs"]["steps"] = 1
    for key in of_type(job, "EmptyLatentImage"):
        job[key]["inputs"].update(width=SIDE, height=SIDE)
    for kind, values in (("BasicScheduler", {"steps": 4}), ("Likeness_ResInversion", {"manipulation_start": 1}),
                         ("Likeness_BiMDSampler", {"manipulation_start": 1}), ("GrowMask", {"expand": 8})):
        for key in of_type(job, kind):
            job[key]["inputs"].update(values)
    job["drawn"] = {"class_type": "LoadImage", "inputs": {"image": "scene.png"}}
    (swap,) = of_type(job, "Likeness_SwapFaces")
    # the synthetic outline is no face's, and its square is as large as auto wants it
    job[swap]["inputs"].update(image=["drawn", 0], mask_kind="box", detection_size="auto")
    for key in of_type(job, "Likeness_AnalyzeFaces"):
        if job[key]["inputs"]["image"] == [swap, 0]:
            job[key]["inputs"]["image"] = ["drawn", 0]
    return job


def test_a_person_far_off_is_looked_for_closely():
    """At 640 a face of the wide scene would be half as large as the detector needs it."""
    sizes = {}
    for path in OWN_FILES:
        if path.stem in workflow_portrait.ABOUT:
            swaps = [node for node in workflows.load(path)["nodes"] if node["type"] == "Likeness_SwapFaces"]
            sizes[path.stem] = ["1280" in node["widgets_values"] for node in swaps]
    assert sizes == {name: [name == workflow_portrait.WIDE_SCENE] for name in workflow_portrait.ABOUT}
    says = {name: "prompt beside it" in text for name, text in workflow_portrait.NOTES.items()}
    assert says == {name: name != workflow_portrait.WITH_INSTANTID for name in says}


def nets(workflow: dict, node: dict, name: str) -> set[int]:
    """ControlNets (ids of their loaders) that the CONDITIONING at an input has been led by."""
    nodes = {each["id"]: each for each in workflow["nodes"]}
    origin = {link[0]: nodes[link[1]] for link in workflow["links"]}
    found, waiting = set(), [item["link"] for item in node["inputs"] if item["name"] == name]
    while waiting:
        before = origin[waiting.pop()]
        if before["type"] == "ControlNetLoader":
            found.add(before["id"])
        waiting += [item["link"] for item in before["inputs"]
                    if item["type"] in ("CONDITIONING", "CONTROL_NET") and item["link"] is not None]
    return found


def test_the_guiders_prompts_are_led_alike():
    """A negative that alone is led by the depth would drive the picture away from it."""
    count = {}
    for path in OWN_FILES:
        workflow = workflows.load(path)
        (guider,) = (node for node in workflow["nodes"] if node["type"] == "Likeness_EnhancerGuider")
        led = [nets(workflow, guider, name) for name in ("positive", "free", "negative")]
        assert led[0] == led[1] == led[2], path.stem
        (painter,) = (node for node in workflow["nodes"] if node["type"] == "KSampler")
        both = [nets(workflow, painter, name) for name in ("positive", "negative")]
        assert both[0] == both[1], path.stem
        count[path.stem] = (len(led[0]), len(both[0]))
    assert count == {workflow_portrait.WITH_PHOTOMAKER: (0, 0), workflow_portrait.WITH_INSTANTID: (1, 0),
                     workflow_portrait.WIDE_SCENE: (0, 1)}


def without(job: dict) -> dict:
    """The same without the identity."""
    job = copy.deepcopy(job)
    for key in of_type(job, "Likeness_BiMDSampler"):
        job[key]["inputs"]["forward_strength"] = 0.0
    return job


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.stem)
def test_it_runs_from_words_to_the_person(studio, path):
    info = studio.object_info(fresh=True)
    workflow = workflows.load(path)
    job = workflows.to_prompt(workflow, info)
    assert not workflows.missing_models(job, info, workflows.own_files(workflow))
    assert {"Likeness_SwapFaces", "Likeness_ResInversion", "Likeness_BiMDSampler"} <= {n["class_type"] for n in job.values()}
    job = small(job)
    studio.free()  # the workflows begin alike: nothing may come from another one's cache
    result = studio.run(job, timeout=600)
    assert result.ok, result.error
    plain = studio.run(without(job), timeout=600)
    assert plain.ok, plain.error
    (picture,), (kept,) = saved(result, job), saved(plain, job)
    assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 5
    change = np.abs(picture.astype(float) - kept).mean(-1)
    assert change.mean() > 0.02, "the identity changes nothing"
    if path.stem == workflow_portrait.WIDE_SCENE:  # the mask of the swap holds the change in its place but for the VAE's reach
        assert change[:, :40].mean() < 0.05 * change[32:130, 120:210].mean()
    (swap,) = of_type(job, "Likeness_SwapFaces")
    assert swap in result.executed


def led(job: dict) -> dict:
    """The scene under edges and under a pose, put in where the notes of 20 and 21 say; nothing after the scene is left."""
    (painter,) = of_type(job, "KSampler")
    (decoded,) = (key for key in of_type(job, "VAEDecode") if job[key]["inputs"]["samples"] == [painter, 0])
    upstream, waiting = {}, [decoded]
    while waiting:
        key = waiting.pop()
        upstream[key] = copy.deepcopy(job[key])
        waiting += [value[0] for value in job[key]["inputs"].values() if isinstance(value, list)]
    prompts = [upstream[painter]["inputs"][name] for name in ("positive", "negative")]
    upstream["drawn"] = job["drawn"]
    upstream["edges"] = {"class_type": "Canny", "inputs": {"image": ["drawn", 0], "low_threshold": 0.2, "high_threshold": 0.5}}
    upstream["net"] = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": workflow_portrait.DEPTH_NET}}
    for name, picture in (("by edges", "edges"), ("by pose", "drawn")):
        upstream[name] = {"class_type": "ControlNetApplyAdvanced", "inputs": {
            "positive": prompts[0], "negative": prompts[1], "control_net": ["net", 0], "image": [picture, 0], "strength": 1.0,
            "start_percent": 0.0, "end_percent": 1.0}}
        prompts = [[name, 0], [name, 1]]
    upstream[painter]["inputs"].update(positive=prompts[0], negative=prompts[1])
    upstream["save"] = {"class_type": "SaveImage", "inputs": {"images": [decoded, 0], "filename_prefix": "led"}}
    return upstream


def test_edges_and_a_pose_lead_the_scene_where_the_notes_say(studio):
    (path,) = (path for path in OWN_FILES if path.stem == workflow_portrait.WITH_PHOTOMAKER)
    assert "Pose, Canny or depth" in workflow_portrait.NOTES[path.stem]
    job = led(small(workflows.to_prompt(workflows.load(path), studio.object_info(fresh=True))))
    plain = copy.deepcopy(job)
    for name in ("by edges", "by pose"):
        plain[name]["inputs"]["strength"] = 0.0
    only = copy.deepcopy(job)
    only["by pose"]["inputs"]["strength"] = 0.0
    shown = []
    for each in (job, only, plain):
        result = studio.run(each, timeout=600)
        assert result.ok, result.error
        shown.append(saved(result, each)[0].astype(float))
    assert np.abs(shown[1] - shown[2]).mean() > 0.1, "the edges lead"
    assert np.abs(shown[0] - shown[1]).mean() > 0.1, "and so does the pose"
