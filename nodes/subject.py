"""The subject: cut out of a picture, encoded, blended, saved and loaded."""
from __future__ import annotations

from comfy_api.latest import io, ui

from ..models.common.errors import LikenessError
from ..models.common.records import Subject
from ..models.common.reference import ON_MISSING, PRESETS, prepare
from ..models.customnet import reference as customnet
from ..models.hosting.adapters import PAIRINGS, Adapter
from ..models.hosting.encoders import Encoders
from ..models.hosting.memory import to_intermediate
from ..models.hosting.subjects import BLEND_MODES, blend, extract_from_picture, load_subject, save_subject
from . import _paths, _types

_MASK = ("White where the subject is. Without a mask the picture's alpha channel serves, without alpha the "
         "whole picture. MASK of Load Image: for a transparent picture put Invert Mask between; a mask painted "
         "in the mask editor is connected as it is.")
_MARGIN = "Free space round the subject on each side, as a share of its longer side."


class PrepareReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_PrepareReference",
            display_name="Prepare Reference",
            category=_types.SUBJECT,
            description="Cuts the subject out of a picture and lays it on a plain background in a square. "
                        "ID Extractor does this by itself; use this node to see or reuse the cut-out.",
            search_aliases=["prep image", "crop subject", "reference", "ipadapter prep image",
                            "remove background crop", "square crop"],
            inputs=[
                io.Image.Input("image", tooltip="Picture of the subject, of any size; a batch is fine."),
                io.Mask.Input("mask", optional=True, tooltip=_MASK),
                io.Combo.Input("preset", options=[*PRESETS, customnet.PRESET],
                               tooltip="What the result looks like. CustomNet: what View Conditioner wants, a hard cut-out of "
                                       "at most 200 pixels on 256 white ones; margin and size do not count then."),
                io.Float.Input("margin", default=0.1, min=0.0, max=1.0, step=0.01, tooltip=_MARGIN),
                io.Int.Input(
                    "size", default=512, min=0, max=4096, step=8,
                    tooltip="Side of the square in pixels. 0 keeps the subject's own pixels, in the square "
                            "of the largest one.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="What to do with an empty mask: stop with an error, or pass the whole picture "
                            "through with an empty mask.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The subject on the plain background, square."),
                io.Mask.Output(display_name="mask", tooltip="The subject's mask in that square."),
                io.Boolean.Output(
                    display_name="found",
                    tooltip="Whether at least one picture held a subject.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image: io.Image.Type, preset: str, margin: float, size: int, on_missing: str,
                mask: io.Mask.Type | None = None) -> io.NodeOutput:
        result = (customnet.prepare(image, mask, on_missing) if preset == customnet.PRESET
                  else prepare(image, mask, preset, margin, size, on_missing))
        return io.NodeOutput(to_intermediate(result.image), to_intermediate(result.mask), any(result.found))


class ExtractID(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_ExtractID",
            display_name="ID Extractor",
            category=_types.SUBJECT,
            description="Looks at one or several pictures of a subject and keeps what makes it itself. Cuts "
                        "out, crops and whitens the background as the adapter learned it.",
            search_aliases=["ipadapter", "ipadapter encoder", "faceid", "subject", "reference",
                            "reference image", "image embeds"],
            inputs=[
                _types.Adapter.Input("adapter", tooltip="From Load Subject Adapter or Load Miniature World."),
                _types.Encoders.Input("encoders", tooltip="From the same loader as the adapter."),
                io.Image.Input("image", tooltip="One or several pictures of ONE subject, as a batch."),
                io.Mask.Input("mask", optional=True, tooltip=_MASK),
                io.Combo.Input(
                    "combine", options=list(PAIRINGS),
                    tooltip="For several pictures. concat: all their details side by side; average: their "
                            "mean, smaller and calmer; one per latent: picture 1 for latent 1 and so on.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="What to do with an empty mask: stop with an error, or leave that picture out. "
                            "With none left the subject is empty and the injector passes everything through.",
                ),
                io.Float.Input(
                    "margin", default=0.1, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip=_MARGIN + " The text output says when the adapter was trained with another one.",
                ),
            ],
            outputs=[
                _types.Subject.Output(
                    display_name="subject",
                    tooltip="The subject. Goes to Dual-Level Injector, Blend Subjects or Save Subject.",
                ),
                io.Image.Output(
                    display_name="image",
                    tooltip="What the encoders saw: check here that the cut-out is clean.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="Tokens, encoders, number of pictures and how much of each the mask kept.",
                ),
                io.Boolean.Output(
                    display_name="found",
                    tooltip="Whether at least one picture held a subject.",
                ),
            ],
        )

    @classmethod
    def execute(cls, adapter: Adapter, encoders: Encoders, image: io.Image.Type, combine: str,
                on_missing: str, mask: io.Mask.Type | None = None, margin: float = 0.1) -> io.NodeOutput:
        result = extract_from_picture(adapter, encoders, image, mask, combine, margin, on_missing)
        picture = to_intermediate(result.picture)
        preview = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(result.subject, picture, result.report, result.found, ui=preview)


class BlendSubjects(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_BlendSubjects",
            display_name="Blend Subjects",
            category=_types.SUBJECT,
            description="Mixes two subjects of the same adapter into one. Chain it for more.",
            search_aliases=["merge subjects", "mix faces", "combine embeds", "ipadapter combine embeds",
                            "average subject", "interpolate"],
            inputs=[
                _types.Subject.Input("subject_a", tooltip="First subject."),
                _types.Subject.Input("subject_b", tooltip="Second subject, extracted with the same adapter."),
                io.Float.Input(
                    "weight", default=0.5, min=0.0, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider,
                    tooltip="0 is subject_a, 1 is subject_b, 0.5 is half of each.",
                ),
                io.Combo.Input(
                    "mode", options=list(BLEND_MODES),
                    tooltip="average: one subject between the two. concat: the details of both stay side by "
                            "side, and the weight acts on the word only.",
                ),
            ],
            outputs=[
                _types.Subject.Output(
                    display_name="subject",
                    tooltip="The blend, used like any other subject.",
                ),
                io.String.Output(display_name="text", tooltip="Shares and number of tokens."),
            ],
        )

    @classmethod
    def execute(cls, subject_a: Subject, subject_b: Subject, weight: float, mode: str) -> io.NodeOutput:
        return io.NodeOutput(*blend(subject_a, subject_b, weight, mode))


class SaveSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_SaveSubject",
            display_name="Save Subject",
            category=_types.SUBJECT,
            description="Writes a subject into output/likeness/subjects, so that the next workflow needs "
                        "neither its picture nor the encoders.",
            search_aliases=["save embeds", "ipadapter save embeds", "export subject", "save face",
                            "store reference"],
            inputs=[
                _types.Subject.Input("subject", tooltip="The subject to keep."),
                io.String.Input(
                    "filename_prefix", default="subject",
                    tooltip="Name of the file below output/likeness/subjects; a number is added. "
                            "Sub-folders and date marks work as in Save Image.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="Path of the written file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, subject: Subject, filename_prefix: str) -> io.NodeOutput:
        path = _paths.new_path(_paths.SUBJECTS, filename_prefix)
        save_subject(subject, path)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


class LoadSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadSubject",
            display_name="Load Subject",
            category=_types.SUBJECT,
            description="Reads a subject that Save Subject wrote, and checks that it was made with this "
                        "adapter.",
            search_aliases=["load embeds", "ipadapter load embeds", "import subject", "load face",
                            "saved reference"],
            inputs=[
                io.Combo.Input(
                    "file", options=list(_paths.saved_files(_paths.SUBJECTS)) or [_paths.nothing_saved(_paths.SUBJECTS)],
                    tooltip="Saved subject from output/likeness/subjects, from input, or from "
                            "models/likeness/subjects. Press R after saving a new one.",
                ),
                _types.Adapter.Input("adapter", tooltip="The adapter that the subject was made with."),
                io.Boolean.Input(
                    "accept_other_adapter", default=False, advanced=True,
                    tooltip="Take the subject although it was made with another adapter or encoder file of "
                            "the same kind. The likeness may suffer.",
                ),
                _types.Encoders.Input(
                    "encoders", optional=True,
                    tooltip="Connect them to also check that the subject was made with these encoders.",
                ),
            ],
            outputs=[
                _types.Subject.Output(
                    display_name="subject",
                    tooltip="The subject. Goes to Dual-Level Injector or Blend Subjects.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="What the file says about itself, and what differs.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        known = file is None or file in _paths.saved_files(_paths.SUBJECTS)
        return True if known else _paths.missing_saved(_paths.SUBJECTS, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        return _paths.stamp(_paths.saved_files(_paths.SUBJECTS).get(file or ""))

    @classmethod
    def execute(cls, file: str, adapter: Adapter, accept_other_adapter: bool,
                encoders: Encoders | None = None) -> io.NodeOutput:
        path = _paths.saved_files(_paths.SUBJECTS).get(file)
        if path is None:
            raise LikenessError(_paths.missing_saved(_paths.SUBJECTS, file))
        return io.NodeOutput(*load_subject(path, adapter, encoders, accept_other_adapter))


NODES = [PrepareReference, ExtractID, BlendSubjects, SaveSubject, LoadSubject]
