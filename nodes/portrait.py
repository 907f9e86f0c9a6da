"""People: PhotoMaker and InstantID, each with the prompt without the identity for CustomEnhancer."""
from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..models.common.errors import LikenessError
from ..models.common.reference import ON_MISSING
from ..models.face.faces import Faces
from ..models.hosting.portrait_files import InstantID, load_instantid
from ..models.hosting.portrait_instantid import COMBINE, LAYERS, Strengths, apply_instantid
from ..models.hosting.portrait_photomaker import encode_photomaker, load_photomaker
from . import _paths, _types


def _there(folder: str, name: str | None) -> bool | str:
    """For validate_inputs, which sees None for a name that comes by a link."""
    return True if name is None or _paths.find(name, (folder,)) else _paths.missing(name, (folder,))


def _path(folder: str, name: str) -> Path:
    path = _paths.find(name, (folder,))
    if path is None:
        raise LikenessError(_paths.missing(name, (folder,)))
    return path


class LoadPhotoMaker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadPhotoMaker",
            display_name="Load PhotoMaker",
            category=_types.LOAD,
            description="Loads a PhotoMaker file whole: its identity encoder, and its LoRA onto the model. ComfyUI's own loader "
                        "leaves the LoRA out.",
            search_aliases=["photomaker", "photomaker plus", "photomaker loader", "id encoder", "face", "portrait"],
            inputs=[
                io.Combo.Input(
                    "file", options=_paths.model_files(_paths.PHOTOMAKER),
                    tooltip="photomaker-v1 or photomaker-v2 from models/photomaker, .bin or .safetensors. The version is told "
                            "from its contents.",
                ),
                io.Model.Input("model", tooltip="An SDXL model; LoRAs and other patches may come before or after."),
                io.Float.Input(
                    "lora_strength", default=1.0, min=-2.0, max=2.0, step=0.05,
                    tooltip="How strongly the file's LoRA acts. 1 is as trained; at 0 the model stays as it is.",
                ),
            ],
            outputs=[
                io.Photomaker.Output(
                    display_name="photomaker", tooltip="The identity encoder. Goes to PhotoMaker Encode; ComfyUI's own one "
                                                       "takes a v1.",
                ),
                io.Model.Output(display_name="model", tooltip="The model with the LoRA. Use this one in the sampler."),
                io.String.Output(display_name="text", tooltip="Version, what it needs, and how many layers the LoRA reached."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return _there(_paths.PHOTOMAKER, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return _paths.stamp(_paths.find(file, (_paths.PHOTOMAKER,)))

    @classmethod
    def execute(cls, file: str, model: io.Model.Type, lora_strength: float) -> io.NodeOutput:
        return io.NodeOutput(*load_photomaker(_path(_paths.PHOTOMAKER, file), model, lora_strength))


class PhotoMakerEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_PhotoMakerEncode",
            display_name="PhotoMaker Encode",
            category=_types.FACE,
            description="Puts the identity of one or several pictures into the word of the prompt that stands for the person. "
                        "Gives the same prompt without the identity too.",
            search_aliases=["photomaker", "photomaker encode plus", "stacked id", "face", "portrait", "trigger word"],
            inputs=[
                io.Photomaker.Input("photomaker", tooltip="From Load PhotoMaker, or a v1 from ComfyUI's own loader."),
                io.Clip.Input("clip", tooltip="Text encoder of the SDXL checkpoint."),
                io.Image.Input("image", tooltip="One or several pictures of ONE person, as a batch; each with the face large."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, default="a photo of a woman img in the rain",
                    tooltip="The prompt. The trigger word stands once, right behind the word for the person, such as: a "
                            "woman img.",
                ),
                io.String.Input(
                    "trigger", default="img",
                    tooltip="The word that marks the one before it as the person. It does not reach the model itself.",
                ),
                io.Float.Input(
                    "start_percent", default=0.2, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the sampling with the plain prompt before the identity begins. 0.2 is the release's; more "
                            "keeps the scene and style, less the face. 0 in CustomEnhancer, where BiMD Sampler's dial says when.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="How much of the identity goes into the word. 1 is as trained; 0 gives the prompt without it.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="For v2, when a picture shows no face: stop with an error, or leave that picture out. With none left "
                            "the prompt without an identity goes through.",
                ),
                _types.Faces.Input(
                    "faces", optional=True,
                    tooltip="For v2: from Analyze Faces with the pack buffalo_l, of the same pictures. v1 needs none.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the identity. Goes to the sampler."),
                io.Conditioning.Output(
                    display_name="free",
                    tooltip="The same prompt without the trigger and without the identity. Goes to CustomEnhancer Guider.",
                ),
                io.String.Output(display_name="text", tooltip="Version, pictures, and the rows where the class word stands."),
                io.Boolean.Output(display_name="found", tooltip="Whether at least one picture gave an identity."),
            ],
        )

    @classmethod
    def execute(cls, photomaker: object, clip: io.Clip.Type, image: io.Image.Type, text: str, trigger: str,
                start_percent: float, strength: float, on_missing: str, faces: Faces | None = None) -> io.NodeOutput:
        return io.NodeOutput(*encode_photomaker(photomaker, clip, image, text, trigger, faces, start_percent, strength,
                                                on_missing))


class LoadInstantID(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_LoadInstantID",
            display_name="Load InstantID",
            category=_types.LOAD,
            description="Loads InstantID's ip-adapter file. Its ControlNet is loaded with ComfyUI's own Load ControlNet Model.",
            search_aliases=["instantid", "instantid model loader", "ip-adapter", "faceid", "face", "portrait"],
            inputs=[
                io.Combo.Input(
                    "file", options=_paths.model_files(_paths.INSTANTID),
                    tooltip="InstantID's ip-adapter from models/instantid, .bin or .safetensors.",
                ),
            ],
            outputs=[
                _types.InstantID.Output(display_name="instantid", tooltip="Goes to InstantID Apply."),
                io.String.Output(display_name="text", tooltip="What was loaded, and which face pack it needs."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return _there(_paths.INSTANTID, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        return _paths.stamp(_paths.find(file, (_paths.INSTANTID,)))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        found = load_instantid(_path(_paths.INSTANTID, file))
        text = (f"{found.name}: InstantID, {found.config.tokens} tokens a face, {len(found.config.layers)} layers; it needs "
                "FACES of the pack antelopev2")
        return io.NodeOutput(found, text)


class InstantIDApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slider = {"min": 0.0, "max": 2.0, "step": 0.05, "display_mode": io.NumberDisplay.slider}
        return io.Schema(
            node_id="Likeness_InstantIDApply",
            display_name="InstantID Apply",
            category=_types.FACE,
            description="Brings a face into the picture: its tokens beside the text in every layer, and InstantID's ControlNet "
                        "for its place and pose. Chain it for several people.",
            search_aliases=["instantid", "apply instantid", "apply instantid advanced", "faceid", "ipadapter faceid",
                            "identitynet", "portrait"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model; LoRAs and other patches may come before or after."),
                io.Conditioning.Input("positive", tooltip="The prompt; ControlNets, areas and Combine may come before or after."),
                io.Conditioning.Input("negative", tooltip="The negative prompt. It gets what InstantID makes of no face."),
                _types.InstantID.Input("instantid", tooltip="From Load InstantID."),
                _types.Faces.Input(
                    "faces",
                    tooltip="From Analyze Faces with the pack antelopev2. Of each picture the largest face is taken; Select "
                            "Faces chooses another.",
                ),
                io.Float.Input(
                    "weight", default=0.8, **slider,
                    tooltip="How strongly the face's tokens act. 0.8 is the release's, 0 is off.",
                ),
                io.Float.Input(
                    "control_strength", default=0.8, **slider,
                    tooltip="How strongly the ControlNet holds place and pose of the face. 0.8 is the release's, 0 is off.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Share of the sampling at which both begin to act.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Share of the sampling at which both end to act.",
                ),
                io.Combo.Input(
                    "combine", options=list(COMBINE),
                    tooltip="For several pictures. average: one face between them; concat: the tokens of all side by side; one "
                            "per latent: picture 1 for latent 1 and so on.",
                ),
                io.Combo.Input(
                    "layers", options=list(LAYERS), advanced=True,
                    tooltip="all 70 as trained. Older nodes leave the ten of the middle block out by mistake; choose that to "
                            "repeat their pictures.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="When no picture shows a face, or the mask is empty: stop with an error, or pass everything through. "
                            "With one per latent, when one shows none: stop, or give no face to its latent.",
                ),
                io.ControlNet.Input(
                    "control_net", optional=True,
                    tooltip="InstantID's own ControlNet, from Load ControlNet Model. It reads the face in place of the prompt; "
                            "other ControlNets in the chain keep reading the prompt.",
                ),
                io.Image.Input(
                    "image", optional=True,
                    tooltip="The picture for the ControlNet, from Face Keypoints, drawn at the size of the result.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where the face's tokens may act, white is yes; any size. For several people, one each.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the face. Goes to the sampler or the next one."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, marked to get the face."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, marked to get no face. Use it."),
                io.Conditioning.Output(
                    display_name="free",
                    tooltip="The prompt, marked to stay without the face. Goes to CustomEnhancer Guider, with the same model.",
                ),
                io.String.Output(display_name="text", tooltip="What acts with which strength, and on how many layers."),
                io.Boolean.Output(display_name="found", tooltip="Whether there was a face, and a place for it."),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, positive: io.Conditioning.Type, negative: io.Conditioning.Type,
                instantid: InstantID, faces: Faces, weight: float, control_strength: float, start_percent: float,
                end_percent: float, combine: str, layers: str, on_missing: str, control_net: io.ControlNet.Type | None = None,
                image: io.Image.Type | None = None, mask: io.Mask.Type | None = None) -> io.NodeOutput:
        strengths = Strengths(weight, control_strength, start_percent, end_percent)
        return io.NodeOutput(*apply_instantid(model, positive, negative, instantid, faces, strengths, control_net, image,
                                              combine, layers, mask, on_missing))


NODES = [LoadPhotoMaker, LoadInstantID, PhotoMakerEncode, InstantIDApply]
