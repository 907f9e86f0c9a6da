"""Boxes on the canvas: nodes, and the groups that place them."""
from __future__ import annotations

from typing import Any, NamedTuple

from .paths import HarnessError

TITLE, SLOT, WIDGET, TEXT_BOX = 30, 20, 24, 96  # heights of litegraph in pixels
FRAME, BADGE = 28, 20  # what the Vue renderer needs above that, and for the line with a pack's name
GAP, PADDING, GROUP_TITLE, GROUP_GAP = 30, 24, 60, 60
WIDTH = 300


class Link(NamedTuple):
    """One output of a node (or, inside a sub-graph, one of its inputs: node -10)."""
    node: int
    slot: int
    type: str


class Node:
    """One box; `node["MODEL"]` is its output of that name."""

    def __init__(self, data: dict) -> None:
        self.data = data
        self.values: dict[str, Any] = {}  # by widget

    @property
    def id(self) -> int:
        return self.data["id"]

    def __getitem__(self, name: str) -> Link:
        for slot, output in enumerate(self.data["outputs"]):
            if output["name"] == name:
                return Link(self.id, slot, output["type"])
        raise HarnessError(f"{self.data['type']} has no output {name!r}, but "
                           f"{[o['name'] for o in self.data['outputs']]}.")


class Group:
    """A titled frame. cell: (column, row) in the grid of groups."""

    def __init__(self, board: Any, title: str, cell: tuple[int, int], color: str) -> None:
        self.board, self.title, self.cell, self.color = board, title, cell, color
        self.cells: dict[tuple[int, int], list[Node]] = {}

    def add(self, kind: Any, values: dict | None = None, *, title: str = "", column: int = 0, row: int = 0,
            width: int = 0, room: int = 0, muted: bool = False, models: tuple = ()) -> Node:
        """A new node below the others of its cell. room: further height, for pictures and long texts."""
        node = self.board.node(kind, values or {}, title, width, room, muted, models)
        self.cells.setdefault((column, row), []).append(node)
        return node

    def note(self, text: str, *, title: str = "Read me", width: int = 420, height: int = 500) -> Node:
        node = self.board.note(text, title, width, height)
        self.cells.setdefault((0, 0), []).append(node)
        return node

    def arrange(self, x: float, y: float) -> tuple[float, float]:
        """Places the nodes with the frame's corner at (x, y); size of the frame."""
        lefts, left = {}, x + PADDING
        for column in sorted({c for c, _ in self.cells}):
            nodes = [n for (c, _), cell in self.cells.items() if c == column for n in cell]
            width = max(n.data["size"][0] for n in nodes)
            for node in nodes:
                node.data["size"][0] = width
            lefts[column], left = left, left + width + GAP
        top = bottom = y + GROUP_TITLE
        for row in sorted({r for _, r in self.cells}):
            for (column, _), cell in ((key, cell) for key, cell in self.cells.items() if key[1] == row):
                place = top
                for node in cell:
                    node.data["pos"] = [lefts[column], place + TITLE]
                    place += TITLE + node.data["size"][1] + GAP
                bottom = max(bottom, place)
            top = bottom
        return left - GAP + PADDING - x, bottom - GAP + PADDING - y
