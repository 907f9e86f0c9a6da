"""Load CustomNet."""
from __future__ import annotations

from comfy_api.latest import io

from ..models.common.errors import LikenessError
from ..models.hosting import customnet
from . import _paths, _types

MINIATURE = "miniature (ships with the pack)"
FOLDERS = ("checkpoints", _paths.FOLDER)


class LoadCustomNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadCustomNet",
            display_name="Load CustomNet",
            category=_types.LOAD,
            description="Loads the authors' CustomNet file as it is: a model that turns an object, places it, and paints the "
                        "background that the prompt asks for.",
            search_aliases=["customnet", "zero123", "stable zero123", "novel view", "load checkpoint", "rotate object"],
            inputs=[
                io.Combo.Input(
                    "file", options=[MINIATURE, *_paths.whole_models(FOLDERS)],
                    tooltip="customnet_v1 or customnet_inpaint_v1 from models/checkpoints or models/likeness, under any name: it "
                            "is told from its contents. The miniature needs no download and paints toy buildings at 64 x 64.",
                ),
                io.Boolean.Input(
                    "save_fp16", default=False, advanced=True,
                    tooltip="Also write a copy of half the size, as safetensors, beside the file. Choose it the next time: it "
                            "loads faster and needs less memory.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Goes to LoRA loaders and samplers like any SD1.5 model."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, for the prompts."),
                io.Vae.Output(display_name="vae", tooltip="For View Conditioner and VAE Decode."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="The image tower, for View Conditioner."),
                io.String.Output(display_name="variant", tooltip="normal, or inpaint: that one continues a background."),
                io.String.Output(display_name="text", tooltip="What was loaded and saved."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        known = file is None or file == MINIATURE or _paths.find(file, FOLDERS) is not None
        return True if known else _paths.missing(file or "", FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return file or "" if file == MINIATURE else _paths.stamp(_paths.find(file, FOLDERS))

    @classmethod
    def execute(cls, file: str, save_fp16: bool) -> io.NodeOutput:
        if file == MINIATURE:
            done = customnet.load_miniature(_paths.embeddings())
            small = [customnet.SMALL] if save_fp16 else []
            return io.NodeOutput(*done[:5], "\n".join([done.text, *small]))
        path = _paths.find(file, FOLDERS)
        if path is None:
            raise LikenessError(_paths.missing(file, FOLDERS))
        # before the parts are loaded, so that the file does not stand in memory twice
        saved = [customnet.save_half(path)] if save_fp16 else []
        done = customnet.load(path, _paths.embeddings())
        return io.NodeOutput(*done[:5], "\n".join([done.text, *saved]))


NODES = [LoadCustomNet]
