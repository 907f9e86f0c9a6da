"""The registry's own check of a pack (`comfy node validate`), on exactly the files that are shipped."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import pack


@pytest.fixture
def check(tmp_path):
    """Function: (exit code, what was said) about the copy of the pack that it also gives."""
    programs = Path(sys.executable).parent
    program = shutil.which("comfy", path=f"{programs}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("comfy-cli is not installed, so `comfy node validate` was not asked")
    copy = pack.mirror(pack.ROOT, tmp_path / "pack")
    # Its settings go into a folder of ours, and it asks nobody about telemetry.
    env = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "APPDATA": str(tmp_path), "DO_NOT_TRACK": "1",
           "XDG_CONFIG_HOME": str(tmp_path), "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}

    def ask() -> tuple[int, str]:
        words = [program, "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
        done = subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace",
                              timeout=300)
        return done.returncode, done.stdout + done.stderr
    return copy, ask


def test_comfy_node_validate_is_clean(check):
    copy, ask = check
    code, said = ask()
    assert code == 0 and "passed" in said and "warning" not in said.lower(), said
    with open(copy / "nodes" / "load.py", "a", encoding="utf-8") as file:
        file.write("\nexec('1')\n")
    code, said = ask()
    assert "S102" in said, "it would not have noticed anything: " + said
