"""Masks of a word: live while the picture is made, predicted before it, and looked at after it."""
from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..models.common.records import Guidance, Word
from ..models.hosting.guidance import KEEPS, NORMS, make_guidance
from ..models.hosting.predict_mask import CELL, SCHEDULERS, Plan, predict_mask
from ..models.hosting.preview_guidance import preview
from ..models.hosting.word_maps import LAYERS
from . import _types

VALUES = ("soft", "binary")
MASK_USES = ("multiply", "replace")
OVERLAPS = ("add", "share")
WORDS = ("this word", "every word of the run")
STEPS = ("all", "last")


def _scope() -> io.Float.Input:
    return io.Float.Input(
        "scope", default=0.25, min=0.01, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider,
        tooltip="How large the subject may become: the share of the picture that the mask keeps. About the size that the "
                "subject shall have.",
    )


def _strategy() -> io.Combo.Input:
    return io.Combo.Input(
        "strategy", options=list(NORMS),
        tooltip="How attention becomes a mask of 0 to 1. max_norm: divided by its largest value. min_max_norm: stretched "
                "from 0 to 1. min_max_per_channel: every layer stretched by itself first, as in the app of the release.",
    )


def _keep() -> io.Combo.Input:
    return io.Combo.Input(
        "keep", options=list(KEEPS), advanced=True,
        tooltip="top share keeps the strongest places, always as many as the scope says. threshold keeps all above 1 "
                "minus the scope, be they many or few.",
    )


def _values() -> io.Combo.Input:
    return io.Combo.Input(
        "values", options=list(VALUES), advanced=True,
        tooltip="soft: the mask is also how strongly the subject acts. binary: fully wherever the mask is.",
    )


def _layers() -> io.Combo.Input:
    return io.Combo.Input(
        "layers", options=list(LAYERS), default=LAYERS[0], optional=True, advanced=True,
        tooltip="Which layers are read. The release reads all. Where they disagree, as in the miniature, the finest of the "
                "way up know the outline best.",
    )


class GuidanceMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_GuidanceMask",
            display_name="Guidance Mask Generator",
            category=_types.PLACE,
            description="The subject acts only where the model itself is drawing the word. The mask is made while the "
                        "picture is sampled, from the model's own attention to that word.",
            search_aliases=["attention mask", "realcustom", "cross attention mask", "regional prompt", "subject mask",
                            "ipadapter mask"],
            inputs=[
                _types.Word.Input("word", tooltip="From Subject Prompt: the word whose place is looked for."),
                _scope(),
                _strategy(),
                _keep(),
                _values(),
                io.Int.Input(
                    "refresh_until_step", default=12, min=1, max=10000,
                    tooltip="Steps that make a fresh mask, each with one more question to the model; later steps keep the "
                            "last one. The release takes 12 of 25.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="A mask of your own for the word, white is yes; any size.",
                ),
                io.Combo.Input(
                    "mask_use", options=list(MASK_USES), optional=True, default=MASK_USES[0],
                    tooltip="multiply: only where both masks are. replace: your mask alone; the model is not asked, and scope, "
                            "strategy, keep, values, refresh_until_step and layers do nothing. It counts with a mask only.",
                ),
                io.Combo.Input(
                    "overlap", options=list(OVERLAPS), optional=True, default=OVERLAPS[0], advanced=True,
                    tooltip="Where masks of several words overlap: add lets all act fully, share divides the place among "
                            "them; one word that asks for it is enough.",
                ),
                io.Boolean.Input(
                    "end_early", default=False, optional=True, advanced=True,
                    tooltip="Ends each guidance question after the last layer that is read. The mask is the same and comes "
                            "some percent sooner; switch it off when another pack's patch counts calls of the model.",
                ),
                _layers(),
            ],
            outputs=[
                _types.Guidance.Output(
                    display_name="guidance",
                    tooltip="Goes to the guidance input of Dual-Level Injector, and to Preview Guidance.",
                ),
                io.String.Output(display_name="text", tooltip="What will be done, in words."),
            ],
        )

    @classmethod
    def execute(cls, word: Word, scope: float, strategy: str, keep: str, values: str, refresh_until_step: int,
                mask: io.Mask.Type | None = None, mask_use: str = MASK_USES[0], overlap: str = OVERLAPS[0],
                end_early: bool = False, layers: str = LAYERS[0]) -> io.NodeOutput:
        guidance = make_guidance(word, scope, strategy, keep, values == VALUES[1], refresh_until_step, mask,
                                 mask_use == MASK_USES[1], overlap == OVERLAPS[1], end_early, layers)
        if guidance.replace:
            text = (f"\"{word.text}\": your mask alone; the model is not asked, and scope, strategy, keep, values, "
                    "refresh_until_step and layers do not act")
        else:
            kept = f"the strongest {100 * scope:g} %" if keep == KEEPS[0] else f"all above {1 - scope:g}"
            text = (f"\"{word.text}\": {kept}, {strategy}, {values}; a fresh mask at the first {refresh_until_step} steps"
                    + (", times your mask" if mask is not None else "")
                    + ("; mask_use says replace, but no mask is connected, so the word's own mask is made"
                       if mask is None and mask_use == MASK_USES[1] else ""))
        return io.NodeOutput(guidance, text)


class PredictMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"default": 1024, "min": 64, "max": 16384, "step": 8}
        return io.Schema(
            node_id="Likeness_PredictMask",
            display_name="Predict Guidance Mask",
            category=_types.PLACE,
            description="Looks some steps ahead, with the text alone, where the model is going to draw the word. Its mask "
                        "can be edited and go back into the Guidance Mask Generator, or to any other node.",
            search_aliases=["attention mask", "layout", "where will it be", "segment before sampling", "realcustom",
                            "predict mask"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; subjects in it stay silent here."),
                io.Conditioning.Input("positive", tooltip="From Subject Prompt; ControlNet may stand between."),
                _types.Word.Input("word", tooltip="From the same Subject Prompt."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                    tooltip="The seed of the sampler that comes after, so that both have the same noise.",
                ),
                io.Int.Input("width", tooltip="Of the picture, in pixels.", **side),
                io.Int.Input("height", tooltip="Of the picture, in pixels.", **side),
                io.Int.Input("steps", default=25, min=1, max=10000, tooltip="Steps of the sampler that comes after."),
                io.Int.Input(
                    "stop_step", default=8, min=1, max=10000,
                    tooltip="After how many of them to look. Early steps know the place, later ones the outline; each "
                            "costs one question to the model.",
                ),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), tooltip="Of the sampler that comes after."),
                _scope(),
                _strategy(),
                _keep(),
                _values(),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="In place of width and height: its size, its number of pictures and its noise mask (inpainting). "
                            "Inside that mask the look ahead starts from full noise even where a sampler will keep a part of "
                            "its picture.",
                ),
                io.Noise.Input("noise", optional=True, tooltip="In place of the seed: core's noise for Sampler Custom."),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="With it the look ahead is guided as the sampler will be, and comes closer to its picture; it "
                            "costs twice as much.",
                ),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, optional=True, advanced=True,
                    tooltip="Guidance of the sampler that comes after. It counts with a negative only.",
                ),
                _layers(),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask",
                    tooltip="One a picture, at its size. Goes to a mask editor, the Guidance Mask Generator or any node.",
                ),
                io.Image.Output(
                    display_name="image",
                    tooltip="What the model has in mind at that step, rough, with the mask in colour.",
                ),
                io.String.Output(display_name="text", tooltip="Which step was looked at and how much the mask covers."),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, positive: io.Conditioning.Type, word: Word, seed: int, width: int, height: int,
                steps: int, stop_step: int, scheduler: str, scope: float, strategy: str, keep: str, values: str,
                latent: io.Latent.Type | None = None, noise: io.Noise.Type | None = None,
                negative: io.Conditioning.Type | None = None, cfg: float = 4.0,
                layers: str = LAYERS[0]) -> io.NodeOutput:
        guidance = make_guidance(word, scope, strategy, keep, values == VALUES[1], 1, layers=layers)
        size = latent or {"samples": torch.zeros(1, 4, height // CELL, width // CELL)}
        result = predict_mask(model, positive, guidance, size, Plan(steps, stop_step, scheduler, seed, noise, cfg), negative)
        return io.NodeOutput(result.mask, result.picture, result.report, ui=ui.PreviewImage(result.picture, cls=cls))


class PreviewGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_PreviewGuidance",
            display_name="Preview Guidance",
            category=_types.PLACE,
            description="The masks that one very run of a sampler made, step by step.",
            search_aliases=["show mask", "attention preview", "mask preview", "realcustom", "debug mask"],
            is_output_node=True,
            inputs=[
                _types.Guidance.Input("guidance", tooltip="From the Guidance Mask Generator of that run."),
                io.Latent.Input("latent", tooltip="The sampler's own output, which tells the run from all others."),
                io.Image.Input(
                    "image", optional=True,
                    tooltip="The decoded picture of that latent, to lay the masks over.",
                ),
                io.Combo.Input(
                    "words", options=list(WORDS), default=WORDS[0], optional=True,
                    tooltip="Show the word of this guidance, or all words that had a mask in this run.",
                ),
                io.Combo.Input(
                    "steps", options=list(STEPS), default=STEPS[0], optional=True,
                    tooltip="all: every mask of the run. last: the masks at the end of the run alone, one for each word and "
                            "picture, in the order of the pictures, ready for any node that takes a mask a picture.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="masks",
                    tooltip="Word by word, step by step, picture by picture, at the size of the latent.",
                ),
                io.Image.Output(
                    display_name="image",
                    tooltip="All of them in colour over the picture, in one sheet, each under its word, step and picture.",
                ),
                io.String.Output(display_name="text", tooltip="Which steps made a mask, and how much the last one covers."),
            ],
        )

    @classmethod
    def execute(cls, guidance: Guidance, latent: io.Latent.Type, image: io.Image.Type | None = None,
                words: str = WORDS[0], steps: str = STEPS[0]) -> io.NodeOutput:
        result = preview(guidance, latent["samples"], image, words == WORDS[1], steps == STEPS[1])
        return io.NodeOutput(result.masks, result.strip, result.report, ui=ui.PreviewImage(result.strip, cls=cls))


NODES = [GuidanceMask, PredictMask, PreviewGuidance]
