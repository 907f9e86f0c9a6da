"""The pack's own sockets and words that several nodes share."""
from __future__ import annotations

from comfy_api.latest import io

Encoders = io.Custom("LIKENESS_ENCODERS")
Adapter = io.Custom("LIKENESS_ADAPTER")
Subject = io.Custom("LIKENESS_SUBJECT")
Word = io.Custom("LIKENESS_WORD")
Guidance = io.Custom("LIKENESS_GUIDANCE")
LayerWeights = io.Custom("LIKENESS_LAYER_WEIGHTS")
# Core's curve as a plain socket: its own input class would put an editor on the node.
Curve = io.Custom("CURVE")

LOAD, SUBJECT, EXACT = "likeness/1 load", "likeness/2 subject", "likeness/exact"
