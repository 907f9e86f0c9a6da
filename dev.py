#!/usr/bin/env python
"""One command for the whole project; works from any folder, with Python 3.10 to 3.13 and nothing else.

    python dev.py setup     get Python packages and ComfyUI into .dev/ (once, about 6 GB)
    python dev.py demo      run every shipped workflow on the real ComfyUI, pictures in output/demo/
    python dev.py run       the same ComfyUI left running, to try things by hand
    python dev.py doctor    a report of what is installed and what is missing
"""
from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "tests"))
from harness import install  # noqa: E402  (standard library only; the rest of harness needs the set-up)
from harness.install import Places, Stop, Terminated, call, say  # noqa: E402
from harness.paths import DEV  # noqa: E402

# Options of `test` that only set a variable for the tests.
SWITCHES = {"browser": "LIKENESS_BROWSER", "fuzz": "LIKENESS_FUZZ"}
# pytest options whose next word is a value, even when a file of that name exists
VALUED = ("-k", "-m", "-p", "-o", "-n", "-W", "--deselect", "--ignore", "--durations", "--maxfail")


def harness(places: Places, *words: object) -> int:
    """Run a part of tests/harness inside the virtual environment."""
    # After Ctrl-C a training ends its step and writes a checkpoint, which takes minutes for a real model on a CPU.
    patience = 600 if words[0] == "train" else 30
    return call([places.python, ROOT / "tests" / "harness", *words], env=inside(places), patience=patience)


def inside(places: Places) -> dict:
    return {"COMFYUI_PATH": str(places.host), "LIKENESS_DEV": str(DEV)}


def pytest_words(words: list) -> list:
    """Paths become absolute, seen from here or else from the checkout; without one, all tests run."""
    out, found, value = [], False, False
    for word in words:
        place, colons, inner = word.partition("::")
        for base in (Path.cwd(), ROOT):
            if not value and not word.startswith("-") and (base / place).exists():
                word, found = str((base / place).absolute()) + colons + inner, True
                break
        value = word in VALUED
        out.append(word)
    return out if found else [*out, str(ROOT / "tests")]


def run_tests(places: Places, words: list, mutations: bool, switches: list) -> int:
    if mutations:
        if switches:
            raise Stop(f"--mutations runs the few tests that its lists name: leave out --{' and --'.join(switches)}.")
        return harness(places, "mutate", *words)
    # The tests' models are tiny: more threads only fight each other.
    env = {**inside(places), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    env.update({SWITCHES[name]: "1" for name in switches})
    config = ["-c", ROOT / "tests" / "pytest.ini", "--rootdir", ROOT / "tests"]
    config += ["-o", f"cache_dir={DEV / 'pytest_cache'}"]
    # In tests/, because `-m` puts the current folder on sys.path and the pack root must not be there.
    pytest = [places.python, "-m", "pytest", *config, *pytest_words(words)]
    tests = call(pytest, cwd=ROOT / "tests", env=env)
    lint = call([places.python, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ROOT])
    return tests or lint


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--comfyui", metavar="PATH", help="your own ComfyUI folder (the one with main.py)")
    common.add_argument("--python", metavar="PATH", help="the Python of your own ComfyUI, used as it is")
    top = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)

    def add(name: str, short: str, more: str) -> argparse.ArgumentParser:
        text = f"{short[0].upper()}{short[1:]}. {more}"
        return commands.add_parser(name, parents=[common], help=short, description=text, allow_abbrev=False)

    models = "your model files, in a folder laid out like ComfyUI/models"
    p = add("setup", "get everything that is needed into .dev/",
            "Needed once; the other commands do it by themselves when something is missing. It can be "
            "stopped and called again. With --python and --comfyui your own ComfyUI is used and nothing is "
            "installed into it. To be rid of everything delete the folder .dev.")
    p.add_argument("--install", action="store_true", help="with --python: install what is missing there")
    p = add("demo", "run every shipped workflow and show the pictures",
            "Starts the real ComfyUI with only this pack, runs each workflow whose model files are there "
            "(those of the miniature world always are) and writes output/demo/index.html for any browser.")
    p.add_argument("--only", metavar="TEXT", help="only workflows whose name contains this")
    p.add_argument("--out", metavar="PATH", help="where the pictures go (default: output/demo)")
    p.add_argument("--models", metavar="PATH", help=models)
    p = add("run", "start ComfyUI with this pack and leave it running",
            "Open the address that it prints; the shipped workflows are under Templates. Ctrl-C ends it.")
    p.add_argument("--port", type=int, default=0, help="port of the page (default: a free one)")
    p.add_argument("--models", metavar="PATH", help=models)
    p = add("test", "run the tests", "Further words go to pytest: dev.py test tests/unit -k mask")
    p.add_argument("--mutations", action="store_true",
                   help="break a copy of the code on purpose as tests/mutations says: tests must fail")
    p.add_argument("--browser", action="store_true",
                   help="also try the page itself in Chromium or Chrome, which has to be installed (about ten minutes)")
    p.add_argument("--fuzz", action="store_true", help="new random examples, and more of them, in tests/host/test_fuzz.py")
    p = add("bench", "measure something and print the numbers", "Without a name it lists what there is.")
    p.add_argument("name", nargs="?", default="", help="what to measure")
    p.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    add("train", "train an adapter, or the files of the miniature world again",
        "Further words go to the trainer; `dev.py train -- --help` lists them.")
    add("doctor", "tell what is installed, which model files were found and what is missing",
        "Paste what it prints into a bug report.")
    return top


def options(args: argparse.Namespace) -> list:
    """Our own flags for the harness, with paths as seen from the caller's folder."""
    out = []
    for key in ("only", "port", "out", "models", "json"):
        value = getattr(args, key, None)
        if value:
            out += ["--" + key, os.path.abspath(value) if key in ("out", "models", "json") else str(value)]
    return out


def main(argv: list) -> int:
    tail: list = []
    if "--" in argv:
        argv, tail = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args, words = parser().parse_known_args(argv)
    words += tail
    if words and args.command not in ("test", "bench", "train"):
        raise Stop(f"dev.py {args.command} does not know: {' '.join(words)}")
    places = Places(args.python, args.comfyui, fresh=args.command == "setup")
    if args.command == "setup":
        install.setup(places, args.install)
        say(f"Ready: Python {places.python}, ComfyUI {places.host}. Next: python dev.py demo")
        return 0
    if args.command == "doctor":
        if not places.ready():
            say("The set-up is not complete: python dev.py setup")
        if not places.there():
            say(f"This Python is {platform.python_version()} on {platform.platform()}.")
            return 1
        return harness(places, "doctor")
    install.setup(places)
    if args.command == "test":
        return run_tests(places, words, args.mutations, [name for name in SWITCHES if getattr(args, name)])
    if args.command == "bench":
        return harness(places, "bench", *([args.name] if args.name else []), *options(args), *words)
    return harness(places, args.command, *options(args), *words)


def terminated(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), terminated)
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as stop:
        sys.exit(f"dev.py: {stop}")
    except KeyboardInterrupt:
        sys.exit(130)
