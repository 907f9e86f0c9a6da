"""The real ComfyUI server in a private base directory.

    with Server(cpu=True) as server:
        result = server.run(prompt)          # API-format prompt
        assert result.ok, result.error
"""
from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .client import Client
from .host import accelerator
from .pack import mirror
from .paths import DEV, PACK_FOLDER, ROOT, HarnessError, host_dir


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def holds_files(folder: Path) -> bool:
    """False for a folder of a fresh ComfyUI, which holds only a file that says what to put there."""
    return any(p.is_file() and not p.name.startswith(("put_", ".")) for p in folder.rglob("*"))


def model_paths_yaml(folders: Iterable[Path], extra: dict[str, Path]) -> str:
    """extra_model_paths text: each sub-folder of `folders` under its own name, and `extra` key -> folder."""
    blocks = []
    for number, folder in enumerate(folders):
        found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        names = [p.name for p in found if holds_files(p)]
        if names:
            lines = [f"  {json.dumps(n)}: {json.dumps(str(folder / n))}" for n in names]
            blocks.append("\n".join([f"models_{number}:", *lines]))
    if extra:
        lines = [f"  {json.dumps(k)}: {json.dumps(str(v))}" for k, v in extra.items()]
        blocks.append("\n".join(["extra:", *lines]))
    return "\n".join(blocks) + "\n" if blocks else ""


class Server(Client):
    """One host process. `start` or `with` begins it, `stop` ends it with everything that it started.

    base: its folder for models, input, output (None: a temporary one, gone after `stop`).
    packs: further custom node folders beside the pack (`pack=False`: without it).
    models: folders laid out like ComfyUI/models; model_folders: {folder key: path}.
    flags: further main.py flags, e.g. ["--cache-none"]. cpu=None: a card when torch sees one.
    host: another ComfyUI folder than that of the set-up, e.g. the oldest one that is supported.
    """

    def __init__(
        self, base: Path | None = None, *, pack: bool = True, packs: Iterable[Path] = (),
        models: Iterable[Path] = (), model_folders: dict[str, Path] | None = None,
        flags: Iterable[str] = (), cpu: bool | None = None, port: int = 0,
        env: dict[str, str] | None = None, start_timeout: float = 600, host: Path | None = None,
    ) -> None:
        super().__init__("")
        self.port, self.host = 0, (host or host_dir()).resolve()
        self._temporary = base is None
        if base is None:
            (DEV / "base").mkdir(parents=True, exist_ok=True)
            base = Path(tempfile.mkdtemp(prefix="server-", dir=DEV / "base"))
        self.base = Path(base).resolve()  # the host resolves a relative one from its own folder
        self.pack, self.packs, self.flags = pack, list(packs), list(flags)
        self.models, self.model_folders = list(models), dict(model_folders or {})
        self.cpu = not accelerator() if cpu is None else cpu
        self._wanted_port = port
        self.env, self.start_timeout = dict(env or {}), start_timeout
        self.log_path = self.base / "server.log"
        self.process: subprocess.Popen | None = None

    # -- life ---------------------------------------------------------------------------------------
    @property
    def input(self) -> Path:
        return self.base / "input"

    def log(self, lines: int = 0) -> str:
        """The server's log, or its last lines."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the host colours its lines
        return "\n".join(text.splitlines()[-lines:]) if lines else text

    def _prepare(self) -> list[str]:
        names = ("custom_nodes", "models/checkpoints", "input", "output", "temp", "user/default")
        for name in names:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        nodes = self.base / "custom_nodes"
        names_of_packs = []
        if self.pack:
            mirror(ROOT, nodes / PACK_FOLDER)
            names_of_packs.append(PACK_FOLDER)
        for folder in self.packs:
            mirror(folder, nodes / folder.name, tuple(p.name for p in folder.iterdir()))
            names_of_packs.append(folder.name)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():  # the first-run tour would replace the loaded graph
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
        # The asset database would otherwise lie in the host's own folder.
        command = [
            sys.executable, str(self.host / "main.py"), "--port", str(self.port),
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--disable-auto-launch", "--disable-api-nodes", *(["--cpu"] if self.cpu else []),
        ]
        text = model_paths_yaml(self.models, self.model_folders)
        if text:
            (self.base / "model_paths.yaml").write_text(text, encoding="utf-8")
            command += ["--extra-model-paths-config", str(self.base / "model_paths.yaml")]
        command += [*self.flags, "--disable-all-custom-nodes"]
        return command + (["--whitelist-custom-nodes", *names_of_packs] if names_of_packs else [])

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
        env.update(PYTHONPYCACHEPREFIX=str(DEV / "pycache"), PYTHONUNBUFFERED="1", PYTHONUTF8="1")
        env.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")
        # Tiny models are 10 to 50 times faster with one thread on a busy machine.
        env.setdefault("OMP_NUM_THREADS", "1")
        return {**env, **self.env}

    def start(self) -> Server:
        """Start and wait until it answers; raises HarnessError with the end of the log."""
        try:
            for last in (False, False, True):
                self.port = self._wanted_port or free_port()
                self.url = f"http://127.0.0.1:{self.port}"
                self._spawn()
                try:
                    self._wait_ready()
                    self._check_packs()
                    return self
                except HarnessError as e:
                    # Between asking for a free port and using it another program may have taken it.
                    taken = "address already in use" in str(e).lower() or "10048" in str(e)
                    if last or self._wanted_port or not taken:
                        raise
                    self._kill()
        except BaseException:
            self.stop()
            raise
        raise AssertionError("unreachable")

    def _spawn(self) -> None:
        command = self._prepare()
        # A group of its own: stop() reaches the server's children, and Ctrl-C reaches us, not the server.
        own: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            own = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.host, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._environment(), **own,
            )
        atexit.register(self.stop)

    def _wait_ready(self) -> None:
        assert self.process is not None
        end = time.monotonic() + self.start_timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise HarnessError(
                    f"The server ended with code {self.process.returncode} before it was ready. "
                    f"The end of its log:\n{self.log(40)}"
                )
            try:
                self.get("/system_stats", timeout=2)
                return
            except (OSError, ValueError):
                time.sleep(0.1)
        raise HarnessError(
            f"The server was not ready after {self.start_timeout:.0f} s. The end of its log:\n{self.log(40)}"
        )

    def _check_packs(self) -> None:
        """A pack that fails to import is only a line in the log; here it is an error."""
        marks = ("(IMPORT FAILED)", "Error while calling comfy_entrypoint", "Cannot import ")
        found = [line for line in self.log().splitlines() if any(m in line for m in marks)]
        found = [line for line in found if str(self.base / "custom_nodes") in line]
        if found:
            raise HarnessError("A pack did not load: " + found[0] + "\n" + self.log(60))

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
            process.wait(10)
            return
        for sig, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
            try:
                os.killpg(process.pid, sig)
            except ProcessLookupError:
                break
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue

    def stop(self) -> None:
        """End the server and its children; safe to call twice."""
        self._kill()
        atexit.unregister(self.stop)
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
