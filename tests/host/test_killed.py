"""The power goes while a subject or an adapter is written: what lies there afterwards is whole or not there at all."""
from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import mini as mini_module
from likeness.models.common import files

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks this process, and kills as Linux does")
MOMENTS = ("half written", "written", "flushed", "renamed")


def killed_at(moment: str, write: Callable[[], None]) -> None:
    """Run `write` in a child that kills itself, without any clean-up, when the moment comes."""
    child = os.fork()
    if child == 0:
        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        real_flush, real_replace = os.fsync, os.replace

        def dying(real: Callable[..., object]) -> Callable[..., None]:
            def write_then_die(source: object, path: Path, **words: object) -> None:
                real(source, path, **words)
                if moment == "half written":
                    os.truncate(path, Path(path).stat().st_size // 2)
                if moment in ("half written", "written"):
                    die()
            return write_then_die
        files.save_file, shutil.copyfile = dying(files.save_file), dying(shutil.copyfile)
        os.fsync = lambda number: (real_flush(number), moment == "flushed" and die())
        os.replace = lambda *a: (real_replace(*a), moment == "renamed" and die())
        try:
            write()
        finally:
            os._exit(1)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it was not killed: the moment never came"
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")


@linux
@pytest.mark.parametrize("way", ["saved", "copied"])
@pytest.mark.parametrize("before", [True, False], ids=["over an old file", "new"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_adapter(mini, tmp_path, moment, before, way):
    """As a training saves it, and as a finished one is copied over what ships."""
    adapters = mini_module.pack("models.hosting.adapters")
    path = tmp_path / "adapter.safetensors"
    state, metadata = files.load(mini.folder / mini_module.ADAPTER)
    old = {name: value * 0 for name, value in state.items()}
    if before:
        files.save(path, old, metadata)
    killed_at(moment, {"saved": lambda: files.save(path, state, metadata),
                       "copied": lambda: files.copy(mini.folder / mini_module.ADAPTER, path)}[way])
    wanted = state if moment == "renamed" else old
    if moment == "renamed" or before:
        loaded = adapters.load_adapter(path).patcher.model.state_dict()
        assert all(torch.equal(loaded[name], wanted[name]) for name in loaded)
    else:
        assert not path.exists()
    listed = {p.name for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")}
    assert listed <= {path.name}, "a half file has the ending of a model"


@linux
@pytest.mark.parametrize("moment", MOMENTS)
def test_subject(nodes, mini, tmp_path, monkeypatch, moment):
    """Through the node's own place and list: nothing half is offered, and the next save takes the next free name."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    subjects, places = mini_module.pack("models.hosting.subjects"), mini_module.pack("nodes._paths")
    subject = subjects.extract_from_picture(mini.adapter, mini.encoders, torch.rand(1, 20, 20, 3), None, "concat", 0.1,
                                            "error").subject
    path = places.new_path(places.SUBJECTS, "cat")
    killed_at(moment, lambda: subjects.save_subject(subject, path))
    offered = [file for name, file in places.saved_files(places.SUBJECTS).items() if name.endswith("[output]")]
    assert offered == ([path] if moment == "renamed" else [])
    for file in offered:
        subjects.load_subject(file, mini.adapter, mini.encoders)
    subjects.save_subject(subject, places.new_path(places.SUBJECTS, "cat"))
    offered = [file for name, file in places.saved_files(places.SUBJECTS).items() if name.endswith("[output]")]
    assert len(offered) == 1 + (moment == "renamed")
    for file in offered:
        assert subjects.load_subject(file, mini.adapter, mini.encoders)[0].pictures == 1



