"""The part of dev.py that runs inside the virtual environment: python tests/harness COMMAND [words]."""
from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

COMMANDS = ("demo", "run", "bench", "train", "doctor", "mutate", "tiny", "build_workflows")


def terminated(*_: object) -> None:
    # Once is enough: a second signal must not break the clean-up.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    # Started as a folder, so the folder itself stands on sys.path; its parent is what we want.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), terminated)
    from harness.paths import HarnessError

    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"one of {', '.join(COMMANDS)} is needed", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"harness.{sys.argv[1]}").main(sys.argv[2:]) or 0)
    except HarnessError as e:
        print(f"dev.py {sys.argv[1]}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
