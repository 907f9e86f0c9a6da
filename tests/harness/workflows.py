"""Shipped workflows (UI format) as API prompts, and which model files they need."""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .paths import WORKFLOWS, HarnessError

MODEL_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".onnx", ".gguf")
NOTE_NODES = ("Note", "MarkdownNote")


def shipped(folder: Path = WORKFLOWS) -> list[Path]:
    """Workflow files an artist finds in the template browser, by the numbers that their names begin with."""
    return sorted(folder.glob("*.json"), key=lambda p: (int("0" + re.match(r"\d*", p.name).group()), p.name.lower()))


def own_files(workflow: dict) -> dict[str, str]:
    """Name and folder of each file that the artist must have for this workflow; nothing where the miniature is enough."""
    return workflow.get("extra", {}).get("own_files", {})


def load(path: Path) -> dict:
    """A workflow file; HarnessError when it is not the UI format that the page opens."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise HarnessError(f"{path.name} is not JSON: {e}") from e
    if not isinstance(workflow, dict) or "nodes" not in workflow:
        raise HarnessError(f"{path.name} is not a workflow in UI format (no list of nodes).")
    return workflow


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """UI graph -> API prompt, as the page queues it (sub-graphs, muted and bypassed nodes included)."""
    from comfy_cli.workflow_to_api import convert_ui_to_api

    return convert_ui_to_api(workflow, object_info)


def notes(workflow: dict) -> list[str]:
    """Texts of the notes on the canvas, from left to right."""
    found = [n for n in workflow["nodes"] if n.get("type") in NOTE_NODES and n.get("widgets_values")]

    def x(node: dict) -> float:
        pos = node.get("pos") or [0, 0]
        return float(pos[0] if isinstance(pos, list) else pos.get("0", 0))

    return [str(n["widgets_values"][0]).strip() for n in sorted(found, key=x)]


def options(spec: Any) -> list | None:
    """Choices of an input as /object_info gives it (both styles), None when it is not a combo."""
    if not isinstance(spec, (list, tuple)) or not spec:
        return None
    if isinstance(spec[0], (list, tuple)):
        return list(spec[0])
    if spec[0] == "COMBO" and len(spec) > 1 and isinstance(spec[1], dict):
        found = spec[1].get("options")
        return list(found) if found is not None else None
    return None


def combos(prompt: dict, object_info: dict) -> Iterator[tuple[str, str, str, list]]:
    """(node class, input name, chosen value, choices) of each combo widget in a prompt."""
    for node in prompt.values():
        kind = node["class_type"]
        sections = object_info.get(kind, {}).get("input", {})
        for section in ("required", "optional"):
            for name, spec in (sections.get(section) or {}).items():
                value, choices = node["inputs"].get(name), options(spec)
                if choices is not None and isinstance(value, str):
                    yield kind, name, value, choices


def missing_models(prompt: dict, object_info: dict, own: Iterable[str] = ()) -> list[str]:
    """Model files that a loader of the prompt names and the server does not have.

    Only names that end like a model file, and those of `own`, count: any other unknown choice is a fault of the workflow and
    shall fail when it runs. The miniature world loads without any file, so nothing of it is ever missing.
    """
    return [
        value
        for kind, _, value, choices in combos(prompt, object_info)
        if kind != "Likeness_LoadDemo" and (value.lower().endswith(MODEL_ENDINGS) or value in own) and value not in choices
    ]


def copy_inputs(target: Path, folder: Path = WORKFLOWS / "inputs") -> list[str]:
    """Pictures that the workflows load, into a server's input folder; returns their names."""
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
            names.append(path.name)
    return names


def input_pictures(prompt: dict) -> list[str]:
    """File names that the prompt's LoadImage-like nodes read from the input folder."""
    names = [
        value.split(" [")[0]
        for node in prompt.values()
        if node["class_type"].startswith("LoadImage")
        for value in (node["inputs"].get("image"),)
        if isinstance(value, str)
    ]
    return list(dict.fromkeys(names))
