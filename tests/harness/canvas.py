"""Builds ComfyUI workflow files (UI format) from a short description and the server's /object_info.

    board = Board("title", info)
    left = board.group("1  Model", (0, 0))
    loader = left.add("CheckpointLoaderSimple", {"ckpt_name": "x.safetensors"})
    left.add("CLIPTextEncode", {"clip": loader["CLIP"], "text": "a cat"})
    write(path, board.data())

A value that is a Link becomes a link, any other value is written into the widget of that name. Nodes stand in
columns inside their group, groups stand in a grid; all places and sizes follow from that.
"""
from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from .canvas_boxes import BADGE, FRAME, GROUP_GAP, GROUP_TITLE, SLOT, TEXT_BOX, WIDGET, WIDTH, Group, Link, Node
from .canvas_inputs import Input, inputs_of
from .paths import ROOT, HarnessError
from .workflows import options

MUTED = 2
CORE_VERSION = "0.30.0"
NAMESPACE = uuid.UUID("6c1f3c0a-8f0e-5b57-9d0b-3d8d1f6f2a11")  # ids of graphs and sub-graphs follow from their names
NOTE = ("MarkdownNote", "#432", "#653")


class Canvas:
    """Nodes, links and groups: what a workflow and the inside of a sub-graph have in common."""

    first_id = 1

    def __init__(self, name: str, info: dict) -> None:
        self.name, self.info = name, info
        self.nodes: list[Node] = []
        self.links: list[list] = []  # id, origin, slot, target, slot, type
        self.groups: list[Group] = []
        self.subs: dict[str, Sub] = {}
        self.own_files: dict[str, str] = {}  # name and folder of what the artist must have: the server may not know it

    def group(self, title: str, cell: tuple[int, int], color: str = "#3f789e") -> Group:
        self.groups.append(Group(self, title, cell, color))
        return self.groups[-1]

    # -- nodes --------------------------------------------------------------------------------------
    def _append(self, data: dict) -> Node:
        data = {"id": self.first_id + len(self.nodes), "type": "", "pos": [0, 0], "size": [WIDTH, 100], "flags": {}, "order": 0,
                "mode": 0, "inputs": [], "outputs": [], **data}
        self.nodes.append(Node(data))
        return self.nodes[-1]

    def by_id(self, number: int) -> Node:
        return self.nodes[number - self.first_id]

    def note(self, text: str, title: str, width: int, height: int) -> Node:
        kind, color, back = NOTE
        return self._append({"type": kind, "title": title, "size": [width, height], "properties": {},
                             "widgets_values": [text], "color": color, "bgcolor": back})

    def node(self, kind: str | Sub, values: dict, title: str, width: int, room: int, muted: bool, models: tuple) -> Node:
        if isinstance(kind, Sub):
            return self._instance(kind, values, title, width, room)
        if kind not in self.info:
            raise HarnessError(f"The server knows no node {kind}.")
        schema = self.info[kind]
        items = inputs_of(schema)
        unknown = set(values) - {item.name for item in items}
        if unknown:
            raise HarnessError(f"{kind} has no input {sorted(unknown)}, but {[item.name for item in items]}.")
        ours = schema["python_module"].startswith("custom_nodes.")
        node = self._append({"type": kind, "mode": MUTED if muted else 0})
        properties: dict[str, Any] = {"cnr_id": "likeness" if ours else "comfy-core"}
        properties["ver"] = pack_version() if ours else CORE_VERSION
        properties["Node name for S&R"] = kind
        if models:
            properties["models"] = [dict(model) for model in models]
        height = 0
        widgets: list[Any] = []
        # the page makes all plain sockets first, then those that belong to widgets
        for item in sorted(items, key=lambda item: item.widget):
            value = values.get(item.name)
            entry: dict[str, Any] = {"localized_name": item.name, "name": item.name, "type": item.type}
            if item.optional:
                entry["shape"] = 7
            if item.widget:
                entry["widget"] = {"name": item.name}
                node.values[item.name] = self._widget_value(kind, item, value, muted)
                widgets += [node.values[item.name], *(["fixed"] if item.seed else [])]
                height += TEXT_BOX if item.multiline else WIDGET * (1 + item.seed + item.upload)
            elif value is None and not item.optional and not muted:
                raise HarnessError(f"{kind}: input {item.name} is not connected.")
            entry["link"] = None
            node.data["inputs"].append(entry)
            if isinstance(value, Link):
                self.connect(value, node, len(node.data["inputs"]) - 1)
            elif value is not None and not item.widget:
                raise HarnessError(f"{kind}: input {item.name} takes a link, not {value!r}.")
        if any(item.upload for item in items):
            widgets.append("image")  # the upload button, last of all
        for name, kind_out in zip(schema["output_name"], schema["output"], strict=True):
            kind_out = "COMBO" if isinstance(kind_out, list) else kind_out
            node.data["outputs"].append({"localized_name": name, "name": name, "type": kind_out, "links": []})
        slots = max(sum(not item.widget for item in items), len(schema["output"]))
        node.data["size"] = [width or WIDTH, slots * SLOT + height + FRAME + (BADGE if ours else 0) + room]
        node.data["properties"] = properties
        node.data["widgets_values"] = widgets
        if title:
            node.data["title"] = title
        return node

    def _widget_value(self, kind: str, item: Input, value: Any, muted: bool) -> Any:
        if value is None or isinstance(value, Link):
            value = item.default
        choices = options(item.spec)
        if choices is not None and value not in choices and not muted and not item.upload and value not in self.own_files:
            raise HarnessError(f"{kind}: {item.name} cannot be {value!r}, but {choices}.")
        return value

    def _instance(self, sub: Sub, values: dict, title: str, width: int, room: int) -> Node:
        self.subs[sub.id] = sub
        names = [entry["name"] for entry in sub.inputs]
        if set(values) - set(names):
            raise HarnessError(f"{sub.name} has no input {sorted(set(values) - set(names))}, but {names}.")
        node = self._append({"type": sub.id, "title": title or sub.name})
        height, slots = 0, 0
        for entry in sub.inputs:
            own: dict[str, Any] = {"name": entry["name"], "type": entry["type"], "link": None}
            if entry["name"] in sub.promoted:
                own["widget"] = {"name": entry["name"]}
                height += sub.promoted[entry["name"]].height
            else:
                slots += 1
            node.data["inputs"].append(own)
            value = values.get(entry["name"])
            if isinstance(value, Link):
                self.connect(value, node, len(node.data["inputs"]) - 1)
            elif value is not None:
                raise HarnessError(f"{sub.name}: set {entry['name']} inside the sub-graph, or link it.")
            elif entry["name"] in sub.required:
                raise HarnessError(f"{sub.name}: input {entry['name']} is not connected.")
        for entry in sub.outputs:
            node.data["outputs"].append({"name": entry["name"], "type": entry["type"], "links": []})
        node.data["size"] = [width or WIDTH, max(slots, len(sub.outputs)) * SLOT + height + FRAME + BADGE + room]
        proxies = [[str(p.node), p.widget] for p in sub.promoted.values()]
        node.data["properties"] = {"proxyWidgets": proxies, "previewExposures": sub.previews, "cnr_id": "likeness",
                                   "ver": pack_version()}
        node.data["widgets_values"] = [p.value for p in sub.promoted.values()]
        return node

    def connect(self, link: Link, node: Node, slot: int) -> int:
        number = len(self.links) + 1
        entry = node.data["inputs"][slot]
        self._check_types(link, node, entry)
        self.links.append([number, link.node, link.slot, node.id, slot, link.type])
        entry["link"] = number
        if link.node > 0:
            self.by_id(link.node).data["outputs"][link.slot]["links"].append(number)
        return number

    def _check_types(self, link: Link, node: Node, entry: dict) -> None:
        kinds = {link.type, entry["type"]}
        if len(kinds) > 1 and "*" not in kinds and not set(link.type.split(",")) & set(entry["type"].split(",")):
            raise HarnessError(f"{node.data['type']}: input {entry['name']} takes {entry['type']}, not {link.type}.")

    # -- layout -------------------------------------------------------------------------------------
    def arrange(self, x0: float = 0, y0: float = 0) -> list[dict]:
        """Places everything and returns the groups' frames."""
        frames = []
        x = x0
        for column in sorted({group.cell[0] for group in self.groups}):
            y, widest = y0, 0.0
            here = sorted((g for g in self.groups if g.cell[0] == column), key=lambda g: g.cell[1])
            for group in here:
                width, height = group.arrange(x, y)
                widest = max(widest, width)
                frames.append({"id": self.groups.index(group) + 1, "title": group.title, "color": group.color,
                               "bounding": [x, y, width, height], "font_size": 24, "flags": {}})
                y += height + GROUP_GAP
            for frame in frames:
                if frame["bounding"][0] == x:  # groups above one another are equally wide
                    frame["bounding"][2] = widest
            x += widest + GROUP_GAP
        self._order()
        return sorted(frames, key=lambda frame: frame["id"])

    def _order(self) -> None:
        """Each node's place in the order of execution: after all that it needs, else from left to right."""
        needs = {n.id: {link[1] for link in self.links if link[3] == n.id and link[1] > 0} for n in self.nodes}
        done: list[int] = []
        while len(done) < len(self.nodes):
            ready = [n for n in self.nodes if n.id not in done and needs[n.id] <= set(done)]
            if not ready:
                raise HarnessError(f"{self.name} has a circle of links.")
            done.append(min(ready, key=lambda n: (*n.data["pos"], n.id)).id)
        for node in self.nodes:
            node.data["order"] = done.index(node.id)


class Promoted(NamedTuple):
    node: int
    widget: str
    height: int
    value: Any


class Sub(Canvas):
    """The definition of a sub-graph. Node ids are numbered apart from the board's: the page wants them unique."""
    first_id = 101

    def __init__(self, name: str, info: dict, description: str = "", category: str = "Likeness") -> None:
        super().__init__(name, info)
        self.id = str(uuid.uuid5(NAMESPACE, name))
        self.description, self.category = description, category
        self.inputs: list[dict] = []
        self.outputs: list[dict] = []
        self.required: set[str] = set()
        self.promoted: dict[str, Promoted] = {}
        self.previews: list[dict[str, str]] = []

    def input(self, name: str, kind: str, required: bool = True) -> Link:
        """A socket on the left; use the link as often as needed."""
        self.inputs.append({"id": str(uuid.uuid5(NAMESPACE, f"{self.name}/in/{name}")), "name": name, "type": kind,
                            "linkIds": []})
        if required:
            self.required.add(name)
        return Link(-10, len(self.inputs) - 1, kind)

    def promote(self, name: str, node: Node, widget: str, *more: tuple[Node, str]) -> None:
        """Show a widget of an inner node on the outside, under `name`; it may be linked as well. more: widgets that follow it."""
        item = next(i for i in inputs_of(self.info[node.data["type"]]) if i.name == widget)
        link = self.input(name, item.type, required=False)
        for target, other in ((node, widget), *more):
            self.connect(link, target, next(i for i, entry in enumerate(target.data["inputs"]) if entry["name"] == other))
        height = TEXT_BOX if item.multiline else WIDGET
        self.promoted[name] = Promoted(node.id, widget, height, node.values[widget])

    def preview(self, node: Node) -> None:
        """Show an inner node's preview picture on the outside."""
        name = "$$canvas-image-preview"
        self.previews.append({"name": name, "sourceNodeId": str(node.id), "sourcePreviewName": name})

    def output(self, name: str, link: Link) -> None:
        number = len(self.links) + 1
        self.outputs.append({"id": str(uuid.uuid5(NAMESPACE, f"{self.name}/out/{name}")), "name": name,
                             "type": link.type, "linkIds": [number]})
        self.links.append([number, link.node, link.slot, -20, len(self.outputs) - 1, link.type])
        self.by_id(link.node).data["outputs"][link.slot]["links"].append(number)

    def connect(self, link: Link, node: Node, slot: int) -> int:
        number = super().connect(link, node, slot)
        if link.node == -10:
            self.inputs[link.slot]["linkIds"].append(number)
        return number

    def definition(self) -> dict:
        """The sub-graph as it stands under definitions.subgraphs."""
        frames = self.arrange()
        right = max((f["bounding"][0] + f["bounding"][2] for f in frames), default=0)
        boxes = [(self.inputs, -240.0), (self.outputs, right + 80.0)]
        for entries, x in boxes:
            for row, entry in enumerate(entries):
                entry["pos"] = [x + 100, GROUP_TITLE + 20 + row * SLOT]
        return {
            "id": self.id, "version": 1, "revision": 0, "config": {}, "name": self.name,
            "state": {"lastGroupId": len(self.groups), "lastNodeId": self.nodes[-1].id, "lastLinkId": len(self.links),
                      "lastRerouteId": 0},
            "inputNode": {"id": -10, "bounding": [boxes[0][1], GROUP_TITLE, 120, 40 + SLOT * len(self.inputs)]},
            "outputNode": {"id": -20, "bounding": [boxes[1][1], GROUP_TITLE, 120, 40 + SLOT * len(self.outputs)]},
            "inputs": self.inputs, "outputs": self.outputs, "widgets": [],
            "nodes": [n.data for n in self.nodes], "groups": frames,
            "links": [dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
                      for link in self.links],
            "extra": {"workflowRendererVersion": "LG"}, "category": self.category, "description": self.description,
        }

    def blueprint(self) -> dict:
        """A file for subgraphs/: the definition and one unconnected instance."""
        self.required = set()
        board = Board(self.name, self.info)
        board.group("", (0, 0)).add(self, width=WIDTH + 40)
        return {**board.data(), "groups": []}


class Board(Canvas):
    """A whole workflow."""

    def data(self) -> dict:
        frames = self.arrange()
        return {
            "id": str(uuid.uuid5(NAMESPACE, f"board/{self.name}")), "revision": 0,
            "last_node_id": len(self.nodes), "last_link_id": len(self.links),
            "nodes": [n.data for n in self.nodes], "links": self.links, "groups": frames,
            "definitions": {"subgraphs": [sub.definition() for sub in self.subs.values()]}, "config": {},
            "extra": {"workflowRendererVersion": "LG", "ds": {"scale": 0.6, "offset": [60, 100]},
                      **({"own_files": self.own_files} if self.own_files else {})}, "version": 0.4,
        }


def pack_version() -> str:
    """Version of the pack, from pyproject.toml (read as text: Python 3.10 has no reader for it)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split('version = "', 1)[1].split('"')[0]


def write(path: Path, data: dict) -> Path:
    """JSON as the page exports it, but with the same bytes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return path
