"""Fixtures of the host tier."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from harness import mini as mini_module


@pytest.fixture(scope="session")
def mini_files(host, tmp_path_factory):
    """Folder with base, dino, mae, custany and untrained (.safetensors) of a random miniature."""
    return mini_module.make_weights(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="session")
def mini(mini_files):
    """A random miniature: model, clip, vae, adapter (random in every part), untrained (changes nothing), encoders.

    Also folder, the files that they came from. Nothing in it may be changed: all tests share it.
    """
    adapters = mini_module.pack("models.hosting.adapters")
    encoders = mini_module.pack("models.hosting.encoders")
    demo = mini_module.pack("models.hosting.demo")
    model, clip, vae = demo.load_base(None, mini_files / mini_module.BASE)
    loaded = tuple(encoders.load_encoder(mini_files / name) for name in (mini_module.DINO, mini_module.MAE))
    return SimpleNamespace(
        model=model, clip=clip, vae=vae, encoders=encoders.Encoders(loaded), folder=mini_files,
        adapter=adapters.load_adapter(mini_files / mini_module.ADAPTER),
        untrained=adapters.load_adapter(mini_files / mini_module.UNTRAINED),
    )
