"""Faces: found, chosen, blended, drawn and swapped."""
from __future__ import annotations

from comfy_api.latest import io, ui

from ..models.common.reference import ON_MISSING
from ..models.face.choose import GENDERS, MODES, ORDERS, blend, parse_numbers, select, table
from ..models.face.detect import LADDER, THRESHOLD
from ..models.face.drawing import STYLES
from ..models.face.faces import Faces
from ..models.face.masks import KINDS
from ..models.face.swap import BOOSTS, Paste
from ..models.hosting.face import FaceModels, FaceSwapper
from ..models.hosting.face_batch import ASSIGN, LOOK_AGAIN, Job, analyse, check_faces, swap
from ..models.hosting.face_pictures import keypoints, marked
from ..models.hosting.memory import to_intermediate
from . import _types

AUTO = "auto"
SIZES = (AUTO, "192", "320", "640", "1024", "1280")
SHOWN = 8  # pictures on the node; all of them are in the output

_SIZE = ("Side in pixels at which the detector looks. auto tries 640, then 320, then 192, until it finds a face: small sides "
         "find faces that fill the picture, large ones find small faces.")
_THRESHOLD = "How sure the detector must be. Lower finds more faces, and more that are none."
_ALONE = "Only without target."
_MESH = ("lower min_confidence or choose the detector_variant both in Detect Face Landmarks, which finds the faces here, or "
         "disconnect face_landmarks")
_CHOOSE = "choose other numbers, a lower similarity, any gender or a smaller min_size"


def _sizes(choice: str) -> tuple[int, ...]:
    return LADDER if choice == AUTO else (int(choice),)


class AnalyzeFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_AnalyzeFaces",
            display_name="Analyze Faces",
            category=_types.FACE,
            description="Finds the faces of one or many pictures and keeps what tells them apart.",
            search_aliases=["insightface", "face detection", "face analysis", "faceid", "face embeds", "reactor", "detect faces",
                            "buffalo_l"],
            inputs=[
                _types.FaceModels.Input("face_models", tooltip="From Load Face Models."),
                io.Image.Input("image", tooltip="One picture, a batch, or the frames of a video."),
                io.Combo.Input("detection_size", options=list(SIZES), default=AUTO, tooltip=_SIZE),
                io.Float.Input("threshold", default=THRESHOLD, min=0.05, max=0.95, step=0.05, tooltip=_THRESHOLD),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="What to do with a picture without a face: stop with an error, or go on with no face for it.",
                ),
                _types.Boxes.Input(
                    "bboxes", optional=True, extra_dict=_types.SOCKET,
                    tooltip="Boxes of one of core's detectors: a face is looked for in each of them and nowhere else.",
                ),
                _types.Landmarks.Input(
                    "face_landmarks", optional=True,
                    tooltip="Of core's Detect Face Landmarks, in place of the pack's own detector. Not together with bboxes.",
                ),
            ],
            outputs=[
                _types.Faces.Output(
                    display_name="faces",
                    tooltip="The faces. Goes to Select Faces, Face Swap and many others.",
                ),
                io.Image.Output(display_name="image",
                                tooltip="The pictures with box, five points and number of each face; 0 is the largest."),
                io.Int.Output(display_name="count", tooltip="Faces in all pictures together."),
                io.Boolean.Output(display_name="found", tooltip="Whether at least one picture holds a face."),
                io.String.Output(display_name="text", tooltip="Every face with its number, size, place and score."),
            ],
        )

    @classmethod
    def execute(cls, face_models: FaceModels, image: io.Image.Type, detection_size: str, threshold: float, on_missing: str,
                bboxes: object = None, face_landmarks: object = None) -> io.NodeOutput:
        faces = analyse(face_models, image, _sizes(detection_size), threshold, bboxes, face_landmarks)
        found = check_faces(faces, on_missing, advice=LOOK_AGAIN if face_landmarks is None else _MESH)
        shown = marked(image, faces)
        count = sum(map(len, faces.frames))
        return io.NodeOutput(faces, shown, count, found, table(faces), ui=ui.PreviewImage(shown[:SHOWN], cls=cls))


class SelectFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_SelectFaces",
            display_name="Select Faces",
            category=_types.FACE,
            description="Chooses faces by size, place, number, gender, or likeness to a reference face, in each picture apart.",
            search_aliases=["face index", "filter faces", "reactor options", "face similarity", "reference face", "sort faces"],
            inputs=[
                _types.Faces.Input("faces", tooltip="From Analyze Faces or Load Faces."),
                io.Combo.Input(
                    "order", options=list(ORDERS), default=ORDERS[0],
                    tooltip="In which order the faces of a picture are counted. most similar first needs a reference.",
                ),
                io.String.Input(
                    "numbers", default="all",
                    tooltip="all, or which ones in that order, counted from 0: 0 is the first, 0,2 the first and the third. "
                            "From large to small these are the numbers that Analyze Faces draws.",
                ),
                _types.Faces.Input(
                    "reference", optional=True,
                    tooltip="Keep only faces that look like this one. In videos this is steadier than numbers, because people "
                            "change places.",
                ),
                io.Float.Input(
                    "similarity", default=0.35, min=-1.0, max=1.0, step=0.01,
                    tooltip="How like the reference a face must be. The same person usually has 0.4 and more, strangers have "
                            "less than 0.2. The text output lists the numbers.",
                ),
                io.Combo.Input(
                    "gender", options=list(GENDERS), default=GENDERS[0], advanced=True,
                    tooltip="Keep one gender, as the pack's own network guesses it. Packs without that network keep nothing.",
                ),
                io.Int.Input(
                    "min_size", default=0, min=0, max=4096, advanced=True,
                    tooltip="Faces smaller than this many pixels are left out.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING), default=ON_MISSING[1],
                    tooltip="What to do when a picture has no such face: stop with an error, or go on with none for it.",
                ),
            ],
            outputs=[
                _types.Faces.Output(display_name="faces", tooltip="The chosen faces of each picture, in order."),
                io.String.Output(display_name="text",
                                 tooltip="All faces with number, size, similarity and guesses, the chosen marked."),
                io.Int.Output(display_name="count", tooltip="Chosen faces in all pictures together."),
                io.Boolean.Output(display_name="found", tooltip="Whether at least one face was chosen."),
            ],
        )

    @classmethod
    def execute(cls, faces: Faces, order: str, numbers: str, similarity: float, gender: str, min_size: int, on_missing: str,
                reference: Faces | None = None) -> io.NodeOutput:
        chosen, text = select(faces, order, parse_numbers(numbers), reference, similarity, gender, min_size)
        found = check_faces(chosen, on_missing, "such face", _CHOOSE)
        return io.NodeOutput(chosen, text, sum(map(len, chosen.frames)), found)


class BlendFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_BlendFaces",
            display_name="Blend Faces",
            category=_types.FACE,
            description="Makes one face of several: of many pictures of one person a steadier likeness, of several persons a "
                        "mix.",
            search_aliases=["average faces", "reactor build blended face", "merge faces", "mix faces", "mean embedding"],
            inputs=[
                _types.Faces.Input("faces", tooltip="All its faces, of all its pictures, are blended."),
                io.String.Input(
                    "weights", default="",
                    tooltip="One number for each face, such as 1, 0.5. Empty weighs all alike.",
                ),
                _types.Faces.Input("faces_b", optional=True, tooltip="More faces; their weights follow those of the first."),
                io.Combo.Input(
                    "mode", options=list(MODES), default=MODES[0], optional=True, advanced=True,
                    tooltip="unit length gives every face the same say. raw averages the bare numbers, as other packs do.",
                ),
            ],
            outputs=[
                _types.Faces.Output(display_name="faces", tooltip="One face, used like any other."),
                io.String.Output(display_name="text", tooltip="Share of each face and its similarity to the blend."),
            ],
        )

    @classmethod
    def execute(cls, faces: Faces, weights: str, faces_b: Faces | None = None, mode: str = MODES[0]) -> io.NodeOutput:
        return io.NodeOutput(*blend([faces] if faces_b is None else [faces, faces_b], weights, mode))


class FaceKeypoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_FaceKeypoints",
            display_name="Face Keypoints",
            category=_types.FACE,
            description="Draws the five points of each face on black, as InstantID's ControlNet reads them.",
            search_aliases=["instantid face keypoints", "draw kps", "face keypoints preprocessor", "landmarks picture"],
            inputs=[
                _types.Faces.Input("faces", tooltip="From Analyze Faces or Select Faces."),
                io.Combo.Input(
                    "style", options=list(STYLES), default=STYLES[0],
                    tooltip="InstantID: coloured dots and limbs of fixed width. plain: small white dots.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=8192, step=8,
                    tooltip="Width of the drawing; 0 takes it from height and the picture's shape, or is the picture's own. Give "
                            "the size that you generate at: dots and limbs are not scaled, as in training.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=8192, step=8,
                    tooltip="Height of the drawing; 0 as in width. Both given may stretch the face.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="One drawing for each picture.")],
        )

    @classmethod
    def execute(cls, faces: Faces, style: str, width: int, height: int) -> io.NodeOutput:
        return io.NodeOutput(keypoints(faces, style, width, height))


class SwapFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Likeness_SwapFaces",
            display_name="Face Swap",
            category=_types.FACE,
            description="Puts a face on the faces of a picture or a video. Use it only with the consent of the people shown, and "
                        "say that the picture was changed where it could be taken for real.",
            search_aliases=["reactor", "faceswap", "swap face", "inswapper", "roop", "deepfake", "customenhancer"],
            inputs=[
                _types.FaceSwapper.Input("swapper", tooltip="From Load Face Swapper."),
                io.Image.Input("image", tooltip="Pictures to change: one, a batch, or the frames of a video."),
                _types.Faces.Input(
                    "source", tooltip="The face to put in, of Analyze Faces, Select Faces, Blend Faces or Load Faces.",
                ),
                _types.FaceModels.Input(
                    "face_models", optional=True,
                    tooltip="From Load Face Models. Finds the faces to replace, all of them, when no target is connected.",
                ),
                _types.Faces.Input(
                    "target", optional=True,
                    tooltip="The faces to replace, of Analyze Faces on this very image, usually through Select Faces.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture may change, white is yes."),
                io.UpscaleModel.Input(
                    "upscale_model", optional=True,
                    tooltip="Sharpens the swapped face before it is pasted. Face restorers and ordinary upscalers both work.",
                ),
                io.Int.Input(
                    "boost", default=2, min=1, max=BOOSTS,
                    tooltip="Resolution of the face as a multiple of the swapper's 128 pixels. The work grows with its square.",
                ),
                io.Combo.Input(
                    "mask_kind", options=list(KINDS), default=KINDS[0],
                    tooltip="Which part of the face is pasted. hull: along the outline of the face. box: the whole square with a "
                            "soft edge. insightface: exactly as that library does.",
                ),
                io.Float.Input(
                    "identity_weight", default=1.0, min=0.0, max=1.5, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="1 is the source's face, 0 the old one, between them a mix; above 1 exaggerates the source. Other "
                            "values than 1 need recognised target faces.",
                ),
                io.Float.Input(
                    "colour_match", default=0.0, min=0.0, max=1.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="Brings light and colour of the new face to those of the old one.",
                ),
                io.Float.Input(
                    "restore_visibility", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="How much of the upscale model's work shows. 0 leaves it out.",
                ),
                io.Combo.Input(
                    "on_missing", options=list(ON_MISSING),
                    tooltip="What to do with a picture without a face to swap: stop with an error, or pass it through unchanged. "
                            "Pictures are never dropped.",
                ),
                io.Combo.Input(
                    "assign", options=list(ASSIGN), default=ASSIGN[0], advanced=True,
                    tooltip="For several source faces. in turn: the first for the first target, and again from the start when "
                            "they run out. one each: the targets that are left over stay.",
                ),
                io.Float.Input(
                    "feather", default=0.15, min=0.0, max=0.5, step=0.01, advanced=True,
                    tooltip="Width of the soft edge of hull and box, as a share of the face.",
                ),
                io.Int.Input(
                    "smoothing", default=0, min=0, max=15, advanced=True,
                    tooltip="For videos: steadies points and outline over this many frames to each side.",
                ),
                io.Combo.Input("detection_size", options=list(SIZES), default=AUTO, advanced=True, tooltip=f"{_ALONE} {_SIZE}"),
                io.Float.Input("threshold", default=THRESHOLD, min=0.05, max=0.95, step=0.05, advanced=True,
                               tooltip=f"{_ALONE} {_THRESHOLD}"),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The pictures; outside of the mask they are untouched to the bit."),
                io.Mask.Output(display_name="mask", tooltip="What was pasted, for a later pass or for compositing."),
                io.String.Output(display_name="text", tooltip="How many faces were swapped, with what."),
                io.Boolean.Output(display_name="found", tooltip="Whether any face was swapped."),
            ],
        )

    @classmethod
    def execute(cls, swapper: FaceSwapper, image: io.Image.Type, source: Faces, boost: int, mask_kind: str,
                identity_weight: float, colour_match: float, restore_visibility: float, on_missing: str, assign: str,
                feather: float, smoothing: int, detection_size: str, threshold: float, face_models: FaceModels | None = None,
                target: Faces | None = None, mask: io.Mask.Type | None = None, upscale_model: object = None) -> io.NodeOutput:
        job = Job(Paste(boost, mask_kind, feather, colour_match, restore_visibility), identity_weight, assign, smoothing,
                  _sizes(detection_size), threshold, on_missing)
        done = swap(swapper, image, source, job, face_models, target, mask, upscale_model)
        return io.NodeOutput(to_intermediate(done.image), to_intermediate(done.mask), done.report, done.found)


NODES = [AnalyzeFaces, SelectFaces, BlendFaces, FaceKeypoints, SwapFaces]
