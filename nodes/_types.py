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
FaceModels = io.Custom("LIKENESS_FACE_MODELS")
FaceSwapper = io.Custom("LIKENESS_FACE_SWAPPER")
Faces = io.Custom("LIKENESS_FACES")
LayerWeights = io.Custom("LIKENESS_LAYER_WEIGHTS")
# Core's curve as a plain socket: its own input class would put an editor on the node.
Curve = io.Custom("CURVE")
BoundingBox = io.Custom("BOUNDING_BOX")  # core's, also without a widget
FaceLandmarks = io.Custom("FACE_LANDMARKS")

LOAD, SUBJECT, INVERT, EXACT = "likeness/1 load", "likeness/2 subject", "likeness/4 invert", "likeness/exact"
FACE, MEASURE = "likeness/5 face", "likeness/6 measure"


def check_curve(curve: object) -> None:
    """Raises LikenessError for what is no CURVE."""
    if curve is not None and not hasattr(curve, "interp"):
        raise LikenessError(f"The curve input got a {type(curve).__name__} instead of a CURVE; connect a Curve Editor.")
