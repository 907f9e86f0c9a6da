"""The oldest host that the pack names: it loads, lists the same nodes and runs the shipped workflows."""
from __future__ import annotations

import json
import re
import sys

import pytest

from harness import install, paths, schemas, workflows
from workflows.shipped import NAMES, OURS, light, prompt, saved


@pytest.fixture(scope="module")
def floor(make_server):
    """A server of the oldest host, with the Python of the others."""
    try:
        place = install.floor_host(install.Path(sys.executable))
    except install.Stop as stop:
        pytest.skip(f"ComfyUI {install.FLOOR} could not be fetched, so the oldest host was not tried ({stop})")
    made = make_server(host=place)
    workflows.copy_inputs(made.input)
    yield made
    made.stop()


def test_it_is_the_version_that_we_name(floor):
    project = (paths.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (named,) = re.findall(r'requires-comfyui = ">=(.+)"', project)
    assert floor.get("/system_stats")["system"]["comfyui_version"] == named == install.FLOOR


def test_every_node_of_ours_is_there(floor):
    info, golden = floor.object_info(), json.loads(schemas.GOLDEN.read_text(encoding="utf-8"))
    assert {name for name in info if name.startswith(OURS)} == set(golden)
    for name, wanted in golden.items():
        assert info[name]["output"] == [item["type"] for item in wanted["outputs"]], name


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_workflow_runs(floor, name):
    job = prompt(name, floor.object_info())
    job = light(job, steps=3)
    result = floor.run(job)
    assert result.ok, result.error
    pictures = saved(result, job)
    assert pictures and all(picture.std() > 5 for picture in pictures)
