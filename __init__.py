"""Likeness: one reference picture in, new pictures of that subject out."""
from __future__ import annotations

import importlib
import logging
from typing import Any

WEB_DIRECTORY = "./js"
# modules of nodes/, in the order of work
FAMILIES = ("load", "load_views", "subject", "inject", "guidance", "view", "invert", "face_files", "face", "portrait", "exact")

log = logging.getLogger("likeness")


def load_nodes(families: tuple[str, ...] = FAMILIES) -> list[Any]:
    """Node classes of every family that loads; one that does not is logged with its reason and left out."""
    from .nodes import _paths

    _paths.register()
    nodes: list[Any] = []
    for family in families:
        try:
            found = importlib.import_module(f".nodes.{family}", __package__).NODES
            for node in found:
                node.GET_SCHEMA()  # one broken schema would make the host refuse the whole pack
            nodes += found
        except Exception as error:
            log.error("Likeness: nodes/%s.py did not load, %s: %s", family, type(error).__name__, error)
            log.debug("Likeness: why nodes/%s.py failed", family, exc_info=True)
    return nodes


async def comfy_entrypoint() -> Any:
    """What the host calls: the pack's extension. Nothing of the pack is imported before."""
    from comfy_api.latest import ComfyExtension

    class Likeness(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return load_nodes()

    return Likeness()
