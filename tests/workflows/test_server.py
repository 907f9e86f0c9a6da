"""The harness itself: the pack on a real server, prompts, errors, cache, cancel, what the page is served."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from urllib.error import HTTPError

import pytest

from harness import paths, workflows


def prompt(checkpoint="tiny_sd15.safetensors", seed=1, steps=2, size=64):
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red cat"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
            "seed": seed, "steps": steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1.0}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "t"}},
    }


def test_pictures_and_cache(server):
    server.free()  # the server is shared: another test may have left the same empty latent in its cache
    first = server.run(prompt(seed=11))
    assert first.ok, first.error
    assert set(first.executed) == set("1234567") and first.cached == []
    assert first.images["7"][0].startswith(b"\x89PNG")
    again = server.run(prompt(seed=11))
    assert again.ok and again.executed == [] and set(again.cached) == set("1234567")
    other = server.run(prompt(seed=12))
    assert other.ok and set(other.executed) == set("567") and set(other.cached) == set("1234")
    assert other.images["7"] != first.images["7"]


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_other_kinds(server, kind):
    job = prompt(f"tiny_{kind}.safetensors")
    if kind == "sd3":
        job["4"]["class_type"] = "EmptySD3LatentImage"
    result = server.run(job)
    assert result.ok, result.error
    assert result.images["7"]


def test_a_refused_prompt_names_the_input(server):
    result = server.run(prompt("nowhere.safetensors"))
    assert result.status == "invalid" and not result.ok
    assert "nowhere.safetensors" in result.error and "CheckpointLoaderSimple" in result.error


def test_an_error_names_the_node(server):
    job = prompt()
    job["2"]["inputs"]["clip"] = ["8", 0]
    job["8"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "x", "type": "sdxl"}}
    assert server.run(job).status == "invalid"
    job = prompt(steps=1)
    job["4"] = {"class_type": "EmptyHunyuanLatentVideo",
                "inputs": {"width": 64, "height": 64, "length": 1, "batch_size": 1}}
    result = server.run(job)
    assert result.status == "error" and "KSampler (node 5)" in result.error


def test_cancel_and_run_again(server):
    expected = server.run(prompt(seed=21, size=128))

    def cancel(kind, data):
        if kind == "executing" and data.get("node") == "5":
            server.interrupt()

    result = server.run(prompt(seed=22, steps=2000, size=128), on_event=cancel)
    assert result.status == "interrupted"
    server.free()
    again = server.run(prompt(seed=21, size=128))
    assert again.ok and again.images == expected.images


def test_too_slow_is_said(server):
    begin = time.monotonic()
    result = server.run(prompt(seed=23, steps=5000, size=128), timeout=2)
    assert result.status == "timeout" and time.monotonic() - begin < 30


def test_the_page_gets_what_the_pack_ships(server):
    """Templates with pictures, help pages, translations, sub-graphs, scripts, each as the page asks."""
    listed = server.get("/workflow_templates").get(paths.PACK_FOLDER, [])
    assert sorted(listed) == sorted(p.stem for p in workflows.shipped())
    wanted = [f"/api/workflow_templates/{paths.PACK_FOLDER}/{p.name}" for p in workflows.shipped()]
    wanted += [w[: -len("json")] + "jpg" for w in wanted]
    js = paths.ROOT / "js"
    for path in js.rglob("*") if js.is_dir() else ():
        if path.is_file():
            wanted.append(f"/extensions/{paths.PACK_FOLDER}/{path.relative_to(js).as_posix()}")
    for address in wanted:
        assert server.get_bytes(address.replace(" ", "%20")), address
    blueprints = {entry["name"] for entry in server.get("/global_subgraphs").values()
                  if entry["source"] == "custom_node"}
    assert blueprints == {p.stem for p in (paths.ROOT / "subgraphs").glob("*.json")}
    for folder in (paths.ROOT / "locales").glob("*/nodeDefs.json"):
        defs = json.loads(folder.read_text(encoding="utf-8"))
        assert defs.items() <= server.get("/i18n")[folder.parent.name]["nodeDefs"].items()
    with pytest.raises(HTTPError):
        server.get_bytes(f"/extensions/{paths.PACK_FOLDER}/no-such-file.js")


def test_only_our_packs_are_loaded(server):
    info = server.object_info()
    foreign = {v["python_module"] for v in info.values() if v["python_module"].startswith("custom_nodes.")}
    assert foreign <= {f"custom_nodes.{paths.PACK_FOLDER}"}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_dev_run_leaves_no_server_behind():
    """`dev.py run` prints an address that answers; after Ctrl-C nobody answers there."""
    words = [sys.executable, str(paths.ROOT / "tests" / "harness"), "run"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    address, said = "", []
    for line in process.stdout:
        said.append(line)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            address = found.group()
            break
    assert address, "".join(said)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert opener.open(address + "/system_stats", timeout=30).status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    with pytest.raises(OSError):
        opener.open(address + "/system_stats", timeout=5)
    process.stdout.close()
