"""What the pack's nodes promise, as plain data: the frozen contract and the English locale.

After a wanted change: LIKENESS_UPDATE=1 python dev.py test tests/host/test_nodes_schema.py
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "schemas.json"
LOCALES = ROOT / "locales" / "en"
DOCS = ROOT / "js" / "docs"
# Choices that are files of the machine, not part of the contract.
FILE_INPUTS = {
    "Likeness_LoadAdapter": ("file",), "Likeness_LoadEncoders": ("first", "second"), "Likeness_LoadSubject": ("file",),
    "Likeness_LoadInversion": ("file",), "Likeness_LoadPhotoMaker": ("file",), "Likeness_LoadInstantID": ("file",),
    "Likeness_LoadFaceModels": ("pack",), "Likeness_LoadFaceSwapper": ("file",),
    "Likeness_LoadFaces": ("file",),
}
SOCKETS = {
    "LIKENESS_ENCODERS": "vision encoders", "LIKENESS_ADAPTER": "subject adapter", "LIKENESS_SUBJECT": "subject",
    "LIKENESS_WORD": "subject word", "LIKENESS_GUIDANCE": "guidance", "LIKENESS_LAYER_WEIGHTS": "layer weights",
    "LIKENESS_INVERSION": "inversion", "LIKENESS_FACE_MODELS": "face models", "LIKENESS_FACE_SWAPPER": "face swapper",
    "LIKENESS_FACES": "faces", "LIKENESS_INSTANTID": "InstantID",
}

Nodes = dict[str, Any]


def _input(node_id: str, item: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": item.id, "type": item.get_io_type()}
    if item.optional:
        entry["optional"] = True
    for name in ("default", "min", "max"):
        if getattr(item, name, None) is not None:
            entry[name] = getattr(item, name)
    if getattr(item, "options", None) is not None:
        files = item.id in FILE_INPUTS.get(node_id, ())
        entry["options"] = "files" if files else list(item.options)
        if files:
            entry.pop("default", None)
    return entry


def snapshot(nodes: Nodes) -> dict[str, Any]:
    """The contract: names, types and order of all inputs and outputs, defaults, ranges and choices."""
    out = {}
    for node_id, cls in sorted(nodes.items()):
        schema = cls.define_schema()
        out[node_id] = {
            "display_name": schema.display_name, "category": schema.category,
            "inputs": [_input(node_id, item) for item in schema.inputs],
            "outputs": [{"name": item.display_name, "type": item.get_io_type()} for item in schema.outputs],
            **({"output_node": True} if schema.is_output_node else {}),
        }
    return out


def node_defs(nodes: Nodes) -> dict[str, Any]:
    """locales/en/nodeDefs.json as the page reads it; outputs are keyed by their place."""
    out = {}
    for node_id, cls in sorted(nodes.items()):
        schema = cls.define_schema()
        out[node_id] = {
            "display_name": schema.display_name, "description": schema.description,
            "inputs": {item.id: {"name": item.display_name or item.id, "tooltip": item.tooltip}
                       for item in schema.inputs},
            "outputs": {str(place): {"name": item.display_name, "tooltip": item.tooltip}
                        for place, item in enumerate(schema.outputs)},
        }
    return out


def main_locale(nodes: Nodes) -> dict[str, Any]:
    """locales/en/main.json: names of the categories and of our sockets."""
    parts = {part for cls in nodes.values() for part in cls.define_schema().category.split("/")}
    return {"nodeCategories": {part: part for part in sorted(parts)}, "dataTypes": dict(sorted(SOCKETS.items()))}


def generated(nodes: Nodes) -> dict[Path, Any]:
    """Every file that is made from the schemas, with its content."""
    return {GOLDEN: snapshot(nodes), LOCALES / "nodeDefs.json": node_defs(nodes),
            LOCALES / "main.json": main_locale(nodes)}


def write(nodes: Nodes) -> None:
    for path, content in generated(nodes).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
