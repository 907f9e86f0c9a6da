"""The pack's own sockets and words that several nodes share."""
from __future__ import annotations

from comfy_api.latest import io

from ..models.common.errors import LikenessError

Encoders = io.Custom("LIKENESS_ENCODERS")
Adapter = io.Custom("LIKENESS_ADAPTER")
Subject = io.Custom("LIKENESS_SUBJECT")
Word = io.Custom("LIKENESS_WORD")
Guidance = io.Custom("LIKENESS_GUIDANCE")
Inversion = io.Custom("LIKENESS_INVERSION")
View = io.Custom("LIKENESS_VIEW")
Placement = io.Custom("LIKENESS_PLACEMENT")
FaceModels = io.Custom("LIKENESS_FACE_MODELS")
FaceSwapper = io.Custom("LIKENESS_FACE_SWAPPER")
Faces = io.Custom("LIKENESS_FACES")
LayerWeights = io.Custom("LIKENESS_LAYER_WEIGHTS")
InstantID = io.Custom("LIKENESS_INSTANTID")

# Core types. The page puts a widget on the node for the first two, by the type's name alone, and sends that widget's value;
# an input with extra_dict=SOCKET stays a plain socket.
Curve = io.Custom("CURVE")
Boxes = io.Custom("BOUNDING_BOX")
SOCKET = {"forceInput": True}
Landmarks = io.Custom("FACE_LANDMARKS")
Camera = io.Custom("LOAD3D_CAMERA")

LOAD, SUBJECT, PLACE = "likeness/1 load", "likeness/2 subject", "likeness/3 place and mask"
INVERT, FACE, MEASURE, EXACT = "likeness/4 invert", "likeness/5 face", "likeness/6 measure", "likeness/exact"


def check_curve(curve: object) -> None:
    """Raises LikenessError for what is no CURVE."""
    if curve is not None and not hasattr(curve, "interp"):
        raise LikenessError(f"The curve input got a {type(curve).__name__} instead of a CURVE; connect a Curve Editor.")
