"""The subject's word, and the subject into model and prompts."""
from __future__ import annotations

from comfy_api.latest import io

from ..models.common.layer_weights import LEVELS, layer_weights, weights_report
from ..models.common.records import Guidance, Subject, Word
from ..models.common.records import LayerWeights as Weights
from ..models.common.reference import ON_MISSING
from ..models.hosting.adapters import Adapter
from ..models.hosting.inject import STORAGE, Strengths, inject
from ..models.hosting.prompt import POOLED, RULES, encode_prompt, tokens_report
from . import _types

CUSTOM = "custom"
# name: global and local strength
STRENGTHS = {"balanced": (1.0, 1.0), "strong likeness": (1.15, 1.25), "free pose": (1.0, 0.6),
             "word only": (1.0, 0.0), "details only": (0.0, 1.0)}
# name: factors of the coarse, middle and fine layers
LEVEL_PRESETS = {"all": (1.0, 1.0, 1.0), "coarse": (1.0, 0.0, 0.0), "middle": (0.0, 1.0, 0.0),
                 "fine": (0.0, 0.0, 1.0), "coarse and middle": (1.0, 1.0, 0.0),
                 "middle and fine": (0.0, 1.0, 1.0)}


class EncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_EncodePrompt",
            display_name="Subject Prompt",
            category=_types.SUBJECT,
            description="Encodes a prompt and finds the word in it that names the subject.",
            search_aliases=["ipadapter", "clip text encode", "trigger word", "subject prompt",
                            "subject word", "reference prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Text encoder of an SD1.5 or SDXL checkpoint, or of the miniature.",
                ),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True,
                    tooltip="What the picture shows, in usual prompt writing; weights such as (cat:1.2) and "
                            "embeddings work.",
                ),
                io.String.Input(
                    "word", default="",
                    tooltip="The word of the text that stands for the subject, such as cat. Several words "
                            "are fine. Upper and lower case do not matter.",
                ),
                io.Int.Input(
                    "occurrence", default=0, min=0, max=99,
                    tooltip="Which one, when the word stands in the text several times: 1 is the first, 0 "
                            "means all.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="What to do when the word is not in the text: stop with an error, or go on "
                            "without the subject.",
                ),
                io.Conditioning.Input(
                    "conditioning", optional=True,
                    tooltip="The same text, encoded by another node: its vectors stay as they are, the word is "
                            "only looked up. Another text is refused.",
                ),
                io.Combo.Input(
                    "rule", options=list(RULES), default=RULES[0], optional=True, advanced=True,
                    tooltip="whole words is right for nearly all. The release of RealCustom takes any part of "
                            "the text, so that cat is also found in category, minds upper and lower case, and "
                            "reads the first 75 tokens only; choose it to repeat its pictures.",
                ),
                io.Combo.Input(
                    "pooled", options=list(POOLED), default=POOLED[0], optional=True, advanced=True,
                    tooltip="SDXL's vector of the whole text. The release of RealCustom takes it before CLIP's last "
                            "projection; choose that, for the negative prompt too, to repeat its pictures.",
                ),
                io.Latent.Input(
                    "release_size", optional=True, advanced=True,
                    tooltip="Only to repeat pictures of the RealCustom release that are not square: the latent that "
                            "will be sampled. Its size is written into the prompt with the width first, as the "
                            "release does; core and SDXL have the height first.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The encoded prompt. Goes to the positive input of Dual-Level Injector.",
                ),
                _types.Word.Output(
                    display_name="word",
                    tooltip="The subject's word and its place. Goes to Dual-Level Injector.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="The word, its tokens, and window and columns where they stand.",
                ),
                io.Boolean.Output(display_name="found", tooltip="Whether the word is in the text."),
            ],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, text: str, word: str, occurrence: int, on_missing: str,
                conditioning: io.Conditioning.Type | None = None, rule: str = RULES[0], pooled: str = POOLED[0],
                release_size: io.Latent.Type | None = None) -> io.NodeOutput:
        size = None
        if release_size is not None:
            height, width = release_size["samples"].shape[-2:]
            size = (8 * width, 8 * height)
        encoded, place, found = encode_prompt(clip, text, word, occurrence, conditioning, on_missing, rule, pooled,
                                              size)
        return io.NodeOutput(encoded, place, tokens_report(place), found)


class DualLevelInjector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slider = {"min": 0.0, "max": 2.0, "step": 0.05, "display_mode": io.NumberDisplay.slider}
        return io.Schema(
            node_id="Likeness_DualLevelInjector",
            display_name="Dual-Level Injector",
            category=_types.SUBJECT,
            description="Brings the subject into the picture: globally into its word, locally into the "
                        "model's own layers. Chain it for several subjects.",
            search_aliases=["ipadapter", "ipadapter apply", "apply subject", "faceid", "reference only",
                            "custany", "inject", "subject"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD1.5 or SDXL model, or the miniature; LoRAs and other patches may come "
                            "before or after.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="From Subject Prompt; ControlNet, areas and Combine may stand between.",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt. It never gets the subject."),
                _types.Subject.Input("subject", tooltip="From ID Extractor, Load Subject or Blend Subjects."),
                _types.Word.Input("word", tooltip="From the Subject Prompt that made the positive."),
                io.Combo.Input(
                    "preset", options=[CUSTOM, *STRENGTHS], default=CUSTOM,
                    tooltip="custom uses the two strengths below. Any other choice replaces them, and the "
                            "text output says by what.",
                ),
                io.Float.Input(
                    "global_strength", default=1.0, **slider,
                    tooltip="How much of the subject goes into its word: what it is, its colours and look "
                            "as a whole. 1 is as trained, 0 is off.",
                ),
                io.Float.Input(
                    "local_strength", default=1.0, **slider,
                    tooltip="How much goes into the model's layers: details, patterns and shapes. 1 is as "
                            "trained, 0 is off; less leaves pose and style freer.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Share of the sampling at which the subject begins to act.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Share of the sampling at which the subject ends to act.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where the subject may act in the picture, white is yes; any size. It limits "
                            "the local level.",
                ),
                _types.Guidance.Input(
                    "guidance", optional=True,
                    tooltip="From Guidance Mask Generator: a mask that follows the word while the picture is made. It "
                            "limits the local level.",
                ),
                _types.LayerWeights.Input(
                    "layer_weights", optional=True,
                    tooltip="From Layer Weights: how strongly each layer gets the subject. It acts on the "
                            "local level.",
                ),
                _types.Curve.Input(
                    "curve", optional=True, extra_dict=_types.SOCKET,
                    tooltip="From core's Curve Editor: local strength over the steps, first step on the "
                            "left. It multiplies the local strength.",
                ),
                io.Combo.Input(
                    "storage", options=list(STORAGE), default=STORAGE[0], optional=True, advanced=True,
                    tooltip="For RealCustom++, what is kept between the steps: its keys and values (243 MB a "
                            "subject on SDXL), or the tokens only, which needs next to no memory and is slower. "
                            "The picture is the same.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with the subject. Goes to the sampler or the next injector.",
                ),
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The prompt with the subject in its word.",
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negative prompt, marked to stay without the subject. Use this one in the "
                            "sampler.",
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="What acts with which strength, and what was left out and why.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, start_percent: float | None = None,
                        end_percent: float | None = None) -> bool | str:
        start = 0.0 if start_percent is None else start_percent
        end = 1.0 if end_percent is None else end_percent
        if 0.0 <= start < end <= 1.0:
            return True
        return (f"The subject would act from {start:g} to {end:g} of the sampling; both lie between 0 and 1, "
                "the start before the end.")

    @classmethod
    def execute(cls, model: io.Model.Type, positive: io.Conditioning.Type, negative: io.Conditioning.Type,
                subject: Subject, word: Word, preset: str, global_strength: float, local_strength: float,
                start_percent: float, end_percent: float, mask: io.Mask.Type | None = None,
                guidance: Guidance | None = None, layer_weights: Weights = (), curve: object = None,
                storage: str = STORAGE[0]) -> io.NodeOutput:
        _types.check_curve(curve)
        levels = STRENGTHS.get(preset, (global_strength, local_strength))
        result = inject(model, positive, negative, subject, word,
                        Strengths(*levels, start_percent, end_percent), mask, guidance, layer_weights or (),
                        curve, storage)
        said = [] if preset == CUSTOM else [f"preset {preset}: global {levels[0]:g}, local {levels[1]:g}; the "
                                            "two sliders are not used"]
        text = "\n".join([*said, result.report])
        return io.NodeOutput(result.model, result.positive, result.negative, text)


class LayerWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        factor = {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}
        return io.Schema(
            node_id="Likeness_LayerWeights",
            display_name="Layer Weights",
            category=_types.SUBJECT,
            description="Decides how strongly each layer of the model gets the subject, from the coarse "
                        "layers (form and place) to the fine ones (texture).",
            search_aliases=["block weights", "ipadapter weights", "ipadapter weight type", "layer weights",
                            "style transfer weights"],
            inputs=[
                _types.Adapter.Input(
                    "adapter",
                    tooltip="The adapter that the subject was made with; its layers are weighted.",
                ),
                io.Combo.Input(
                    "preset", options=[CUSTOM, *LEVEL_PRESETS], default=CUSTOM,
                    tooltip="custom uses the three levels below. Any other choice switches whole levels on "
                            "or off instead.",
                ),
                io.Float.Input(
                    LEVELS[0], display_mode=io.NumberDisplay.slider, **factor,
                    tooltip="Layers of the lowest resolution: form, parts, where things are.",
                ),
                io.Float.Input(
                    LEVELS[1], display_mode=io.NumberDisplay.slider, **factor,
                    tooltip="Layers between. SDXL and the miniature have none of them: the slider has no effect "
                            "there.",
                ),
                io.Float.Input(
                    LEVELS[2], display_mode=io.NumberDisplay.slider, **factor,
                    tooltip="Layers of the highest resolution: colour, pattern, texture.",
                ),
                io.Float.Input(
                    "fade_first", advanced=True, **factor,
                    tooltip="Further factor of the first layer; the layers between go evenly to fade_last.",
                ),
                io.Float.Input(
                    "fade_last", advanced=True, **factor,
                    tooltip="Further factor of the last layer.",
                ),
                io.String.Input(
                    "overrides", default="", optional=True, advanced=True,
                    tooltip="Single layers by name, such as output.3.0: 0.5, output.9: 0. They replace what "
                            "came out above.",
                ),
            ],
            outputs=[
                _types.LayerWeights.Output(
                    display_name="layer_weights",
                    tooltip="A factor for each layer. Goes to Dual-Level Injector.",
                ),
                io.String.Output(display_name="text", tooltip="The names of all layers with their factors."),
            ],
        )

    @classmethod
    def execute(cls, adapter: Adapter, preset: str, coarse: float, middle: float, fine: float,
                fade_first: float, fade_last: float, overrides: str = "") -> io.NodeOutput:
        levels = dict(zip(LEVELS, LEVEL_PRESETS.get(preset, (coarse, middle, fine)), strict=True))
        keys, base = [key for key, _ in adapter.config.layers], adapter.config.base
        weights = layer_weights(keys, base, levels, (fade_first, fade_last), overrides)
        return io.NodeOutput(weights, weights_report(weights, base))


NODES = [EncodePrompt, DualLevelInjector, LayerWeights]
