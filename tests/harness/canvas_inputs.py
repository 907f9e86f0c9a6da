"""A node's inputs as the page sees them, read from /object_info."""
from __future__ import annotations

from typing import Any, NamedTuple

from .workflows import options

# The types for which the page (1.47) makes a widget by their name alone, in every node and for optional inputs too.
VALUES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
EDITORS = ("MARKDOWN", "IMAGEUPLOAD", "COLOR", "IMAGECOMPARE", "BOUNDING_BOX", "BOUNDING_BOXES", "CHART", "GALLERIA", "PAINTER",
           "TEXTAREA", "CURVE", "RANGE", "COLORS")
WIDGETS = VALUES + EDITORS


class Input(NamedTuple):
    """One input; spec is [type, {default, limits, hints}]."""
    name: str
    type: str
    widget: bool
    optional: bool
    spec: Any

    @property
    def extra(self) -> dict:
        return extra_of(self.spec)

    @property
    def seed(self) -> bool:
        """The page adds a second widget, control_after_generate, behind such an input."""
        return bool(self.extra.get("control_after_generate")) or (self.type == "INT" and self.name in ("seed", "noise_seed"))

    @property
    def upload(self) -> bool:
        """The page adds an upload button behind all other widgets."""
        return bool(self.extra.get("image_upload"))

    @property
    def multiline(self) -> bool:
        return bool(self.extra.get("multiline"))

    @property
    def default(self) -> Any:
        """What the page puts into a fresh widget."""
        if "default" in self.extra:
            return self.extra["default"]
        choices = options(self.spec)
        return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(self.type, "")


def extra_of(spec: Any) -> dict:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def inputs_of(schema: dict) -> list[Input]:
    """Inputs in the host's order: required, then optional. Hidden ones have no place on the canvas."""
    found = []
    for section in ("required", "optional"):
        specs = schema["input"].get(section) or {}
        for name in schema.get("input_order", {}).get(section) or list(specs):
            spec = specs[name]
            kind = "COMBO" if options(spec) is not None else str(spec[0])
            widget = kind in WIDGETS and not extra_of(spec).get("forceInput")
            found.append(Input(name, kind, widget, section == "optional", spec))
    return found
