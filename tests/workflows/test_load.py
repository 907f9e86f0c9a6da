"""Load and faults on one server of their own: hundreds of prompts, lost memory, files that go and come back."""
from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from harness import mini, paths, workflows
from workflows.shipped import NAMES, light, of_type, prompt, same, saved

FAULTS = paths.ROOT / "tests" / "harness" / "fault_nodes"
WEIGHTS = paths.ROOT / "models" / "demo" / "weights"
WARM, TURNS = 20, 180  # 200 in all
FRESH = itertools.count()  # the host answers a node from its cache when it has the inputs of an earlier run


@pytest.fixture(scope="module")
def loaded(make_server):
    """A server with the nodes that break a run."""
    made = make_server(packs=[FAULTS])
    workflows.copy_inputs(made.input)
    made.object_info(fresh=True)
    yield made
    made.stop()


def job(server, seed: int = 1, steps: int = 1, name: str = NAMES[0]) -> dict:
    return light(prompt(name, server.object_info()), steps=steps, seed=seed)


def one(job_: dict, kind: str) -> dict:
    """Inputs of the only node of a type."""
    (key,) = of_type(job_, kind)
    return job_[key]["inputs"]


def refused(server, seed: int) -> None:
    """A prompt that the server does not even take, and one that ends in our own sentence."""
    bad = job(server, seed)
    one(bad, "Likeness_DualLevelInjector")["global_strength"] = 3.0
    assert server.run(bad).status == "invalid"
    bad = job(server, seed)
    one(bad, "Likeness_EncodePrompt")["word"] = f"word{seed}"
    result = server.run(bad)
    assert result.status == "error" and "is not in the prompt" in result.error


def cancelled(server, seed: int) -> None:
    long = job(server, seed, steps=1000)
    (sampler,) = of_type(long, "KSampler")

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data.get("node") == sampler:
            server.interrupt()

    assert server.run(long, on_event=cancel, timeout=300).status == "interrupted"


def residents(server) -> dict:
    """What the process holds after a garbage collection: memory, VRAM, tensors, loaded models."""
    result = server.run({"1": {"class_type": "Fault_Residents", "inputs": {"turn": next(FRESH)}}})
    assert result.ok and result.executed == ["1"], result.error
    return {"bytes": psutil.Process(server.process.pid).memory_info().rss, **json.loads(result.outputs["1"]["text"][0])}


def held(server) -> dict:
    """What the process holds once its caches are dropped; the models are those before that, because it unloads them all."""
    models = residents(server)["models"]
    server.free()
    return {**residents(server), "models": models}


def sampled(result, job_: dict) -> bool:
    """Whether every picture was painted in this run; one from the host's cache would prove nothing."""
    return set(of_type(job_, "KSampler")) <= set(result.executed)


def test_memory_is_flat_over_200_prompts(loaded):
    """With cancels and bad prompts between, new subjects and prompts all the time, the same picture at the end."""
    begin = job(loaded, seed=7, steps=2)
    expected = saved(loaded.run(begin), begin)
    before = {}
    for turn in range(1, WARM + TURNS + 1):
        now = job(loaded, seed=turn)
        one(now, "Likeness_DualLevelInjector")["local_strength"] = turn % 8 / 4
        if turn % 5 == 0:  # another subject
            one(now, "Likeness_ExtractID")["margin"] = turn % 50 / 100
        result = loaded.run(now)
        assert result.ok, f"turn {turn}: {result.error}"
        if turn % 20 == 5:
            refused(loaded, turn)
        if turn % 20 == 15:
            cancelled(loaded, turn)
        if turn == WARM:
            before = held(loaded)
    after = held(loaded)
    assert after["bytes"] < 1.05 * before["bytes"] and after["vram"] <= 1.05 * before["vram"], (before, after)
    assert after["tensors"] <= before["tensors"] + 2 and after["models"] <= before["models"], (before, after)
    again = loaded.run(begin)
    assert again.ok and sampled(again, begin) and same(saved(again, begin), expected)


@pytest.mark.parametrize("step", [0, 1])
def test_out_of_memory_in_mid_sampling(loaded, step):
    """One error, and the very next run is as if nothing had happened."""
    good = job(loaded, seed=51, steps=3)
    expected = saved(loaded.run(good), good)
    bad = job(loaded, seed=51, steps=3)
    sampler = one(bad, "KSampler")
    bad["fault"] = {"class_type": "Fault_OutOfMemory", "inputs": {"model": sampler["model"], "step": step}}
    sampler["model"] = ["fault", 0]
    first = held(loaded)
    for _ in range(3):
        result = loaded.run(bad)
        assert result.status == "error" and "KSampler" in result.error and f"simulated at step {step}" in result.error
    again = loaded.run(good)
    assert again.ok and sampled(again, good) and same(saved(again, good), expected)
    last = held(loaded)
    assert last["tensors"] <= first["tensors"] + 2, "a failed run left tensors behind"


@pytest.fixture
def folder(loaded):
    """models/likeness with adapter and encoders of the miniature, gone after the test."""
    place = loaded.base / "models" / "likeness"
    place.mkdir(parents=True, exist_ok=True)
    for name in (mini.ADAPTER, mini.DINO, mini.MAE):
        shutil.copy(WEIGHTS / name, place / name)
    yield place
    shutil.rmtree(place)


def from_files(server, seed: int = 61) -> dict:
    """The workflow with its adapter and encoders from the model folder."""
    made = job(server, seed, steps=2)
    made["files"] = {"class_type": "Likeness_LoadAdapter", "inputs": {"file": mini.ADAPTER}}
    made["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["files", 2]}}
    one(made, "Likeness_ExtractID").update(adapter=["files", 0], encoders=["files", 1])
    return made


def report(result) -> list[str]:
    """What the loader says of its files; the last line is about the MAE."""
    return result.outputs["report"]["text"][0].splitlines()


def test_model_files_that_go_change_and_come_back(loaded, folder):
    graph = from_files(loaded)
    first = loaded.run(graph)
    assert first.ok, first.error
    expected = saved(first, graph)
    adapter, encoder = folder / mini.ADAPTER, folder / mini.MAE

    adapter.unlink()
    result = loaded.run(graph)
    assert result.status == "invalid" and "put it there and press R" in result.error

    from likeness.models.common import files
    state, metadata = files.load(WEIGHTS / mini.ADAPTER)
    files.save(adapter, {name: value * 0.5 for name, value in state.items()}, metadata)
    other = loaded.run(graph)
    assert other.ok, other.error
    assert "files" in other.executed and not same(saved(other, graph), expected)

    whole = (WEIGHTS / mini.ADAPTER).read_bytes()
    adapter.write_bytes(whole[: len(whole) // 2])
    result = loaded.run(graph)
    assert result.status == "error" and "is cut off" in result.error
    shutil.copy(WEIGHTS / mini.ADAPTER, adapter)

    encoder.unlink()
    result = loaded.run(graph)
    assert result.status == "error" and "This adapter needs a mae encoder of width" in result.error
    encoder.write_bytes((WEIGHTS / mini.MAE).read_bytes()[:-1])
    result = loaded.run(graph)
    assert result.status == "error" and "This adapter needs a mae encoder" in result.error

    state, metadata = files.load(WEIGHTS / mini.MAE)
    files.save(encoder, {name: value * 0.5 for name, value in state.items()}, metadata)
    other = loaded.run(graph)
    assert other.ok, other.error
    assert "files" in other.executed and not same(saved(other, graph), expected)
    assert report(other) == [*report(first)[:-1], report(first)[-1] + "; not the very file of the training"]
    shutil.copy(WEIGHTS / mini.MAE, encoder)

    again = loaded.run(graph)
    assert again.ok and same(saved(again, graph), expected) and report(again) == report(first)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


ENDINGS = ("pt", "pth", "bin", "ckpt", "safetensors")


def armed(path: Path, mark: Path, kind: str) -> Path:
    """A file that leaves `mark` behind when it is unpickled, as torch writes files today or as plain pickle."""
    if kind == "zip":
        torch.save({"state_dict": {"a": torch.zeros(2)}, "more": Trap(mark)}, path)
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Trap(mark)}, protocol=2))
        pickle.loads(path.read_bytes())
    assert mark.exists(), "the trap is not armed"
    mark.unlink()
    return path


@pytest.mark.parametrize("kind", ["zip", "plain"])
def test_pickles_are_never_executed(loaded, folder, tmp_path, kind):
    """Neither when the folder is searched for encoders nor when such a file is chosen."""
    mark = tmp_path / "sprung"
    traps = [armed(folder / f"0 trap {kind}.{ending}", mark, kind) for ending in ENDINGS]
    loaded.object_info(fresh=True)
    graph, encoder = from_files(loaded, seed=62), folder / mini.MAE
    encoder.unlink()  # with all encoders there the search ends before it comes to a pickle
    searched = loaded.run(graph)
    assert searched.status == "error" and "needs a mae encoder" in searched.error
    assert not mark.exists(), "the search executed the pickle"
    shutil.copy(WEIGHTS / mini.MAE, encoder)
    searched = loaded.run(graph)
    assert searched.ok, searched.error
    for path in traps:
        for node, inputs, text in (("LoadAdapter", {"file": path.name}, 2),
                                   ("LoadEncoders", {"first": path.name, "second": "none"}, 1)):
            result = loaded.run({"1": {"class_type": f"Likeness_{node}", "inputs": inputs},
                                 "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", text]}}})
            assert result.status == "error" and path.name in result.error, result.error
            assert "cannot be read as weights" in result.error or "is a PyTorch file" in result.error, result.error
    assert not mark.exists(), "the pickle was executed"
