"""`dev.py test --mutations`: does a broken pack turn a test red?

Each file of tests/mutations holds `MUTATIONS`, a list of `Mutation`. Each is applied alone to a copy of the
checkout, its tests run there, and at least one must fail. The checkout itself is never touched.
"""
from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .pack import mirror
from .paths import DEV, PACK_FOLDER, PACK_PARTS, ROOT, HarnessError, host_dir

LISTS = ROOT / "tests" / "mutations"


class Mutation(NamedTuple):
    """name: what is broken. file: path in the checkout. old, new: text that stands there exactly once, and
    what takes its place. tests: pytest words that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("tests/unit",)


def load() -> list[Mutation]:
    found: list[Mutation] = []
    for path in sorted(LISTS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"mutations_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.MUTATIONS
    names = [m.name for m in found]
    if not found or len(set(names)) != len(names):
        raise HarnessError("The lists in tests/mutations are empty or have a name twice.")
    return found


def mutated(text: str, mutation: Mutation) -> str:
    """`text` with the mutation; HarnessError when its place is not there exactly once."""
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise HarnessError(f"{mutation.name}: its text stands {count} times in {mutation.file}, not once.")
    return text.replace(mutation.old, mutation.new)


def run_tests(copy: Path, words: tuple[str, ...]) -> tuple[int, str]:
    tests = copy / "tests"
    paths = [str(copy / w) if (copy / w.split("::")[0]).exists() else w for w in words]
    command = [sys.executable, "-m", "pytest", "-c", str(tests / "pytest.ini"), "--rootdir", str(tests)]
    env = {**os.environ, "COMFYUI_PATH": str(host_dir()), "LIKENESS_DEV": str(DEV), "OMP_NUM_THREADS": "1"}
    # The same source under another time stamp: byte code of the mutant before must not be taken for it.
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    env.pop("PYTHONPYCACHEPREFIX", None)
    command += ["-x", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=tests, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main(argv: list[str]) -> int:
    """Words pick mutations whose name contains one of them."""
    chosen = [m for m in load() if not argv or any(w.lower() in m.name.lower() for w in argv)]
    if not chosen:
        raise HarnessError("No mutation has such a name.")
    copy = DEV / "mutants" / str(os.getpid()) / PACK_FOLDER
    survived = []
    try:
        mirror(ROOT, copy, (*PACK_PARTS, "tests", "dev.py", ".comfyignore"))
        tests = sorted({m.tests for m in chosen})
        for words in tests:  # a test that is red anyway notices nothing
            code, text = run_tests(copy, words)
            if code != 0:
                raise HarnessError(f"Without any mutation {' '.join(words)} fails:\n{text[-2000:]}")
        for mutation in chosen:
            place, begin = copy / mutation.file, time.monotonic()
            before = place.read_text(encoding="utf-8")
            try:
                place.write_text(mutated(before, mutation), encoding="utf-8")
                code, text = run_tests(copy, mutation.tests)
            finally:
                place.write_text(before, encoding="utf-8")
            # 1 is "tests failed"; anything else (nothing collected, a crash of pytest) proves nothing.
            caught = code == 1
            seconds = time.monotonic() - begin
            print(f"  {'caught' if caught else 'SURVIVED':>8}  {seconds:6.1f} s  {mutation.name}", flush=True)
            if not caught:
                survived.append(mutation.name)
                print(text[-1500:])
    finally:
        shutil.rmtree(copy.parent, ignore_errors=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations were caught.")
    return 1 if survived else 0
