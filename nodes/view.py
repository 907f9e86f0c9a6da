"""Camera and place of an object: Viewpoint, Turntable, Placement and View Conditioner."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..models.common.errors import LikenessError
from ..models.common.images import split_alpha
from ..models.common.reference import ON_MISSING
from ..models.customnet import placement as places
from ..models.customnet.placement import Placement as PlacementValue
from ..models.customnet.view import View, from_camera, is_camera, turntable
from ..models.hosting.memory import to_intermediate
from ..models.hosting.view import Strengths, condition
from . import _types

_ELEVATION = ("Degrees that the camera goes up against the reference; negative looks from lower. The authors' demo goes from -30 "
              "to 30.")
_DISTANCE = "How much further away the camera stands, as a share: 0 as the reference. The public weights only learned 0."
_ONE_NOISE = "All pictures start from the same noise, so that less changes between the views."
_FLIP = ("Turn the other way. The sign of the public weights follows Zero-1-to-3 and was not seen yet: if the object turns "
         "the wrong way round, switch this on.")


class Viewpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_Viewpoint",
            display_name="Viewpoint",
            category=_types.PLACE,
            description="From where the new picture sees the object, relative to the reference picture.",
            search_aliases=["camera", "angle", "rotate object", "zero123", "novel view", "azimuth elevation"],
            inputs=[
                io.Float.Input(
                    "azimuth", default=30.0, min=-180.0, max=180.0, step=1.0, display_mode=io.NumberDisplay.slider,
                    tooltip="Degrees that the camera goes to the right round the object. Trained from -60 to 60.",
                ),
                io.Float.Input(
                    "elevation", default=0.0, min=-90.0, max=90.0, step=1.0, display_mode=io.NumberDisplay.slider,
                    tooltip=_ELEVATION,
                ),
                io.Float.Input("distance", default=0.0, min=-0.9, max=2.0, step=0.05, advanced=True, tooltip=_DISTANCE),
                io.Boolean.Input("flip", default=False, advanced=True, tooltip=_FLIP),
                _types.Camera.Input(
                    "camera", optional=True,
                    tooltip="Camera of core's Load 3D in place of the numbers: the reference is taken as seen from the "
                            "front, along the Z axis.",
                ),
                io.Float.Input(
                    "reference_distance", default=0.0, min=0.0, max=10000.0, step=0.1, optional=True, advanced=True,
                    tooltip="With a camera: how far from its target, in scene units, the reference's camera would stand. "
                            "0: as far as this one.",
                ),
            ],
            outputs=[_types.View.Output(display_name="view", tooltip="One camera. Goes to View Conditioner.")],
        )

    @classmethod
    def execute(cls, azimuth: float, elevation: float, distance: float, flip: bool, camera: Any = None,
                reference_distance: float = 0.0) -> io.NodeOutput:
        if camera is not None:
            if not is_camera(camera):
                raise LikenessError(f"The camera input got a {type(camera).__name__}; connect camera_info of core's Load 3D.")
            azimuth, elevation, distance = from_camera(camera, reference_distance)
        return io.NodeOutput(View((-azimuth if flip else azimuth,), (elevation,), (distance,)))


class Turntable(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_Turntable",
            display_name="Turntable",
            category=_types.PLACE,
            description="Several viewpoints in a row, from one azimuth to another: one picture each, made in one batch.",
            search_aliases=["rotate", "orbit", "camera path", "multi view", "zero123 batch", "spin"],
            inputs=[
                io.Float.Input("start", default=-60.0, min=-360.0, max=360.0, step=1.0,
                               tooltip="Azimuth of the first picture in degrees."),
                io.Float.Input("end", default=60.0, min=-360.0, max=360.0, step=1.0,
                               tooltip="Azimuth of the last picture. After full turns the first view is not shown again."),
                io.Int.Input("count", default=8, min=1, max=256, tooltip="Number of pictures."),
                io.Float.Input("elevation", default=0.0, min=-90.0, max=90.0, step=1.0, tooltip=_ELEVATION),
                io.Float.Input("distance", default=0.0, min=-0.9, max=2.0, step=0.05, advanced=True, tooltip=_DISTANCE),
                io.Boolean.Input("equal_noise", default=True, tooltip=_ONE_NOISE),
                io.Boolean.Input("flip", default=False, advanced=True, tooltip=_FLIP),
            ],
            outputs=[_types.View.Output(display_name="view", tooltip="One camera a picture. Goes to View Conditioner.")],
        )

    @classmethod
    def execute(cls, start: float, end: float, count: int, elevation: float, distance: float, equal_noise: bool,
                flip: bool) -> io.NodeOutput:
        sign = -1.0 if flip else 1.0
        return io.NodeOutput(turntable(sign * start, sign * end, count, elevation, distance, equal_noise))


class Placement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_Placement",
            display_name="Placement",
            category=_types.PLACE,
            description="Where in the new picture the object stands: by numbers, by a painted mask, or by a detector's box.",
            search_aliases=["bounding box", "position", "place object", "bbox", "location", "layout"],
            inputs=[
                io.Float.Input("x", default=0.15, min=-1.0, max=2.0, step=0.01, display_mode=io.NumberDisplay.slider,
                               tooltip="Left end of the box, as a share of the frame's width. It may leave the frame."),
                io.Float.Input("y", default=0.15, min=-1.0, max=2.0, step=0.01, display_mode=io.NumberDisplay.slider,
                               tooltip="Upper end of the box, as a share of the frame's height."),
                io.Float.Input("box_width", default=0.7, min=0.01, max=3.0, step=0.01, display_mode=io.NumberDisplay.slider,
                               tooltip="Width of the box, as a share of the frame's width."),
                io.Float.Input("box_height", default=0.7, min=0.01, max=3.0, step=0.01, display_mode=io.NumberDisplay.slider,
                               tooltip="Height of the box, as a share of the frame's height."),
                io.Combo.Input(
                    "box_of", options=list(places.MEANS),
                    tooltip="object: the box is as large as the object's longer side in the picture. whole reference: the box "
                            "takes the whole reference picture with its white margin, as in the authors' demo.",
                ),
                io.Combo.Input(
                    "fit", options=list(places.FITS),
                    tooltip="square: the longer side counts, in the pixels of the new picture, and what leaves the frame is cut "
                            "off, as in training. stretched: the square reference is squashed into the box, as in the authors' "
                            "demo.",
                ),
                io.Int.Input("frame_width", default=256, min=16, max=16384, step=8,
                             tooltip="Width of the new picture, and of the picture in which a detector's box was measured."),
                io.Int.Input("frame_height", default=256, min=16, max=16384, step=8, tooltip="Height of the same."),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING), advanced=True,
                    tooltip="What to do with an empty mask, or where the detector found nothing: stop with an error, or take the "
                            "numbers.",
                ),
                io.Mask.Input("mask", optional=True,
                              tooltip="Painted place of the object in place of the numbers; one mask a picture."),
                _types.Boxes.Input(
                    "bounding_box", optional=True, extra_dict=_types.SOCKET,
                    tooltip="Box in pixels in place of the numbers, of core's detectors or Bounding Box. Of several in one "
                            "picture the surest is taken, else the largest.",
                ),
                io.Image.Input("image", optional=True,
                               tooltip="Picture for the preview; its size takes the place of frame_width and frame_height."),
            ],
            outputs=[
                _types.Placement.Output(display_name="placement", tooltip="Goes to View Conditioner."),
                _types.Boxes.Output(display_name="bounding_box",
                                    tooltip="Box of the first picture's whole reference in pixels of the frame, cut off where "
                                            "it leaves it: for crop_region of core's Crop Image."),
                io.Image.Output(display_name="preview",
                                tooltip="Orange: the whole reference. Blue: the square in whose middle the object will be; a "
                                        "long or a small object does not fill it."),
                io.Boolean.Output(display_name="found", tooltip="Whether mask or detector gave every place; true for numbers."),
            ],
        )

    @classmethod
    def execute(cls, x: float, y: float, box_width: float, box_height: float, box_of: str, fit: str, frame_width: int,
                frame_height: int, on_missing: str, mask: io.Mask.Type | None = None, bounding_box: Any = None,
                image: io.Image.Type | None = None) -> io.NodeOutput:
        if mask is not None and bounding_box is not None:
            raise LikenessError("The place comes from a mask and from a bounding box at once; disconnect one of them.")
        picture = None if image is None else split_alpha(image)[0]
        if picture is not None:
            frame_height, frame_width = picture.shape[1:3]
        width, height = frame_width, frame_height
        asked: list[places.Box | None] = [None]
        needed = on_missing == ON_MISSING[0]
        if mask is not None:
            asked, width, height = places.mask_boxes(mask, needed)
        elif bounding_box is not None:
            asked = places.detected_boxes(bounding_box, needed)
        found = None not in asked or (mask is None and bounding_box is None)
        by_hand = (x * width, y * height, box_width * width, box_height * height)
        placement = places.place([by_hand if box is None else box for box in asked], width, height, fit, box_of)
        # cut off at the frame: core's crop takes no numbers below 0
        x0, y0, x1, y1 = (min(max(value, 0), most) for value, most in zip(
            placement.pixels(frame_width, frame_height)[0], (frame_width, frame_height) * 2, strict=True))
        behind = None if picture is None else picture[[k % picture.shape[0] for k in range(len(placement.boxes))]]
        preview = to_intermediate(places.preview(placement, frame_width, frame_height, behind))
        return io.NodeOutput(placement, {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}, preview, found,
                             ui=ui.PreviewImage(preview, cls=cls))


class ViewConditioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_ViewConditioner",
            display_name="View Conditioner",
            category=_types.PLACE,
            description="Tells a CustomNet which object to show, from where, and at which place; the prompt tells the "
                        "background. Works with KSampler and every other sampler.",
            search_aliases=["customnet", "zero123", "stable zero123 conditioning", "novel view", "object placement",
                            "reference object"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt: the background you want."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; an empty one is what the authors use."),
                io.ClipVision.Input("clip_vision", tooltip="From Load CustomNet."),
                io.Vae.Input("vae", tooltip="From Load CustomNet."),
                io.Image.Input("reference",
                               tooltip="The object on white, from Prepare Reference with the preset CustomNet."),
                io.Int.Input("width", default=256, min=16, max=4096, step=8,
                             tooltip="Width of the new picture. CustomNet was trained at 256 only, the miniature at 64."),
                io.Int.Input("height", default=256, min=16, max=4096, step=8, tooltip="Height of the new picture."),
                io.Float.Input(
                    "object_strength", default=1.0, min=0.0, max=3.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="How much the object's attention counts; 1 as trained. The pasted place stays.",
                ),
                io.Float.Input(
                    "text_strength", default=1.0, min=0.0, max=3.0, step=0.05, advanced=True,
                    tooltip="How much the text's attention counts; 1 as trained.",
                ),
                _types.View.Input("view", optional=True,
                                  tooltip="From Viewpoint or Turntable; without one, the view of the reference."),
                _types.Placement.Input("placement", optional=True,
                                       tooltip="From Placement; without one, the reference fills the picture."),
                io.Image.Input("background", optional=True,
                               tooltip="Only for the inpaint variant: the picture that the object comes into."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Goes to a sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="Goes to the same sampler."),
                io.Latent.Output(display_name="latent", tooltip="One empty picture a view or place."),
                io.Image.Output(
                    display_name="background",
                    tooltip="The background at the picture's size, one for each: destination of core's Image Composite Masked, "
                            "which puts its very pixels back outside of the box. One white picture without a background.",
                ),
                io.Mask.Output(display_name="mask", tooltip="The box: mask of the same Image Composite Masked."),
                io.String.Output(display_name="text", tooltip="Number, size and cameras of the pictures."),
            ],
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any, clip_vision: Any, vae: Any, reference: io.Image.Type, width: int, height: int,
                object_strength: float, text_strength: float, view: View | None = None,
                placement: PlacementValue | None = None, background: io.Image.Type | None = None) -> io.NodeOutput:
        done = condition(positive, negative, clip_vision, vae, reference, view or View((0.0,), (0.0,), (0.0,)),
                         placement or places.WHOLE, width, height, Strengths(object_strength, text_strength), background)
        return io.NodeOutput(done.positive, done.negative, done.latent, to_intermediate(done.background),
                             to_intermediate(done.mask), done.report)


NODES = [Viewpoint, Turntable, Placement, ViewConditioner]
