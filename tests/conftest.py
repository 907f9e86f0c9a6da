"""Shared fixtures. The pack is loaded once as package `likeness`; its root never stands on sys.path.

tests/unit needs nothing but torch; tests/host gets the host's modules in this process (fixture `host`);
tests/workflows talks to a real server (fixture `server`); tests/browser opens its page in Chromium.
"""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

# Before torch is imported: tiny tensors, and more threads only fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from harness import host as host_module  # noqa: E402
from harness import pack, paths, tiny  # noqa: E402
from harness.server import Server  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts us in the background makes us and every child deaf to Ctrl-C; some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TIERS = ("unit", "host", "workflows", "browser")
pack.load_pack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier, and run the quick tiers first."""
    def tier(item: pytest.Item) -> str:
        parts = Path(item.path).relative_to(paths.ROOT / "tests").parts
        return parts[0] if parts[0] in TIERS else ""

    for item in items:
        if tier(item):
            item.add_marker(tier(item))
    items.sort(key=lambda item: TIERS.index(tier(item)) if tier(item) else len(TIERS))


@pytest.fixture(scope="session", autouse=True)
def _pack_root_stays_off_the_path():
    yield
    root = str(paths.ROOT)
    assert root not in [os.path.abspath(p or os.getcwd()) for p in sys.path], "the pack root is on sys.path"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return paths.ROOT


@pytest.fixture(scope="session")
def host():
    """The real host in this process, on the CPU, its folders moved to a private place.

    Namespace with path, version and args. LIKENESS_DEVICE=auto uses a card when there is one.
    """
    cpu = None if os.environ.get("LIKENESS_DEVICE") == "auto" else True
    return host_module.enter(cpu=cpu, base=host_module.private_base())


@pytest.fixture(scope="session")
def nodes(host):
    """The pack's node classes by id."""
    return pack.pack_nodes()


@pytest.fixture(scope="session")
def tiny_files() -> dict[str, Path]:
    """Tiny checkpoints, LoRA and ControlNet: file name -> path (see harness/tiny.py)."""
    return tiny.ensure()


@pytest.fixture(scope="session")
def tiny_checkpoint(host, tiny_files):
    """Function: "sd15" | "sdxl" | "sd3" -> a new (MODEL, CLIP, VAE) of the tiny checkpoint."""
    tiny.register()

    def load(kind: str):
        return host_module.load_checkpoint(tiny_files[f"tiny_{kind}.safetensors"])

    return load


@pytest.fixture(scope="session")
def make_server(tiny_files):
    """Function: further keywords of harness.server.Server -> a started server with pack and tiny models.

    All servers that it made end with the session.
    """
    servers: list[Server] = []

    def make(**options) -> Server:
        folder = next(iter(tiny_files.values())).parent
        keys = {"checkpoints": folder, "loras": folder, "controlnet": folder}
        options.setdefault("cpu", None if os.environ.get("LIKENESS_DEVICE") == "auto" else True)
        options["packs"] = [tiny.PACK, *options.get("packs", ())]
        options["model_folders"] = {**keys, **options.get("model_folders", {})}
        server = Server(**options)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server) -> Server:
    """One real server for the whole session."""
    return make_server()
