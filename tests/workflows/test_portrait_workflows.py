"""CustomEnhancer for people, whole: the workflows for an artist's SDXL files run on tiny files of the same names."""
from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import canvas_boxes, host, portraits, tiny, workflow_portrait, workflows
from workflows.shipped import nodes, of_type, saved

NAMES = tuple(workflow_portrait.RECIPES)
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
    for name in ("buffalo_l", "antelopev2"):
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


@pytest.fixture(scope="module")
def made(studio):
    return workflow_portrait.build(studio.object_info(fresh=True))


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
    job[swap]["inputs"].update(image=["drawn", 0], mask_kind="box")  # the synthetic outline is no face's
    for key in of_type(job, "Likeness_AnalyzeFaces"):
        if job[key]["inputs"]["image"] == [swap, 0]:
            job[key]["inputs"]["image"] = ["drawn", 0]
    return job


def without(job: dict) -> dict:
    """The same without the identity."""
    job = copy.deepcopy(job)
    for key in of_type(job, "Likeness_BiMDSampler"):
        job[key]["inputs"]["forward_strength"] = 0.0
    return job


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_words_to_the_person(studio, made, name):
    info = studio.object_info()
    job = workflows.to_prompt(made[name], info)
    assert not workflows.missing_models(job, info)
    assert {"Likeness_SwapFaces", "Likeness_ResInversion", "Likeness_BiMDSampler"} <= {n["class_type"] for n in job.values()}
    job = small(job)
    result = studio.run(job, timeout=600)
    assert result.ok, result.error
    plain = studio.run(without(job), timeout=600)
    assert plain.ok, plain.error
    (picture,), (kept,) = saved(result, job), saved(plain, job)
    assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 5
    change = np.abs(picture.astype(float) - kept).mean(-1)
    assert change.mean() > 0.02, "the identity changes nothing"
    if name == "Wide scene, small person":  # the mask of the swap holds the change in its place, but for the first stage's reach
        assert change[:, :40].mean() < 0.05 * change[32:130, 120:210].mean()
    (swap,) = of_type(job, "Likeness_SwapFaces")
    assert swap in result.executed


@pytest.mark.parametrize("name", NAMES)
def test_the_canvas_is_tidy(made, name):
    workflow = made[name]
    boxes = [(n["pos"], n["size"]) for n in nodes(workflow)]
    for k, ((x, y), (w, h)) in enumerate(boxes):
        for (a, b), (c, d) in boxes[:k]:
            top = canvas_boxes.TITLE
            assert not (x < a + c and a < x + w and y - top < b + d and b - top < y + h), "two nodes overlap"
    place = {n["id"]: next(g["bounding"][0] for g in workflow["groups"] if g["bounding"][0] <= n["pos"][0] <= g["bounding"][0]
                           + g["bounding"][2]) for n in workflow["nodes"]}
    assert all(place[origin] <= place[target] for _, origin, _, target, _, _ in workflow["links"]), "a link goes back"
    assert len(workflows.notes(workflow)) == 1 and "consent" in workflows.notes(workflow)[0]
