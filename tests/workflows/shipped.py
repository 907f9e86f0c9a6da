"""What the tests of the shipped workflows share: files, boxes on the canvas, prompts, pictures."""
from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from harness import paths, workflows

EVERY = workflows.shipped()
FILES = [path for path in EVERY if not workflows.own_files(workflows.load(path))]  # what the miniature runs
OWN_FILES = [path for path in EVERY if path not in FILES]  # what needs files of the artist
NAMES = [path.stem for path in FILES]
TITLE = 30  # a node's title bar stands above its pos
OURS = "Likeness_"


class Box(NamedTuple):
    name: str
    x: float
    y: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return self.x < other.right and other.x < self.right and self.y < other.bottom and other.y < self.bottom

    def inside(self, other: Box) -> bool:
        return self.x >= other.x and self.y >= other.y and self.right <= other.right and self.bottom <= other.bottom


def node_box(node: dict) -> Box:
    (x, y), (width, height) = node["pos"], node["size"]
    return Box(f"{node['type']} ({node['id']})", x, y - TITLE, x + width, y + height)


def group_box(group: dict) -> Box:
    x, y, width, height = group["bounding"]
    return Box(group["title"], x, y, x + width, y + height)


def subgraphs(workflow: dict) -> list[dict]:
    return workflow.get("definitions", {}).get("subgraphs", [])


def graphs(workflow: dict) -> list[dict]:
    """The canvas itself and the inside of each sub-graph."""
    return [workflow, *subgraphs(workflow)]


def nodes(workflow: dict) -> Iterator[dict]:
    for graph in graphs(workflow):
        yield from graph["nodes"]


def is_note(node: dict) -> bool:
    return node["type"] in workflows.NOTE_NODES


def blueprints() -> list[Path]:
    return sorted((paths.ROOT / "subgraphs").glob("*.json"))


def prompt(name: str, info: dict) -> dict:
    """API prompt of a shipped workflow."""
    return workflows.to_prompt(workflows.load(paths.WORKFLOWS / f"{name}.json"), info)


def of_type(job: dict, kind: str) -> list[str]:
    return [key for key, node in job.items() if node["class_type"] == kind]


def light(job: dict, steps: int = 3, **sampler: Any) -> dict:
    """The same prompt with few steps and one picture, for tests that are not about the picture."""
    job = copy.deepcopy(job)
    for key in of_type(job, "KSampler"):
        job[key]["inputs"].update({"steps": steps, **sampler})
    for key in of_type(job, "EmptyLatentImage"):
        job[key]["inputs"]["batch_size"] = 1
    return job


def saved(result: Any, job: dict) -> list[np.ndarray]:
    """Pixels (h, w, 3) of all pictures that Save Image wrote."""
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for key in of_type(job, "SaveImage")
            for data in result.images.get(key, [])]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) > 0 and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def golden() -> dict:
    return json.loads((paths.ROOT / "tests" / "golden" / "workflows.json").read_text(encoding="utf-8"))
